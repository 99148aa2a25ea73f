"What notebooks pass through into git (nbconvert) and onto the site (nbdev)"

import ast
import json
import re
from functools import cache
from html import escape
from importlib import import_module
from io import StringIO
from itertools import groupby
from pathlib import Path
from tokenize import COMMENT, generate_tokens
from typing import NamedTuple

from execnb.nbio import NbCell, mk_cell
from nbconvert.preprocessors import Preprocessor
from nbdev.config import get_config
from nbdev.doclinks import NbdevLookup
from nbdev.process import Processor
from nbformat import NotebookNode, from_dict

WIDGETS = "application/vnd.jupyter.widget-state+json"


def _models(
    nb: NotebookNode,  # A notebook
) -> dict[str, dict]:  # The models of its widgets by identifier
    "What widgets have left in a notebook"
    return nb["metadata"].get("widgets", {}).get(WIDGETS, {}).get("state", {})


class CanonicalIds(Preprocessor):
    """Number widget models in order of creation, so that a second run of a
    notebook gives the same file"""

    def preprocess(self, nb, resources):
        "The notebook with numbers for identifiers"
        number = {key: f"{i:032x}" for i, key in enumerate(_models(nb))}

        def numbered(found):
            return number.get(found[0], found[0])

        text = re.sub("[0-9a-f]{32}", numbered, json.dumps(nb))
        return from_dict(json.loads(text)), resources


class _Lines(list):
    "A list where execnb expects text"

    def splitlines(self, keepends=False):
        return list(self)


class KeepLinks(Processor):
    """Let the state of a jslink through: execnb splits whatever is called
    `source` into lines, and there it is a list"""

    def end(self):
        "Mark what is a list"
        for model in _models(self.nb).values():
            source = model.get("state", {}).get("source")
            if isinstance(source, list):
                model["state"]["source"] = _Lines(source)


# Entries: what a page says of a public name

Definition = ast.FunctionDef | ast.ClassDef
Comments = dict[int, str]  # Line, counted from 1 -> the comment on it


class Row(NamedTuple):
    "A parameter in an entry"

    name: str
    default: str  # Empty where there is none
    type: str  # Likewise
    says: str  # The comment beside it


@cache
def parsed(
    module: str,  # With the package before it
) -> tuple[dict[str, Definition], Comments]:
    "Its definitions by name, and the comment at each line"
    text = Path(import_module(module).__file__).read_text(encoding="utf-8")
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in generate_tokens(StringIO(text).readline)
        if token.type == COMMENT
    }
    body = ast.parse(text).body
    return {t.name: t for t in body if isinstance(t, Definition)}, comments


def prose(
    text: str,  # A comment or docstring
) -> str:
    "Markdown: names of the package become links, and nothing else is markup"
    parts = re.split("(`[^`]*`)", text)  # what is code, and what is between
    parts[::2] = [re.sub(r"([][\\*_^~$@<>|#{}])", r"\\\1", p) for p in parts[::2]]
    return NbdevLookup().link_line("".join(parts))


def typed(
    node: ast.expr | None,  # An annotation
) -> str:
    "A type as markdown; a bar would end the cell of a table"
    if node is None:
        return ""
    return prose(ast.unparse(node).strip("'").replace("|", "or"))


def parameter(
    node: ast.arg,
    default: ast.expr | None,
    says: Comments,  # Of its module
    stars: str = "",  # Before its name
) -> Row:
    "The row of one parameter"
    return Row(
        stars + node.arg,
        ast.unparse(default) if default else "",
        typed(node.annotation),
        prose(says.get((default or node).end_lineno, "")),
    )


def arguments(
    node: ast.FunctionDef,
    says: Comments,  # Of its module
    skip: int = 0,  # Arguments left out, `self` among them
) -> list[Row]:
    "A row for each argument of a function"
    a = node.args
    plain = a.posonlyargs + a.args
    defaults = [None] * (len(plain) - len(a.defaults)) + a.defaults
    rows = [parameter(p, d, says) for p, d in zip(plain, defaults)][skip:]
    if a.vararg:
        rows.append(parameter(a.vararg, None, says, "*"))
    elif a.kwonlyargs:
        rows.append(Row("*", "", "", ""))
    rows += [parameter(p, d, says) for p, d in zip(a.kwonlyargs, a.kw_defaults)]
    if a.kwarg:
        rows.append(parameter(a.kwarg, None, says, "**"))
    return rows


def fields(
    cls: ast.ClassDef,
    says: Comments,  # Of its module
) -> list[Row]:
    "A row for each field of a dataclass or named tuple"
    return [
        Row(
            node.target.id,
            ast.unparse(node.value) if node.value else "",
            typed(node.annotation),
            prose(says.get(node.end_lineno, "")),
        )
        for node in cls.body
        if isinstance(node, ast.AnnAssign)
        and "ClassVar" not in ast.unparse(node.annotation)  # no parameter
    ]


def methods(
    cls: ast.ClassDef,
) -> list[ast.FunctionDef]:
    "Public methods that say what they do"
    own = [f for f in cls.body if isinstance(f, ast.FunctionDef)]
    return [f for f in own if f.name[0] != "_" and ast.get_docstring(f)]


def class_rows(
    module: str,  # With the package before it
    name: str,  # Of a class
) -> list[Row]:
    "A row for each argument that makes an object, inherited fields first"
    package, rows = module.split(".")[0], []
    for base in getattr(import_module(module), name).__mro__[::-1]:
        if base.__module__.split(".")[0] != package:
            continue
        defined, says = parsed(base.__module__)
        cls = defined[base.__name__]
        own = fields(cls, says)
        for node in cls.body:
            if isinstance(node, Definition) and node.name == "__init__":
                rows, own = [], arguments(node, says, 1)
        names = [row.name for row in own]
        rows = [row for row in rows if row.name not in names] + own
    return rows


WIDTH = 82  # Columns that a page shows


def call(
    name: str,
    rows: list[Row],
) -> str:
    "A call as it is written down, an argument to a line where it is long"
    given = [
        f"{row.name}={row.default}" if row.default else row.name for row in rows
    ]
    whole = f"{name}({', '.join(given)})"
    if len(whole) <= WIDTH:
        return whole
    return "\n".join([f"{name}(", *(f"    {arg}," for arg in given), ")"])


def table(
    rows: list[tuple[str, str, str]],  # Name, type and comment
) -> list[str]:
    "Lines of a table, none where there are no rows"
    if not rows:
        return []
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return ["", "| parameter | | |", "|:---|:---|:---------|", *lines]


def method(
    cls: str,
    node: ast.FunctionDef,
    says: Comments,  # Of its module
) -> str:
    "A line of the list of methods"
    decorators = " ".join(map(ast.unparse, node.decorator_list))
    rows = arguments(node, says, int("staticmethod" not in decorators))
    shown = node.name if "property" in decorators else call(node.name, rows)
    explained = [
        f"<code>{row.name}</code>: {row.says}" for row in rows if row.says
    ]
    what = "; ".join([prose(ast.get_docstring(node)), *explained])
    returns = f" → {typed(node.returns)}" if node.returns else ""
    anchor = f"{cls.lower()}.{node.name}"
    return f'- <code id="{anchor}">{escape(shown)}</code>{returns}: {what}'


def uses(
    source: str,  # Of a cell
) -> list[tuple[str, bool, str]]:
    "(name, called, line) for the names in each statement of one line"
    try:
        todo, lines = list(ast.parse(source).body), source.splitlines()
    except SyntaxError:  # a magic of IPython
        return []
    found = []
    while todo:
        node = todo.pop(0)
        if isinstance(node, ast.With | ast.For) and not expects_failure(node):
            todo += node.body
        simple = isinstance(node, ast.Expr | ast.Assign | ast.Assert)
        if not simple or node.lineno != node.end_lineno:
            continue
        inside = list(ast.walk(node))
        calls = [part.func for part in inside if isinstance(part, ast.Call)]
        named = [
            part for part in inside if isinstance(part, ast.Name | ast.Attribute)
        ]
        for part in named:
            name = part.id if isinstance(part, ast.Name) else part.attr
            found.append((name, part in calls, lines[node.lineno - 1].strip()))
    return found


@cache
def examples(
    path: str,  # Of a notebook, from the root
) -> dict[str, str]:  # Name -> its plainest line
    "How a page uses names: a call before others, no check, and then the shortest"
    nb = json.loads((get_config().config_path / path).read_text(encoding="utf-8"))
    found = {}
    for cell in nb["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code" or re.match(r"#\| *(export|hide)", source):
            continue
        for name, called, line in uses(source):
            found.setdefault(name, []).append((called, line))

    def plainest(use):
        called, line = use
        return (
            not called,
            line.startswith(("assert", "test_", "check_")),
            len(line),
        )

    return {name: min(lines, key=plainest)[1] for name, lines in found.items()}


FACE = ("nbs/00_own_model.ipynb", "nbs/index.ipynb")  # Where else a word is used


def example(
    module: str,  # With the package before it
    name: str,  # Of a function or class in it
    path: str,  # Of the notebook that defines it, from the root
) -> str:  # Empty where no page uses it
    "A line with a name, or with what returns it, run with the page it is from"
    nodes = [n for d in parsed(module)[0].values() for n in ast.walk(d)]
    makers = [
        node.name
        for node in nodes
        if isinstance(node, ast.FunctionDef)
        and node.returns
        and re.search(rf"\b{name}\b", ast.unparse(node.returns))
    ]
    for wanted in (name, *makers):
        for page in (path, *FACE):
            if wanted in examples(page):
                return examples(page)[wanted]
    return ""


def folded(
    summary: str,  # HTML
    lines: list[str],  # Markdown
) -> list[str]:
    "Lines that open on a click, none where there are none"
    if not any(lines):
        return []
    head = f'<details class="symtele-more"><summary>{summary}</summary>'
    return ["", head, "", *lines, "", "</details>"]


def entry(
    module: str,  # With the package before it
    name: str,  # Of a function or class
    path: str,  # Of the notebook that defines it, from the root
) -> str:
    "The API entry: signature, what it is, an example, parameters, public methods"
    defined, says = parsed(module)
    node = defined[name]
    listed, returns = [], []
    if isinstance(node, ast.ClassDef):
        rows = class_rows(module, name)
        listed = [method(name, f, says) for f in methods(node)]
    else:
        rows = arguments(node, says)
        if node.returns:
            comment = prose(says.get(node.returns.lineno, ""))
            returns = [("**returns**", typed(node.returns), comment)]
    given = [row for row in rows if row.name != "*"]
    cells = [(f"<code>{row.name}</code>", row.type, row.says) for row in given]
    used = example(module, name, path)
    shown = ["", "For example", "", "```python", used, "```"] if used else []
    what = "Parameters and methods" if listed else "Parameters"
    return "\n".join(
        [
            f"### {name} {{.unnumbered .unlisted}}",  # not in the contents
            "",
            "```python",
            call(name, rows),
            "```",
            "",
            prose(ast.get_docstring(node) or ""),
            *shown,
            *folded(what, [*table(cells + returns), "", *listed]),
        ]
    )


def assigned(
    body: list[ast.stmt],
) -> list[str]:
    "Names that statements give a value"
    targets = [t for s in body if isinstance(s, ast.Assign) for t in s.targets]
    parts = [part for target in targets for part in ast.walk(target)]
    names = [part for part in parts if isinstance(part, ast.Name)]
    return [part.id for part in names if isinstance(part.ctx, ast.Store)]


def anchored(
    names: list[str],  # Public, that a cell defines
) -> str:
    "Where links to names lead, on a page that tells a story"
    spans = [
        f'<span id="{name.lower()}" class="symtele-name" '
        f'data-name="{name}"></span>'
        for name in names
    ]
    return "".join(spans)


def fold(
    source: str,  # Of a cell
    summary: str,  # What stands on it
) -> str:
    "Source that opens on a click"
    quoted = json.dumps(summary, ensure_ascii=False)
    return f"#| code-fold: true\n#| code-summary: {quoted}\n{source}"


STUDIES = 30  # Pages with at least this number tell a story, the others explain


def number(
    path: str,  # Of a notebook
) -> int:  # -1 where it has none
    "Its place in the order of reading"
    found = re.match(r"\d+", Path(path).name)
    return int(found[0]) if found else -1


class ApiEntries(Processor):
    """What stands on a page for an exported cell: entries made from the package
    itself, the source folded beneath; tables of values stay open. On the page of
    a study the folded source is all. nbdev's own way executes the cells again,
    where a dataclass has lost its comments and a name two modules share is the
    first one's, and drops all source."""

    def begin(self):
        "Put entries in the place of exported cells"
        directives = [c.get("directives_", {}) for c in self.nb.cells]
        names = [d["default_exp"][0] for d in directives if "default_exp" in d]
        if not names:
            return
        self.module = f"{get_config().lib_name}.{names[0]}"
        root = get_config().config_path
        self.path = Path(self.nb.path_).relative_to(root).as_posix()
        self.nb.cells = [new for c in self.nb.cells for new in self.replaced(c)]
        links = self.links()
        for cell in self.nb.cells:
            for wrong, right in links if cell.cell_type == "markdown" else ():
                cell.source = cell.source.replace(f"({wrong})", f"({right})")

    def links(self) -> set[tuple[str, str]]:
        """(wrong, right) where nbdev links a name to the first of two that share
        it"""
        to, (own, _) = NbdevLookup().doc, parsed(self.module)
        both = {(to(name), to(f"{self.module}.{name}")) for name in own}
        return {(first, mine) for first, mine in both if first != mine}

    def replaced(
        self,
        cell: NbCell,  # Of the notebook; its source is folded in place
    ) -> list[NbCell]:
        "The cells that stand for one"
        directives = cell.get("directives_", {})
        if "export" not in directives:
            return [] if "default_exp" in directives else [cell]
        body = ast.parse(cell.source).body
        if any(isinstance(s, ast.Import | ast.ImportFrom) for s in body):
            return []
        public = import_module(self.module).__all__
        defined = [s.name for s in body if isinstance(s, Definition)]
        named = [name for name in defined if name in public]
        if number(self.path) >= STUDIES:
            named += [name for name in assigned(body) if name in public]
            about = ", ".join(named or defined or assigned(body))
            cell.source = fold(cell.source, f"Code: {about}")
            return [mk_cell(anchored(named), "markdown"), cell]
        new = [
            mk_cell(entry(self.module, n, self.path), "markdown") for n in named
        ]
        values = [name for name in assigned(body) if name in public]
        if values:
            lines = [self.value(import_module(self.module), n) for n in values]
            new.append(mk_cell("\n\n".join(lines), "markdown"))
        if defined:
            cell.source = fold(cell.source, f"Source: {', '.join(defined)}")
        return [*new, cell]

    def value(self, module, name) -> str:
        "The entry of a value: its name and type"
        kind = prose(type(getattr(module, name)).__name__)
        return f'<code id="value.{name}">{name}</code>, {kind}'


# Checks and code


def expects_failure(
    node: ast.stmt,
) -> bool:
    "Whether a statement is there to see something fail"
    return isinstance(node, ast.With) and "expect_fail" in ast.unparse(
        node.items[0]
    )


def is_check(
    node: ast.stmt,
) -> bool:
    "Whether a statement only says what must be so"
    if isinstance(node, ast.Assert) or expects_failure(node):
        return True
    if isinstance(node, ast.For):
        return all(map(is_check, node.body))
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        return ast.unparse(node.value.func).startswith(("test_", "check_"))
    return False


def split(
    source: str,  # Of a cell
) -> tuple[str, str]:
    "What it does, and the checks at its end"
    try:
        body = ast.parse(source).body
    except SyntaxError:  # a magic of IPython
        return source, ""
    does = [node for node in body if not is_check(node)]
    last = does[-1].end_lineno if does else 0
    # a comment behind the last statement stays with it
    lines = source.splitlines()
    return "\n".join(lines[:last]), "\n".join(lines[last:]).strip("\n")


def silent(
    cell: NbCell,
) -> bool:
    "Whether a cell is folded code that puts nothing out, or an anchor of such"
    if cell.cell_type == "markdown":
        return cell.source.startswith('<span id="') and "\n" not in cell.source
    folded = cell.cell_type == "code" and cell.source.startswith("#| code-fold")
    return folded and not cell.outputs


def together(
    cells: list[NbCell],  # Folded, none of which puts anything out
) -> list[NbCell]:
    "One cell with the code of all, their anchors before it"
    anchors = "".join(c.source for c in cells if c.cell_type == "markdown")
    heads, bodies = [], []
    for cell in cells:
        if cell.cell_type == "code":
            _, summary, body = cell.source.split("\n", 2)
            heads.append(json.loads(summary.partition(": ")[2]))
            bodies.append(body)
    if not bodies:
        return cells
    own = [head.partition(": ")[2] for head in heads if ": " in head]
    first = heads[0].partition(": ")[0]
    source = fold(
        "\n\n\n".join(bodies), f"{first}: {', '.join(own)}" if own else first
    )
    new = [mk_cell(source, "code")]
    return [mk_cell(anchors, "markdown"), *new] if anchors else new


class FoldCode(Processor):
    """Fold what a reader need not see first: the checks of a cell, and on a page
    that tells a story all code, one fold for what follows each other"""

    def begin(self):
        "Fold code that no directive speaks of"
        self.study = number(self.nb.path_) >= STUDIES
        cells = [new for c in self.nb.cells for new in self.parts(c)]
        if self.study:
            runs = [(quiet, list(run)) for quiet, run in groupby(cells, silent)]
            cells = [
                c
                for quiet, run in runs
                for c in (together(run) if quiet else run)
            ]
        self.nb.cells = cells

    def parts(
        self,
        cell: NbCell,  # Its source is folded in place
    ) -> list[NbCell]:
        "What it puts out, what it does, and the checks at its end, as cells"
        if cell.cell_type != "code":
            return [cell]
        if "#| code-fold" in cell.source:
            return shown_first(cell)
        does, checks = split(cell.source)
        if not does:
            cell.source = fold(checks, "Check")
            return [cell]
        if self.study:
            cell.source = fold(cell.source, "Code")
            return shown_first(cell)
        if not checks:
            return [cell]
        cell.source = does
        return [cell, mk_cell(fold(checks, "Check"), "code")]


def shown_first(
    cell: NbCell,  # Folded
) -> list[NbCell]:
    "What it puts out, and below it how"
    if not cell.outputs:
        return [cell]
    source, cell.source = cell.source, "#| echo: false"
    return [cell, mk_cell(source, "code")]


TWICE = re.compile(r"\[\[(`[^`]*`)\]\([^()]*\)\]\(([^()]*)\)")


def relative_links(
    markdown: str,
) -> str:
    "Links to names lead to pages beside this one; links of the prose itself stay"
    config = get_config()
    site = f"]({config.doc_host}{config.doc_baseurl}/nbs/"
    return TWICE.sub(r"[\1](\2)", markdown.replace(site, "]("))


class LocalLinks(Processor):
    "Make nbdev's links hold wherever the site stands, in prose and in sentences"

    def cell(
        self,
        cell: NbCell,  # Changed in place
    ):
        "Mend the links of a cell and of what it puts out"
        if cell.cell_type == "markdown":
            cell.source = relative_links(cell.source)
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "text/markdown" in data:
                shown = "".join(data["text/markdown"])
                data["text/markdown"] = relative_links(shown)
