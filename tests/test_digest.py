"""What may not change when code is moved about: hundreds of seeded moves of every group,
law, search and precision, the words of every error, the bytes of every results file.
`python tests/test_digest.py` writes the digest anew; do that where a change is meant."""

import hashlib
import json
import math
from pathlib import Path

import pytest
import test_training
import torch
import torch.nn.functional as F
from torch import Generator, nn

from symtele import (
    GL,
    Ascent,
    BatchGL,
    GreatCircle,
    Grid,
    LeastSquares,
    MoveData,
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
    ridge_whitener,
    rosenbrock,
    second_moment,
    teleport,
    wire,
)
from symtele.baselines import Matched
from symtele.experiments import processor

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "tests/digest.json"
F64, F32 = torch.float64, torch.float32
ACTS = {
    "leaky": lambda: nn.LeakyReLU(0.1),
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
SEARCHES = {
    "stay": Stay(),
    "random": Random(0.1),
    "sample": Sample(3, 0.1),
    "default": Ascent(),
    "fixed": Ascent(3, lr=1e-4),
    "matched": Matched(Ascent(2)),
}
OBJECTIVES = {"norm": grad_norm, "ahead": lookahead(0.01)}


def network(shape, act, dtype, seed):
    "A plain network with its batch: model, loss, parameters, x"
    widths, n, bias = SHAPES[shape]
    rng = Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [
            m
            for a, b in zip(widths, widths[1:], strict=False)
            for m in (nn.Linear(a, b, bias), ACTS[act]())
        ]
    model = nn.Sequential(*layers[:-1]).to(dtype)
    x, y = (
        torch.randn(n, d, dtype=F64, generator=rng)
        for d in widths[:: len(widths) - 1]
    )
    loss, w = loss_of(model, F.mse_loss, y.to(dtype))
    return model, loss, w, x.to(dtype)


def told(out):
    "What a move did, and its parameters along fixed random directions"
    w = {"w": out.w} if isinstance(out.w, torch.Tensor) else out.w
    flat = torch.cat([t.double().flatten() for t in w.values()])
    d = torch.randn(3, len(flat), dtype=F64, generator=Generator().manual_seed(1))
    numbers = [*(d @ flat), *out.loss.flatten(), *out.objective, out.drift]
    bits = b"".join(t.numpy().tobytes() for t in (*w.values(), out.objective))
    facts = [bool(out.accepted), int(out.code), int(out.steps), int(out.evals)]
    return entry(numbers, bits, [*facts, out.slope])


def entry(numbers, bits, facts):
    "Numbers to 17 digits, the bits they come from, and what is no number"
    return dict(
        numbers=[float(v) for v in numbers],
        bits=hashlib.sha256(bits).hexdigest()[:12],
        facts=facts,
    )


def network_moves():
    "Every group and search on five networks, both precisions, two objectives"
    groups = dict(
        GL=GL, BatchGL=BatchGL, Scaling=Scaling, Permutation=Permutation
    )
    for i, (shape, act) in enumerate((s, a) for s in SHAPES for a in ACTS):
        for dtype in (F64, F32):
            model, loss, w, x = network(shape, act, dtype, i)
            wiring = wire(model, x)
            for name, group in groups.items():
                for search in SEARCHES:
                    if name == "Permutation" and search not in ("stay", "sample"):
                        continue
                    for objective in OBJECTIVES:
                        if objective == "ahead" and search not in (
                            "default",
                            "fixed",
                        ):
                            continue
                        key = f"{shape} {act} {dtype} {name} {search} {objective}"
                        yield (
                            key,
                            lambda loss=loss, w=w, x=x, wiring=wiring, g=group, s=search, o=objective: (
                                told(
                                    teleport(
                                        loss,
                                        w,
                                        g(wiring),
                                        x,
                                        objective=OBJECTIVES[o],
                                        search=SEARCHES[s],
                                        rng=Generator().manual_seed(3),
                                    )
                                )
                            ),
                        )


def special_moves():
    "Least squares, whitening, moved data, several tasks, seeds at once"
    for act in ACTS:
        for dtype in (F64, F32):
            model, loss, w, x = network("paper", act, dtype, 7)
            tasks, _ = loss_of(model, lambda o, y: (o**2).mean(0)[:3], x)
            wiring, moving = wire(model, x), wire(model, x, inputs=True)
            data = torch.randn(40, 5, generator=Generator().manual_seed(2)).to(
                dtype
            )
            to = MoveData(ridge_whitener(second_moment(data), 1e-3))
            crowd = torch.cat((x, 2 * x, data[:9]))

            def free(w, x, m=model):
                return torch.func.functional_call(m, w, (x,)).square().mean()

            whiten = BatchGL(wiring) if act != "linear" else GL(wiring)
            for name, args, options in (
                (
                    "lsq",
                    (loss, w, LeastSquares(wiring), x),
                    dict(search=Random(0.1), tol=10.0),
                ),
                (
                    "lsq crowded",
                    (free, w, LeastSquares(wiring), crowd),
                    dict(search=Random(0.1), tol=10.0),
                ),
                (
                    "lsq strict",
                    (free, w, LeastSquares(wiring), crowd),
                    dict(search=Random(1.0), tol=1e-6),
                ),
                (
                    "whiten",
                    (loss, w, whiten, x),
                    dict(search=Whiten(1e-3, full_batch=True)),
                ),
                ("data", (loss, w, GL(moving), x), dict(search=to)),
                ("data climbs", (loss, w, GL(moving), x), {}),
                ("tasks", (tasks, w, BatchGL(wiring), x), {}),
                (
                    "tasks GL",
                    (tasks, w, GL(wiring), x),
                    dict(objective=lookahead(0.1)),
                ),
            ):
                yield (
                    f"{name} {act} {dtype}",
                    lambda args=args, options=options: told(
                        teleport(*args, **options)
                    ),
                )
        model, loss, w, x = network("small", act, F64, 9)
        group, xs = BatchGL(wire(model, x)), torch.stack([x, x + 0.1, x.flip(0)])
        for name, search in (("trust", Ascent(3)), ("fixed", Ascent(3, lr=1e-4))):
            yield (
                f"vmap {name} {act}",
                lambda loss=loss, w=w, g=group, xs=xs, s=search: many(
                    torch.func.vmap(lambda x: teleport(loss, w, g, x, search=s))(
                        xs
                    )
                ),
            )


def many(out):
    "What moves of several seeds at once did"
    flat = torch.cat([t.flatten(1) for t in out.w.values()], 1)
    numbers = [*flat.sum(1), *flat.square().sum(1), *out.loss.flatten()]
    return entry(
        numbers,
        flat.numpy().tobytes(),
        [out.accepted.tolist(), out.code.tolist()],
    )


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
    searches = SEARCHES | {
        "grid": Grid(16),
        "circle": GreatCircle(9),
        "circles": GreatCircle(5, 2),
    }
    for problem, (group, loss, n) in problems.items():
        for dtype in (F64, F32):
            w = torch.randn(n, generator=Generator().manual_seed(n)).to(dtype)
            for search in searches:
                if n > 2 and search == "grid" or n == 2 and search == "matched":
                    continue
                for objective in OBJECTIVES:
                    yield (
                        f"{problem} {dtype} {search} {objective}",
                        lambda l=loss, w=w, g=group, s=search, o=objective: told(
                            teleport(
                                l,
                                w,
                                g,
                                objective=OBJECTIVES[o],
                                search=searches[s],
                                rng=Generator().manual_seed(3),
                            )
                        ),
                    )


def along_orbits():
    "Slopes, values, pulled covectors and inverses two moves along an orbit"
    cases = (
        ("leaky", "GL", GL),
        ("leaky", "BatchGL", BatchGL),
        ("softplus", "BatchGL", BatchGL),
        ("linear", "GL", GL),
        ("linear", "Scaling", Scaling),
    )
    for shape in SHAPES:
        for act, name, group in cases:
            for objective in OBJECTIVES:
                yield (
                    f"orbit {shape} {act} {name} {objective}",
                    lambda s=shape, a=act, g=group, o=objective: walked(
                        s, a, g, o
                    ),
                )


def walked(shape, act, group, objective):
    "Numbers of two moves along one orbit"
    model, loss, w, x = network(shape, act, F64, 11)
    orbit, rng = group(wire(model, x)).orbit(w, x), Generator().manual_seed(5)
    land = landscape(orbit, loss, OBJECTIVES[objective])
    seen = []
    for _ in range(2):
        xi = orbit.random(rng, 0.1)
        c = orbit.pull(xi, land.gradient)
        land, orbit = land.move(xi), orbit.to(xi)
        seen += [land.slope(), land.height[None], orbit.inverse(xi)]
        seen += [t.flatten() for t in (*c.values(), *orbit.w.values())]
    flat = torch.cat(seen)
    d = torch.randn(3, len(flat), dtype=F64, generator=Generator().manual_seed(1))
    return entry(d @ flat, flat.numpy().tobytes(), [])


def said(call):
    "An error's type and words"
    try:
        call()
    except Exception as e:
        return f"{type(e).__name__}: {e}"
    return "no error"


def errors():
    "Every message that bad input and bad parts get"
    for what, (change, _) in test_training.BAD.items():
        yield f"bad {what}", lambda c=change: said(test_training.rig(**c)[3])
    for what, (build, _) in test_training.BUILD.items():
        yield f"build {what}", lambda b=build: said(b)


def files():
    "The bytes of every results file"
    for p in sorted((ROOT / "nbs/results").glob("*.json")):
        yield p.name, lambda p=p: hashlib.sha256(p.read_bytes()).hexdigest()[:16]


def cases():
    "Name -> what makes the entry of that name"
    torch.set_num_threads(1)
    parts = (
        network_moves,
        special_moves,
        chart_moves,
        along_orbits,
        errors,
        files,
    )
    return {k: f for part in parts for k, f in part()}


def found(make):
    "An entry, or the words of the error in its place"
    try:
        return make()
    except (ValueError, TypeError) as e:
        return f"{type(e).__name__}: {e}"


def environment():
    "What decides about the last bits"
    return dict(torch=torch.__version__, processor=processor())


OLD = (
    json.loads(FILE.read_text())
    if FILE.exists()
    else dict(entries={}, environment={})
)
CASES = cases()
# A float32 move is the same within rounding; a float64 move bit for bit, on the machine
# that wrote the digest, and within 1e-13 where an order of summation had to change.
LOOSE = {True: 1e-13, False: 1e-8}
REORDERED = ()  # words in the names of float64 moves whose sums had to change their order


def near(a, b, rtol):
    "Whether two lists of numbers agree, nan being equal to itself"
    size = max((abs(v) for v in b if math.isfinite(v)), default=0.0)
    return len(a) == len(b) and all(
        u == v
        or math.isnan(u)
        and math.isnan(v)
        or abs(u - v) <= rtol * max(abs(v), size)
        for u, v in zip(a, b, strict=True)
    )


def faults(name, new, old, here):
    "How an entry differs from the digest's"
    if isinstance(new, str) or isinstance(old, str):
        return [] if new == old else [f"{name}: {new!r}, was {old!r}"]
    rtol = 1e-3 if "float32" in name else LOOSE[here]
    *numbers, drift = new["numbers"]
    *was, _ = old["numbers"]
    out = [] if near(numbers, was, rtol) else [f"{name}: {numbers}, was {was}"]
    exact = (
        here and "float32" not in name and not any(w in name for w in REORDERED)
    )
    if exact and new["bits"] != old["bits"]:
        out.append(f"{name}: other bits")
    return out + (
        []
        if new["facts"] == old["facts"]
        else [f"{name}: {new['facts']}, was {old['facts']}"]
    )


def test_nothing_has_changed():
    "Every move, error and file is what it was"
    here = OLD["environment"] == environment()
    new = {k: found(f) for k, f in CASES.items()}
    wrong = [
        f for k in new for f in faults(k, new[k], OLD["entries"].get(k), here)
    ]
    assert len(new) >= 400 and set(new) == set(OLD["entries"])
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
    for new in others:
        assert faults("x", new, old, True) and not faults("x", old, old, True)


if __name__ == "__main__":
    made = dict(
        environment=environment(), entries={k: found(f) for k, f in CASES.items()}
    )
    FILE.write_text(json.dumps(made, indent=0, ensure_ascii=False) + "\n")
    print(len(made["entries"]), "entries")
