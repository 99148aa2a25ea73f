"""Pages as a reader has them, with no Quarto: notebooks processed by nbdev as for
the site, written by pandoc in the shape Quarto gives a page, with those rules
of Quarto's stylesheet that have bitten, the site's own style and script, and the
files that the last step of the build puts beside them."""

import html
import json
import re

import pypandoc
from test_tree import NOTEBOOKS, ROOT, copied, run

from symtele import _site

WIDGETS = "application/vnd.jupyter.widget-state+json"
VIEW = "application/vnd.jupyter.widget-view+json"
PANDOC = ["--mathml", "--section-divs", "--wrap=preserve"]


def processed(folder):
    "Path of each notebook -> it as Quarto gets it; made in a copy of the tree"
    copy = copied(folder)
    printed = run(
        "python",
        "-c",
        "import nbdev.serve; nbdev.serve.proc_nbs(n_workers=0)",
        cwd=copy,
        package=copy,
    )
    assert "Quarto" not in printed  # nbdev's commands would try to install it
    return {
        p: json.loads((copy / "_proc" / p).read_text(encoding="utf-8"))
        for p in NOTEBOOKS
    }


def joined(text):
    "The text of a cell or an output"
    return text if isinstance(text, str) else "".join(text)


def directives(source):
    "What a cell asks of Quarto, and its source without"
    asked = dict(re.findall(r"^#\| ([\w-]+): (.*)$", source, re.M))
    return asked, re.sub(r"^#\| .*\n?", "", source, flags=re.M)


def fenced(code):
    "Code for pandoc, in a fence longer than any inside"
    return f"~~~~~~ {{.python .cell-code}}\n{code}\n~~~~~~"


KEPT = []  # HTML that pandoc need not read, megabytes of pictures among it


def raw(markup):
    "A mark for HTML that stays as it is"
    KEPT.append(markup)
    return f"<!--kept {len(KEPT) - 1}-->"


def put_back(page):
    "A page with its HTML for the marks"
    return re.sub(r"<!--kept (\d+)-->", lambda mark: KEPT[int(mark[1])], page)


def code_cell(cell):
    "Source and outputs, as Quarto writes them down"
    asked, source = directives(joined(cell["source"]))
    parts = ['<div class="cell">']
    shown = fenced(source.strip("\n"))
    if asked.get("code-fold") == "true":
        title = json.loads(asked.get("code-summary", '"Code"'))
        head = (
            f'<details class="code-fold"><summary>{html.escape(title)}</summary>'
        )
        shown = f"{head}\n\n{shown}\n\n</details>"
    if asked.get("echo") != "false" and source.strip():
        parts.append(shown)
    parts += map(output, cell["outputs"])
    return "\n\n".join([*parts, "</div>"])


def output(out):
    "What a cell puts out, the best of its forms"
    data = out.get("data", {})
    if out["output_type"] == "stream":
        text = html.escape(joined(out["text"]))
        inner, kind = raw(f"<pre><code>{text}</code></pre>"), "stdout"
    elif VIEW in data:
        view = json.dumps(data[VIEW])
        inner, kind = raw(f'<script type="{VIEW}">{view}</script>'), "display"
    elif "text/html" in data:
        inner, kind = raw(joined(data["text/html"])), "display"
    elif "text/markdown" in data:
        inner, kind = joined(data["text/markdown"]), "display"
    elif "image/png" in data:
        inner = raw(f'<img src="data:image/png;base64,{data["image/png"]}">')
        kind = "display"
    else:
        text = html.escape(joined(data.get("text/plain", "")))
        inner, kind = raw(f"<pre><code>{text}</code></pre>"), "display"
    return f'<div class="cell-output cell-output-{kind}">\n\n{inner}\n\n</div>'


HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title} – symtele</title>
<link href="../site_libs/quarto.css" rel="stylesheet">
{scripts}
<link href="styles.css" rel="stylesheet">
</head>
<body class="nav-sidebar floating quarto-light">
<div id="quarto-content">
<main class="content" id="quarto-document-content">
<header id="title-block-header"><h1 class="title">{title}</h1></header>
"""
# What Quarto writes on a page with widgets
JSDELIVR = "https://cdn.jsdelivr.net/npm"
ELSEWHERE = f"""<script src="{JSDELIVR}/jquery@3.5.1/dist/jquery.min.js" \
integrity="sha384-x" crossorigin="anonymous"></script>
<script src="{JSDELIVR}/requirejs@2.3.6/require.min.js" integrity="sha384-x" \
crossorigin="anonymous"></script>
<script>define('jquery', [],function() {{return window.jQuery;}})</script>
<script src="{JSDELIVR}/@jupyter-widgets/html-manager@*/dist/embed-amd.js" \
crossorigin="anonymous"></script>
"""


def page(nb):
    "A processed notebook as a page, before the last step of the build"
    top, *cells = nb["cells"]
    title = re.search(r"^title: (.*)$", joined(top["source"]), re.M)[1].strip(
        "'\""
    )
    parts = [
        joined(c["source"]) if c["cell_type"] == "markdown" else code_cell(c)
        for c in cells
        if c["cell_type"] != "raw"
    ]
    body = pypandoc.convert_text(
        "\n\n".join(parts), "html", "markdown", extra_args=PANDOC
    )
    body = put_back(body).replace("<table>", '<table class="caption-top table">')
    body = body.replace('<figure class="', '<figure class="figure ')
    widgets = nb["metadata"].get("widgets", {}).get(WIDGETS)
    state = ""
    if widgets:
        saved = json.dumps(widgets).replace("</", r"<\/")
        state = f'<script type="{WIDGETS}">{saved}</script>'
    head = HEAD.format(title=title, scripts=ELSEWHERE if widgets else "")
    script = '<script src="site.js"></script>'
    return f"{head}{body}</main></div>{state}{script}</body></html>"


def address(nb):
    "The page a notebook becomes"
    return re.search(
        r"^output-file: (\S+)$", joined(nb["cells"][0]["source"]), re.M
    )[1]


def build(notebooks, folder):
    "Pages of processed notebooks in a folder, as the site has them; their paths"
    (folder / "nbs").mkdir(parents=True)
    (folder / "site_libs").mkdir()
    rules = (ROOT / "tests" / "quarto.css").read_text(encoding="utf-8")
    (folder / "site_libs" / "quarto.css").write_text(rules, encoding="utf-8")
    for name in ("styles.css", "site.js"):
        text = (ROOT / "nbs" / name).read_text(encoding="utf-8")
        (folder / "nbs" / name).write_text(text, encoding="utf-8")
    found = {}
    for path, nb in notebooks.items():
        found[path] = folder / "nbs" / address(nb)
        found[path].write_text(page(nb), encoding="utf-8")
    _site.finish(folder)
    return found
