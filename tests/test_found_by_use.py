"""What users ran into, one test for each: before it was mended, each of them
failed. What is shown on a page (own kinds, pinned trunks, trained searches,
resumed runs, moves that are undone) is checked there."""

import pickle
import pkgutil
import pydoc

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import grad

import symtele
from symtele import (
    GL,
    Ascent,
    BatchGL,
    Rotation,
    Teleporter,
    at,
    every,
    first,
    grad_norm,
    landscape,
    loss_of,
    reset,
    rosenbrock,
    teleport,
    wire,
)


def network():
    "A network of two hidden layers, a batch and its targets"
    torch.manual_seed(0)
    layers = (
        nn.Linear(8, 16),
        nn.ReLU(),
        nn.Linear(16, 16),
        nn.ReLU(),
        nn.Linear(16, 3),
    )
    return nn.Sequential(*layers), torch.randn(12, 8), torch.randint(3, (12,))


def plane():
    "A point on Rosenbrock's function and the group that moves it"
    return torch.tensor([-1.0, -1.0], dtype=torch.float64), Rotation(rosenbrock)


def test_a_write_that_fails_half_way_is_taken_back():
    "The bias is a view of one number: weights before it were written and stayed"
    model, x, y = network()
    model[2].bias = nn.Parameter(torch.zeros(1).expand(16))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="single memory location"):
        Teleporter(model, F.cross_entropy, schedule=at(0)).step(x, y)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_loss_of_every_sample_is_no_list_of_tasks():
    "It took 26 s and 2.2 GB where it was taken for 1,024 tasks"
    model, _, _ = network()
    x, y = torch.randn(1024, 8), torch.randint(3, (1024,))
    loss_fn = nn.CrossEntropyLoss(reduction="none")
    with pytest.raises(ValueError, match="1024 values.*reduction='mean'"):
        Teleporter(model, loss_fn, schedule=at(0)).step(x, y)


def test_reset_is_tried_when_it_is_asked_for():
    "Not in the middle of a run; and never the optimizer of another model"
    model, _, _ = network()
    other = torch.optim.Adam(network()[0].parameters())

    class Wrapping(torch.optim.SGD):
        def __init__(self, params, base, lr=0.1):
            super().__init__(params, lr=lr)

    strange = Wrapping(model.parameters(), torch.optim.SGD)
    for optimizer, says in (
        (strange, "new Wrapping"),
        (other, "not the model's"),
    ):
        with pytest.raises(ValueError, match=says):
            Teleporter(
                model,
                F.cross_entropy,
                schedule=at(0),
                optimizer=optimizer,
                state=reset,
            )


def test_modules_are_modules():
    "`import symtele.teleport as T` gave the function: a word hid a module's name"
    modules = {m.name for m in pkgutil.iter_modules(symtele.__path__)}
    assert len(modules) > 15 and not modules & set(symtele.__all__)
    hidden = [m for m in modules if not m.startswith("_")]
    for name in hidden:
        held = getattr(symtele, name, None)
        assert held is None or held.__name__ == f"symtele.{name}"


def test_results_are_short_and_schedules_travel():
    "A result had 10,000 characters; a schedule could not be pickled"
    model, x, y = network()
    tele = Teleporter(model, F.cross_entropy, schedule=every(3) | at(0))
    out = tele.step(x, y, k=np.int64(0))
    assert out.accepted and len(repr(out)) < 200 and "accepted" in repr(out)
    again = pickle.loads(pickle.dumps(tele.firing.schedule))
    assert [k for k in range(8) if again(k)] == [0, 3, 6]
    with pytest.raises(TypeError, match="whole number, got True"):
        tele.step(x, y, k=True)


def test_a_name_is_not_taken_for_a_wrapper():
    "A user's own attribute had the name that compiled models use"
    model, x, y = network()
    model._orig_mod = nn.Linear(3, 3)
    assert Teleporter(model, F.cross_entropy, schedule=at(0)).model is model


def test_help_explains_every_argument():
    "It listed their names"
    words = pydoc.render_doc(Teleporter, renderer=pydoc.plaintext)
    code = Teleporter.__init__.__code__
    names = code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]
    assert len(names) == 14
    assert not [name for name in names if f"{name}  " not in words]


def test_the_closed_form_can_be_differentiated_at_the_identity():
    "It gave 4.7e6 where -1.01e6 is right"
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(5, 6), nn.LeakyReLU(0.1), nn.Linear(6, 3)
    ).double()
    x, y = (torch.randn(4, d, dtype=torch.float64) for d in (5, 3))
    loss, w = loss_of(model, F.mse_loss, y)
    land = landscape(BatchGL(wire(model, x)).orbit(w, x), loss)
    assert land.closed
    slope = grad(lambda xi: land.move(xi).height)(land.orbit.zero())
    torch.testing.assert_close(slope, land.slope(), rtol=1e-9, atol=1e-12)


def test_a_random_objective_is_refused():
    "Before and after were different draws"
    w, group = plane()

    def noisy(loss, w):
        return grad_norm(loss, w) * torch.rand(())

    with pytest.raises(ValueError, match="objective gave two values"):
        teleport(rosenbrock.loss, w, group, objective=noisy)


def test_calls_of_the_loss_are_counted_as_often_as_they_are_made():
    "An objective that looks in twenty directions at once counted as one"
    w, group = plane()
    directions = torch.randn(20, 2, dtype=torch.float64)

    def around(loss, w):
        return torch.func.vmap(lambda d: loss(w + 0.1 * d))(directions).mean()

    stay = teleport(
        rosenbrock.loss, w, group, objective=around, search=lambda land, _: land
    )
    assert stay.evals >= 2 + 2 * 20


def test_an_ascent_without_a_cap_asks_for_no_gradient():
    "It computed the gradient's norm at every candidate"
    w, group = plane()
    asked = []

    def height(loss, w):
        asked.append(1)
        return loss(w) - w.square().sum()

    capped, free = (
        teleport(rosenbrock.loss, w, group, objective=height, search=search).evals
        for search in (Ascent(5), Ascent(5, growth=None))
    )
    assert (
        free == capped
    )  # a chart carries gradients: no call of the loss either way
    land = landscape(group.orbit(w), rosenbrock.loss, height)
    end = Ascent(5, growth=None)(land, torch.Generator())
    assert "gsq" not in land.known and "gsq" not in end.known


def test_a_firing_is_asked_about_without_firing():
    "Loops that need to know had to repeat the condition"
    model, x, y = network()
    tele = Teleporter(model, F.cross_entropy, GL(), schedule=first(1), batches=2)
    seen = [tele.due(k) for k in (0, 0, 1)]
    assert seen == [True, True, False] and tele.history == []
    assert tele.step(x, y, k=0) is not None and tele.due(0)
    assert tele.step(x, y, k=0) is not None and not tele.due(0)
