"""Layout, size, names and imports, measured on cells of notebooks and on tests.
`python tests/test_style.py` prints every fault there is, a line each."""

import ast
import io
import json
import re
import subprocess
import sys
import tokenize
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from test_tree import NOTEBOOKS, ROOT, copied, run

WIDTH = 82  # columns, what a page shows
LONGEST_FUNCTION, LONGEST_CLASS = 50, 120  # lines, docstring included
# Lines of the modules of these notebooks together. The core was 3125 and should
# come to 3000; since then it moves buffers, calls models with any arguments,
# trains on several ranks, prints a wiring and hears the paths of the batch law,
# which rebuilds layers from where it has been (03), asks late (08), and says the
# formula of every group, objective and search where `help` shows it.
# The reading should come to 1000; without blank lines it has 1363. Last it came
# to hear first states of recurrent layers, units that decide indices, five ops,
# what models keep outside their parameters, and which unit of a class is meant.
LONGEST_CORE, LONGEST_READING = 4710, 1650
READING = (4, 5)  # how a model is read, and the rules
CORE = (1, 2, 3, 6, 7, 8, 9, 10, 11)  # the modules beside them
READERS = {"wiring", "rules"}  # modules of the core that know layers by name
MOST_NAMES = 20  # public names of a module
MOST_BARE = 0.05  # share of annotations that do not say what a container holds
FEWEST_WORDS = 55  # for 1,000 characters of code, blanks not counted
CONTAINERS = {"dict", "list", "tuple", "set", "frozenset", "Callable", "object"}
LAYER = r"\.(weight|bias)\b"  # in text, a parameter of a layer by its name
BY_NAME = {"experiments"}  # what `make reproduce` asks a module for
DRAWING = {"matplotlib", "ipywidgets", "IPython"}
WRITTEN = ("nbs", "tests", "symtele", "setup.py")
RUFF = Path(sys.executable).parent / "ruff"

FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef
COMPREHENSION = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp


@dataclass(frozen=True)
class Cell:
    "A cell of code, or all of a file"

    place: str  # File and cell, as a fault names them
    source: str

    @property
    def exported(self) -> bool:
        "Whether it is part of a module"
        return bool(re.search(r"^#\| *export", self.source, re.M))

    @property
    def tree(self) -> ast.Module:
        "What Python reads in it"
        return parsed(self.source)


@dataclass(frozen=True)
class Page:
    "A notebook, a test or a module written by hand"

    path: str
    cells: tuple[Cell, ...]
    words: int = 0  # Of its prose

    @property
    def number(self) -> int | None:
        "Its place in the reading order, if it has one"
        found = re.match(r"nbs/(\d\d)_", self.path)
        return int(found[1]) if found else None

    @property
    def module(self) -> str | None:
        "The module that it exports to"
        found = re.search(r"^#\| *default_exp (\w+)", self.code, re.M)
        return found[1] if found else None

    @property
    def code(self) -> str:
        "All its cells"
        return "\n".join(cell.source for cell in self.cells)

    @property
    def exported(self) -> list[Cell]:
        "The cells that make its module"
        return [cell for cell in self.cells if cell.exported]

    @property
    def core(self) -> bool:
        "Whether its module is part of the core"
        return self.module is not None and self.number < 20

    @property
    def study(self) -> bool:
        "Whether it is about one paper or one finding"
        return self.number is not None and 30 <= self.number < 80


@cache
def parsed(source: str) -> ast.Module:
    "A syntax tree, made once"
    return ast.parse(source)


def notebook(path: str) -> Page:
    "A notebook as it is saved"
    cells = json.loads((ROOT / path).read_text(encoding="utf-8"))["cells"]
    text = ["".join(cell["source"]) for cell in cells]
    kinds = [cell["cell_type"] for cell in cells]
    code = [
        Cell(f"{path}:cell {i}", source)
        for i, (kind, source) in enumerate(zip(kinds, text, strict=True), 1)
        if kind == "code"
    ]
    words = [
        len(source.split())
        for source, kind in zip(text, kinds, strict=True)
        if kind == "markdown"
    ]
    return Page(path, tuple(code), sum(words))


def file(path: Path) -> Page:
    "A file of Python as one cell"
    name = path.relative_to(ROOT).as_posix()
    return Page(name, (Cell(name, path.read_text(encoding="utf-8")),))


BY_HAND = ("setup.py", "symtele/__init__.py", "symtele/_docproc.py")
PAGES = [
    *map(notebook, NOTEBOOKS),
    *map(file, sorted((ROOT / "tests").glob("*.py"))),
    *(file(ROOT / path) for path in BY_HAND),
]


def made(*code: str, path: str = "nbs/05_made.ipynb", words: int = 0) -> Page:
    "A page for a control"
    cells = [Cell(f"{path}:cell {i}", source) for i, source in enumerate(code, 1)]
    return Page(path, tuple(cells), words)


# Layout


def wide(pages: list[Page]) -> Iterator[str]:
    "Lines that a page would have to scroll; an address cannot be broken"
    for cell in all_cells(pages):
        for i, line in enumerate(cell.source.splitlines(), 1):
            if len(re.sub(r"https?://\S+", "", line)) > WIDTH:
                yield f"{cell.place}:{i}: {len(line)} columns"


def all_cells(pages: list[Page]) -> Iterator[Cell]:
    "The cells of all pages"
    for page in pages:
        yield from page.cells


def semicolons(pages: list[Page]) -> Iterator[str]:
    "Lines with a second statement, or with an end that Python does not need"
    for cell in all_cells(pages):
        tokens = tokenize.generate_tokens(io.StringIO(cell.source).readline)
        for token in tokens:
            if token.type == tokenize.OP and token.string == ";":
                yield f"{cell.place}:{token.start[0]}: a semicolon"


def nested(pages: list[Page]) -> Iterator[str]:
    "Conditional expressions and comprehensions that hold a second one"
    for cell in all_cells(pages):
        for kind in (ast.IfExp, COMPREHENSION):
            for node in ast.walk(cell.tree):
                if not isinstance(node, kind):
                    continue
                inner = [n for n in ast.walk(node) if isinstance(n, kind)]
                if len(inner) > 1:
                    name = type(node).__name__
                    yield f"{cell.place}:{node.lineno}: {name} in another"


# Size


def long_bodies(pages: list[Page]) -> Iterator[str]:
    "Exported functions and classes that no screen holds"
    for cell in exported_cells(pages):
        for node in ast.walk(cell.tree):
            if not isinstance(node, FUNCTION | ast.ClassDef):
                continue
            lines = node.end_lineno - node.lineno + 1
            is_class = isinstance(node, ast.ClassDef)
            most = LONGEST_CLASS if is_class else LONGEST_FUNCTION
            if lines > most:
                yield f"{cell.place}: {node.name} has {lines} lines of {most}"


def exported_cells(pages: list[Page]) -> Iterator[Cell]:
    "The cells that make modules"
    for page in pages:
        yield from page.exported


def long_core(pages: list[Page]) -> Iterator[str]:
    "The modules of the core, longest first, where together they are too long"
    parts = ("core", CORE, LONGEST_CORE), ("reading", READING, LONGEST_READING)
    for name, numbers, most in parts:
        own = [page for page in pages if page.number in numbers]
        lines = Counter({page.path: module_lines(page) for page in own})
        if lines.total() > most:
            yield f"the {name} has {lines.total()} lines of {most}"
            yield from (f"{path}: {n} lines" for path, n in lines.most_common())


def module_lines(page: Page) -> int:
    "Lines of an exported module as ruff lays it out, but for those of nbdev"
    cells = [
        re.sub(r"^#\|.*\n", "", cell.source, flags=re.M) for cell in page.exported
    ]
    layout = subprocess.run(
        [RUFF, "format", "--isolated", f"--line-length={WIDTH}", "-"],
        input="\n\n".join(cells),
        capture_output=True,
        text=True,
        check=True,
    )
    return len(layout.stdout.splitlines())


def few_words(pages: list[Page]) -> Iterator[str]:
    "Pages of the core that are code and not prose"
    for page in pages:
        if page.number not in CORE + READING:
            continue
        characters = len("".join(page.code.split()))
        share = 1000 * page.words / characters
        if share < FEWEST_WORDS:
            yield (
                f"{page.path}: {share:.0f} words for 1,000 characters of code, "
                f"{FEWEST_WORDS} wanted"
            )


# Names


def public(cell: Cell) -> list[str]:
    "Names that a cell adds to its module's `__all__`"
    if not re.search(r"^#\| *export *$", cell.source, re.M):
        return []
    names = []
    for node in cell.tree.body:
        if isinstance(node, FUNCTION | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            names += assigned(node)
    return [name for name in names if not name.startswith("_")]


def assigned(node: ast.Assign | ast.AnnAssign) -> list[str]:
    "Plain names that a statement gives a value"
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    names = []
    for target in targets:
        parts = target.elts if isinstance(target, ast.Tuple) else [target]
        names += [part.id for part in parts if isinstance(part, ast.Name)]
    return names


def public_names(page: Page) -> dict[str, str]:
    "Public name of a page's module -> where it is defined"
    return {name: cell.place for cell in page.cells for name in public(cell)}


def passed_on(page: Page) -> list[str]:
    "Names of other modules that a page adds to its own `__all__`"
    found = []
    for cell in page.exported:
        for node in cell.tree.body:
            if isinstance(node, ast.Assign) and assigned(node) == ["_all_"]:
                found += ast.literal_eval(node.value)
    return found


def many_names(pages: list[Page]) -> Iterator[str]:
    "Modules whose words nobody can keep in mind"
    for page in pages:
        names = [*public_names(page), *passed_on(page)]
        if len(names) > MOST_NAMES:
            yield (
                f"{page.path}: {len(names)} public names of {MOST_NAMES}: "
                f"{', '.join(names)}"
            )


def unused_names(pages: list[Page]) -> Iterator[str]:
    "Public names that only their own module uses, or only their own study"
    modules = {p.module: p for p in pages if p.module}
    used = {use for page in pages for use in uses(page, modules)}
    for page in modules.values():
        own = set() if page.study else checked(page)
        for name, place in public_names(page).items():
            if (page.module, name) not in used and name not in own | BY_NAME:
                yield f"{place}: {name} is used nowhere else"


def checked(page: Page) -> set[str]:
    "Names that the cells of a page use beside those that make its module"
    return {
        node.id
        for cell in page.cells
        if not cell.exported
        for node in ast.walk(cell.tree)
        if isinstance(node, ast.Name)
    }


def uses(page: Page, modules: dict[str, Page]) -> set[tuple[str, str]]:
    "(module, name) of every word that a page takes from a module that defines it"
    found = set()
    cells = [cell.tree for cell in page.cells]
    for trees in (cells, *([program] for program in programs(page))):
        for module, name in imported(*trees):
            names = [name]
            if name == "*" and module in modules:
                names = public_names(modules[module])
            found |= {origin(module, n, modules) for n in names}
    return found


def programs(page: Page) -> list[ast.Module]:
    "Programs that a test holds as text"
    if not page.path.startswith("tests/"):
        return []
    text = [
        node.value
        for node in ast.walk(page.cells[0].tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    return [parsed(s) for s in text if re.match(r"(from|import) symtele\b", s)]


def imported(*trees: ast.Module) -> Iterator[tuple[str, str]]:
    "(module, name) of what a page imports; of symtele itself, the module is ''"
    aliases = {}  # name here -> module, as far as it may be one
    for node in walk(trees):
        if isinstance(node, ast.ImportFrom):
            module = within(node)
            if module is not None:
                yield from ((module, alias.name) for alias in node.names)
            if module == "":
                aliases |= {a.asname or a.name: a.name for a in node.names}
        elif isinstance(node, ast.Import):
            for alias in node.names:
                root, _, module = alias.name.partition(".")
                if root == "symtele":
                    yield module, ""
                    aliases[alias.asname or root] = module if alias.asname else ""
    for node in walk(trees):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id in aliases:
                yield aliases[node.value.id], node.attr


def walk(trees: Iterable[ast.Module]) -> Iterator[ast.AST]:
    "All nodes of several trees"
    for tree in trees:
        yield from ast.walk(tree)


def within(node: ast.ImportFrom) -> str | None:
    "The module of symtele that is imported from, '' for the package, or None"
    if node.level == 1:
        return node.module or ""
    root, _, module = (node.module or "").partition(".")
    return module if root == "symtele" else None


def origin(module: str, name: str, modules: dict[str, Page]) -> tuple[str, str]:
    "The module that defines a name, which others may pass on"
    owners = [m for m, page in modules.items() if name in public_names(page)]
    if module in owners or not owners:
        return module, name
    if not module:
        return owners[0], name
    for cell in modules[module].exported if module in modules else ():
        for below, passed in imported(cell.tree):
            if passed == name and below != module:
                return origin(below, name, modules)
    return module, name


def undocumented(pages: list[Page]) -> Iterator[str]:
    "Public functions, classes and methods that do not say what comes back"
    for page in pages:
        known = classes(pages) | classes([page])
        for cell in page.exported:
            for name, node in with_methods(cell):
                if not ast.get_docstring(node) and not inherits(name, known):
                    yield f"{cell.place}: {name} has no docstring"


def classes(pages: list[Page]) -> dict[str, ast.ClassDef]:
    "The exported classes of some pages by name"
    nodes = [node for cell in exported_cells(pages) for node in cell.tree.body]
    return {node.name: node for node in nodes if isinstance(node, ast.ClassDef)}


def inherits(name: str, known: dict[str, ast.ClassDef]) -> bool:
    "Whether a method has its docstring from a base class, as `help` shows it"
    owner, _, method = name.partition(".")
    if not method or owner not in known:
        return False
    for base in known[owner].bases:
        if not isinstance(base, ast.Name) or base.id not in known:
            continue
        told = [
            part
            for part in known[base.id].body
            if isinstance(part, FUNCTION) and part.name == method
        ]
        if any(map(ast.get_docstring, told)):
            return True
        if inherits(f"{base.id}.{method}", known):
            return True
    return False


def with_methods(cell: Cell) -> Iterator[tuple[str, ast.AST]]:
    "Public functions and classes of a cell and the public methods in them"
    for node in cell.tree.body:
        if not isinstance(node, FUNCTION | ast.ClassDef) or node.name[0] == "_":
            continue
        yield node.name, node
        for part in node.body if isinstance(node, ast.ClassDef) else ():
            if isinstance(part, FUNCTION) and part.name[0] != "_":
                yield f"{node.name}.{part.name}", part


def bare_types(pages: list[Page]) -> Iterator[str]:
    "Annotations that do not say what a container holds, where they are too many"
    total, bare = 0, []
    for cell in exported_cells(pages):
        for node in annotations(cell.tree):
            total += 1
            if names := bare_names(node):
                text = ast.unparse(node)
                bare.append(
                    f"{cell.place}:{node.lineno}: {text} ({', '.join(names)})"
                )
    if len(bare) > MOST_BARE * total:
        yield f"{len(bare)} of {total} annotations hold a bare container"
        yield from bare


def annotations(tree: ast.Module) -> Iterator[ast.expr]:
    "Types of parameters, results and fields"
    for node in ast.walk(tree):
        if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation:
            yield node.annotation
        elif isinstance(node, FUNCTION) and node.returns:
            yield node.returns


def bare_names(node: ast.expr) -> list[str]:
    "Containers of an annotation with nothing inside"
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return bare_names(ast.parse(node.value, mode="eval").body)
    filled = {id(n.value) for n in ast.walk(node) if isinstance(n, ast.Subscript)}
    names = [
        n.id if isinstance(n, ast.Name) else n.attr
        for n in ast.walk(node)
        if isinstance(n, ast.Name | ast.Attribute) and id(n) not in filled
    ]
    return [name for name in names if name in CONTAINERS]


# Imports


def upward(pages: list[Page]) -> Iterator[str]:
    "Modules that need a later one, studies that need another study"
    number = {p.module: p.number for p in pages if p.module}
    studies = {p.module for p in pages if p.module and p.study}
    for page in pages:
        for cell in page.cells:
            for name in sorted(set(modules_of(cell, number))):
                later = name == "" or number[name] >= (page.number or 0)
                if page.module and cell.exported and later:
                    yield f"{cell.place}: imports {name or 'the whole package'}"
                elif page.study and name in studies - {page.module}:
                    yield f"{cell.place}: a study imports {name}"


def modules_of(cell: Cell, known: dict[str, int]) -> Iterator[str]:
    "Modules that a cell imports, '' for what it takes from the whole package"
    for module, name in imported(cell.tree):
        if module in known:
            yield module
        elif name in known:
            yield name
        elif not module and name.strip("_") == name != "":
            yield ""


def drawing_core(pages: list[Page]) -> Iterator[str]:
    "Modules of the core that draw"
    for cell in exported_cells([p for p in pages if p.core]):
        for node in ast.walk(cell.tree):
            roots = [name.partition(".")[0] for name in import_names(node)]
            yield from (
                f"{cell.place}:{node.lineno}: imports {root}"
                for root in sorted(DRAWING & set(roots))
            )


def import_names(node: ast.AST) -> list[str]:
    "Modules that a statement imports"
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module:
        return [node.module]
    return []


def layers_by_name(pages: list[Page]) -> Iterator[str]:
    "Names of a layer's parameters in the core, which knows parameters only"
    for page in pages:
        if not page.core or page.module in READERS:
            continue
        for cell in page.exported:
            for node in ast.walk(cell.tree):
                text = getattr(node, "value", None)
                if isinstance(text, str) and re.search(LAYER, text):
                    yield f"{cell.place}:{node.lineno}: {text!r}"


GATES: dict[str, Callable[[list[Page]], Iterator[str]]] = {
    "width": wide,
    "semicolons": semicolons,
    "nested": nested,
    "bodies": long_bodies,
    "core": long_core,
    "words": few_words,
    "public names": many_names,
    "names in use": unused_names,
    "docstrings": undocumented,
    "bare types": bare_types,
    "imports": upward,
    "drawing": drawing_core,
    "layers": layers_by_name,
}
EXPORT = "#| export\n"
HEAD = "#| default_exp made"
CORE_PAGE = "nbs/06_made.ipynb"
LATER = made("#| default_exp later", path="nbs/06_later.ipynb")
STUDY = made("#| default_exp study", path="nbs/31_study.ipynb")
CONTROLS = {  # gate -> a page without the fault, one with it, what is said of it
    "width": (
        [made("x = 1  # https://" + 80 * "x")],
        [made("x = 1", "\nx = 1  #" + 80 * "x")],
        "nbs/05_made.ipynb:cell 2:2: 88 columns",
    ),
    "semicolons": (
        [made("x = 'a; b'  # c; d")],
        [made("x = 1;")],
        "nbs/05_made.ipynb:cell 1:1: a semicolon",
    ),
    "nested": (
        [made("x = [a if b else c for b in range(3)]")],
        [made("x = [a for b in c if any(d for d in b)]")],
        "nbs/05_made.ipynb:cell 1:1: ListComp in another",
    ),
    "bodies": (
        [made(EXPORT + "def f():\n" + 49 * "    x\n")],
        [made(EXPORT + "def f():\n" + 50 * "    x\n")],
        "nbs/05_made.ipynb:cell 1: f has 51 lines of 50",
    ),
    "core": (
        [made(HEAD, EXPORT + LONGEST_CORE * "x\n", "y = 1", path=CORE_PAGE)],
        [
            made(
                HEAD,
                EXPORT + (LONGEST_CORE - 2) * "x\n",
                EXPORT + "y = 1",
                path=CORE_PAGE,
            )
        ],
        f"the core has {LONGEST_CORE + 1} lines of {LONGEST_CORE}",
    ),
    "words": (
        [made("x" * 1000, words=55)],
        [made("x" * 1000, words=54)],
        "nbs/05_made.ipynb: 54 words for 1,000 characters of code, 55 wanted",
    ),
    "public names": (
        [made(EXPORT + "a = b = c = d = _e = 1\n" * 9)],
        [made(EXPORT + "".join(f"x{i} = {i}\n" for i in range(21)))],
        f"nbs/05_made.ipynb: 21 public names of 20: "
        f"{', '.join(f'x{i}' for i in range(21))}",
    ),
    "names in use": (
        [made(HEAD, EXPORT + "def f(): g\ndef _g(): f", "f()")],
        [made(HEAD, EXPORT + "def f(): g\ndef g(): f", "f()")],
        "nbs/05_made.ipynb:cell 2: g is used nowhere else",
    ),
    "docstrings": (
        [made(EXPORT + "def f():\n    'x'\n\ndef _g(): pass", "def g(): pass")],
        [made(EXPORT + "class A:\n    'x'\n    def f(self): pass")],
        "nbs/05_made.ipynb:cell 1: A.f has no docstring",
    ),
    "bare types": (
        [made(EXPORT + "def f(a: dict[str, int]) -> 'list[int]': pass")],
        [made(EXPORT + "def f(a: dict[str, list]) -> int: pass")],
        "nbs/05_made.ipynb:cell 1:2: dict[str, list] (list)",
    ),
    "imports": (
        [made(HEAD, "from symtele.later import x"), LATER],
        [made(HEAD, EXPORT + "from symtele.later import x"), LATER],
        "nbs/05_made.ipynb:cell 2: imports later",
    ),
    "drawing": (
        [made(HEAD, "import matplotlib")],
        [made(HEAD, EXPORT + "def f():\n    import matplotlib.pyplot as plt")],
        "nbs/05_made.ipynb:cell 2:3: imports matplotlib",
    ),
    "layers": (
        [made(HEAD, EXPORT + "x = f'{a}.pulled'", "'0.weight'")],
        [made(HEAD, EXPORT + "x = f'{a}.weight'")],
        "nbs/05_made.ipynb:cell 2:2: '.weight'",
    ),
}


@pytest.mark.parametrize("gate", GATES)
def test_style(gate):
    "One rule, on everything that is written here"
    found = list(GATES[gate](PAGES))
    assert not found, "\n".join([f"{len(found)} faults", *found])


@pytest.mark.parametrize("gate", GATES)
def test_a_fault_is_seen(gate):
    "Control: the same rule on a page with one fault, and on the like without"
    good, bad, fault = CONTROLS[gate]
    assert not list(GATES[gate](good))
    assert fault in list(GATES[gate](bad))


def test_more_faults_are_seen():
    "Controls of the rules that have two sides"
    large = made(EXPORT + "class A:\n" + 120 * "    x\n")
    assert list(long_bodies([large])) == [
        "nbs/05_made.ipynb:cell 1: A has 121 lines of 120"
    ]
    most = LONGEST_READING
    reading = made(HEAD, EXPORT + (most + 1) * "x\n")
    fault = f"the reading has {most + 1} lines of {most}"
    assert fault in list(long_core([reading]))
    conditions = made("x = 1 if a else 2 if b else 3")
    assert list(nested([conditions])) == [
        "nbs/05_made.ipynb:cell 1:1: IfExp in another"
    ]
    whole = made(HEAD, EXPORT + "from symtele import GL", "import symtele")
    assert list(upward([whole])) == [
        "nbs/05_made.ipynb:cell 2: imports the whole package"
    ]
    version = made(HEAD, EXPORT + "from symtele import __version__")
    assert not list(upward([version]))


@pytest.mark.parametrize(
    "line",
    (
        "from symtele.study import x",
        "from symtele import study",
        "import symtele.study",
    ),
)
def test_a_study_in_a_study_is_seen(line):
    "Control: in any cell of a study, and not of a page on all of them"
    other = made("#| default_exp other", line, path="nbs/32_other.ipynb")
    claims = made("#| default_exp claims", line, path="nbs/90_claims.ipynb")
    assert list(upward([other, STUDY])) == [
        "nbs/32_other.ipynb:cell 2: a study imports study"
    ]
    assert not list(upward([claims, STUDY]))


def test_docstrings_are_inherited():
    "A method says what comes back where the one that it overrides does"
    base = made(EXPORT + "class A:\n    'x'\n    def f(self):\n        'x'")
    silent = made(EXPORT + "class A:\n    'x'\n    def f(self): pass")
    heir = made(EXPORT + "class B(A):\n    'x'\n    def f(self): pass")
    second = made(EXPORT + "class C(B):\n    'x'\n    def f(self): pass")
    assert not list(undocumented([base, heir, second]))
    # controls: no such base, one that says nothing, another name, a nearer class
    assert len(list(undocumented([heir, second]))) == 2
    assert len(list(undocumented([silent, heir]))) == 2
    other = made(EXPORT + "class B(A):\n    'x'\n    def g(self): pass")
    assert len(list(undocumented([base, other]))) == 1
    own = made(silent.code, heir.code)
    assert len(list(undocumented([base, own]))) == 2


def test_names_are_followed():
    "A name is used where it is imported, by whatever way, and nowhere else"
    page = made(HEAD, EXPORT + "f = 1")
    passing = made(
        LATER.code, EXPORT + "from symtele.made import f", path=LATER.path
    )
    for code in (
        "from symtele import f",
        "from symtele.made import f",
        "import symtele.made as m\nm.f()",
        "from symtele import made\nmade.f()",
        "import symtele\nsymtele.f()",
        "'from symtele.made import *'",
    ):
        user = made(code, path="tests/test_x.py")
        assert not list(unused_names([page, user])), code
    assert not list(unused_names([page, passing]))
    user = made("from symtele.later import f", path="tests/test_x.py")
    assert not list(unused_names([page, passing, user]))
    for cells in (
        ("from symtele import made", "made.f()"),
        ("import symtele.made as m", "def g():\n    m.f()"),
    ):
        assert not list(
            unused_names([page, made(*cells, path="nbs/index.ipynb")])
        )
        # controls: the name of a module that is imported under no such name
        assert list(unused_names([page, made(cells[1], path="nbs/index.ipynb")]))
    for code in (
        "f = 2",
        "import symtele.made as m",
        "from symtele.other import f",
        "from other import f",
        "'import *'",
    ):
        user = made(code, path="tests/test_x.py")
        assert list(unused_names([page, user])), code
    study = made("#| default_exp study", EXPORT + "f = 1", "f", path=STUDY.path)
    assert list(unused_names([study]))


def test_public_names_are_those_of_the_package():
    "What is counted here is what nbdev puts into `__all__`"
    for page in PAGES:
        if page.module:
            path = ROOT / f"symtele/{page.module}.py"
            names = {*public_names(page), *passed_on(page)}
            assert names == set(listed(path.read_text(encoding="utf-8")))


def listed(text: str) -> list[str]:
    "`__all__` of a module's text"
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and assigned(node) == ["__all__"]:
            return ast.literal_eval(node.value)
    return []


def ruff(folder: Path) -> list[str]:
    "What ruff would change or does not accept in a tree, a line each"
    found = []
    for command in (["format", "--check"], ["check"]):
        done = subprocess.run(
            [RUFF, *command, "--no-cache", "--output-format=concise", *WRITTEN],
            cwd=folder,
            capture_output=True,
            text=True,
        )
        assert done.returncode in (0, 1), done.stderr
        found += re.findall(r"^\S+\.(?:py|ipynb):.*", done.stdout, re.M)
    return found


def test_ruff(tmp_path):
    "One formatter and one linter, with the settings that are committed"
    found = ruff(copied(tmp_path))
    assert not found, "\n".join([f"{len(found)} faults", *found])


def test_ruff_sees_faults(tmp_path):
    "Control of the test above: a test, a notebook and a module with a fault each"
    folder = copied(tmp_path)
    before = set(ruff(folder))
    test, module = folder / "tests/test_new.py", folder / "symtele/new.py"
    test.write_text("x = {'a':1}\n")
    module.write_text("if x: pass\n")
    saved = folder / "nbs/index.ipynb"
    nb = json.loads(saved.read_text(encoding="utf-8"))
    cell = next(c for c in nb["cells"] if c["cell_type"] == "code")
    cell["source"] = ["f = lambda x: x"]
    saved.write_text(json.dumps(nb), encoding="utf-8")
    new = "\n".join(set(ruff(folder)) - before)
    assert "tests/test_new.py:1:6: unformatted" in new
    assert "symtele/new.py:1:5: E701" in new
    assert "symtele/new.py:1:5: unformatted" not in new  # nbdev lays them out
    assert re.search(r"nbs/index.ipynb:cell \d+:1:1: E731", new), new


def loaded(statement: str, cwd: Path) -> set[str]:
    "Which libraries that draw a statement loads in a fresh process"
    code = f"{statement}; import sys; print(*sys.modules)"
    names = run("python", "-c", code, cwd=cwd, package=ROOT)
    return DRAWING & set(names.split())


def test_import_is_light(tmp_path):
    "Whoever trains on a machine without a screen waits for nothing that draws"
    assert not loaded("import symtele", tmp_path)
    drawing = loaded("import symtele, matplotlib", tmp_path)  # control
    assert drawing == {"matplotlib"}


if __name__ == "__main__":
    faults = {gate: list(find(PAGES)) for gate, find in GATES.items()}
    faults["ruff"] = ruff(ROOT)
    for gate, found in faults.items():
        for fault in found:
            print(f"{gate}: {fault}")
    count = sum(map(len, faults.values()))
    sys.exit(f"{count} faults" if count else 0)
