"""What a teleport costs, in counts that no noise reaches: flops, factorisations and calls of tensor operations,
against those of one gradient. Whoever makes a teleport dearer is told here, and by how much."""

import pytest
import torch
import torch.nn.functional as F

from symtele.experiments import count_flops
from symtele.groups import GL, BatchGL
from symtele.mlp import formula_ascent, speed_problem, squared
from symtele.mnist import net
from symtele.runtime import operations, peak_memory
from symtele.teleport import (
    Ascent,
    ChainNorm,
    grad_norm,
    landscape,
    loss_of,
    measure,
    teleport,
)
from symtele.wiring import wire

STEPS = 10


def square(width, layers, n=None):
    model, x, y = speed_problem((width,) * (layers + 1), n or width)
    return model, x, y, squared


def mnist():
    g = torch.Generator().manual_seed(0)
    return (
        net(784, 64, 64, 10),
        torch.randn(20, 784, generator=g),
        torch.arange(20) % 10,
        F.cross_entropy,
    )


# Problem, group, and what ten steps of small norm may cost: flops and calls in those of a gradient, factorisations,
# and peak memory in that of a gradient. Measured, then raised by 2 to 4 %: room for another version of PyTorch, and
# none for one more product in every step.
CASES = {
    "32, 3 layers": (lambda: square(32, 3), BatchGL, 30.8, 18.9, 2, 9.3),
    "64, 32 samples": (lambda: square(64, 3, 32), BatchGL, 42.8, 19.5, 4, 14.6),
    "32, 8 layers": (lambda: square(32, 8, 16), BatchGL, 55.2, 28.4, 14, 20.8),
    "64, 8 samples": (lambda: square(64, 3, 8), BatchGL, 40.4, 22.4, 24, 11.7),
    "MNIST, GL": (mnist, GL, 2.06, 36.1, 0, 3.25),
    "MNIST, BatchGL": (mnist, BatchGL, 14.0, 16.1, 4, 5.05),
}
TRUST = 30.7, 21.3, 3, 10.0  # the first of them, by the default search


def costs(f, base):
    "Flops, calls, factorisations and memory of `f`, all but the third over those of `base`"
    a, b = operations(f), operations(base)
    return (
        count_flops(f) / count_flops(base),
        len(a) / len(b),
        sum(c.kind == "factorisations" for c in a),
        peak_memory(f) / peak_memory(base),
    )


def case(name, search=None, objective=grad_norm):
    "A teleport and the gradient that it is held against; steps of norm 0.003, far from where an inverse is found another way"
    problem, group, *bounds = CASES[name]
    model, x, y, loss_fn = problem()
    loss, w = loss_of(model, loss_fn, y)
    bound = group(wire(model, x))
    search = search or Ascent(
        STEPS, lr=0.003 / landscape(bound.orbit(w, x), loss).slope().norm().item()
    )

    def move():
        return teleport(loss, w, bound, x, search=search, objective=objective)

    assert move().accepted
    return costs(move, lambda: measure(lambda w: loss(w, x), w)), bounds


def over(found, bounds):
    return {
        k: (f, b)
        for k, f, b in zip(
            ("flops", "calls", "factorisations", "memory"), found, bounds
        )
        if f > b
    }


@pytest.mark.parametrize("name", CASES)
def test_a_teleport_costs_no_more_than_it_did(name):
    "A bound that is met with much to spare is no bound: then lower it"
    found, bounds = case(name)
    assert not over(found, bounds), over(found, bounds)
    assert all(f > 0.85 * b for f, b in zip(found, bounds) if b), (found, bounds)


@pytest.mark.parametrize("name", ["32, 3 layers", "MNIST, BatchGL"])
def test_counts_do_not_vary(name):
    assert case(name)[0] == case(name)[0]


def test_the_default_search_costs_what_it_did():
    "The trust region: more calls a step than a fixed rate, hardly more flops"
    found, _ = case("32, 3 layers", Ascent(STEPS))
    assert not over(found, TRUST), found


def test_a_slope_by_autograd_is_seen():
    "Control: the same objective under another name has no closed slope, and breaks the bounds on flops and calls"
    found, bounds = case(
        "32, 3 layers", objective=lambda loss, w: grad_norm(loss, w)
    )
    assert {"flops", "calls"} <= set(over(found, bounds)), found


def test_one_more_product_in_every_step_is_seen(monkeypatch):
    "Control: the smallest slowdown worth a word, a tenth of a training step in each step of the ascent"
    slope = ChainNorm.slope
    monkeypatch.setattr(
        ChainNorm,
        "slope",
        lambda self: (self.chain.x @ self.chain.x.mT, slope(self))[1],
    )
    assert "flops" in over(*case("32, 3 layers"))


def test_the_formula_factorises_in_every_step():
    "Control: what the closed form saves; the bound of the exact teleport is not met by the paper's formula"
    model, x, y, loss_fn = square(32, 3)
    loss, w = loss_of(model, loss_fn, y)
    found = costs(
        lambda: formula_ascent(list(w.values()), x, y, 1e-12, STEPS),
        lambda: measure(lambda w: loss(w, x), w),
    )
    assert found[2] == 2 * STEPS and {"flops", "calls", "factorisations"} <= set(
        over(found, CASES["32, 3 layers"][2:])
    )
