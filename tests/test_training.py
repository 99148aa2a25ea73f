"""What a sceptical user checks before a `Teleporter` goes into a training loop: every optimizer, every resume,
every mistake. A move keeps the loss and changes parameters; a call that fails changes nothing at all."""

import copy
import inspect
import pickle
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils._pytree import tree_leaves, tree_map

from symtele.groups import (
    GL,
    BatchGL,
    LeastSquares,
    Orthogonal,
    Permutation,
    Scaling,
)
from symtele.teleport import (
    Ascent,
    Random,
    Teleporter,
    at,
    every,
    first,
    keep,
    lookahead,
    loss_of,
    reset,
    teleport,
    transport,
)
from symtele.wiring import wire

OPTIMIZERS = {
    n: o
    for n, o in vars(torch.optim).items()
    if isinstance(o, type)
    and issubclass(o, torch.optim.Optimizer)
    and n not in ("Optimizer", "SparseAdam")
}  # SparseAdam raises on dense gradients, and these layers make no others
X, Y = (
    torch.randn(
        6, d, dtype=torch.float64, generator=torch.Generator().manual_seed(d)
    )
    for d in (5, 3)
)
nan, inf = torch.nan, torch.inf


def net(*layers, dtype=torch.float64):
    "Layers by recipe: a tuple is a linear layer, the rest are modules; the global random state is left alone"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            *(nn.Linear(*l) if isinstance(l, tuple) else l for l in layers)
        ).to(dtype)


def mlp(act=lambda: nn.LeakyReLU(0.1), bias=True, **kw):
    return net((5, 6, bias), act(), (6, 6, bias), act(), (6, 3, bias), **kw)


def noisy():
    "Dropout and BatchNorm in train mode, but for the last dropout"
    model = net(
        (5, 6),
        nn.LeakyReLU(0.1),
        (6, 6),
        nn.LeakyReLU(0.1),
        nn.Dropout(0.3),
        (6, 4),
        nn.BatchNorm1d(4),
        nn.Dropout(0.2),
        (4, 3),
    )
    model[7].eval()
    return model


def make(name, model, **kw):
    "An optimizer with the options that change its memory, as far as it has them"
    known, options = (
        inspect.signature(OPTIMIZERS[name]).parameters,
        dict(
            weight_decay=0.01, momentum=0.9, initial_accumulator_value=0.1, **kw
        ),
    )
    return OPTIMIZERS[name](
        model.parameters(), **{k: v for k, v in options.items() if k in known}
    )


def hand(model, x=X, y=Y):
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
        L = F.mse_loss(model(x), y)
        L.backward()
        return L

    if isinstance(optimizer, torch.optim.LBFGS):
        return optimizer.step(closure)
    closure()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def params(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def moved(model, old):
    return [n for n, p in model.named_parameters() if not torch.equal(p, old[n])]


def bits(*trees):
    "All values, tensors as bytes, so that nan equals itself and -0 is not 0"

    def read(t):
        return b"" if t.device.type == "meta" else t.detach().numpy().tobytes()

    return [
        (t.dtype, t.shape, read(t)) if isinstance(t, torch.Tensor) else repr(t)
        for t in tree_leaves(trees)
    ]


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
    return training(model, optimizer) + bits(tele.state_dict(), id(tele.group))


@pytest.mark.parametrize("state", (keep, reset), ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer(name, state):
    "An optimizer notices a teleport by its gradient only, and by a new memory where that was asked for"
    model = mlp(bias=name != "Muon")  # Muon takes matrices only
    optimizer = make(name, model, max_iter=3)
    scheduler = ExponentialLR(optimizer, 0.98)
    tele = Teleporter(
        model, F.mse_loss, schedule=at(3, 6), optimizer=optimizer, state=state
    )
    refs, start = optimizer.param_groups[0]["params"], hand(model)
    for k in range(12):
        before, old, memory = (
            hand(model),
            params(model),
            bits(optimizer.state_dict()),
        )
        out = tele.step(X, Y)
        assert (out is not None) == (k in (3, 6)) == bool(moved(model, old))
        if out:
            assert (
                out.accepted
                and len(moved(model, old)) >= 3
                and abs(hand(model) - before) <= 1e-12 * before
            )
        if state is keep or not out:
            assert bits(optimizer.state_dict()) == memory
        else:
            twin = copy.deepcopy(model)
            new = make(name, twin, max_iter=3, lr=optimizer.param_groups[0]["lr"])
            assert (
                bits(optimizer.state_dict()["state"])
                == bits(new.state_dict()["state"])
                and bits(optimizer.state_dict()) != memory
            )
            for _ in range(2):
                update(model, optimizer)
                update(twin, new)
            assert bits(params(model)) == bits(
                params(twin)
            )  # no memory anywhere else
        update(model, optimizer)
        scheduler.step()
    assert (
        all(p is q for p, q in zip(refs, model.parameters(), strict=True))
        and hand(model) < start
    )


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_accumulation_fires_once(dtype):
    "With k = optimizer steps taken, the first micro-batch fires and all of them add gradients of the new place"
    model, x, y, fired = mlp(dtype=dtype), X.to(dtype), Y.to(dtype), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tele = Teleporter(
        model, F.mse_loss, schedule=every(2, start=0), search=Random(0.5)
    )
    for k in range(4):
        for i, (a, b) in enumerate(zip(x.split(2), y.split(2))):
            held, old, out = (
                hand(model, x, y),
                params(model),
                tele.step(a, b, k=k),
            )
            fired += [(k, i)] * (out is not None)
            assert (out is not None) == bool(moved(model, old)) and abs(
                hand(model, x, y) - held
            ) <= held * 100 * torch.finfo(dtype).eps
            assert (
                out is None
                or out.accepted
                and model[0].weight.dtype == out.w["0.weight"].dtype == dtype
            )
            (F.mse_loss(model(a), b) / 3).backward()
        torch.testing.assert_close(
            [p.grad for p in model.parameters()],
            list(
                torch.autograd.grad(
                    F.mse_loss(model(x), y), list(model.parameters())
                )
            ),
        )
        optimizer.step()
        optimizer.zero_grad()
    assert fired == [(0, 0), (2, 0)] and tele.step(x, y, k=2) is None


def test_autocast():
    "Half precision could not tell an exact move from a bad one, and autocast's copies of old weights give old gradients"
    model, x, y = mlp(dtype=torch.float32), X.float(), Y.float()
    optimizer, start = (
        torch.optim.AdamW(model.parameters(), lr=0.01),
        hand(model, x, y),
    )
    tele = Teleporter(
        model,
        F.mse_loss,
        schedule=at(2, 5),
        search=Random(1.0),
        optimizer=optimizer,
        state=reset,
    )
    for k in range(10):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(x)
            before, old = hand(model, x, y), params(model)
            out = tele.step(x, y)
            L = F.mse_loss(model(x), y)
            assert (out is not None) == (k in (2, 5)) == bool(
                moved(model, old)
            ) and torch.is_autocast_enabled("cpu")
            if out:
                assert (
                    out.accepted
                    and abs(hand(model, x, y) - before) <= 1e-6 * before
                    and out.w["0.weight"].dtype == torch.float32
                )
        with torch.autocast("cpu", dtype=torch.bfloat16):
            fresh = F.mse_loss(model(x), y)
        L.backward()
        assert bits([p.grad for p in model.parameters()]) == bits(
            torch.autograd.grad(fresh, list(model.parameters()))
        )
        optimizer.step()
        optimizer.zero_grad()
    assert hand(model, x, y) < start


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resumed_is_uninterrupted(name, tmp_path):
    "A run killed in the middle of a firing and started again elsewhere ends on the same bits"
    b, seed = name != "Muon", torch.Generator().manual_seed(0).get_state()

    def train(steps, load=None, without=None):
        model = net(
            (5, 6, b),
            nn.LeakyReLU(0.1),
            nn.Dropout(0.2),
            (6, 6, b),
            nn.LeakyReLU(0.1),
            (6, 3, b),
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
        parts = dict(
            model=model, optimizer=optimizer, scheduler=scheduler, tele=tele
        )
        saved = torch.load(load) if load else {}
        for part in saved.keys() - {without, "rng"}:
            parts[part].load_state_dict(saved[part])
        torch.set_rng_state(saved.get("rng", seed))
        for _ in range(steps):
            tele.step(X, Y)
            update(model, optimizer)
            scheduler.step()
        return {k: p.state_dict() for k, p in parts.items()} | dict(
            rng=torch.get_rng_state()
        )

    def end(run):
        return bits(
            dict(run["model"]),
            run["optimizer"],
            run["rng"],
            run["tele"]["rng"],
            [{**r, "seconds": 0} for r in run["tele"]["history"]],
        )

    path, whole = tmp_path / "run.pt", train(9)
    torch.save(train(4), path)
    saved = torch.load(path)["tele"]
    assert (
        saved["left"] == 1
        and sum(
            t.numel() for t in tree_leaves(saved) if isinstance(t, torch.Tensor)
        )
        == saved["rng"].numel()
    )  # no parameters
    assert [(r["k"], r["accepted"]) for r in whole["tele"]["history"]] == [
        (k, True) for k in (3, 4, 6, 7)
    ] and all(
        type(v) in (int, float, bool, str)
        for r in whole["tele"]["history"]
        for v in r.values()
    )
    assert end(train(5, path)) == end(whole) and bits(
        dict(train(5, path, without="tele")["model"])
    ) != bits(dict(whole["model"]))  # control


M = mlp()


class Branch(nn.Module):
    "A graph that depends on values"

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(5, 3).double()

    def forward(self, x):
        return self.a(x) if x.sum() > 0 else -self.a(x)


def poisoned():
    model = noisy()
    model[2].weight.data[0, 0] = nan
    return model


def policy(optimizer, out, pull):
    raise ArithmeticError("policy failed")


def loss(f):
    return dict(loss_fn=lambda o, y: f(F.mse_loss(o, y, reduction="none")))


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
    **{
        f"model {a.__name__}": (
            dict(model=mlp(a), group=BatchGL()),
            f"BatchGL finds.*{a.__name__} has no inverse.*would move",
        )
        for a in (nn.ReLU, nn.GELU)
    },
    "model Tanh": (
        dict(model=mlp(nn.Tanh)),
        "would move something: Permutation, BatchGL",
    ),
    "model frozen": (
        dict(model=noisy().requires_grad_(False)),
        "model.*no trainable parameters",
    ),
    "model linear": (dict(model=net((5, 3))), "GL finds nothing to move"),
    "model branches": (dict(model=Branch()), "wire cannot read Branch.forward"),
    "loss float": (
        loss(lambda l: l.mean().item()),
        "loss must return a Tensor, got float",
    ),
    "loss (0,)": (loss(lambda l: l[0, :0]), r"loss.*of shape \(0,\)"),
    "loss int": (loss(lambda l: l.sum().long()), "loss.*floating.*int64"),
    "loss (N,M)": (
        loss(lambda l: l),
        r"loss.*shape \(\) or \(T,\), got torch.float64 of shape \(6, 3\)",
    ),
    "loss (1,M)": (
        loss(lambda l: l.mean(0, keepdim=True)),
        r"loss.*of shape \(1, 3\)",
    ),
    "loss constant": (
        dict(loss_fn=lambda o, y: y.sum()),
        "loss does not depend on w",
    ),
    "loss detached": (
        loss(lambda l: l.mean().detach()),
        "loss does not depend on w",
    ),
    "loss random": (
        loss(lambda l: l.mean() * (1 + random.random())),
        "loss gave two values for the same parameters",
    ),
    "k -1": (dict(k=-1), "k must be at least 0, got -1"),
    "k 1.5": (dict(k=1.5), "k must be a whole number, got 1.5"),
    "k True": (dict(k=True), "k must be a whole number, got True"),
    "search None": (
        dict(search=lambda land, rng: None),
        "search must return a landscape.*NoneType",
    ),
    "search shape": (
        dict(search=lambda land, rng: land.move(torch.zeros(3))),
        r"xi must have shape \(12,\), got \(3,\)",
    ),
    "search slope": (
        dict(group=Permutation()),
        "Ascent needs a group with a slope",
    ),
    "group chart": (dict(group=Orthogonal(torch.eye(2))), "moves one Tensor"),
    "policy": (dict(state=policy), "policy failed"),
    "probe narrow": (dict(probe=(X[:, :4], Y)), "6x4"),
}


def rig(model=None, loss_fn=F.mse_loss, group=GL(), *, x=X, y=Y, k=None, **kw):
    "A model in mid-training with gradients and momenta, its optimizer, its Teleporter, and the call to make"
    model = model or noisy()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    optimizer.step()
    tele = Teleporter(
        model,
        loss_fn,
        group,
        **{
            **dict(schedule=lambda k: True, optimizer=optimizer, state=reset),
            **kw,
        },
    )
    return model, optimizer, tele, lambda: tele.step(x, y, k)


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("what", BAD)
def test_bad_input_changes_nothing(what):
    "Whoever catches the error and goes on has what they had, and can read what was wrong"
    model, optimizer, tele, call = rig(**BAD[what][0])
    before = everything(model, optimizer, tele)
    with pytest.raises(
        (ValueError, TypeError, RuntimeError, ArithmeticError),
        match=f"(?s){BAD[what][1]}",
    ) as e:
        call()
    assert everything(
        model, optimizer, tele
    ) == before and "Original traceback" not in str(e.value)  # a tracer's words


BUILD = {  # what is wrong: (how to build it, what the message must say)
    "at(-1)": (lambda: at(-1), "got -1"),
    "at()": (lambda: at(), "at least one"),
    "every(0)": (lambda: every(0), r"every\(n\).*got 0"),
    "first(1.5)": (lambda: first(1.5), "got 1.5"),
    "every start": (lambda: every(3, start=-2), "start.*got -2"),
    "singular": (
        lambda: Orthogonal(torch.diag(torch.tensor([1.0, 0.0]))),
        "positive-definite.*0",
    ),
    "A nan": (
        lambda: Orthogonal(torch.full((2, 2), nan)),
        r"Orthogonal\(A\).*nan",
    ),
    "A list": (
        lambda: Orthogonal([[1.0, 0.0], [0.0, 1.0]]),
        r"Orthogonal\(A\).*Tensor.*list",
    ),
    **{
        f"{k}={getattr(v, '__name__', v)!r}": (
            lambda k=k, v=v: Teleporter(
                **{"model": M, "loss_fn": F.mse_loss, "schedule": at(0), k: v}
            ),
            f"{k}.*{says}",
        )
        for k, v, says in (
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
    },
    **{
        f"schedule={s!r}": (
            lambda s=s: Teleporter(M, F.mse_loss, schedule=s),
            says,
        )
        for s, says in (
            (set(), "at least one"),
            ({-3}, "at least 0, got -3"),
            ({0.5}, "whole number, got 0.5"),
        )
    },
    "state name": (
        lambda: Teleporter(
            M,
            F.mse_loss,
            schedule=at(0),
            optimizer=torch.optim.Adam(M.parameters()),
            state="reset",
        ),
        "state.*got 'reset'",
    ),
    "optimizer name": (
        lambda: Teleporter(
            M, F.mse_loss, schedule=at(0), optimizer="adam", state=reset
        ),
        "optimizer.*got 'adam'",
    ),
    "LeastSquares": (
        lambda: Teleporter(M, F.mse_loss, LeastSquares(), schedule=at(0)),
        "tol",
    ),
}


@pytest.mark.parametrize("what", BUILD)
def test_bad_parts_are_refused_when_built(what):
    "What can be seen at the start must not wait for the first firing, hours later"
    with pytest.raises((ValueError, TypeError), match=f"(?s){BUILD[what][1]}"):
        BUILD[what][0]()


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
        with pytest.raises((TypeError, ValueError, RuntimeError), match=says):
            tele.load_state_dict({**good, "k": 7, "history": [], **change})
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
    "Ctrl-C, or an error, at the first to fourth call of the loss or of a layer: the same firing can be tried again"

    def fails(*_):
        if e := next(errors, None):
            raise e("out of luck")

    model, optimizer, tele, call = rig(
        None,
        lambda o, y: (where == "loss" and fails(), F.mse_loss(o, y))[1],
        group,
        objective=lookahead(0.1),
        search=Random(0.3),
    )
    if where == "layer":
        model[5].register_forward_hook(fails)
    for k in range(2):  # before and after the model has been read
        before, errors = (
            everything(model, optimizer, tele),
            iter([None] * n + [error]),
        )
        with pytest.raises((error, ValueError), match="out of luck"):
            call()  # a ValueError while the model is read
        assert everything(model, optimizer, tele) == before and tele.k == k
        old, held = params(model), hand(model)
        assert (
            call().accepted
            and moved(model, old)
            and abs(hand(model) - held) <= 1e-11 * held
            and tele.k == k + 1
        )


@pytest.mark.parametrize(
    "loss_fn", (F.mse_loss, F.binary_cross_entropy), ids=lambda f: f.__name__
)
@pytest.mark.parametrize(
    "group,value",
    [
        (g, v)
        for g in (GL(), BatchGL(), Scaling())
        for v in (1e300, -1e300, inf, nan, "singular")
    ][:-1]
    + [(Permutation(), "collapse")],
    ids=str,
)  # a diagonal is never singular
def test_overflow_is_refused(group, value, loss_fn):
    "A search that runs away, or leaves the group, is refused and not raised, even where the loss raises on nan"
    act, y = (
        nn.Identity if type(group) is GL else lambda: nn.LeakyReLU(0.1),
        Y if loss_fn is F.mse_loss else (Y > 0).double(),
    )
    singular = torch.cat(
        [-torch.eye(6, dtype=torch.float64).flatten()] * 2
    )  # I + T = 0 in both spaces

    def search(land, rng):
        return land.move(
            singular
            if value == "singular"
            else land.orbit.zero() * 0
            if value == "collapse"
            else land.orbit.zero() + value
        )

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
    assert (
        not out.accepted
        and ("the loss changed" if value == "collapse" else "finite")
        in out.reason
        and training(model, optimizer) == before
        and bits(out.w) == bits(params(model))
    )
    assert (
        not tele.history[0]["accepted"]
        and tele.history[0]["probe_before"] == tele.history[0]["probe_after"]
    )


class Tied(nn.Module):
    "Two layers share a matrix, one is frozen, one normalises; what is left to move is `free`"

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.frozen, self.free, self.d, self.norm = net(
            (5, 6), (6, 6), (6, 6), (6, 6), (6, 6), (6, 3), nn.BatchNorm1d(6)
        )
        self.c.weight = self.b.weight
        self.frozen.requires_grad_(False)

    def forward(self, x):
        h = self.norm(self.frozen(F.relu(self.c(F.relu(self.b(self.a(x)))))))
        return self.d(F.dropout(F.relu(self.free(h)), 0.5, self.training))


WRAPPERS = {
    "bare": lambda m: m,
    "parallel": nn.DataParallel,
    "compiled": lambda m: torch.compile(m, backend="eager"),
    "both": lambda m: torch.compile(nn.DataParallel(m), backend="eager"),
}


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_wrapped_models_move_the_right_parameters(wrap):
    "Wrappers prefix names; tied and frozen parameters, running statistics and modes stay as they are"
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
    old, held, buffers, rng = (
        params(model),
        hand(model),
        bits(dict(model.named_buffers())),
        torch.get_rng_state(),
    )
    assert (
        tele.step(X, Y).accepted
        and moved(model, old) == ["free.weight", "free.bias", "d.weight"]
        and abs(hand(model) - held) <= 1e-12 * held
    )
    assert (
        bits(dict(model.named_buffers())) == buffers
        and model.training
        and model.c.weight is model.b.weight
        and torch.equal(rng, torch.get_rng_state())
    )
    torch.manual_seed(7)
    L = F.mse_loss(wrapped(X), Y)
    assert abs(L.item() - held) <= 1e-12 * held
    L.backward()
    optimizer.step()  # the wrapper sees the move


@pytest.mark.parametrize("start", (True, False))
def test_freezing_between_firings(start):
    "Fine-tuning freezes and unfreezes layers: the next firing moves what is trainable then"
    model = mlp()
    model[0].requires_grad_(start)
    tele = Teleporter(model, F.mse_loss, schedule=first(2), search=Random(0.5))
    for trainable in (start, not start):
        model[0].requires_grad_(trainable)
        old, held = params(model), hand(model)
        assert (
            tele.step(X, Y).accepted
            and ("0.weight" in moved(model, old)) == trainable
            and "2.weight" in moved(model, old)
            and abs(hand(model) - held) <= 1e-12 * held
        )


@pytest.mark.parametrize("group", (GL, BatchGL))
def test_seeds_under_vmap_equal_one_by_one(group):
    "Three seeds at once are three seeds in a row"
    model = mlp()
    G = group(wire(model, X))
    f, w = loss_of(model, F.mse_loss, Y)
    ws = [
        {
            k: p
            + 0.1
            * torch.randn(
                p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(s)
            )
            for k, p in w.items()
        }
        for s in range(3)
    ]
    many = torch.func.vmap(lambda w: teleport(f, w, G, X))(
        tree_map(lambda *t: torch.stack(t), *ws)
    )
    assert many.accepted.all()
    for s, w in enumerate(ws):
        tree_map(
            lambda a, b: torch.testing.assert_close(
                a[s], b, rtol=1e-9, atol=1e-10
            ),
            (many.w, many.objective, many.code),
            (lambda o: (o.w, o.objective, o.code))(teleport(f, w, G, X)),
        )


def test_results_survive_pickle_and_copy():
    "A result is plain data: it can be sent to another process, and it shares no memory with the model"
    model, _, tele, call = rig()
    out = call()
    old = bits(out)
    for again in (pickle.loads(pickle.dumps(out)), copy.deepcopy(out)):
        assert bits(again) == old and (
            again.report,
            again.reason,
            again.slope,
        ) == (out.report, out.reason, out.slope)
    model[0].weight.data.zero_()
    assert (
        bits(out) == old
        and copy.deepcopy(tele).state_dict()["history"]
        == tele.state_dict()["history"]
    )
