"""Several processes train one model, each with batches of its own: they make the
same move, or none."""

import pytest
import torch
import torch.nn.functional as F
from torch import distributed, multiprocessing, nn
from torch.func import grad, jacrev, vmap

from symtele import GL, Permutation, Random, Teleporter, at, grad_norm, loss_of
from symtele.batch import BatchGL
from symtele.groups import dot
from symtele.objectives import measure
from symtele.training import _averaged

RANKS = 2


def network():
    "Two hidden layers; the same on every rank"
    torch.manual_seed(0)
    layers = nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU()
    return nn.Sequential(*layers, nn.Linear(6, 3)).double()


def batch(rank, k=0):
    "The batch of a rank at a step"
    rng = torch.Generator().manual_seed(10 * k + rank)
    x = torch.randn(8, 4, dtype=torch.float64, generator=rng)
    return x, torch.randint(3, (8,), generator=rng)


def mean_loss(model):
    "The loss that is trained, on the first batches"
    pairs = [batch(rank) for rank in range(RANKS)]
    losses = [F.cross_entropy(model(x), y).item() for x, y in pairs]
    return sum(losses) / RANKS


def flat(model):
    "All parameters"
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def apart(t):
    "How far ranks are from one another"
    low, high = t.clone(), t.clone()
    distributed.all_reduce(low, distributed.ReduceOp.MIN)
    distributed.all_reduce(high, distributed.ReduceOp.MAX)
    return (high - low).abs().max().item()


def gsq(loss, w):
    "Has no closed form: its slope is a second derivative"
    return grad_norm(loss, w).sqrt()


def check_derivatives(rank):
    "Of the mean over ranks: those of the loss of all batches together"
    model = network()
    x, y = batch(rank)
    loss, w = loss_of(model, F.cross_entropy, y)
    own = _averaged(loss, distributed.group.WORLD)
    xs, ys = (torch.cat(t) for t in zip(*map(batch, range(RANKS))))
    whole, _ = loss_of(model, F.cross_entropy, ys)
    v = {k: torch.sin(3 * t) for k, t in w.items()}
    points = {k: torch.stack((t, 2 * t, t - 1)) for k, t in w.items()}

    def found(f):
        def slope(w):
            return dot(grad(f)(w), v)

        def twice(w):
            return torch.stack((f(w), f(w).square()))

        first, second = measure(f, w), grad(slope)(w)
        return (
            first.loss,
            first.gradient,
            second,
            measure(twice, w).tasks,
            vmap(grad(f))(points),
            jacrev(slope)(w),
        )

    mine = found(lambda w: own(w, x))
    torch.testing.assert_close(mine, found(lambda w: whole(w, xs)))


def check_moves(rank):
    "All ranks are at one place, with the loss they had"
    for options in (
        {},
        dict(search=Random(0.5), seed=rank),
        dict(objective=gsq),
    ):
        model = network()
        tele = Teleporter(
            nn.parallel.DistributedDataParallel(model),
            F.cross_entropy,
            schedule=at(0, 3),
            **options,
        )
        start, before = flat(model), mean_loss(model)
        out = tele.step(*batch(rank), k=0)
        assert out.accepted and (flat(model) - start).norm() > 0.01
        assert apart(flat(model)) == 0
        assert abs(mean_loss(model) - before) < 1e-12 * before
        train(tele, rank, model)
        assert apart(flat(model)) == 0
        assert [row["accepted"] for row in tele.history] == [True, True]
    alone = Teleporter(model, F.cross_entropy, schedule=at(0))
    assert alone.step(*batch(rank)).accepted
    assert apart(flat(model)) > 1e-3  # control: each by its own gradient


def train(tele, rank, model):
    "Some steps of data-parallel training"
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
    for k in range(1, 6):
        x, y = batch(rank, k)
        tele.step(x, y, k=k)
        optimizer.zero_grad()
        F.cross_entropy(parallel(x), y).backward()
        optimizer.step()


def collapse(land, rng):
    "Search: every unit becomes the first, which is no permutation"
    return land.move(0 * land.orbit.zero())


def check_refusals(rank):
    "A policy of one's own that parts the ranks; laws that look at the batch"
    model = network()
    parallel = nn.parallel.DistributedDataParallel(model)

    def parting(optimizer, out, pull):
        out.w["0.bias"] += rank

    optimizer = torch.optim.SGD(model.parameters())
    tele = Teleporter(
        parallel,
        F.cross_entropy,
        schedule=at(0),
        optimizer=optimizer,
        state=parting,
    )
    before = flat(model)
    with pytest.raises(RuntimeError, match=r"taken back: \['0.bias'\]"):
        tele.step(*batch(rank))
    assert torch.equal(flat(model), before)
    crowd = Teleporter(
        parallel, F.cross_entropy, Permutation(), schedule=at(0), search=collapse
    )
    out = crowd.step(*batch(rank))
    assert not out.accepted and out.drift > 1e-3 and apart(out.loss) == 0
    assert torch.equal(flat(model), before)
    with pytest.raises(ValueError, match="BatchGL looks at the batch.*GL()"):
        Teleporter(parallel, F.cross_entropy, BatchGL(), schedule=at(0))
    torch.distributed.fsdp.fully_shard(model, mesh=whole_mesh())
    with pytest.raises(TypeError, match="sharded.*FSDP"):
        Teleporter(model, F.cross_entropy, GL(), schedule=at(0))


def whole_mesh():
    "All ranks in a row"
    return distributed.device_mesh.init_device_mesh("cpu", (RANKS,))


def work(rank, path):
    "What one process does"
    torch.set_num_threads(1)
    init = dict(init_method=f"file://{path}", rank=rank, world_size=RANKS)
    distributed.init_process_group("gloo", **init)
    try:
        check_derivatives(rank)
        check_moves(rank)
        check_refusals(rank)
    finally:
        distributed.destroy_process_group()


def test_ranks_make_the_same_move(tmp_path):
    "Accepted on both, 36 % apart, and still so after 20 steps"
    multiprocessing.spawn(work, (str(tmp_path / "ranks"),), RANKS)
