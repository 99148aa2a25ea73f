"""The site, as far as nbdev makes it, with no Quarto: every notebook is processed
in a copy of the tree, and what a reader could click or look up is followed:
links, anchors, the entry of every public name, what the search is told. Quarto's
half needs Quarto; tests/reader.py stands in for it."""

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
from test_tree import NOTEBOOKS, ROOT, strings, tree

import symtele
from symtele._docproc import STUDIES, number, parsed
from symtele._site import finish

CFG = get_config(path=ROOT)
# Where the project would be found; no page leads there before it is
ELSEWHERE = (CFG.doc_host, CFG.git_url)
HOME = "nbs/index.ipynb"
SUMS = 90  # Pages with at least this number say what all others come to


def shelves():
    "The order of reading: where to start, what was found, how it is made"
    numbered = sorted(set(NOTEBOOKS) - {HOME})
    sums = [p for p in numbered if number(p) >= SUMS]
    start = [HOME, *(p for p in numbered if number(p) < 1), *sums]
    studies = [p for p in numbered if STUDIES <= number(p) < SUMS]
    return [*start, *studies, *(p for p in numbered if 0 < number(p) < STUDIES)]


ORDER = shelves()


def read(path):
    "The cells of a notebook as it is saved"
    return json.loads((ROOT / path).read_text(encoding="utf-8"))["cells"]


@pytest.fixture(scope="module")
def pages(processed):
    "Path of each notebook -> its cells as Quarto gets them"
    return {path: nb["cells"] for path, nb in processed.items()}


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
        for heading in re.findall(r"^#{2,6} +(.+?) *(?:\{.*)?$", part, re.M):
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
    "Links of pages to pages, anchors or files that are not there"
    known = {path: anchors(cells) for path, cells in pages.items()}
    notebook = {path: path for path in pages}  # of the address of a page, too
    notebook |= {f"nbs/{address(cells)}": path for path, cells in pages.items()}
    for path, cells in pages.items():
        for link in links(cells):
            to, anchor = target(path, link)
            if to is None:
                continue
            if to in notebook:
                found = not anchor or anchor in known[notebook[to]]
            else:
                found = to in files and not anchor
            if not found:
                yield f"{path}: {link}"


def target(path, link):
    "Path and anchor in this tree that a link on a page leads to; elsewhere: None"
    to, _, anchor = link.partition("#")
    if re.match(r"\w+:", to):
        return None, anchor  # another site, or data
    return (Path(path).parent / to).as_posix() if to else path, anchor


def sidebar_faults(site):
    "What the sidebar lists otherwise than in reading order"
    entries = strings(site["website"]["sidebar"])
    listed = [s for s in entries if s.endswith(".ipynb")]
    pairs = zip_longest(listed, ORDER, fillvalue="nothing")
    return [f"{a} instead of {b}" for a, b in pairs if a != b]


def test_links_lead_somewhere(pages):
    """Between pages, to headings, entries, pictures and results, and to no place
    where the project is not yet"""
    every = [link for cells in pages.values() for link in links(cells)]
    assert sum(".html#" in link for link in every) > 50
    assert any("ipynb" in link for link in every)
    assert not [link for link in every if link.startswith(ELSEWHERE)]
    assert not [p for cells in pages.values() for p in shown(cells) if "[[`" in p]
    found = list(dead(pages, tree()))
    assert not found, "\n".join(found)
    assert not list(strays(pages))


def strays(pages):
    "Links of a page to another's entry of a name that it has itself"
    for path, cells in pages.items():
        whole = "\n".join(shown(cells))
        named = r"\[`(\w+)(?:\(\))?`\]\(([\w.]+\.html)"
        for name, to in set(re.findall(named, whole)):
            if to != address(cells) and re.search(
                rf"^### {name} {{", whole, re.M
            ):
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
        "b.html#b.act",
        "https://x.org/#y",
        "p.png",
    ]
    bad = [
        "c.ipynb",
        "b.ipynb#the-loss",
        "b.ipynb#the-loss-l-2",
        "#gone",
        "b.html#b.gone",
        "c.html",
        "q.png",
    ]
    a = [
        md("---", "output-file: a.html", "---"),
        md("## `Here`", "`[x](code.ipynb)`"),
        md(*[f"[x]({s})" for s in good]),
        md(*[f"[x]({s})" for s in bad[:4]]),
        html([f'<a href="{s}">x</a>' for s in bad[4:]]),
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
    found = list(dead({"nbs/a.ipynb": a, "nbs/b.ipynb": b}, ["nbs/p.png"]))
    assert found == [f"nbs/a.ipynb: {s}" for s in bad]


def entries(cells):
    """Public name -> its entry; of a value, its definition must be there too; on
    the page of a study the folded source"""
    found = {}
    for cell, after in zip(cells, [*cells[1:], None]):
        title = re.search(r"^### (\w+) \{", text(cell), re.M)
        if cell["cell_type"] == "markdown" and title:
            found[title[1]] = text(cell)
        for name in re.findall(r'symtele-name" data-name="(\w+)"', text(cell)):
            if re.search(
                rf"^(def|class) {name}\b|^[\w, ]*\b{name}\b", text(after), re.M
            ):
                found[name] = text(after)
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
        of_method = f'id="{name.lower()}.{method}"', f"def {method}("
        if not any(part in found[name] for part in of_method):
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


def unused(pages):
    "Functions and classes whose entry has no line of use"
    for path, module in modules(pages).items():
        if number(path) >= STUDIES:
            continue
        found, (defined, _) = entries(pages[path]), parsed(module.__name__)
        for name in set(found) & set(defined):
            if "\nFor example\n" not in found[name]:
                yield f"{path}: {name}"


def test_entries_have_a_line_of_use(pages):
    "From a cell that runs, so it is true"
    missing = sorted(unused(pages))
    assert not missing, "\n".join(missing)
    silent = [
        dict(c, source=text(c).replace("For example", ""))
        for c in pages[ORDER[-1]]
    ]
    assert list(unused({ORDER[-1]: silent}))  # control


def test_groups_and_objectives_say_their_formula(pages):
    "In plain letters, which `help` shows too"
    for name in (
        "GL",
        "BatchGL",
        "Scaling",
        "Permutation",
        "Rotation",
        "Orthogonal",
    ):
        assert re.search("[→∘·⁻ᵀ⁺]", getattr(symtele, name).__doc__), name
    for name in ("grad_norm", "lookahead"):
        assert re.search("[‖∇]", getattr(symtele, name).__doc__), name


def test_missing_entries_are_seen(pages):
    "Control of the test above"
    training = entries(pages["nbs/09_training.ipynb"])
    assert 'id="teleporter.step"' in training["Teleporter"]
    cells = pages["nbs/06_objectives.ipynb"]
    assert "Learning rate η" in entries(cells)["Lookahead"]
    assert "measure" in entries(cells)
    fewer = [c for c in cells if "### measure {" not in text(c)]
    assert "measure" not in entries(fewer)
    assert not mute(entries(cells), "measure")
    words = "Parameters; not modified"
    silent = [dict(c, source=text(c).replace(words, "")) for c in cells]
    assert mute(entries(silent), "measure") == ["measure(w)"]
    training = importlib.import_module("symtele.training")
    named = ["due", "step", "state_dict", "load_state_dict"]
    assert methods(training, "Teleporter") == named


def unsaid(cells):
    """Outputs that a page shows as a terminal would: printed text, bare figures,
    values longer than a line"""
    for cell in cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            value = "".join(data.get("text/plain", ""))
            alone = set(data) == {"text/plain"}
            long = alone and ("\n" in value or value.startswith("<"))
            if output["output_type"] == "stream" or "image/png" in data or long:
                yield output


def test_sentences_tables_and_figures_are_part_of_the_page(pages):
    "Nothing is printed, and every figure has its caption and words"
    found = [
        (path, bad) for path, cells in pages.items() for bad in unsaid(cells)
    ]
    assert not found, found
    printed = dict(output_type="stream", text="the loss is 3")
    kinds = [
        {"text/plain": "<Figure>", "image/png": "iVBOR"},
        {"text/plain": "[1,\n 2]"},
        {"text/plain": "x", "text/markdown": "The loss is 3."},
        {"text/plain": "at(3)"},
    ]
    outputs = [dict(output_type="display_data", data=data) for data in kinds]
    wrong = list(unsaid([dict(outputs=[printed, *outputs])]))
    assert wrong == [printed, *outputs[:2]]  # control


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
    contents = site["website"]["sidebar"]["contents"]
    contents[1]["contents"].remove(ORDER[4])  # control
    assert sidebar_faults(site)[0] == f"{ORDER[5]} instead of {ORDER[4]}"


PAGE = """<html><head><title>Groups – symtele</title>
<script src="https://cdn.jsdelivr.net/npm/jquery@3.5.1/jquery.min.js"></script></head>
<main><p>What groups are.</p><section id="law" class="level2"><h2>A law</h2>
<p>Holds <em>always</em>.</p><pre>assert lookahead</pre>
<details class="code-fold"><summary>Check</summary><p>lookahead</p></details>
<section id="gl" class="level3 unlisted"><h3>GL</h3><p>All &lt;g&gt;</p></section>
</section><span id="draw" class="symtele-name" data-name="Draw"></span>
<table></table></main></html>"""


def test_last_step_of_the_build(tmp_path):
    """Findings and names can be found, by what is said of them and not by code;
    tables have boxes, jQuery is not asked for"""
    (tmp_path / "nbs").mkdir()
    (tmp_path / "nbs/groups.html").write_text(PAGE)
    try:
        finish(tmp_path)
    except FileNotFoundError as missing:
        pytest.skip(str(missing))
    page = (tmp_path / "nbs/groups.html").read_text()
    assert "https" not in page
    assert '<div class="symtele-wide"><table></table></div>' in page
    found = json.loads((tmp_path / "search.json").read_text())
    assert [(f["section"], f["text"], f["href"]) for f in found] == [
        ("", "What groups are.", "nbs/groups.html"),
        ("A law", "Holds always.", "nbs/groups.html#law"),
        ("GL", "All <g>", "nbs/groups.html#gl"),
        ("Draw", "", "nbs/groups.html#draw"),
    ]
    (tmp_path / "nbs/groups.html").write_text(PAGE)
    with pytest.raises(FileNotFoundError, match="requirejs.* install npm"):
        finish(tmp_path, tmp_path)


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
