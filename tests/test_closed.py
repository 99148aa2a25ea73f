"""The closed slope of the batch law against autograd through the whole action, on hundreds of random chains"""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from torch import Generator, nn
from torch.func import grad

from symtele import BatchGL, grad_norm, loss_of, wire
from symtele.teleport import Landscape, landscape

NETS, COND = (
    300,
    1e4,
)  # above this condition of a layer's input, rounding decides and not the formula
LEAKY = [lambda: nn.LeakyReLU(0.1), lambda: nn.LeakyReLU(0.5)]
SMOOTH = [
    nn.Softplus,
    lambda: nn.Softplus(2.0),
    nn.ELU,
    lambda: nn.ELU(0.5),
    nn.CELU,
    nn.SELU,
    nn.Tanh,
    nn.Sigmoid,
    nn.LogSigmoid,
    nn.Softsign,
]


def draw(seed):
    "A chain of 2 to 8 layers, a batch, its loss; every third batch is wider than some layer, every fifth small for its layers"
    torch.manual_seed(seed)

    def R(a, b):
        return torch.randint(a, b + 1, ()).item()

    l, bias, mixed, wide = 2 + seed % 7, bool(R(0, 1)), R(0, 1), not seed % 3
    d = [R(3, 9) for _ in range(l + 1)]
    n = R(4, 10) if wide else R(1, min(d[:l]))
    if wide:
        d[0] = n + R(0, 2)
    elif not seed % 5:
        d, n = [3 * k for k in d], min(n, 2)
    acts = (
        LEAKY * 2 + [nn.Identity] if wide else SMOOTH + LEAKY * 2 + [nn.Identity]
    )
    one = acts[R(0, len(acts) - 1)]
    layers = [
        m
        for a, b in zip(d, d[1:])
        for m in (
            nn.Linear(a, b, bias),
            (acts[R(0, len(acts) - 1)] if mixed else one)(),
        )
    ][:-1]
    for m in layers[::2]:
        nn.init.orthogonal_(m.weight)
    ce, x = R(0, 1), torch.randn(n, d[0], dtype=torch.float64)
    y = (
        torch.randint(0, d[-1], (n,))
        if ce
        else torch.randn(n, d[-1], dtype=torch.float64)
    )
    return (
        nn.Sequential(*layers).double(),
        x,
        (
            nn.functional.cross_entropy
            if ce
            else lambda o, y: (o - y).square().sum() / 2
        ),
        y,
    )


def check(seed):
    "Relative errors of value and slope, at the start or after three moves; without σ'' where there is one"
    torch.set_num_threads(1)
    model, x, f, y = draw(seed)
    loss, w = loss_of(model, f, y)
    try:
        orbit = BatchGL(wire(model, x)).orbit(w, x)
    except ValueError:
        return []
    if orbit.law != "batch":
        return []
    land, out = landscape(orbit, loss), []
    cond = max(
        torch.linalg.cond(p.full).item() for p in orbit.reading[1].values()
    )
    for k in range(1 + 3 * (seed // 7 % 2)):
        if k == 3 * (seed // 7 % 2):

            def J(xi):
                return grad_norm(lambda w: loss(w, x), land.orbit.act(xi))

            v, s = J(land.orbit.zero()), grad(J)(land.orbit.zero())
            row = dict(
                seed=seed,
                k=k,
                kind=land.kind,
                cond=cond,
                kinds=tuple({k for _, k in orbit.blocks.spaces}),
                finite=bool(v.isfinite() and s.isfinite().all()),
                few=sum(l.trail is not None for l in land.chain.links),
                value=((land.height - v) / v).abs().item(),
                slope=((land.slope() - s).norm() / s.norm()).item(),
            )
            if any(
                l.kind == "batch"
                and l.bent[1] is not None
                and l.bent[1].abs().max() > 0.01
                for l in land.chain.links
            ):
                flat = land.knowing(
                    chain=land.chain._replace(
                        links=tuple(
                            l._replace(bent=(l.bent[0], None))
                            for l in land.chain.links
                        )
                    )
                )
                row["flat"] = ((flat.slope() - s).norm() / s.norm()).item()
            out.append(row)
        land = (
            land.climb(norm=0.03)
            if k == 1
            else land.move(land.orbit.random(Generator().manual_seed(k), 0.03))
        )
    return out


@pytest.fixture(scope="module")
def rows():
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        return sum(pool.map(check, range(NETS), chunksize=15), [])


def test_value_and_slope(rows, capsys):
    "Where the batch can be inverted, to 1e-9; a chain is always recognised"
    good = [r for r in rows if r["cond"] <= COND and r["finite"]]
    nets = {r["seed"] for r in good}
    off = {q: max(r[q] for r in good) for q in ("value", "slope")}
    with capsys.disabled():
        print(
            f"\n{len(nets)} chains, largest relative error of the value {off['value']:.0e}, of the slope {off['slope']:.0e}; without σ'' median {torch.tensor([r['flat'] for r in good if 'flat' in r]).median():.0%}"
        )
    assert (
        len(nets) >= 220
        and all(r["kind"] == "closed" for r in rows)
        and max(off.values()) < 1e-9
    ), off
    assert (
        sum("scale" in r["kinds"] for r in good) >= 20
        and sum("gl" in r["kinds"] for r in good) >= 20
        and sum(r["few"] > 1 for r in good) >= 20
    )


def test_curvature_matters(rows):
    "Control: without σ'' the slope is another"
    flat = [
        r["flat"]
        for r in rows
        if "flat" in r and r["cond"] <= COND and r["finite"]
    ]
    assert len(flat) >= 100 and sum(f > 1e-6 for f in flat) >= 0.98 * len(flat), (
        sorted(flat)[:5]
    )
