"""What may not change when code is moved about: hundreds of seeded moves of every
group, law, search and precision, the words of every error and those that checks
ask for, the bytes of every results file. `python tests/test_digest.py` writes the
digest anew, `... texts` only what checks ask for; do that where a change is
meant."""

import ast
import hashlib
import json
import math
import sys
from functools import partial
from itertools import product

import test_training
import torch
import torch.nn.functional as F
from test_style import PAGES, made
from test_tree import ROOT
from torch import Generator, nn

from symtele import (
    GL,
    Ascent,
    BatchGL,
    GreatCircle,
    Grid,
    LeastSquares,
    Orthogonal,
    Permutation,
    Random,
    Rotation,
    Sample,
    Scaling,
    Stay,
    Whiten,
    booth,
    ellipse,
    grad_norm,
    landscape,
    lookahead,
    loss_of,
    rosenbrock,
    teleport,
    wire,
)
from symtele.baselines import Matched
from symtele.experiments import processor
from symtele.whitening import MoveData, ridge_whitener, second_moment

FILE = ROOT / "tests/digest.json"
F64, F32 = torch.float64, torch.float32
ACTS = {
    "leaky": partial(nn.LeakyReLU, 0.1),
    "tanh": nn.Tanh,
    "softplus": nn.Softplus,
    "linear": nn.Identity,
}
SHAPES = {  # name -> widths, samples, biases
    "small": ((5, 6, 6, 3), 4, True),
    "paper": ((5, 6, 7, 8), 4, False),
    "crowded": ((6, 4, 7, 3), 6, True),
    "wide": ((20, 40, 44, 4), 3, True),
    "deep": ((7, 8, 8, 8, 8, 5), 6, False),
}
GROUPS = {
    "GL": GL,
    "BatchGL": BatchGL,
    "Scaling": Scaling,
    "Permutation": Permutation,
}
SEARCHES = {
    "stay": Stay(),
    "random": Random(0.1),
    "sample": Sample(3, 0.1),
    "default": Ascent(),
    "fixed": Ascent(3, lr=1e-4),
    "matched": Matched(Ascent(2)),
}
CIRCLES = SEARCHES | {
    "grid": Grid(16),
    "circle": GreatCircle(9),
    "circles": GreatCircle(5, 2),
}
OBJECTIVES = {"norm": grad_norm, "ahead": lookahead(0.01)}


def network(shape, act, dtype, seed):
    "A plain network with its batch: model, loss, parameters, x"
    widths, n, bias = SHAPES[shape]
    rng = Generator().manual_seed(seed)
    layers = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for a, b in zip(widths, widths[1:]):
            layers += [nn.Linear(a, b, bias), ACTS[act]()]
    model = nn.Sequential(*layers[:-1]).to(dtype)
    x = torch.randn(n, widths[0], dtype=F64, generator=rng)
    y = torch.randn(n, widths[-1], dtype=F64, generator=rng)
    loss, w = loss_of(model, F.mse_loss, y.to(dtype))
    return model, loss, w, x.to(dtype)


# Entries


def failure(error):
    "What was raised, by the name of Python's own kind of error"
    kinds = [c for c in type(error).__mro__ if c.__module__ == "builtins"]
    return f"{kinds[0].__name__}: {error}"


def entry(numbers, bits, facts):
    "Numbers to 17 digits, the bits they come from, and what is no number"
    return dict(
        numbers=[float(v) for v in numbers],
        bits=hashlib.sha256(bits).hexdigest()[:12],
        facts=facts,
    )


def projected(flat):
    "A vector along three fixed random directions"
    rng = Generator().manual_seed(1)
    return torch.randn(3, len(flat), dtype=F64, generator=rng) @ flat


def move_entry(out):
    "What a move did, and its parameters along fixed random directions"
    w = {"w": out.w} if isinstance(out.w, torch.Tensor) else out.w
    flat = torch.cat([t.double().flatten() for t in w.values()])
    numbers = [*projected(flat), *out.loss.flatten(), *out.objective, out.drift]
    bits = b"".join(t.numpy().tobytes() for t in (*w.values(), out.objective))
    facts = [bool(out.accepted), int(out.code), int(out.steps), int(out.evals)]
    return entry(numbers, bits, [*facts, out.slope])


def move(loss, w, group, x, search, objective):
    "The entry of a seeded move"
    rng = Generator().manual_seed(3)
    objective = OBJECTIVES[objective]
    return move_entry(
        teleport(loss, w, group, x, objective=objective, search=search, rng=rng)
    )


def network_choices():
    "Group, search and objective; a permutation has no slope"
    for group, search, objective in product(GROUPS, SEARCHES, OBJECTIVES):
        if group == "Permutation" and search not in ("stay", "sample"):
            continue
        if objective == "ahead" and search not in ("default", "fixed"):
            continue
        yield group, search, objective


def network_moves():
    "Every group and search on five networks, both precisions, two objectives"
    for i, (shape, act) in enumerate(product(SHAPES, ACTS)):
        for dtype in (F64, F32):
            model, loss, w, x = network(shape, act, dtype, i)
            wiring = wire(model, x)
            for name, search, objective in network_choices():
                yield (
                    f"{shape} {act} {dtype} {name} {search} {objective}",
                    partial(
                        move,
                        loss,
                        w,
                        GROUPS[name](wiring),
                        x,
                        SEARCHES[search],
                        objective,
                    ),
                )


def special_moves():
    "Least squares, whitening, moved data, several tasks, seeds at once"
    for act in ACTS:
        for dtype in (F64, F32):
            for name, args, options in special_cases(act, dtype):
                yield (
                    f"{name} {act} {dtype}",
                    partial(special_move, args, options),
                )
        model, loss, w, x = network("small", act, F64, 9)
        group, xs = BatchGL(wire(model, x)), torch.stack([x, x + 0.1, x.flip(0)])
        for name, search in (("trust", Ascent(3)), ("fixed", Ascent(3, lr=1e-4))):
            yield (
                f"vmap {name} {act}",
                partial(moves_at_once, loss, w, group, xs, search),
            )


def special_move(args, options):
    "The entry of a move"
    return move_entry(teleport(*args, **options))


def special_cases(act, dtype):
    "Name, arguments and options of each"
    model, loss, w, x = network("paper", act, dtype, 7)
    tasks, _ = loss_of(model, lambda out, y: (out**2).mean(0)[:3], x)
    wiring, moving = wire(model, x), wire(model, x, inputs=True)
    rng = Generator().manual_seed(2)
    data = torch.randn(40, 5, generator=rng).to(dtype)
    whitened = MoveData(ridge_whitener(second_moment(data), 1e-3))
    crowd = torch.cat((x, 2 * x, data[:9]))

    def free(w, x):
        return torch.func.functional_call(model, w, (x,)).square().mean()

    squares, batch, linear = LeastSquares(wiring), BatchGL(wiring), GL(wiring)
    whiten = linear if act == "linear" else batch
    loose = dict(search=Random(0.1), tol=10.0)
    strict = dict(search=Random(1.0), tol=1e-6)
    yield "lsq", (loss, w, squares, x), loose
    yield "lsq crowded", (free, w, squares, crowd), loose
    yield "lsq strict", (free, w, squares, crowd), strict
    yield (
        "whiten",
        (loss, w, whiten, x),
        dict(search=Whiten(1e-3, full_batch=True)),
    )
    yield "data", (loss, w, GL(moving), x), dict(search=whitened)
    yield "data climbs", (loss, w, GL(moving), x), {}
    yield "tasks", (tasks, w, batch, x), {}
    yield "tasks GL", (tasks, w, linear, x), dict(objective=lookahead(0.1))


def moves_at_once(loss, w, group, xs, search):
    "The entry of moves of several seeds at once"
    out = torch.func.vmap(lambda x: teleport(loss, w, group, x, search=search))(
        xs
    )
    flat = torch.cat([t.flatten(1) for t in out.w.values()], 1)
    numbers = [*flat.sum(1), *flat.square().sum(1), *out.loss.flatten()]
    facts = [out.accepted.tolist(), out.code.tolist()]
    return entry(numbers, flat.numpy().tobytes(), facts)


def chart_moves():
    "Rotations and quadratics under every search of a circle or a sphere"
    A = torch.randn(5, 5, dtype=F64, generator=Generator().manual_seed(0))
    A = A @ A.T + torch.eye(5)
    problems = {
        "rosenbrock": (Rotation(rosenbrock), rosenbrock.loss, 2),
        "rosenbrock 6": (Rotation(rosenbrock), rosenbrock.loss, 6),
        "booth": (Rotation(booth), booth.loss, 2),
        "ellipse": (Rotation(ellipse(3.0)), ellipse(3.0).loss, 2),
        "quadratic": (Orthogonal(A), lambda w: w @ A.to(w) @ w / 2, 5),
    }
    for problem, dtype in product(problems, (F64, F32)):
        group, loss, n = problems[problem]
        w = torch.randn(n, generator=Generator().manual_seed(n)).to(dtype)
        for search, objective in product(CIRCLES, OBJECTIVES):
            if search == "grid" and n > 2 or search == "matched" and n == 2:
                continue
            if (problem, search) == ("rosenbrock 6", "fixed"):
                continue  # steps so long that rounding decides where they end
            yield (
                f"{problem} {dtype} {search} {objective}",
                partial(move, loss, w, group, None, CIRCLES[search], objective),
            )


def along_orbits():
    "Slopes, values, pulled covectors and inverses two moves along an orbit"
    cases = (
        ("leaky", "GL"),
        ("leaky", "BatchGL"),
        ("softplus", "BatchGL"),
        ("linear", "GL"),
        ("linear", "Scaling"),
    )
    for shape, (act, group), objective in product(SHAPES, cases, OBJECTIVES):
        yield (
            f"orbit {shape} {act} {group} {objective}",
            partial(along_orbit, shape, act, group, objective),
        )


def along_orbit(shape, act, group, objective):
    "The entry of two moves along one orbit"
    model, loss, w, x = network(shape, act, F64, 11)
    orbit = GROUPS[group](wire(model, x)).orbit(w, x)
    land = landscape(orbit, loss, OBJECTIVES[objective])
    rng = Generator().manual_seed(5)
    found = []
    for _ in range(2):
        xi = orbit.random(rng, 0.1)
        pulled = orbit.pull(xi, land.gradient)
        land, orbit = land.move(xi), orbit.to(xi)
        found += [land.slope(), land.height[None], orbit.inverse(xi)]
        found += [t.flatten() for t in (*pulled.values(), *orbit.w.values())]
    flat = torch.cat(found)
    return entry(projected(flat), flat.numpy().tobytes(), [])


def errors():
    "Every message that bad input and bad parts get"
    for what, (change, _) in test_training.BAD.items():
        yield f"bad {what}", partial(bad_input, change)
    for what, (build, _) in test_training.BUILD.items():
        yield f"build {what}", partial(error_of, build)


def bad_input(change):
    "What a Teleporter says of it"
    return error_of(test_training.rig(**change)[3])


def error_of(call):
    "An error's type and words"
    try:
        call()
    except Exception as error:
        return failure(error)
    return "no error"


def files():
    "The bytes of every results file"
    for path in sorted((ROOT / "nbs/results").glob("*.json")):
        yield path.name, partial(file_hash, path)


def file_hash(path):
    "A hash of the bytes"
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def cases():
    "Name -> what makes the entry of that name"
    torch.set_num_threads(1)
    found = {}
    for part in (
        network_moves,
        special_moves,
        chart_moves,
        along_orbits,
        errors,
        files,
    ):
        found |= dict(part())
    return found


def entry_or_error(make):
    "An entry, or the words of the error in its place"
    try:
        return make()
    except (ValueError, TypeError) as error:
        return failure(error)


def environment():
    "What decides about the last bits"
    return dict(torch=torch.__version__, processor=processor())


# Words that checks ask of errors


def asked(pages):
    "What checks want an error to say, written there or in the table of a loop"
    found = set()
    for tree in [cell.tree for page in pages for cell in page.cells]:
        tables = columns(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.keyword) and node.arg in (
                "contains",
                "match",
            ):
                found |= words(node.value, tables)
    return sorted(found)


def words(node, tables):
    "The text of a literal, or of all rows of a loop"
    if isinstance(node, ast.Name):
        return tables.get(node.id, set())
    return {node.value} if text(node) else set()


def text(node):
    "Whether a node is a text"
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def columns(tree):
    "Loop variable -> the texts that it takes from a table"
    found = {}
    for loop in ast.walk(tree):
        if not isinstance(loop, ast.For) or not isinstance(
            loop.target, ast.Tuple
        ):
            continue
        for row in getattr(loop.iter, "elts", ()):
            for name, value in zip(loop.target.elts, getattr(row, "elts", ())):
                if isinstance(name, ast.Name) and text(value):
                    found.setdefault(name.id, set()).add(value.value)
    return found


def unasked(texts, pages):
    "Texts that stand in no test and in no cell of a page but those of its module"
    cells = [cell for page in pages for cell in page.cells if not cell.exported]
    nodes = [node for cell in cells for node in ast.walk(cell.tree)]
    there = "\0".join(node.value for node in nodes if text(node))
    return [s for s in texts if s not in there]


# What was, and what is


OLD = dict(entries={}, environment={}, texts=[])
if FILE.exists():
    OLD |= json.loads(FILE.read_text())
CASES = cases()
# A float32 move is the same within rounding; a float64 move bit for bit, on the
# machine that wrote the digest, and within 1e-13 where an order of summation had
# to change.
LOOSE = {True: 1e-13, False: 1e-8}
REORDERED = ()  # words in names of float64 moves whose sums have another order


def near(found, wanted, rtol):
    "Whether two lists of numbers agree, nan being equal to itself"
    size = max((abs(v) for v in wanted if math.isfinite(v)), default=0.0)

    def agree(a, b):
        if a == b or math.isnan(a) and math.isnan(b):
            return True
        return abs(a - b) <= rtol * max(abs(b), size)

    return len(found) == len(wanted) and all(map(agree, found, wanted))


def faults(name, new, old, here):
    "How an entry differs from the digest's"
    if isinstance(new, str) or isinstance(old, str):
        return [] if new == old else [f"{name}: {new!r}, was {old!r}"]
    single = "float32" in name
    *numbers, _ = new["numbers"]
    *before, _ = old["numbers"]
    found = []
    if not near(numbers, before, 1e-3 if single else LOOSE[here]):
        found.append(f"{name}: {numbers}, was {before}")
    exact = here and not single and not any(s in name for s in REORDERED)
    if exact and new["bits"] != old["bits"]:
        found.append(f"{name}: other bits")
    if new["facts"] != old["facts"]:
        found.append(f"{name}: {new['facts']}, was {old['facts']}")
    return found


def test_nothing_has_changed():
    "Every move, error and file is what it was"
    here = OLD["environment"] == environment()
    new = {name: entry_or_error(make) for name, make in CASES.items()}
    wrong = []
    for name in new:
        wrong += faults(name, new[name], OLD["entries"].get(name), here)
    assert len(new) >= 400
    assert set(new) == set(OLD["entries"])
    assert not wrong, "\n".join(wrong[:20])


def test_a_change_is_seen():
    "Control: another number, another fact, another word"
    old = entry([1.0, 2.0, 0.0], b"", [True])
    others = (
        entry([1.0, 2.0 + 1e-12, 0.0], b"", [True]),
        entry([1.0, 2.0, 0.0], b"", [False]),
        entry([1.0, 2.0, 0.0], b"x", [True]),
        "TypeError: no",
    )
    assert not faults("x", old, old, True)
    for new in others:
        assert faults("x", new, old, True)


def test_errors_are_asked_for_the_same_words():
    "No check of an error has gone, or asks for less than it did"
    assert len(OLD["texts"]) >= 100
    assert not unasked(OLD["texts"], PAGES)


def test_a_lost_text_is_seen():
    "Control: in a module it is what is said, and not what is asked for"
    loop = 'for error, says in ((E, "odd 5"), (E, "odd 7")):\n    '
    check = "with expect_fail(error, contains=says):\n        f()"
    page = made(loop + check, 'with raises(E, match="more " "than 2"):\n    f()')
    texts = asked([page])
    assert texts == ["more than 2", "odd 5", "odd 7"]
    assert not unasked(texts, [page])
    fewer = made('with raises(E, match="than 2"):\n    f("odd 5")')
    module = made('#| export\nwords = "more than 2", "odd 7"')
    assert unasked(texts, [fewer, module]) == ["more than 2", "odd 7"]


def write(**parts):
    "Put parts of the digest in place of the old"
    whole = {k: (OLD | parts)[k] for k in ("environment", "entries", "texts")}
    FILE.write_text(json.dumps(whole, indent=0, ensure_ascii=False) + "\n")
    print({name: len(part) for name, part in whole.items()})


if __name__ == "__main__":
    if sys.argv[1:] == ["texts"]:
        write(texts=asked(PAGES))
    else:
        entries = {name: entry_or_error(make) for name, make in CASES.items()}
        write(environment=environment(), entries=entries, texts=asked(PAGES))
