"""The site, as far as nbdev makes it, with no Quarto: every notebook is processed in a copy of the tree, and what a reader
could click or look up is followed: links, anchors, source lines, the entry of every public name. Quarto's half needs Quarto."""

import ast
import base64
import importlib
import io
import json
import re
from pathlib import Path

import pytest
import yaml
from nbdev.config import get_config
from PIL import Image
from test_tree import NOTEBOOKS, ROOT, copied, run, strings, tree

import symtele
from symtele._docproc import blocks

CFG = get_config(path=ROOT)
SITE, SOURCE = (
    f"{CFG.doc_host}{CFG.doc_baseurl}/",
    f"{CFG.git_url}/blob/{CFG.branch}/",
)
ORDER = [
    "nbs/index.ipynb",
    *sorted(p for p in NOTEBOOKS if p != "nbs/index.ipynb"),
]  # two digits give the reading order


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    "Path of each notebook -> its cells as Quarto gets them"
    copy = copied(tmp_path_factory.mktemp("site"))
    said = run(
        "python",
        "-c",
        "import nbdev.serve; nbdev.serve.proc_nbs(n_workers=0)",
        cwd=copy,
        package=copy,
    )
    assert "Quarto" not in said  # nbdev's commands would try to install it
    return {
        p: json.loads((copy / "_proc" / p).read_text(encoding="utf-8"))["cells"]
        for p in NOTEBOOKS
    }


def text(cell):
    return "".join(cell["source"])


def shown(cells):
    "Markdown and HTML of a page: its prose, and what its cells put out"
    for c in cells:
        if c["cell_type"] == "markdown":
            yield re.sub(r"^```.*?^```", "", text(c), flags=re.M | re.S)
        for o in c.get("outputs", []):
            yield from (
                "".join(o["data"][k])
                for k in ("text/markdown", "text/html")
                if k in o.get("data", {})
            )


def address(cells):
    "The page a notebook becomes"
    return re.search(r"^output-file: (\S+)$", text(cells[0]), re.M)[1]


def anchors(cells):
    "Identifiers on a page: of headings by pandoc's rule, and those written out"
    seen = []
    for s in shown(cells):
        for h in re.findall(r"^#{2,6} +(.+?) *#*$", s, re.M):
            h = re.sub(
                r"\[([^]]*)\]\([^)]*\)|<[^>]*>", r"\1", h
            )  # the text of a link
            h = (
                re.sub(
                    r"^[^a-z]+",
                    "",
                    re.sub(
                        r"\s+", "-", re.sub(r"[^\w\s.-]", "", h.lower()).strip()
                    ),
                )
                or "section"
            )
            seen.append(
                h
                if h not in seen
                else next(
                    n for i in range(1, 99) if (n := f"{h}-{i}") not in seen
                )
            )
        seen += [a or b for a, b in re.findall(r'\bid="([^"]+)"|\{#([\w.-]+)', s)]
    return set(seen)


def links(cells):
    "Where a page leads, links in code aside"
    for s in shown(cells):
        yield from (
            a or b
            for a, b in re.findall(
                r'\]\(([^()\s]+(?:\([^()]*\))?)\)|(?:href|src)="([^"]+)"',
                re.sub(r"(`+)(?!`).*?\1", r"``", s),
            )
        )


def dead(pages, files):
    "Links of pages to pages, anchors, files or source lines that are not there; `files`: path -> text, or None"
    at = {f"nbs/{address(cells)}": p for p, cells in pages.items()} | {
        p: p for p in pages
    }
    known = {p: anchors(cells) for p, cells in pages.items()}
    for p, cells in pages.items():
        for link in links(cells):
            to, _, anchor = link.partition("#")
            if to.startswith(SOURCE):
                to = to[len(SOURCE) :]
                lines = (files.get(to) or "").splitlines()
                n = int(anchor[1:] or 0)
                if not (
                    0 < n <= len(lines) and re.match("(def|class) ", lines[n - 1])
                ):
                    yield f"{p}: {link}"
                continue
            if to.startswith(SITE):
                to = to[len(SITE) :]
            elif re.match(r"\w+:", to):
                continue  # elsewhere, or data
            elif to:
                to = (Path(p).parent / to).as_posix()
            else:
                to = p
            if to in at:
                found = not anchor or anchor in known[at[to]]
            else:
                found = to in files and not anchor
            if not found:
                yield f"{p}: {link}"


def sidebar_faults(site):
    "What the sidebar lists otherwise than in reading order"
    listed = [
        s for s in strings(site["website"]["sidebar"]) if s.endswith(".ipynb")
    ]
    return [
        f"{a} instead of {b}"
        for a, b in zip(
            listed + ["nothing"] * len(ORDER), ORDER + ["nothing"] * len(listed)
        )
        if a != b
    ]


def test_links_lead_somewhere(pages):
    "Between pages, to headings and entries, into the source, to pictures and results"
    files = {
        p: (ROOT / p).read_text(encoding="utf-8") if p.endswith(".py") else None
        for p in tree()
    }
    every = [link for cells in pages.values() for link in links(cells)]
    assert all(
        sum(s in link for link in every) > 50 for s in (SITE, SOURCE)
    ) and any("ipynb" in link for link in every)
    assert not (found := list(dead(pages, files))), "\n".join(found)
    strays = {
        (p, n, to)
        for p, cells in pages.items()
        for s in shown(cells)
        for n, to in re.findall(rf"\[`(\w+)(?:\(\))?`\]\({SITE}nbs/([\w.]+)", s)
        if to != address(cells)
        and re.search(rf"^### {n}$", "\n".join(shown(cells)), re.M)
    }
    assert not strays  # a page means its own names


def test_dead_links_are_seen():
    "Control of the test above: one page with every kind of link, good and dead"

    def md(*lines):
        return dict(cell_type="markdown", source="\n".join(lines))

    head = md("---", "output-file: a.html", "---")
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
        head,
        md("## `Here`", "`[x](code.ipynb)`"),
        md(*[f"[x]({s})" for s in good]),
        md(*[f"[x]({s})" for s in bad[:5]]),
        dict(
            cell_type="code",
            source="",
            outputs=[
                dict(
                    data={"text/html": [f'<a href="{s}">x</a>' for s in bad[5:]]}
                )
            ],
        ),
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
    assert list(dead({"nbs/a.ipynb": a, "nbs/b.ipynb": b}, files)) == [
        f"nbs/a.ipynb: {s}" for s in bad
    ]


def entries(cells):
    "Public name -> its entry on a page; a value has its definition, in the open or folded"
    found = {
        m[1]: text(c)
        for c in cells
        if c["cell_type"] == "markdown"
        and SOURCE in text(c)
        and (m := re.search(r"^### (\w+)$", text(c), re.M))
    }
    code = "\n".join(text(c) for c in cells if c["cell_type"] == "code")
    return found | {
        n: s
        for s in shown(cells)
        for n in re.findall(r'^<code id="value\.\w+">(\w+)</code>', s, re.M)
        if re.search(rf"^[\w, ]*\b{n}\b[\w, ]* = ", code, re.M)
    }


def mute(found, name):
    return [
        f"{name}({p})"
        for p in re.findall(
            r"^\| <code>\W*(\w+)</code> \|[^|]*\| *\|$", found[name], re.M
        )
    ]


def methods(module, name):
    "Public methods that say what they do"
    classes = [
        b
        for b in ast.parse(Path(module.__file__).read_text(encoding="utf-8")).body
        if isinstance(b, ast.ClassDef) and b.name == name
    ]
    return [
        f.name
        for c in classes
        for f in c.body
        if isinstance(f, ast.FunctionDef)
        and f.name[0] != "_"
        and ast.get_docstring(f)
    ]


def test_every_public_name_has_an_entry(pages):
    "On the page of its module; in the modules whose words `symtele` gives, each parameter says what it is. A name that is passed on has its entry where it comes from"
    source = {
        p: json.loads((ROOT / p).read_text(encoding="utf-8"))["cells"]
        for p in pages
    }
    module = {
        p: importlib.import_module(f"symtele.{m[1]}")
        for p, cells in source.items()
        for c in cells
        if (m := re.match(r"#\| default_exp (\w+)", text(c)))
    }
    found = {p: entries(pages[p]) for p in module}
    words = [
        n
        for n, o in vars(symtele).items()
        if n[0] != "_" and not isinstance(o, type(symtele))
    ]
    missing = [
        f"symtele.{n}"
        for n in words
        if not any(n in m.__all__ for m in module.values())
    ]
    for p, m in module.items():
        for n in m.__all__:
            if n not in found[p]:
                missing += (
                    [f"{p}: {n}"]
                    if not any(
                        n in found[q] and getattr(module[q], n) is getattr(m, n)
                        for q in module
                    )
                    else []
                )
                continue
            missing += [
                f"{p}: {n}.{f}"
                for f in methods(m, n)
                if f'id="{n.lower()}.{f}"' not in found[p][n]
            ]
            if any(w in found[p] for w in words):
                missing += [f"{p}: {s}" for s in mute(found[p], n)]
    assert len(words) > 30 and not missing, "\n".join(missing)


def test_missing_entries_are_seen(pages):
    "Control of the test above"
    cells = pages["nbs/03_teleport.ipynb"]
    assert (
        'id="teleporter.step"' in entries(cells)["Teleporter"]
        and "Learning rate η" in entries(cells)["lookahead"]
    )
    assert "measure" in entries(cells) and "measure" not in entries(
        [c for c in cells if "### measure" not in text(c)]
    )
    assert not mute(entries(cells), "measure")
    cells = [
        dict(c, source=text(c).replace("Parameters; not modified", ""))
        for c in cells
    ]
    assert mute(entries(cells), "measure") == ["measure(w)"]
    assert methods(importlib.import_module("symtele.teleport"), "Teleporter") == [
        "step"
    ]


def test_pages_are_light(pages):
    "Text, pictures and widgets together"
    size = {p: len(json.dumps(cells)) for p, cells in pages.items()}
    saved = {
        p: len((ROOT / p).read_bytes()) for p in pages
    }  # widgets and their pictures are in the metadata
    assert max(max(size[p], saved[p]) for p in pages) < 3e6


def test_printed_tables_stay_whole(pages):
    "Every line of Fig. 6's table is in one box that does not wrap; sentences are not, and a page without tables is left as it is"
    printed = [
        o
        for c in json.loads(
            (ROOT / "nbs/35_runtime.ipynb").read_text(encoding="utf-8")
        )["cells"]
        for o in c.get("outputs", [])
        if "plain runs" in "".join(o.get("text", ""))
    ]
    lines = "".join(printed[0]["text"]).splitlines()
    table = [l for l in lines if re.search("[0-9] +[0-9]+ +[0-9]+ µs", l)]
    boxes = [
        b
        for h in shown(pages["nbs/35_runtime.ipynb"])
        for b in re.findall("<pre class=symtele-table>(.*?)</pre>", h, re.S)
    ]
    (box,) = (b for b in boxes if table[0] in b)
    assert (
        len(table) == 9
        and all(l in box.splitlines() for l in table)
        and lines[-1] not in box
    )
    assert [
        t for t, _ in blocks("One sentence.\nAnother, with  a gap.\nA third.")
    ] == [False] * 3  # control: one line is no table
    assert not any(
        "symtele-table" in h for h in shown(pages["nbs/04_wiring.ipynb"])
    )


def test_sidebar_is_the_reading_order():
    "A notebook missing from the sidebar cannot be found; a listed one that is gone is a dead link"
    site = yaml.safe_load((ROOT / "_quarto.yml").read_text())
    assert not sidebar_faults(site)
    assert (
        site["project"]["render"][0] == ORDER[0]
    )  # where _docs/index.html leads
    style = site["format"]["html"]
    for name in {
        s for s in strings(style) if s.endswith((".css", ".scss", ".html"))
    }:
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


def test_pictures_bring_their_white():
    "The dark theme shows the same pictures, and their axes are black"
    found = [
        (p, dark(s))
        for p in NOTEBOOKS
        for s in pictures(json.loads((ROOT / p).read_text(encoding="utf-8")))
    ]
    assert len(found) > 50 and not [f for f in found if f[1]]
    for colour, fault in (
        ((255, 255, 255, 255), None),
        ((255, 255, 255, 0), "transparent"),
        ((0, 0, 0, 255), "not on white"),
    ):  # control
        Image.new("RGBA", (2, 2), colour).save(file := io.BytesIO(), "png")
        assert dark(base64.b64encode(file.getvalue())) == fault


INLINE = r"(?<![\\$])\$(?=\S)(?:[^$\\]|\\.)+?(?<=\S)\$(?!\d)"


def misread(s):
    "Lines of a markdown cell that Jupyter and pandoc read differently"
    s = re.sub(
        r"`[^`\n]*`", "code", re.sub(r"^```.*?^```", "code", s, flags=re.M | re.S)
    )
    lines = re.sub(
        INLINE, "math", re.sub(r"\$\$(?:(?!\n\n)[^$])+\$\$", "math", s)
    ).splitlines()
    yield from (l for l in lines if "$" in l)
    block = r"(\||[-*+] |\d+\. |#+ |>)"
    yield from (
        b
        for a, b in zip(lines, lines[1:])
        if re.match(block, b) and a.strip() and not re.match(block + "|  ", a)
    )  # pandoc wants an empty line before


def test_prose_reads_the_same_in_jupyter_and_on_the_site():
    "Dollars that open and close a formula, and empty lines before lists, tables and headings"
    cells = [
        text(c)
        for p in NOTEBOOKS
        for c in json.loads((ROOT / p).read_text(encoding="utf-8"))["cells"]
        if c["cell_type"] == "markdown"
    ]
    assert sum("$" in s for s in cells) > 50 and not [
        l for s in cells for l in misread(s)
    ]
    for wrong in (
        "costs $ 3 or $4",
        "$x $",
        "$$x\n\ny$$",
        "these:\n- a list",
        "this:\n| a | table |",
    ):
        assert list(misread(wrong)), wrong  # control
    assert not list(
        misread("$x_1$, $$\\sum_i\nx_i$$ and `$HOME`\n\n- a list\n- of two")
    )
