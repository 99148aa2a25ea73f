"""The site, as far as nbdev makes it, with no Quarto: every notebook is processed
in a copy of the tree, and what a reader could click or look up is followed:
links, anchors, source lines, the entry of every public name. Quarto's half needs
Quarto."""

import ast
import base64
import importlib
import io
import json
import re
from itertools import zip_longest
from pathlib import Path

import pytest
import yaml
from nbdev.config import get_config
from PIL import Image
from test_tree import NOTEBOOKS, ROOT, copied, run, strings, tree

import symtele
from symtele._docproc import blocks

CFG = get_config(path=ROOT)
SITE = f"{CFG.doc_host}{CFG.doc_baseurl}/"
SOURCE = f"{CFG.git_url}/blob/{CFG.branch}/"
HOME = "nbs/index.ipynb"
# Two digits give the reading order.
ORDER = [HOME, *sorted(set(NOTEBOOKS) - {HOME})]


def read(path):
    "The cells of a notebook as it is saved"
    return json.loads((ROOT / path).read_text(encoding="utf-8"))["cells"]


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    "Path of each notebook -> its cells as Quarto gets them"
    copy = copied(tmp_path_factory.mktemp("site"))
    printed = run(
        "python",
        "-c",
        "import nbdev.serve; nbdev.serve.proc_nbs(n_workers=0)",
        cwd=copy,
        package=copy,
    )
    assert "Quarto" not in printed  # nbdev's commands would try to install it
    return {
        p: json.loads((copy / "_proc" / p).read_text(encoding="utf-8"))["cells"]
        for p in NOTEBOOKS
    }


def text(cell):
    "What is written in a cell"
    return "".join(cell["source"])


def shown(cells):
    "Markdown and HTML of a page: its prose, and what its cells put out"
    for cell in cells:
        if cell["cell_type"] == "markdown":
            yield re.sub(r"^```.*?^```", "", text(cell), flags=re.M | re.S)
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            for kind in ("text/markdown", "text/html"):
                if kind in data:
                    yield "".join(data[kind])


def address(cells):
    "The page a notebook becomes"
    return re.search(r"^output-file: (\S+)$", text(cells[0]), re.M)[1]


def anchors(cells):
    "Identifiers on a page: of headings by pandoc's rule, and those written out"
    found = []
    for part in shown(cells):
        for heading in re.findall(r"^#{2,6} +(.+?) *#*$", part, re.M):
            name = identifier(heading)
            numbered = (f"{name}-{i}" for i in range(1, 99))
            free = (n for n in (name, *numbered) if n not in found)
            found.append(next(free))
        written = re.findall(r'\bid="([^"]+)"|\{#([\w.-]+)', part)
        found += [a or b for a, b in written]
    return set(found)


def identifier(heading):
    "Pandoc's name of a heading, the first of its kind"
    words = re.sub(r"\[([^]]*)\]\([^)]*\)|<[^>]*>", r"\1", heading)  # of a link
    letters = re.sub(r"[^\w\s.-]", "", words.lower()).strip()
    return re.sub(r"^[^a-z]+", "", re.sub(r"\s+", "-", letters)) or "section"


LINK = r'\]\(([^()\s]+(?:\([^()]*\))?)\)|(?:href|src)="([^"]+)"'


def links(cells):
    "Where a page leads, links in code aside"
    for part in shown(cells):
        prose = re.sub(r"(`+)(?!`).*?\1", r"``", part)
        yield from (a or b for a, b in re.findall(LINK, prose))


def dead(pages, files):
    """Links of pages to pages, anchors, files or source lines that are not there;
    `files`: path -> text, or None"""
    known = {path: anchors(cells) for path, cells in pages.items()}
    notebook = {path: path for path in pages}  # of the address of a page, too
    notebook |= {f"nbs/{address(cells)}": path for path, cells in pages.items()}
    for path, cells in pages.items():
        for link in links(cells):
            to, anchor = target(path, link)
            if to is None:
                continue
            if link.startswith(SOURCE):
                found = defines(files.get(to) or "", int(anchor[1:] or 0))
            elif to in notebook:
                found = not anchor or anchor in known[notebook[to]]
            else:
                found = to in files and not anchor
            if not found:
                yield f"{path}: {link}"


def target(path, link):
    "Path and anchor in this tree that a link on a page leads to; elsewhere: None"
    to, _, anchor = link.partition("#")
    for root in (SOURCE, SITE):
        if to.startswith(root):
            return to.removeprefix(root), anchor
    if re.match(r"\w+:", to):
        return None, anchor  # another site, or data
    return (Path(path).parent / to).as_posix() if to else path, anchor


def defines(source, line):
    "Whether a definition starts at a line, counted from 1"
    lines = source.splitlines()
    inside = 0 < line <= len(lines)
    return inside and re.match("(def|class) ", lines[line - 1]) is not None


def sidebar_faults(site):
    "What the sidebar lists otherwise than in reading order"
    entries = strings(site["website"]["sidebar"])
    listed = [s for s in entries if s.endswith(".ipynb")]
    pairs = zip_longest(listed, ORDER, fillvalue="nothing")
    return [f"{a} instead of {b}" for a, b in pairs if a != b]


def test_links_lead_somewhere(pages):
    "Between pages, to headings, entries, source, pictures and results"
    files = dict.fromkeys(tree())
    for path in files:
        if path.endswith(".py"):
            files[path] = (ROOT / path).read_text(encoding="utf-8")
    every = [link for cells in pages.values() for link in links(cells)]
    for root in (SITE, SOURCE):
        assert sum(root in link for link in every) > 50
    assert any("ipynb" in link for link in every)
    found = list(dead(pages, files))
    assert not found, "\n".join(found)
    assert not list(strays(pages))


def strays(pages):
    "Links of a page to another's entry of a name that it has itself"
    for path, cells in pages.items():
        whole = "\n".join(shown(cells))
        named = rf"\[`(\w+)(?:\(\))?`\]\({SITE}nbs/([\w.]+)"
        for name, to in set(re.findall(named, whole)):
            if to != address(cells) and re.search(rf"^#### {name}$", whole, re.M):
                yield path, name, to


def test_dead_links_are_seen():
    "Control of the test above: one page with every kind of link, good and dead"

    def md(*lines):
        return dict(cell_type="markdown", source="\n".join(lines))

    def html(lines):
        outputs = [dict(data={"text/html": lines})]
        return dict(cell_type="code", source="", outputs=outputs)

    good = [
        "b.ipynb",
        "b.ipynb#the-loss-l",
        "b.ipynb#the-loss-l-1",
        "#here",
        SITE + "nbs/b.html#b.act",
        SOURCE + "m.py#L2",
        "https://x.org/#y",
        "p.png",
    ]
    bad = [
        "c.ipynb",
        "b.ipynb#the-loss",
        "b.ipynb#the-loss-l-2",
        "#gone",
        SITE + "nbs/b.html#b.gone",
        SITE + "nbs/c.html",
        SOURCE + "m.py#L1",
        SOURCE + "m.py#L3",
        SOURCE + "m.py#LNone"[:-4],
        "q.png",
    ]
    a = [
        md("---", "output-file: a.html", "---"),
        md("## `Here`", "`[x](code.ipynb)`"),
        md(*[f"[x]({s})" for s in good]),
        md(*[f"[x]({s})" for s in bad[:5]]),
        html([f'<a href="{s}">x</a>' for s in bad[5:]]),
    ]
    b = [
        md("---", "output-file: b.html", "---"),
        md("## The loss $L$"),
        md(
            "#### The *loss*, [$L$](a.ipynb)",
            "",
            '| <code id="b.act">act</code> |',
        ),
    ]
    files = {"m.py": "x = 1\ndef f(): pass", "nbs/p.png": None}
    found = list(dead({"nbs/a.ipynb": a, "nbs/b.ipynb": b}, files))
    assert found == [f"nbs/a.ipynb: {s}" for s in bad]


def entries(cells):
    "Public name -> its entry; of a value, its definition must be there too"
    found = {}
    for cell in cells:
        title = re.search(r"^#### (\w+)$", text(cell), re.M)
        if cell["cell_type"] == "markdown" and SOURCE in text(cell) and title:
            found[title[1]] = text(cell)
    code = "\n".join(text(c) for c in cells if c["cell_type"] == "code")
    for part in shown(cells):
        for name in re.findall(
            r'^<code id="value\.\w+">(\w+)</code>', part, re.M
        ):
            if re.search(rf"^[\w, ]*\b{name}\b[\w, ]* = ", code, re.M):
                found[name] = part
    return found


def mute(found, name):
    "Parameters in an entry that it says nothing of"
    rows = r"^\| <code>\W*(\w+)</code> \|[^|]*\| *\|$"
    return [f"{name}({p})" for p in re.findall(rows, found[name], re.M)]


def methods(module, name):
    "Public methods that say what they do"
    body = ast.parse(Path(module.__file__).read_text(encoding="utf-8")).body
    named = [c for c in body if isinstance(c, ast.ClassDef) and c.name == name]
    return [
        f.name
        for cls in named
        for f in cls.body
        if isinstance(f, ast.FunctionDef)
        and f.name[0] != "_"
        and ast.get_docstring(f)
    ]


def modules(pages):
    "Path of a notebook -> the module that it makes"
    found = {}
    for path in pages:
        for cell in read(path):
            default = re.match(r"#\| default_exp (\w+)", text(cell))
            if default:
                found[path] = importlib.import_module(f"symtele.{default[1]}")
    return found


def package_words():
    "What `from symtele import` gives"
    return [
        name
        for name, value in vars(symtele).items()
        if name[0] != "_" and not isinstance(value, type(symtele))
    ]


def missing_parts(found, path, module, name, explained):
    "What the entry of a name does not say; `explained`: its parameters must be"
    for method in methods(module, name):
        if f'id="{name.lower()}.{method}"' not in found[name]:
            yield f"{path}: {name}.{method}"
    if explained:
        yield from (f"{path}: {p}" for p in mute(found, name))


def test_every_public_name_has_an_entry(pages):
    """On the page of its module; in the modules whose words `symtele` gives, each
    parameter says what it is. A name that is passed on has its entry where it
    comes from"""
    module = modules(pages)
    found = {path: entries(pages[path]) for path in module}
    words = package_words()
    listed = {name for m in module.values() for name in m.__all__}
    missing = [f"symtele.{name}" for name in words if name not in listed]

    def elsewhere(name, value):
        return any(
            name in found[path] and getattr(m, name) is value
            for path, m in module.items()
        )

    for path, m in module.items():
        explained = any(word in found[path] for word in words)
        for name in m.__all__:
            if name in found[path]:
                missing += missing_parts(found[path], path, m, name, explained)
            elif not elsewhere(name, getattr(m, name)):
                missing.append(f"{path}: {name}")
    assert len(words) > 30
    assert not missing, "\n".join(missing)


def test_missing_entries_are_seen(pages):
    "Control of the test above"
    training = entries(pages["nbs/09_training.ipynb"])
    assert 'id="teleporter.step"' in training["Teleporter"]
    cells = pages["nbs/06_objectives.ipynb"]
    assert "Learning rate η" in entries(cells)["Lookahead"]
    assert "measure" in entries(cells)
    fewer = [c for c in cells if "#### measure" not in text(c)]
    assert "measure" not in entries(fewer)
    assert not mute(entries(cells), "measure")
    words = "Parameters; not modified"
    silent = [dict(c, source=text(c).replace(words, "")) for c in cells]
    assert mute(entries(silent), "measure") == ["measure(w)"]
    training = importlib.import_module("symtele.training")
    named = ["due", "step", "state_dict", "load_state_dict"]
    assert methods(training, "Teleporter") == named


def test_pages_are_light(pages):
    "Text, pictures and widgets together"
    for path, cells in pages.items():
        saved = (ROOT / path).read_bytes()  # widgets and their pictures among it
        assert max(len(json.dumps(cells)), len(saved)) < 3e6, path


def test_printed_tables_stay_whole(pages):
    """Every line of a printed table is in one box that does not wrap; sentences
    are not, and a page without tables is left as it is"""
    path = "nbs/00_own_model.ipynb"
    outputs = [o for cell in read(path) for o in cell.get("outputs", [])]
    printed = ["".join(o.get("text", "")) for o in outputs]
    table = next(s for s in printed if s.startswith("k  ") and "the step" in s)
    boxes = []
    for part in shown(pages[path]):
        boxes += re.findall("<pre class=symtele-table>(.*?)</pre>", part, re.S)
    (box,) = (b for b in boxes if table.splitlines()[0] in b)
    assert table.count("\n") == 13
    assert set(table.splitlines()) <= set(box.splitlines())
    around = blocks(f"A sentence.\n{table}Another one.")
    assert [whole for whole, _ in around] == [False, True, False]
    sentences = "One sentence.\nAnother, with  a gap.\nA third."  # no table
    assert [whole for whole, _ in blocks(sentences)] == [False, False, False]
    plain = shown(pages["nbs/04_wiring.ipynb"])
    assert not any("symtele-table" in part for part in plain)


def test_sidebar_is_the_reading_order():
    """A notebook missing from the sidebar cannot be found; a listed one that is
    gone is a dead link"""
    site = yaml.safe_load((ROOT / "_quarto.yml").read_text())
    assert not sidebar_faults(site)
    # where _docs/index.html leads
    assert site["project"]["render"][0] == ORDER[0]
    for name in strings(site["format"]["html"]):
        if name.endswith((".css", ".scss", ".html")):
            assert (ROOT / name).is_file()
    site["website"]["sidebar"]["contents"].remove(ORDER[3])  # control
    assert sidebar_faults(site)[0] == f"{ORDER[4]} instead of {ORDER[3]}"


def pictures(node):
    "Every PNG in a notebook, as an output, in HTML or in the state of a widget"
    for s in strings(node):
        if s.startswith("iVBOR"):
            yield s
        yield from re.findall(r"data:image/png;base64,([\w+/=]+)", s)


def dark(png):
    "Why a picture would be hard to read on a dark page"
    with Image.open(io.BytesIO(base64.b64decode(png))) as image:
        pixels = image.convert("RGBA")
    if pixels.getchannel("A").getextrema()[0] < 255:
        return "transparent"
    if min(pixels.getpixel((0, 0))) < 250:
        return "not on white"


def square(colour):
    "A PNG of one colour"
    file = io.BytesIO()
    Image.new("RGBA", (2, 2), colour).save(file, "png")
    return base64.b64encode(file.getvalue())


def test_pictures_bring_their_white():
    "The dark theme shows the same pictures, and their axes are black"
    found = []
    for path in NOTEBOOKS:
        nb = json.loads((ROOT / path).read_text(encoding="utf-8"))
        found += [(path, dark(png)) for png in pictures(nb)]
    assert len(found) > 50
    assert not [(path, why) for path, why in found if why]
    assert dark(square((255, 255, 255, 255))) is None  # controls
    assert dark(square((255, 255, 255, 0))) == "transparent"
    assert dark(square((0, 0, 0, 255))) == "not on white"


CODE = r"^```.*?^```"
INLINE = r"(?<![\\$])\$(?=\S)(?:[^$\\]|\\.)+?(?<=\S)\$(?!\d)"
DISPLAY = r"\$\$(?:(?!\n\n)[^$])+\$\$"
BLOCK = r"(\||[-*+] |\d+\. |#+ |>)"


def misread(markdown):
    "Lines of a markdown cell that Jupyter and pandoc read differently"
    prose = re.sub(CODE, "code", markdown, flags=re.M | re.S)
    prose = re.sub(r"`[^`\n]*`", "code", prose)
    lines = re.sub(INLINE, "math", re.sub(DISPLAY, "math", prose)).splitlines()
    yield from (line for line in lines if "$" in line)
    for above, line in zip(lines, lines[1:]):
        goes_on = not above.strip() or re.match(BLOCK + "|  ", above)
        if re.match(BLOCK, line) and not goes_on:
            yield line  # pandoc wants an empty line before


def test_prose_reads_the_same_in_jupyter_and_on_the_site():
    """Dollars that open and close a formula, and empty lines before lists, tables
    and headings"""
    cells = [
        text(cell)
        for path in NOTEBOOKS
        for cell in read(path)
        if cell["cell_type"] == "markdown"
    ]
    assert sum("$" in s for s in cells) > 50
    assert not [line for s in cells for line in misread(s)]


def test_misread_prose_is_seen():
    "Control of the test above"
    for wrong in (
        "costs $ 3 or $4",
        "$x $",
        "$$x\n\ny$$",
        "these:\n- a list",
        "this:\n| a | table |",
    ):
        assert list(misread(wrong)), wrong
    right = "$x_1$, $$\\sum_i\nx_i$$ and `$HOME`\n\n- a list\n- of two"
    assert not list(misread(right))
