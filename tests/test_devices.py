"""What holds on a CPU holds on a GPU, where there is one: the same moves, exact
by its own kernels too, and refusals that change no bit. On a machine without a
GPU the same checks run on the CPU alone."""

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from test_exact import Heard
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from symtele import (
    GL,
    Ascent,
    BatchGL,
    GreatCircle,
    Grid,
    LeastSquares,
    Permutation,
    Random,
    Rotation,
    Sample,
    Scaling,
    Teleporter,
    Wiring,
    every,
    loss_of,
    reset,
    rosenbrock,
    teleport,
    training,
    wire,
)
from symtele.networks import Blocks, perm, scale
from symtele.runtime import peak_memory
from symtele.teleporting import full_precision
from symtele.zoo import GPT, ZOO, SmallViT, change, draw, prove

CARD = torch.cuda.is_available()
DEVICES = ["cpu", *["cuda"] * CARD]
FEW = ["SmallResNet", "Llama", "UNet", "LSTM", "TransformerEncoderLayer"]
# Rounding of the largest output, over all elements
EXACT = {"float64": 1e-9, "float32": 2e-3}
on_a_card = pytest.mark.skipif(not CARD, reason="there is no GPU")


def there(tree: Any, device: str) -> Any:
    "The same tensors on a device"
    return tree_map_only(torch.Tensor, lambda t: t.to(device), tree)


def example(name: str, device: str) -> tuple[nn.Module, Any]:
    "A model of the zoo, and what it is called with"
    torch.manual_seed(0)
    model, x = ZOO[name].make(), ZOO[name].data()
    return model.to(device), there(x, device)


# Moves of all kinds


@pytest.mark.parametrize(
    ("device", "name"),
    [("cpu", name) for name in FEW] + [("cuda", name) for name in ZOO if CARD],
)
def test_every_kind_of_move_keeps_all_outputs(device, name):
    "In both modes and both precisions; without one axis of a space it does not"
    with full_precision():
        row = prove(*example(name, device), elements=1 + 2 * (device == "cuda"))
    for key, drift in row["drift"].items():
        precision = key.split(", ")[1]
        assert drift < EXACT[precision], (key, drift)
    for key, drift in row["control"].items():
        assert drift > 1e-6, (key, drift)


def problem(device: str) -> tuple[nn.Module, Any, Any]:
    "Three layers with a batch of four, float64"
    torch.manual_seed(1)
    act = partial(nn.LeakyReLU, 0.1)
    layers = nn.Linear(5, 6), act(), nn.Linear(6, 6), act(), nn.Linear(6, 3)
    parts = nn.Sequential(*layers).double(), torch.randn(4, 5), torch.randn(4, 3)
    model, x, y = (part.to(device, torch.float64) for part in parts)
    return model, x, y


MOVES = {
    "GL": (GL, Ascent(3)),
    "BatchGL": (BatchGL, Ascent(3)),
    "Scaling": (Scaling, Ascent(3)),
    "Permutation": (Permutation, Random(1.0)),
    "random": (GL, Random(0.5)),
    "Sample": (BatchGL, Sample(4)),
    "LeastSquares": (LeastSquares, Random(0.1)),
}


def moved(device: str, name: str, seed: int = 0) -> Any:
    "One teleport of the problem on a device"
    model, x, y = problem(device)
    loss, w = loss_of(model, F.mse_loss, y)
    make, search = MOVES[name]
    how = dict(search=search, rng=torch.Generator().manual_seed(seed))
    if make is LeastSquares:
        how["tol"] = 1.0
    return teleport(loss, w, make(wire(model, x)), x, **how)


def apart(a: Any, b: Any) -> float:
    "The largest difference of two sets of parameters"
    return max((a[k].cpu() - b[k].cpu()).abs().max().item() for k in a)


@pytest.mark.parametrize("name", MOVES)
@pytest.mark.parametrize("device", DEVICES)
def test_a_move_is_that_of_the_cpu(device, name):
    "Number for number, and where the model is; with another seed it is another"
    out, same, other = moved(device, name), moved("cpu", name), None
    for t in tree_leaves((out.w, out.x, out.loss, out.drift, out.objective)):
        assert t.device.type == device
    assert out.accepted and out.w["0.weight"].dtype == torch.float64
    assert out.drift < (1.0 if name == "LeastSquares" else 1e-12)
    assert apart(out.w, same.w) < 1e-9
    torch.testing.assert_close(out.objective.cpu(), same.objective)
    if not isinstance(MOVES[name][1], Ascent):
        other = moved(device, name, seed=1)
        assert apart(out.w, other.w) > 1e-3


@pytest.mark.parametrize("search", [Grid(), GreatCircle()])
@pytest.mark.parametrize("device", DEVICES)
def test_a_rotation_of_a_chart(device, search):
    "Found on the circle, where the parameters are"
    w = torch.tensor([-1.0, -1.0], dtype=torch.float64, device=device)
    out = teleport(rosenbrock.loss, w, Rotation(rosenbrock), search=search)
    assert out.w.device.type == device and out.accepted
    assert out.objective[1] > 10 * out.objective[0]
    assert rosenbrock.loss(out.w + 0.1) > 1.01 * out.loss[1]


# Kernels


class Looks(nn.Module):
    "A model that looks at its batch, so that it is read where it runs"

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x):
        "What the model says of a batch of numbers"
        assert (x == x).all()
        return self.model(x)


def ops(model: nn.Module, x: Any) -> set[str]:
    "The ops of a forward pass in both modes"
    with Heard() as heard, torch.no_grad():
        for mode in (True, False):
            deepcopy(model).train(mode)(x)
    return heard.names


def census(wiring: Wiring) -> Counter:
    "How many spaces there are of each size that move in the same way"
    return Counter((s.size, s.copies, s.commutes) for s in wiring.spaces)


class Normed(nn.Module):
    "Layers around PyTorch's RMSNorm"

    def __init__(self):
        super().__init__()
        self.up, self.norm = nn.Linear(8, 16), nn.RMSNorm(16)
        self.down, self.out = nn.Linear(16, 12), nn.Linear(12, 3)

    def forward(self, x):
        "Rows -> rows"
        return self.out(self.down(self.norm(self.up(x))).relu())


class Kernel(NamedTuple):
    "An op that a device has of its own, and a model that comes to it"

    make: Callable[[], nn.Module]
    data: Callable[[], Any]
    cuda: str  # Its name on a card
    known: bool = True  # Whether a rule reads it


KERNELS = {
    "batch norm": Kernel(*ZOO["SmallResNet"], cuda="cudnn_batch_norm"),
    "RMS norm": Kernel(Normed, partial(torch.randn, 5, 8), "_fused_rms_norm"),
    "LSTM": Kernel(*ZOO["LSTM"], cuda="_cudnn_rnn", known=False),
    "GRU": Kernel(*ZOO["GRU"], cuda="_cudnn_rnn", known=False),
    "layer norm": Kernel(*ZOO["TransformerEncoderLayer"], "native_layer_norm"),
}


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("device", DEVICES)
def test_a_model_is_read_by_the_kernels_it_runs(device, name):
    "Found are the spaces that the meta device shows; of an unknown kernel fewer"
    torch.manual_seed(0)
    kernel = KERNELS[name]
    model, x = kernel.make().to(device), there(kernel.data(), device)
    if device == "cuda":
        assert kernel.cuda in ops(model, x)
    shown, read = wire(model, x), wire(Looks(model), x)
    assert read.branch and not shown.branch
    assert census(read) <= census(shown)
    if kernel.known:
        assert census(read) == census(shown)
    with full_precision():
        row = prove(model, x, elements=1)
    assert max(row["drift"].values()) < EXACT["float32"]


class Attention(NamedTuple):
    "A way to attend"

    backend: SDPBackend
    dtype: torch.dtype
    op: str  # What is heard, or `bmm` where it is taken apart


FLASH = "_scaled_dot_product_flash_attention"
ATTENTION = {
    "cpu": {
        "math": Attention(SDPBackend.MATH, torch.float32, "bmm"),
        "flash": Attention(
            SDPBackend.FLASH_ATTENTION, torch.float32, f"{FLASH}_for_cpu"
        ),
    },
    "cuda": {
        "math": Attention(SDPBackend.MATH, torch.float32, "bmm"),
        "flash": Attention(SDPBackend.FLASH_ATTENTION, torch.bfloat16, FLASH),
        "efficient": Attention(
            SDPBackend.EFFICIENT_ATTENTION,
            torch.float32,
            "_scaled_dot_product_efficient_attention",
        ),
        "cuDNN": Attention(
            SDPBackend.CUDNN_ATTENTION,
            torch.bfloat16,
            "_scaled_dot_product_cudnn_attention",
        ),
    },
}


def by_powers_of_two(space: Any, rng: torch.Generator) -> torch.Tensor:
    "A scale that no precision rounds"
    z = scale.zero(space)
    powers = torch.randint(-1, 2, z.shape, generator=rng)
    return powers * torch.log(torch.tensor(2.0, dtype=torch.float64))


@pytest.mark.parametrize("model", [SmallViT, partial(GPT, dropout=0.0)])
@pytest.mark.parametrize(
    ("device", "name"), [(d, name) for d in DEVICES for name in ATTENTION[d]]
)
def test_attention_by_every_kernel(device, name, model):
    "Read as on the meta device, and exact; not without one axis of a space"
    backend, dtype, op = ATTENTION[device][name]
    torch.manual_seed(0)
    net, rng = model().to(device, dtype).eval(), torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 32, 32).to(device, dtype)
    if model is not SmallViT:
        x = torch.randint(50, (2, 16), device=device)
    with sdpa_kernel(backend), full_precision(), torch.no_grad():
        assert op in ops(net, x)
        wiring = wire(Looks(net), x)
        assert wiring.branch and census(wiring) == census(wire(net, x))
        before = [Looks(net)(x)]
        for kind in (perm, scale):
            element = (
                by_powers_of_two if kind is scale else partial(draw, kind=perm)
            )
            spaces = [s for s in wiring.spaces if kind in s.commutes]
            moves = {s.name: there(element(s, rng=rng), device) for s in spaces}
            old = {f"model.{k}": p for k, p in net.named_parameters()}
            tolerance = 2e-5 if dtype == torch.float32 else 3e-2
            assert spaces and changed(
                net, x, old, spaces, moves, kind, before
            ) < (tolerance)
            lame = [lacking(spaces[-1], old), *spaces[:-1]]
            off = changed(net, x, old, lame, moves, kind, before)
            assert off > 2 * tolerance, off


def changed(net, x, old, spaces, moves, kind, before) -> float:
    "By how much a move changes the outputs"
    new = Blocks(tuple((s, kind) for s in spaces)).move(old, moves)
    return change(before, [torch.func.functional_call(Looks(net), new, (x,))])


def lacking(space: Any, named: dict[str, torch.Tensor]) -> Any:
    "A space without the largest of its parameters"
    known = [t for t in space.slots if t.param in named]
    left = max(known, key=lambda t: named[t.param].numel())
    return replace(space, slots=[t for t in space.slots if t is not left])


# In training


def entropy(out, y):
    "Cross-entropy of rows, tokens or pixels"
    return F.cross_entropy(out if out.ndim == 4 else out.flatten(0, -2), y)


TRAINED = {  # name in the zoo -> group
    "SmallResNet": Scaling,
    "UNet": Permutation,
    "SmallViT": GL,
    "GPT": Scaling,
    "LSTM": Permutation,
    "MLP LeakyReLU": GL,
    "MLP Tanh": BatchGL,
}


def trained(name: str, device: str) -> tuple[nn.Module, Any, torch.Tensor]:
    "A model in train mode, a batch and targets"
    model, x = example(name, device)
    with torch.no_grad():
        shape = entropy_shape(model.eval()(x))
    return model.train(), x, torch.randint(2, shape, device=device)


def entropy_shape(out):
    "Of the targets that `entropy` takes"
    pixels = out.ndim == 4
    return (out.shape[0], *out.shape[2:]) if pixels else (out[..., 0].numel(),)


ROUNDED = ["float32", "TF32", "bfloat16"]


@pytest.fixture(params=ROUNDED)
def rounded(request):
    "How a training multiplies, put back afterwards"
    cudnn, products = torch.backends.cudnn.allow_tf32, "highest"
    torch.backends.cudnn.allow_tf32 = request.param == "TF32"
    torch.set_float32_matmul_precision(
        "high" if request.param == "TF32" else products
    )
    yield request.param
    torch.backends.cudnn.allow_tf32 = cudnn
    torch.set_float32_matmul_precision(products)


def said(model: nn.Module, x: Any) -> list[torch.Tensor]:
    "What a copy says on the CPU, in float64 and eval mode"
    with torch.no_grad():
        x = tree_map(lambda t: t.double() if t.is_floating_point() else t, x)
        return [deepcopy(model).cpu().double().eval()(x.cpu())]


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("device", DEVICES)
def test_a_training_is_moved_exactly(device, rounded, name):
    "However it rounds; and not if one parameter were where it was"
    model, x, y = trained(name, device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    tele = Teleporter(
        model,
        entropy,
        TRAINED[name](),
        schedule=every(2, start=0),
        search=Random(0.5),
        optimizer=optimizer,
        state=reset,
    )
    told = torch.backends.cudnn.allow_tf32
    half = torch.autocast(device, torch.bfloat16, enabled=rounded == "bfloat16")
    for _ in range(4):
        before, old = said(model, x), deepcopy(model.state_dict())
        with half:
            out = tele.step(x, y)
        if out is not None:
            assert out.accepted, out
            drift = change(before, said(model, x))
            assert drift < (1e-2 if TRAINED[name] is BatchGL else 1e-4), drift
            assert control(model, old, x, before) > 10 * drift
        with half:
            loss = entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert [row["accepted"] for row in tele.history] == [True, True]
    assert torch.backends.cudnn.allow_tf32 == told


def control(model, old, x, before) -> float:
    "The change of the outputs if the parameter that moved most had not moved"
    new = {k: p for k, p in model.state_dict().items() if p.is_floating_point()}
    most = max(new, key=lambda k: (new[k] - old[k]).norm().item())
    lame = deepcopy(model)
    lame.load_state_dict({**model.state_dict(), most: old[most]})
    return change(before, said(lame, x))


def fitted() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    "A small ResNet that has learnt its batch by heart, on a card"
    model, *_ = trained("SmallResNet", "cuda")
    x = torch.randn(16, 3, 32, 32, device="cuda")
    y = torch.randint(10, (16,), device="cuda")
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        entropy(model(x), y).backward()
        optimizer.step()
    return model, x, y


@on_a_card
def test_products_in_tf32_would_be_taken_for_drift(monkeypatch):
    "Control: the same moves with the loss as a card rounds it by default"
    model, x, y = fitted()
    refused, drift = {}, {}
    for name, context in dict(exact=full_precision, tf32=nullcontext).items():
        monkeypatch.setattr(training, "full_precision", context)
        with monkeypatch.context() as settings:
            settings.setattr(torch.backends.cudnn, "allow_tf32", True)
            tele = Teleporter(
                deepcopy(model),
                entropy,
                Scaling(),
                schedule=every(1, start=0),
                search=Random(0.5),
            )
            for _ in range(20):
                tele.step(x, y)
        refused[name] = sum(not row["accepted"] for row in tele.history)
        drift[name] = max(row["drift"] for row in tele.history)
    eps = torch.finfo(torch.float32).eps
    assert refused["exact"] == 0 and drift["exact"] < 10 * eps
    assert drift["tf32"] > 100 * eps  # of a bound of about 200 eps


@on_a_card
def test_a_loss_that_is_summed_in_any_order():
    "Of many pixels: a wrong move is refused and does not look like randomness"
    model = example("UNet", "cuda")[0]
    x = torch.randn(16, 3, 256, 256, device="cuda")
    y = torch.randint(2, (16, 256, 256), device="cuda")
    wiring = wire(model, x)
    space, *others = [s for s in wiring.spaces if scale in s.commutes]
    lame = lacking(space, dict(model.named_parameters()))
    how = dict(schedule=every(1, start=0), search=Random(3.0))
    for spaces, accepted in (([lame, *others], False), (wiring.spaces, True)):
        group = Scaling(Wiring(spaces, model))
        tele = Teleporter(model, entropy, group, **how)
        for _ in range(6):
            assert tele.step(x, y).accepted == accepted


@pytest.mark.parametrize("device", DEVICES)
def test_a_loss_that_differs_by_rounding_is_pure_enough(device):
    "By one part in ten million it is, by one in a thousand it is not"
    model, x, y = problem(device)
    model, x, y = model.float(), x.float(), y.float()
    table = wire(model, x)
    lame = lacking(table.spaces[0], dict(model.named_parameters()))
    group = Scaling(Wiring([lame, *table.spaces[1:]], model))
    for off in (1e-7, 1e-3):
        calls = count()

        def noisy(out, y, off=off, calls=calls):
            return F.mse_loss(out, y) * (1 + off * next(calls))

        how = dict(schedule=every(1, start=0), search=Random(3.0))
        tele = Teleporter(model, noisy, group, **how)
        with (
            nullcontext()
            if off < 1e-6
            else pytest.raises(ValueError, match="pure")
        ):
            assert not tele.step(x, y).accepted


@pytest.mark.parametrize("name", ["SmallResNet", "UNet", "GPT"])
@pytest.mark.parametrize("device", DEVICES)
def test_a_refusal_changes_no_bit(device, name):
    "A move that leaves one axis out is refused; the whole one is not"
    model, x, y = trained(name, device)
    optimizer = torch.optim.Adam(model.parameters())
    entropy(model(x), y).backward()
    optimizer.step()
    wiring = wire(model, x)
    parameters = dict(model.named_parameters())
    space, *others = [s for s in wiring.spaces if scale in s.commutes]
    lame = Wiring([lacking(space, parameters), *others], model)
    for table, accepted in ((lame, False), (wiring, True)):
        tele = Teleporter(
            model,
            entropy,
            Scaling(table),
            schedule=every(1, start=0),
            search=Random(3.0),
            optimizer=optimizer,
            state=reset,
        )
        held = model.state_dict(), optimizer.state_dict()["state"]
        before = tree_map(deepcopy, tree_leaves(held))
        assert tele.step(x, y).accepted == accepted, tele.history
        held = model.state_dict(), optimizer.state_dict()["state"]
        after = tree_leaves(held)
        kept = len(before) == len(after) and all(map(torch.equal, before, after))
        assert kept == (not accepted)


@pytest.mark.parametrize("device", DEVICES)
def test_a_teleporter_goes_on_where_it_was_saved(device):
    "Even from a file whose tensors were loaded onto the device"
    ends = []
    for load in (True, False):
        model, x, y = problem(device)
        how = dict(schedule=every(1, start=0), search=Random(0.5))
        first = Teleporter(model, F.mse_loss, GL(), **how)
        first.step(x, y)
        second = Teleporter(model, F.mse_loss, GL(), **how)
        if load:
            second.load_state_dict(there(first.state_dict(), device))
        (second if load else first).step(x, y)
        ends.append(model[0].weight.detach().clone())
    assert torch.equal(*ends)
    model, x, y = problem(device)  # control: one that begins anew
    for _ in range(2):
        Teleporter(model, F.mse_loss, GL(), **how).step(x, y)
    assert not torch.equal(model[0].weight, ends[0])


# What the study asks a device


@pytest.mark.parametrize("device", DEVICES)
def test_memory_at_the_peak(device):
    "Two sums at one time, not three; a view is none"
    z = torch.randn(512, 512, device=device)
    found = peak_memory(lambda: z + (z + (z + 1)), device)
    assert found == 2 * z.nbytes
    assert peak_memory(lambda: z.T[:3], device) == 0
