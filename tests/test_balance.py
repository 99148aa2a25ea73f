"""The point with the least Σw²: in loops, under `vmap`, on models of all kinds,
and what is left of a model where the move is refused"""

from copy import deepcopy
from statistics import median

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, nn
from torch.utils._pytree import tree_map

from symtele import Scaling, Teleporter, every, loss_of, teleport, transport, wire
from symtele.balance import Balance, balance
from symtele.zoo import ZOO


def network(seed=0, scale=3.0):
    "A ReLU network whose units have lognormal scales"
    rng = Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)
    )
    with torch.no_grad():
        for i in (0, 2):
            z = scale * torch.randn(8, generator=rng)
            model[i].weight.mul_(z.exp()[:, None])
            model[i].bias.mul_(z.exp())
            model[i + 2].weight.mul_((-z).exp())
    return model


def batch(n=16, seed=0):
    "Random images of six pixels and labels"
    rng = Generator().manual_seed(seed)
    return torch.randn(n, 6, generator=rng), torch.arange(n) % 3


def squares(model):
    "Σw²"
    return sum(p.double().square().sum().item() for p in model.parameters())


def same(model, state):
    "Whether a model has these numbers, bit for bit"
    now = model.state_dict()
    return all(torch.equal(t, now[k]) for k, t in state.items())


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_in_a_loop(optimizer):
    "Every second step, with the optimizer's moments carried along"
    model, (x, y) = network(), batch()
    how = dict(momentum=0.9) if optimizer is torch.optim.SGD else {}
    opt = optimizer(model.parameters(), lr=1e-2, **how)
    tele = Teleporter(
        model,
        F.cross_entropy,
        Scaling(),
        schedule=every(2, start=0),
        search=Balance(),
        optimizer=opt,
        state=transport,
    )
    for _ in range(20):
        tele.step(x, y)
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step()
    assert len(tele.history) == 10
    assert all(row["accepted"] for row in tele.history)
    assert F.cross_entropy(model(x), y) < tele.history[0]["loss_before"]
    assert median(row["steps"] for row in tele.history[1:]) < 20


def test_under_vmap():
    "Several networks at once end where each ends alone"
    models = [network(seed).double() for seed in range(3)]
    x, y = batch()
    x = x.double()
    loss, _ = loss_of(models[0], F.cross_entropy, y)
    group = Scaling(wire(models[0], x))
    alone = [loss_of(m, F.cross_entropy, y)[1] for m in models]
    stack = tree_map(lambda *t: torch.stack(t), *alone)
    search = Balance(sweeps=40)

    def move(w):
        return teleport(loss, w, group, x, search=search).w

    together = torch.func.vmap(move)(stack)
    for i, w in enumerate(alone):
        for k, t in move(w).items():
            torch.testing.assert_close(together[k][i], t, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "name",
    [
        "LeNet",
        "SmallResNet",
        "SmallViT",
        "GPT",
        "Llama",
        "UNet",
        "LSTM",
        "two inputs",
        "named inputs",
        "weight_norm",
    ],
)
def test_models_of_all_kinds(name):
    "The outputs stay, Σw² does not grow, and a second call finds nothing to do"
    torch.manual_seed(0)
    model, x = (make() for make in ZOO[name])
    model.eval()
    parameters, before = list(model.parameters()), squares(model)
    record = balance(model, x)
    assert record.accepted and record.drift < 2e-5, record
    assert all(p is q for p, q in zip(parameters, model.parameters()))
    after = squares(model)
    assert after <= before * (1 + 1e-6)
    again = balance(model, x)
    assert again.accepted and squares(model) == pytest.approx(after, rel=1e-6)


def test_a_refused_move_leaves_every_bit():
    "A search that goes where float32 ends"

    def far(land, rng):
        return land.move(land.orbit.zero() + 200)

    model, (x, _) = network(), batch()
    state = deepcopy(model.state_dict())
    record = balance(model, x, far)
    assert not record.accepted and "finite" in record.reason
    assert same(model, state)


def test_frozen_parameters_stay():
    "What does not train is not moved, nor what would have to move with it"
    model, (x, _) = network(), batch()
    model[0].requires_grad_(False)
    state = deepcopy(model.state_dict())
    before = model(x)
    record = balance(model, x)
    assert record.accepted and not same(model, state)
    assert same(model, {k: t for k, t in state.items() if k[0] == "0"})
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types(dtype):
    "A half-precision move holds or is refused; a wide one is exact"
    model, (x, _) = network(scale=1.0).to(dtype), batch()
    x = x.to(dtype)
    state, before = deepcopy(model.state_dict()), model(x)
    record = balance(model, x)
    if record.accepted:
        error = (model(x) - before).abs().max() / before.abs().max()
        assert error < 4 * torch.finfo(dtype).eps ** (2 / 3)
    else:
        assert same(model, state)
    assert record.accepted or dtype == torch.bfloat16


def test_units_in_training_mode_with_dropout():
    "The measurement repeats its random numbers, and mode and `.grad` stay"
    model, (x, y) = network(), batch()
    model = nn.Sequential(*model[:2], nn.Dropout(0.5), *model[2:])
    F.cross_entropy(model(x), y).backward()
    grads = [p.grad.clone() for p in model.parameters()]
    record = balance(model, x)
    assert record.accepted and model.training
    assert all(torch.equal(g, p.grad) for g, p in zip(grads, model.parameters()))
