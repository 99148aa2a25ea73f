"""The closed slope of the batch law against autograd through the whole action, on
hundreds of random chains"""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Generator, nn
from torch.func import grad

from symtele import BatchGL, grad_norm, loss_of, wire
from symtele.batch import OnBatch, batch
from symtele.objectives import landscape

NETS = 300
COND = 1e4  # above this condition of a layer's input rounding decides
LEAKY = [partial(nn.LeakyReLU, 0.1), partial(nn.LeakyReLU, 0.5)]
SMOOTH = [
    nn.Softplus,
    partial(nn.Softplus, 2.0),
    nn.ELU,
    partial(nn.ELU, 0.5),
    nn.CELU,
    nn.SELU,
    nn.Tanh,
    nn.Sigmoid,
    nn.LogSigmoid,
    nn.Softsign,
]


def half_squares(out, y):
    "A loss whose second derivative in the outputs is 1"
    return (out - y).square().sum() / 2


def whole(low, high):
    "A random whole number, both ends included"
    return torch.randint(low, high + 1, ()).item()


def draw(seed):
    """A chain of 2 to 8 layers, a batch, its loss; every third batch is wider
    than some layer, every fifth small for its layers"""
    torch.manual_seed(seed)
    depth, bias, mixed = 2 + seed % 7, bool(whole(0, 1)), whole(0, 1)
    wide = not seed % 3
    widths = [whole(3, 9) for _ in range(depth + 1)]
    n = whole(4, 10) if wide else whole(1, min(widths[:depth]))
    if wide:
        widths[0] = n + whole(0, 2)
    elif not seed % 5:
        widths, n = [3 * d for d in widths], min(n, 2)
    acts = LEAKY * 2 + [nn.Identity]
    if not wide:
        acts = SMOOTH + acts
    one = acts[whole(0, len(acts) - 1)]
    layers = []
    for a, b in zip(widths, widths[1:]):
        layers.append(nn.Linear(a, b, bias))
        layers.append((acts[whole(0, len(acts) - 1)] if mixed else one)())
    del layers[-1]
    for layer in layers[::2]:
        nn.init.orthogonal_(layer.weight)
    labels = whole(0, 1)
    x = torch.randn(n, widths[0], dtype=torch.float64)
    model = nn.Sequential(*layers).double()
    if labels:
        y = torch.randint(0, widths[-1], (n,))
        return model, x, nn.functional.cross_entropy, y
    y = torch.randn(n, widths[-1], dtype=torch.float64)
    return model, x, half_squares, y


def check(seed):
    """Relative errors of value and slope, at the start or after three moves;
    without σ'' where there is one"""
    torch.set_num_threads(1)
    model, x, loss_fn, y = draw(seed)
    loss, w = loss_of(model, loss_fn, y)
    try:
        orbit = BatchGL(wire(model, x)).orbit(w, x)
    except ValueError:
        return []
    if not isinstance(orbit.law, OnBatch):
        return []
    cond = max(
        torch.linalg.cond(p.full).item() for p in orbit.law.read.plus.values()
    )
    land = landscape(orbit, loss)
    moves = 3 * (seed // 7 % 2)
    for k in range(moves):
        if k == 1:
            land = land.climb(norm=0.03)
        else:
            rng = Generator().manual_seed(k)
            land = land.move(land.orbit.random(rng, 0.03))
    row = dict(
        seed=seed,
        closed=land.closed,
        cond=cond,
        kinds=tuple({kind.name for _, kind in orbit.blocks.spaces}),
        few=sum(link.trail is not None for link in land.chain.links),
    )
    return [row | errors(land, loss, x)]


def errors(land, loss, x):
    "Relative errors of value and slope, and of the slope without σ''"

    def height(xi):
        return grad_norm(lambda w: loss(w, x), land.orbit.act(xi))

    value, slope = height(land.orbit.zero()), grad(height)(land.orbit.zero())

    def error(found):
        return ((found - slope).norm() / slope.norm()).item()

    row = dict(
        finite=bool(value.isfinite() and slope.isfinite().all()),
        value=((land.height - value) / value).abs().item(),
        slope=error(land.slope()),
    )
    if any(curved(link) for link in land.chain.links):
        row["flat"] = error(flattened(land).slope())
    return row


def curved(link):
    "Whether a link of the batch law has a σ'' worth the name"
    if link.kind != batch or link.slopes is None:
        return False
    return bool(link.slopes[1].abs().max() > 0.01)


def flattened(land):
    "The landscape without σ''"
    links = tuple(
        link._replace(slopes=link.slopes and (link.slopes[0], 0 * link.slopes[1]))
        for link in land.chain.links
    )
    return replace(land, known={"chain": land.chain._replace(links=links)})


@pytest.fixture(scope="module")
def rows():
    "What every chain gave, from two processes"
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        return sum(pool.map(check, range(NETS), chunksize=15), [])


def judged(rows):
    "Those whose batch can be inverted"
    return [r for r in rows if r["cond"] <= COND and r["finite"]]


def test_value_and_slope(rows, capsys):
    "Where the batch can be inverted, to 1e-9; a chain is always recognised"
    good = judged(rows)
    nets = {r["seed"] for r in good}
    worst = dict(
        value=max(r["value"] for r in good), slope=max(r["slope"] for r in good)
    )
    flat = torch.tensor([r["flat"] for r in good if "flat" in r]).median()
    with capsys.disabled():
        print(
            f"\n{len(nets)} chains, largest relative error "
            f"of the value {worst['value']:.0e}, "
            f"of the slope {worst['slope']:.0e}; without σ'' median {flat:.0%}"
        )
    assert len(nets) >= 220
    assert all(r["closed"] for r in rows)
    assert max(worst.values()) < 1e-9, worst
    assert sum("scale" in r["kinds"] for r in good) >= 20
    assert sum("gl" in r["kinds"] for r in good) >= 20
    assert sum(r["few"] > 1 for r in good) >= 20


def test_curvature_matters(rows):
    "Control: without σ'' the slope is another"
    flat = [r["flat"] for r in judged(rows) if "flat" in r]
    wrong = sum(error > 1e-6 for error in flat)
    assert len(flat) >= 100
    assert wrong >= 0.98 * len(flat), sorted(flat)[:5]
