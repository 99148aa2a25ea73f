"""What a teleport costs, in counts that no noise reaches: flops, factorisations
and calls of tensor operations, against those of one gradient. Whoever makes a
teleport dearer is told here, and by how much."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

from symtele import closed
from symtele.baselines import formula_ascent, speed_problem, squared
from symtele.batch import BatchGL
from symtele.classifier import net
from symtele.experiments import count_flops
from symtele.networks import GL
from symtele.objectives import grad_norm, landscape, loss_of, measure
from symtele.runtime import operations, peak_memory
from symtele.searches import Ascent
from symtele.teleporting import teleport
from symtele.wiring import wire

STEPS = 10


class Costs(NamedTuple):
    "Measured, or the most that is allowed"

    flops: float  # In those of one gradient
    calls: float  # In those of one gradient
    factorisations: int
    memory: float  # At its peak, in that of one gradient


class Case(NamedTuple):
    "A problem, a group, and what ten steps of small norm may cost"

    problem: Callable[[], tuple]
    group: type
    most: Costs


def square(width, layers, n=None):
    "A regression whose layers are all as wide"
    model, x, y = speed_problem((width,) * (layers + 1), n or width)
    return model, x, y, squared


def mnist(width=64):
    "A classifier with a batch like one of MNIST"
    x = torch.randn(20, 784, generator=torch.Generator().manual_seed(0))
    model = net(784, width, width, 10)
    return model, x, torch.arange(20) % 10, F.cross_entropy


# Measured, then raised by 2 to 4 %: room for another version of PyTorch, and none
# for one more product in every step.
CASES = {
    "32, 3 layers": Case(
        partial(square, 32, 3), BatchGL, Costs(27.0, 12.3, 4, 5.41)
    ),
    "64, 32 samples": Case(
        partial(square, 64, 3, 32), BatchGL, Costs(39.5, 13.9, 8, 6.49)
    ),
    "32, 8 layers": Case(
        partial(square, 32, 8, 16), BatchGL, Costs(51.3, 20.8, 28, 11.4)
    ),
    "64, 8 samples": Case(
        partial(square, 64, 3, 8), BatchGL, Costs(36.5, 22.7, 46, 9.76)
    ),
    "MNIST, GL": Case(mnist, GL, Costs(1.52, 18.0, 0, 1.07)),
    "MNIST, BatchGL": Case(mnist, BatchGL, Costs(12.4, 11.6, 8, 2.15)),
    "256 wide, BatchGL": Case(
        partial(mnist, 256), BatchGL, Costs(19.7, 18.2, 46, 3.93)
    ),
}
TRUST = Costs(26.4, 15.3, 4, 6.57)  # the first of them, by the default search


def costs(call, gradient):
    "What a call costs beside a gradient"
    done, base = operations(call), operations(gradient)
    return Costs(
        flops=count_flops(call) / count_flops(gradient),
        calls=len(done) / len(base),
        factorisations=sum(c.kind == "factorisations" for c in done),
        memory=peak_memory(call) / peak_memory(gradient),
    )


def measured(name, search=None, objective=grad_norm):
    """What a teleport costs; steps of norm 0.003, far from where an inverse is
    found another way"""
    case = CASES[name]
    model, x, y, loss_fn = case.problem()
    loss, w = loss_of(model, loss_fn, y)
    group = case.group(wire(model, x))
    if search is None:
        slope = landscape(group.orbit(w, x), loss).slope()
        search = Ascent(STEPS, lr=0.003 / slope.norm().item())

    def move():
        return teleport(loss, w, group, x, search=search, objective=objective)

    def gradient():
        return measure(lambda w: loss(w, x), w)

    assert move().accepted
    return costs(move, gradient)


def over(found, most):
    "What costs more than is allowed"
    pairs = zip(Costs._fields, found, most)
    return {name: (cost, bound) for name, cost, bound in pairs if cost > bound}


@pytest.mark.parametrize("name", CASES)
def test_a_teleport_costs_no_more_than_it_did(name):
    "A bound that is met with much to spare is no bound: then lower it"
    found, most = measured(name), CASES[name].most
    assert not over(found, most)
    for cost, bound in zip(found, most):
        assert cost > 0.85 * bound or not bound, (found, most)


@pytest.mark.parametrize("name", ["32, 3 layers", "MNIST, BatchGL"])
def test_counts_do_not_vary(name):
    "The same teleport twice"
    assert measured(name) == measured(name)


def test_the_default_search_costs_what_it_did():
    "The trust region: more calls a step than a fixed rate, hardly more flops"
    found = measured("32, 3 layers", Ascent(STEPS))
    assert not over(found, TRUST), found


def test_a_slope_by_autograd_is_seen():
    """Control: the same objective under another name has no closed slope, and
    breaks the bounds on flops and calls"""

    def same_norm(loss, w):
        return grad_norm(loss, w)

    found = measured("32, 3 layers", objective=same_norm)
    dearer = over(found, CASES["32, 3 layers"].most)
    assert {"flops", "calls"} <= set(dearer), found


# Layers -> products in a further step of the batch law, square and without biases
PRODUCTS = {3: 19, 5: 44, 8: 83}


def products_of_a_step(layers):
    "How many products one more step of a fixed rate takes"
    model, x, y, loss_fn = square(32, layers)
    loss, w = loss_of(model, loss_fn, y)
    group = BatchGL(wire(model, x))
    slope = landscape(group.orbit(w, x), loss).slope()
    rate = 0.003 / slope.norm().item()

    def products(steps):
        search = Ascent(steps, lr=rate)
        calls = operations(lambda: teleport(loss, w, group, x, search=search))
        return sum(call.kind == "products" for call in calls)

    return products(2) - products(1)


@pytest.mark.parametrize("layers", PRODUCTS)
def test_a_step_takes_no_more_products_than_it_did(layers):
    assert products_of_a_step(layers) == PRODUCTS[layers]


def test_one_more_product_in_every_step_is_seen(monkeypatch):
    """Control: the smallest slowdown worth a word, a tenth of a training step in
    each step of the ascent"""
    slope = closed._chain_slope

    def slower(chain, passed):
        chain.x @ chain.x.mT
        return slope(chain, passed)

    monkeypatch.setattr(closed, "_chain_slope", slower)
    assert "flops" in over(measured("32, 3 layers"), CASES["32, 3 layers"].most)
    assert products_of_a_step(3) == PRODUCTS[3] + 1


def test_the_formula_factorises_in_every_step():
    """Control: what the closed form saves; the bound of the exact teleport is not
    met by the paper's formula"""
    model, x, y, loss_fn = square(32, 3)
    loss, w = loss_of(model, loss_fn, y)
    found = costs(
        lambda: formula_ascent(list(w.values()), x, y, 1e-12, STEPS),
        lambda: measure(lambda w: loss(w, x), w),
    )
    assert found.factorisations == 2 * STEPS
    dearer = set(over(found, CASES["32, 3 layers"].most))
    assert {"flops", "calls", "factorisations"} <= dearer
