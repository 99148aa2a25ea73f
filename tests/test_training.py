"""What a sceptical user checks before a `Teleporter` goes into a training loop:
every optimizer, every resume, every mistake. A move keeps the loss and changes
parameters; a call that fails changes nothing at all."""

import copy
import inspect
import pickle
import random
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils._pytree import tree_leaves, tree_map

from symtele.batch import BatchGL, LeastSquares
from symtele.groups import Orthogonal
from symtele.networks import GL, Permutation, Scaling
from symtele.objectives import lookahead, loss_of
from symtele.searches import Ascent, Random, Sample
from symtele.teleporting import teleport
from symtele.training import Teleporter, at, every, first, keep, reset, transport
from symtele.wiring import wire

# SparseAdam raises on dense gradients, and these layers make no others
OPTIMIZERS = {
    name: cls
    for name, cls in vars(torch.optim).items()
    if isinstance(cls, type)
    and issubclass(cls, torch.optim.Optimizer)
    and name not in ("Optimizer", "SparseAdam")
}
X, Y = (
    torch.randn(
        6, d, dtype=torch.float64, generator=torch.Generator().manual_seed(d)
    )
    for d in (5, 3)
)
nan, inf = torch.nan, torch.inf


def leaky():
    "The activation of most models here"
    return nn.LeakyReLU(0.1)


def net(*recipe, dtype=torch.float64):
    """Layers by recipe: a tuple is a linear layer, the rest are modules; the
    global random state is left alone"""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Linear(*r) if isinstance(r, tuple) else r for r in recipe]
    return nn.Sequential(*layers).to(dtype)


def mlp(act=leaky, bias=True, **options):
    "Three layers of 6 units"
    return net((5, 6, bias), act(), (6, 6, bias), act(), (6, 3, bias), **options)


def noisy():
    "Dropout and BatchNorm in train mode, but for the last dropout"
    model = net(
        (5, 6),
        leaky(),
        (6, 6),
        leaky(),
        nn.Dropout(0.3),
        (6, 4),
        nn.BatchNorm1d(4),
        nn.Dropout(0.2),
        (4, 3),
    )
    model[7].eval()
    return model


def make(name, model, **options):
    "An optimizer with the options that change its memory, as far as it has them"
    known = inspect.signature(OPTIMIZERS[name]).parameters
    options |= dict(
        weight_decay=0.01, momentum=0.9, initial_accumulator_value=0.1
    )
    own = {k: v for k, v in options.items() if k in known}
    return OPTIMIZERS[name](model.parameters(), **own)


def loss_by_hand(model, x=X, y=Y):
    "The loss in full precision under one fixed dropout mask, from a copy"
    with (
        torch.random.fork_rng(),
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
    ):
        torch.manual_seed(7)
        return F.mse_loss(copy.deepcopy(model)(x), y).item()


def update(model, optimizer, x=X, y=Y):
    "One ordinary step; LBFGS evaluates the loss itself"

    def closure():
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        return loss

    if isinstance(optimizer, torch.optim.LBFGS):
        optimizer.step(closure)
        return
    closure()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def params(model):
    "A copy of the parameters by name"
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def moved(model, old):
    "Names of the parameters that are not what they were"
    return [n for n, p in model.named_parameters() if not torch.equal(p, old[n])]


def near(found, wanted, rtol):
    "Whether a loss is the same within rounding"
    return abs(found - wanted) <= rtol * wanted


def bits(*trees):
    "All values, tensors as bytes, so that nan equals itself and -0 is not 0"
    return [leaf_bits(leaf) for leaf in tree_leaves(trees)]


def leaf_bits(leaf):
    "Type, shape and bytes of a tensor, which has none on meta; text of all else"
    if not isinstance(leaf, torch.Tensor):
        return repr(leaf)
    if leaf.device.type == "meta":
        return leaf.dtype, leaf.shape, b""
    return leaf.dtype, leaf.shape, leaf.detach().numpy().tobytes()


def training(model, optimizer):
    "Whatever a teleport that is not accepted might have touched"
    return bits(
        dict(model.state_dict()),
        [p.grad for p in model.parameters()],
        optimizer.state_dict(),
        [id(p) for p in optimizer.state],
        [
            (m.training, len(m._forward_hooks), len(m._forward_pre_hooks))
            for m in model.modules()
        ],
        torch.get_rng_state(),
    )


def everything(model, optimizer, tele):
    "The same, and what the Teleporter keeps"
    return training(model, optimizer) + bits(tele.state_dict(), id(tele.group))


@pytest.mark.parametrize("state", (keep, reset), ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer(name, state):
    """An optimizer notices a teleport by its gradient only, and by a new memory
    where that was asked for"""
    model = mlp(bias=name != "Muon")  # Muon takes matrices only
    optimizer = make(name, model, max_iter=3)
    scheduler = ExponentialLR(optimizer, 0.98)
    tele = Teleporter(
        model, F.mse_loss, schedule=at(3, 6), optimizer=optimizer, state=state
    )
    refs, start = optimizer.param_groups[0]["params"], loss_by_hand(model)
    for k in range(12):
        loss, old = loss_by_hand(model), params(model)
        memory = bits(optimizer.state_dict())
        out = tele.step(X, Y)
        fired = out is not None
        assert fired == (k in (3, 6))
        assert fired == bool(moved(model, old))
        if fired:
            assert out.accepted
            assert len(moved(model, old)) >= 3
            assert near(loss_by_hand(model), loss, 1e-12)
        if state is reset and fired:
            assert bits(optimizer.state_dict()) != memory
            goes_on_like_new(name, model, optimizer)
        else:
            assert bits(optimizer.state_dict()) == memory
        update(model, optimizer)
        scheduler.step()
    assert all(p is q for p, q in zip(refs, model.parameters(), strict=True))
    assert loss_by_hand(model) < start


def goes_on_like_new(name, model, optimizer):
    "Two steps beside a new optimizer on a copy: no memory is anywhere else"
    twin = copy.deepcopy(model)
    new = make(name, twin, max_iter=3, lr=optimizer.param_groups[0]["lr"])
    state, fresh = optimizer.state_dict()["state"], new.state_dict()["state"]
    assert bits(state) == bits(fresh)
    for _ in range(2):
        update(model, optimizer)
        update(twin, new)
    assert bits(params(model)) == bits(params(twin))


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_accumulation_fires_once(dtype):
    """With k = optimizer steps taken, the first micro-batch fires and all of them
    add gradients of the new place"""
    model, x, y = mlp(dtype=dtype), X.to(dtype), Y.to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tele = Teleporter(
        model, F.mse_loss, schedule=every(2, start=0), search=Random(0.5)
    )
    fired = []
    for k in range(4):
        for i, (part, labels) in enumerate(zip(x.split(2), y.split(2))):
            loss, old = loss_by_hand(model, x, y), params(model)
            out = tele.step(part, labels, k=k)
            if out is not None:
                fired.append((k, i))
                assert out.accepted
                assert model[0].weight.dtype == out.w["0.weight"].dtype == dtype
            assert (out is not None) == bool(moved(model, old))
            rtol = 100 * torch.finfo(dtype).eps
            assert near(loss_by_hand(model, x, y), loss, rtol)
            (F.mse_loss(model(part), labels) / 3).backward()
        added = [p.grad for p in model.parameters()]
        torch.testing.assert_close(added, gradients(model, x, y))
        optimizer.step()
        optimizer.zero_grad()
    assert fired == [(0, 0), (2, 0)]
    assert tele.step(x, y, k=2) is None


def gradients(model, x, y):
    "Gradients of the loss on a whole batch"
    return list(
        torch.autograd.grad(F.mse_loss(model(x), y), [*model.parameters()])
    )


def test_autocast():
    """Half precision could not tell an exact move from a bad one, and autocast's
    copies of old weights give old gradients"""
    model, x, y = mlp(dtype=torch.float32), X.float(), Y.float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    tele = Teleporter(
        model,
        F.mse_loss,
        schedule=at(2, 5),
        search=Random(1.0),
        optimizer=optimizer,
        state=reset,
    )
    start = loss_by_hand(model, x, y)
    for k in range(10):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(x)
            before, old = loss_by_hand(model, x, y), params(model)
            out = tele.step(x, y)
            loss = F.mse_loss(model(x), y)
            assert (out is not None) == (k in (2, 5))
            assert (out is not None) == bool(moved(model, old))
            assert torch.is_autocast_enabled("cpu")
            if out:
                assert out.accepted
                assert near(loss_by_hand(model, x, y), before, 1e-6)
                assert out.w["0.weight"].dtype == torch.float32
        with torch.autocast("cpu", dtype=torch.bfloat16):
            fresh = F.mse_loss(model(x), y)
        loss.backward()
        wanted = torch.autograd.grad(fresh, list(model.parameters()))
        assert bits([p.grad for p in model.parameters()]) == bits(wanted)
        optimizer.step()
        optimizer.zero_grad()
    assert loss_by_hand(model, x, y) < start


def train(name, steps, load=None, without=None):
    "States of all parts of a run after some steps, from a checkpoint or anew"
    bias = name != "Muon"
    model = net(
        (5, 6, bias),
        leaky(),
        nn.Dropout(0.2),
        (6, 6, bias),
        leaky(),
        (6, 3, bias),
    )
    optimizer = make(name, model, max_iter=3)
    scheduler = ExponentialLR(optimizer, 0.98)
    tele = Teleporter(
        model,
        F.mse_loss,
        schedule=every(3),
        search=Random(0.3),
        batches=2,
        optimizer=optimizer,
        state=reset,
    )
    parts = dict(model=model, optimizer=optimizer, scheduler=scheduler, tele=tele)
    saved = torch.load(load) if load else {}
    for part in saved.keys() - {without, "rng"}:
        parts[part].load_state_dict(saved[part])
    start = torch.Generator().manual_seed(0).get_state()
    torch.set_rng_state(saved.get("rng", start))
    for _ in range(steps):
        tele.step(X, Y)
        update(model, optimizer)
        scheduler.step()
    states = {name: part.state_dict() for name, part in parts.items()}
    return states | dict(rng=torch.get_rng_state())


def final_bits(run):
    "All that a run leaves, but for the seconds"
    tele = run["tele"]
    timeless = [{**row, "seconds": 0} for row in tele["history"]]
    return bits(
        dict(run["model"]), run["optimizer"], run["rng"], tele["rng"], timeless
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resumed_is_uninterrupted(name, tmp_path):
    """A run killed in the middle of a firing and started again elsewhere ends on
    the same bits"""
    path, whole = tmp_path / "run.pt", train(name, 9)
    torch.save(train(name, 4), path)
    saved = torch.load(path)["tele"]
    tensors = [t for t in tree_leaves(saved) if isinstance(t, torch.Tensor)]
    assert saved["left"] == 1
    # no parameters
    assert sum(t.numel() for t in tensors) == saved["rng"].numel()
    history = whole["tele"]["history"]
    fired = [(k, True) for k in (3, 4, 6, 7)]
    assert [(row["k"], row["accepted"]) for row in history] == fired
    for row in history:
        assert all(type(v) in (int, float, bool, str) for v in row.values())
    assert final_bits(train(name, 5, path)) == final_bits(whole)
    other = train(name, 5, path, without="tele")  # control
    assert bits(dict(other["model"])) != bits(dict(whole["model"]))


class Twice(nn.Module):
    "Calls a layer twice: what it reads and what it makes is one space"

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = net((5, 6), (6, 6), (6, 3))

    def forward(self, x):
        h = F.leaky_relu(self.a(x), 0.1)
        return self.c(F.leaky_relu(self.b(F.leaky_relu(self.b(h), 0.1)), 0.1))


class Branch(nn.Module):
    "A graph that depends on values"

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(5, 3).double()

    def forward(self, x):
        return self.a(x) if x.sum() > 0 else -self.a(x)


def poisoned():
    "A model with one parameter that is nan"
    model = noisy()
    model[2].weight.data[0, 0] = nan
    return model


def bad_policy(optimizer, out, pull):
    "What may go wrong in code of one's own"
    raise ArithmeticError("policy failed")


def no_search(land, rng):
    "Forgets to return a landscape"


def short_search(land, rng):
    "Moves by an element of the wrong shape"
    return land.move(torch.zeros(3))


def reduced(how):
    "A loss that reduces the squared errors in its own way"

    def loss_fn(out, y):
        return how(F.mse_loss(out, y, reduction="none"))

    return dict(loss_fn=loss_fn)


def no_inverse(act):
    "A model that `BatchGL` cannot move, and what is said of it"
    op = act.__name__.lower()
    says = f"BatchGL finds.*{op} has no inverse.*would move"
    return dict(model=mlp(act), group=BatchGL()), says


BAD = {  # what is wrong: (what to change, what the message must say)
    "x narrow": (dict(x=X[:, :4]), r"\bx\b.*\(6, 4\)"),
    "x flat": (dict(x=X[0]), r"\bx\b.*\(5,\)"),
    "x empty": (dict(x=X[:0], y=Y[:0]), r"\bx\b.*at least one sample.*\(0, 5\)"),
    "x float32": (dict(x=X.float()), r"x has dtype torch.float32.*torch.float64"),
    "x nan": (dict(x=X * nan), "x holds 30 values that are nan"),
    "x inf": (dict(x=X / 0), "x holds 30 values that are nan or inf"),
    "x list": (dict(x=X.tolist()), r"\bx\b must be a Tensor.*list"),
    "x None": (dict(x=None), r"\bx\b must be a Tensor.*None"),
    "x meta": (dict(x=X.to("meta")), "x is on meta"),
    "y short": (dict(y=Y[:5]), "size of tensor a"),
    "y nan": (dict(y=Y * nan), "loss is nan"),
    "y inf": (dict(y=Y / 0), "loss is inf"),
    "y meta": (dict(y=Y.to("meta")), "meta"),
    "model nan": (dict(model=poisoned()), r"w\['2.weight'\] holds 1 values"),
    "model meta": (
        dict(model=noisy().to("meta")),
        r"x is on cpu, w\['0.weight'\] on meta",
    ),
    "model ReLU": no_inverse(nn.ReLU),
    "model GELU": no_inverse(nn.GELU),
    "model Tanh": (
        dict(model=mlp(nn.Tanh)),
        "would move something: Permutation, BatchGL",
    ),
    "model frozen": (
        dict(model=noisy().requires_grad_(False)),
        "model.*no trainable parameters",
    ),
    "model linear": (dict(model=net((5, 3))), "GL finds nothing to move"),
    "model branches": (dict(model=Branch()), "GL finds nothing to move"),
    "model twice": (
        dict(model=Twice(), group=BatchGL()),
        "BatchGL finds no layer for its batch action.*parameters are shared",
    ),
    "model dropout": (
        dict(
            model=net((5, 6), nn.Tanh(), nn.Dropout(0.5), (6, 3)),
            group=Permutation(),
            search=Sample(2),
        ),
        "Permutation finds nothing.*told apart by mul in 2.*No group here",
    ),
    "loss float": (
        reduced(lambda e: e.mean().item()),
        "loss must return a Tensor, got float",
    ),
    "loss (0,)": (
        reduced(lambda e: e[0, :0]),
        r"loss.*of shape \(0,\)",
    ),
    "loss int": (
        reduced(lambda e: e.sum().long()),
        "loss.*floating.*int64",
    ),
    "loss (N,M)": (
        reduced(lambda e: e),
        r"loss.*shape \(\) or \(T,\), got torch.float64 of shape \(6, 3\)",
    ),
    "loss (1,M)": (
        reduced(lambda e: e.mean(0, keepdim=True)),
        r"loss.*of shape \(1, 3\)",
    ),
    "loss constant": (
        dict(loss_fn=lambda out, y: y.sum()),
        "loss does not depend on w",
    ),
    "loss detached": (
        reduced(lambda e: e.mean().detach()),
        "loss does not depend on w",
    ),
    "loss random": (
        reduced(lambda e: e.mean() * (1 + random.random())),
        "loss gave two values for the same parameters",
    ),
    "k -1": (dict(k=-1), "k must be at least 0, got -1"),
    "k 1.5": (dict(k=1.5), "k must be a whole number, got 1.5"),
    "k True": (dict(k=True), "k must be a whole number, got True"),
    "search None": (
        dict(search=no_search),
        "search must return a landscape.*NoneType",
    ),
    "search shape": (
        dict(search=short_search),
        r"xi must have shape \(16,\), got \(3,\)",
    ),
    "search slope": (
        dict(group=Permutation()),
        "Ascent needs a group with a slope",
    ),
    "group chart": (dict(group=Orthogonal(torch.eye(2))), "moves one Tensor"),
    "policy": (dict(state=bad_policy), "policy failed"),
    "probe narrow": (dict(probe=(X[:, :4], Y)), "6x4"),
}


LINEAR = GL()


def rig(
    model=None, loss_fn=F.mse_loss, group=LINEAR, *, x=X, y=Y, k=None, **parts
):
    """A model in mid-training with gradients and momenta, its optimizer, its
    Teleporter, and the call to make"""
    model = model or noisy()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    optimizer.step()
    usual = dict(schedule=lambda k: True, optimizer=optimizer, state=reset)
    tele = Teleporter(model, loss_fn, group, **usual | parts)
    return model, optimizer, tele, lambda: tele.step(x, y, k)


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("what", BAD)
def test_bad_input_changes_nothing(what):
    "Whoever catches the error has what they had, and can read what was wrong"
    change, says = BAD[what]
    model, optimizer, tele, call = rig(**change)
    before = everything(model, optimizer, tele)
    errors = (ValueError, TypeError, RuntimeError, ArithmeticError)
    with pytest.raises(errors, match=f"(?s){says}") as error:
        call()
    assert everything(model, optimizer, tele) == before
    assert "Original traceback" not in str(error.value)  # a tracer's words


def test_a_layer_called_twice_moves():
    "By what its two uses share; a matrix for each would not keep the loss"
    model = Twice()
    old, loss = params(model), loss_by_hand(model)
    tele = Teleporter(model, F.mse_loss, schedule=at(0), search=Random(0.5))
    assert tele.step(X, Y).accepted
    assert moved(model, old) == [
        "a.weight",
        "a.bias",
        "b.weight",
        "b.bias",
        "c.weight",
    ]
    assert near(loss_by_hand(model), loss, 1e-12)


M = mlp()
BUILD = {  # what is wrong: (how to build it, what the message must say)
    "at(-1)": (partial(at, -1), "got -1"),
    "at()": (at, "at least one"),
    "every(0)": (partial(every, 0), r"every\(n\).*got 0"),
    "first(1.5)": (partial(first, 1.5), "got 1.5"),
    "every start": (partial(every, 3, start=-2), "start.*got -2"),
    "singular": (
        partial(Orthogonal, torch.diag(torch.tensor([1.0, 0.0]))),
        "positive-definite.*0",
    ),
    "A nan": (
        partial(Orthogonal, torch.full((2, 2), nan)),
        r"Orthogonal\(A\).*nan",
    ),
    "A list": (
        partial(Orthogonal, [[1.0, 0.0], [0.0, 1.0]]),
        r"Orthogonal\(A\).*Tensor.*list",
    ),
}
PARTS = (  # part of a Teleporter, what it must not be, what the message must say
    ("schedule", "often", "got 'often'"),
    ("schedule", 7, "got 7"),
    ("schedule", None, "got None"),
    ("model", F.relu, "got function"),
    ("state", reset, "needs the optimizer"),
    ("state", transport, "needs the optimizer"),
    ("search", "x", "got 'x'"),
    ("search", Ascent, "got.*Ascent"),
    ("objective", "x", "got 'x'"),
    ("loss_fn", "mse", "got 'mse'"),
    ("group", GL, "got.*GL"),
    ("group", "gl", "got 'gl'"),
    ("tol", -1.0, "got -1"),
    ("tol", nan, "got nan"),
    ("tol", "x", "got 'x'"),
    ("batches", 0, "got 0"),
    ("probe", 3, "got 3"),
    ("inputs", nn.Linear(3, 4), "square.*got"),
)
for part, value, says in PARTS:
    name = getattr(value, "__name__", value)
    whole = {"model": M, "loss_fn": F.mse_loss, "schedule": at(0), part: value}
    BUILD[f"{part}={name!r}"] = partial(Teleporter, **whole), f"{part}.*{says}"
for steps, says in (
    (set(), "at least one"),
    ({-3}, "at least 0, got -3"),
    ({0.5}, "whole number, got 0.5"),
):
    build = partial(Teleporter, M, F.mse_loss, schedule=steps)
    BUILD[f"schedule={steps!r}"] = build, says
BUILD |= {
    "state name": (
        partial(
            Teleporter,
            M,
            F.mse_loss,
            schedule=at(0),
            optimizer=torch.optim.Adam(M.parameters()),
            state="reset",
        ),
        "state.*got 'reset'",
    ),
    "optimizer name": (
        partial(
            Teleporter,
            M,
            F.mse_loss,
            schedule=at(0),
            optimizer="adam",
            state=reset,
        ),
        "optimizer.*got 'adam'",
    ),
    "LeastSquares": (
        partial(Teleporter, M, F.mse_loss, LeastSquares(), schedule=at(0)),
        "tol",
    ),
}


@pytest.mark.parametrize("what", BUILD)
def test_bad_parts_are_refused_when_built(what):
    "What can be seen at the start must not wait for a firing, hours later"
    build, says = BUILD[what]
    with pytest.raises((ValueError, TypeError), match=f"(?s){says}"):
        build()


def test_bad_state_loads_nothing():
    "A checkpoint is loaded whole or not at all"
    model, optimizer, tele, call = rig()
    call()
    before, good = everything(model, optimizer, tele), tele.state_dict()
    for change, says in (
        (dict(rng=torch.zeros(3)), "RNG"),
        (dict(k=-1), "k must be at least 0, got -1"),
        (dict(left="a"), "left.*'a'"),
    ):
        state = good | dict(k=7, history=[]) | change
        with pytest.raises((TypeError, ValueError, RuntimeError), match=says):
            tele.load_state_dict(state)
        assert everything(model, optimizer, tele) == before
    with pytest.raises(ValueError, match="history"):
        tele.load_state_dict({"k": 3})
    call()
    assert len(good["history"]) == 1  # a saved state does not go on


@pytest.mark.parametrize("error", (RuntimeError, KeyboardInterrupt))
@pytest.mark.parametrize("where", ("loss", "layer"))
@pytest.mark.parametrize(
    "group", (GL(), BatchGL()), ids=lambda g: type(g).__name__
)
@pytest.mark.parametrize("n", range(4))
def test_exceptions_leave_no_trace(n, group, where, error):
    """Ctrl-C, or an error, at the first to fourth call of the loss or of a layer:
    the same firing can be tried again"""
    outcomes = iter(())

    def fails(*args):
        failure = next(outcomes, None)
        if failure:
            raise failure("out of luck")

    def loss_fn(out, y):
        if where == "loss":
            fails()
        return F.mse_loss(out, y)

    model, optimizer, tele, call = rig(
        None, loss_fn, group, objective=lookahead(0.1), search=Random(0.3)
    )
    if where == "layer":
        model[5].register_forward_hook(fails)
    for k in range(2):  # before and after the model has been read
        before = everything(model, optimizer, tele)
        outcomes = iter([None] * n + 2 * [error])  # a reading tries twice
        with pytest.raises((error, ValueError), match="out of luck"):
            call()  # a ValueError while the model is read
        assert everything(model, optimizer, tele) == before
        assert tele.k == k
        outcomes = iter(())
        old, loss = params(model), loss_by_hand(model)
        assert call().accepted
        assert moved(model, old)
        assert near(loss_by_hand(model), loss, 1e-11)
        assert tele.k == k + 1


GROUPS = (GL(), BatchGL(), Scaling())
VALUES = (1e300, -1e300, inf, nan, "singular")
RUNAWAYS = [(g, v) for g in GROUPS for v in VALUES]
RUNAWAYS[-1] = (Permutation(), "collapse")  # a diagonal is never singular


@pytest.mark.parametrize(
    "loss_fn", (F.mse_loss, F.binary_cross_entropy), ids=lambda f: f.__name__
)
@pytest.mark.parametrize("group,value", RUNAWAYS, ids=str)
def test_overflow_is_refused(group, value, loss_fn):
    """A search that runs away, or leaves the group, is refused and not raised,
    even where the loss raises on nan"""
    act = nn.Identity if type(group) is GL else leaky
    y = Y if loss_fn is F.mse_loss else (Y > 0).double()

    def search(land, rng):
        zero = land.orbit.zero()
        if value == "singular":  # I + T = 0 in both spaces
            both = [-torch.eye(6, dtype=torch.float64).flatten()] * 2
            return land.move(torch.cat(both))
        return land.move(zero * 0 if value == "collapse" else zero + value)

    model, optimizer, tele, call = rig(
        net((5, 6), act(), (6, 6), act(), (6, 3), nn.Sigmoid()),
        loss_fn,
        group,
        y=y,
        search=search,
        probe=(X, y),
    )
    before = training(model, optimizer)
    out = call()
    assert not out.accepted
    assert ("the loss changed" if value == "collapse" else "finite") in out.reason
    assert training(model, optimizer) == before
    assert bits(out.w) == bits(params(model))
    row = tele.history[0]
    assert not row["accepted"]
    assert row["probe_before"] == row["probe_after"]


class Tied(nn.Module):
    """Two layers share a matrix, one is frozen, one normalises; what is left to
    move is `free`"""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.frozen, self.free, self.d, self.norm = net(
            (5, 6), (6, 6), (6, 6), (6, 6), (6, 6), (6, 3), nn.BatchNorm1d(6)
        )
        self.c.weight = self.b.weight
        self.frozen.requires_grad_(False)

    def forward(self, x):
        shared = self.c(F.relu(self.b(self.a(x))))
        h = self.norm(self.frozen(F.relu(shared)))
        return self.d(F.dropout(F.relu(self.free(h)), 0.5, self.training))


def bare(model):
    "The model itself"
    return model


def compiled(model):
    "Compiled, as far as that can be done on any machine"
    return torch.compile(model, backend="eager")


def both(model):
    "In two wrappers"
    return compiled(nn.DataParallel(model))


WRAPPERS = {
    "bare": bare,
    "parallel": nn.DataParallel,
    "compiled": compiled,
    "both": both,
}


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_wrapped_models_move_the_right_parameters(wrap):
    """Wrappers prefix names; tied and frozen parameters, running statistics and
    modes stay as they are"""
    model = Tied()
    wrapped = WRAPPERS[wrap](model)
    optimizer = torch.optim.Adam(wrapped.parameters())
    tele = Teleporter(
        wrapped,
        F.mse_loss,
        schedule=at(0),
        search=Random(0.5),
        optimizer=optimizer,
        state=reset,
    )
    old, before = params(model), loss_by_hand(model)
    buffers, rng = bits(dict(model.named_buffers())), torch.get_rng_state()
    assert tele.step(X, Y).accepted
    around = ["free.weight", "free.bias", "d.weight", "norm.weight"]
    assert moved(model, old) == around
    assert near(loss_by_hand(model), before, 1e-12)
    assert bits(dict(model.named_buffers())) == buffers
    assert model.training
    assert model.c.weight is model.b.weight
    assert torch.equal(rng, torch.get_rng_state())
    torch.manual_seed(7)
    loss = F.mse_loss(wrapped(X), Y)
    assert near(loss.item(), before, 1e-12)
    loss.backward()
    optimizer.step()  # the wrapper sees the move


@pytest.mark.parametrize("start", (True, False))
def test_freezing_between_firings(start):
    """Fine-tuning freezes and unfreezes layers: the next firing moves what is
    trainable then"""
    model = mlp()
    model[0].requires_grad_(start)
    tele = Teleporter(model, F.mse_loss, schedule=first(2), search=Random(0.5))
    for trainable in (start, not start):
        model[0].requires_grad_(trainable)
        old, loss = params(model), loss_by_hand(model)
        assert tele.step(X, Y).accepted
        assert ("0.weight" in moved(model, old)) == trainable
        assert "2.weight" in moved(model, old)
        assert near(loss_by_hand(model), loss, 1e-12)


def shaken(w, seed):
    "Parameters near others, each by draws of its own generator"

    def draw(p):
        rng = torch.Generator().manual_seed(seed)
        return torch.randn(p.shape, dtype=p.dtype, generator=rng)

    return {name: p + 0.1 * draw(p) for name, p in w.items()}


@pytest.mark.parametrize("group", (GL, BatchGL))
def test_seeds_under_vmap_equal_one_by_one(group):
    "Three seeds at once are three seeds in a row"
    model = mlp()
    bound = group(wire(model, X))
    loss, w = loss_of(model, F.mse_loss, Y)
    starts = [shaken(w, seed) for seed in range(3)]

    def move(w):
        out = teleport(loss, w, bound, X)
        return (out.w, out.objective, out.code), out.accepted

    stacked = tree_map(lambda *t: torch.stack(t), *starts)
    together, accepted = torch.func.vmap(move)(stacked)
    assert accepted.all()
    for i, start in enumerate(starts):
        mine = tree_map(lambda t, i=i: t[i], together)
        alone, _ = move(start)
        torch.testing.assert_close(mine, alone, rtol=1e-9, atol=1e-10)


def test_results_survive_pickle_and_copy():
    """A result is plain data: it can be sent to another process, and it shares no
    memory with the model"""
    model, _, tele, call = rig()
    out = call()
    old = bits(out)
    for again in (pickle.loads(pickle.dumps(out)), copy.deepcopy(out)):
        assert bits(again) == old
        for name in ("report", "reason", "slope"):
            assert getattr(again, name) == getattr(out, name)
    model[0].weight.data.zero_()
    assert bits(out) == old
    history = copy.deepcopy(tele).state_dict()["history"]
    assert history == tele.state_dict()["history"]
