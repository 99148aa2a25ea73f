"""What `wire` reads is exact and nearly all there is: random programs out of
every family of ops, and a numerical null space of tiny models beside it."""

import copy
import warnings
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from multiprocessing import get_context
from random import Random
from threading import Lock
from types import SimpleNamespace
from typing import ClassVar
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn.utils import prune
from torch.utils import _pytree as pytree

from symtele.networks import Blocks, Kind, Slot, Space, Wiring, gl, perm, scale
from symtele.wiring import RULES, wire
from symtele.zoo import (
    GPT,
    ZOO,
    Llama,
    LoRALinear,
    change,
    draw,
    fresh,
    mlp,
    outputs,
    prove,
    shares,
)

DOUBLE = torch.float64
KINDS = (perm, scale, gl)
PROGRAMS = 1000  # To be looked at, out of
DRAWN = 1050  # of which a few compute nothing finite
STEPS = 9  # Of a program
TOLERANCE = 1e-7  # Of an output's largest entry: some programs divide by little
Op = Callable[["Program", Tensor, Random, str], Tensor]
OPS: dict[str, Op] = {}  # Name -> (program, value, rng, name of a parameter)


def op(f: Op) -> Op:
    "A step that programs may take"
    OPS[f.__name__] = f
    return f


def steps(seed: int) -> list[str]:
    "Which steps a program takes"
    return Random(seed).choices([*OPS], k=STEPS)


class Program(nn.Module):
    "Random steps on values of shape (2, 4, channels); each value is an output"

    def __init__(self, seed: int):
        super().__init__()
        self.seed, self.ops = seed, steps(seed)
        self.numbers, self.norms = nn.ParameterDict(), nn.ModuleDict()
        self.weights, self.log = [], []
        with torch.no_grad():
            self(torch.randn(2, 4, 6, dtype=DOUBLE), torch.randint(5, (2, 4)))
        self.told = "\n".join([f"seed {seed}", *self.log])

    def par(self, name: str, *shape: int) -> Tensor:
        "A parameter, made when it is first asked for"
        if name not in self.numbers:
            t = torch.randn(*shape, dtype=DOUBLE) / max(1, shape[-1]) ** 0.5
            self.numbers[name] = nn.Parameter(t + 0.7 if len(shape) == 1 else t)
        return self.numbers[name]

    def module(self, name: str, make: Callable[[], nn.Module]) -> nn.Module:
        "A module, likewise"
        if name not in self.norms:
            self.norms[name] = make().double()
        return self.norms[name]

    def matrix(self, name: str, outputs: int, inputs: int) -> Tensor:
        "A weight that later steps may use again"
        weight = self.par(name, outputs, inputs)
        self.weights.append(weight)
        return weight

    def other(self, v: Tensor, rng: Random) -> Tensor:
        "A value of the same shape, maybe this one"
        return rng.choice([u for u in self.values if u.shape == v.shape] or [v])

    def forward(self, x: Tensor, tokens: Tensor) -> list[Tensor]:
        self.tokens, self.weights, self.log = tokens, [], []
        self.values = [F.linear(x, self.par("in", 8, 6))]
        for i, name in enumerate(self.ops):
            rng = Random(1000 * self.seed + i)
            chosen = rng.randrange(max(0, len(self.values) - 3), len(self.values))
            v = OPS[name](self, self.values[chosen], rng, f"p{i}")
            self.log.append(f"{i + 1}: {name}({chosen}) -> {tuple(v.shape)}")
            self.values.append(v[..., :24])
        return [
            F.linear(v, self.par(f"out{i}", 3, v.shape[-1]))
            for i, v in enumerate(self.values)
        ]


# Products


@op
def linear(p, v, rng, n):
    width = rng.choice((1, 6, 8, 8, 12))
    bias = p.par(n + "b", width) if rng.random() < 0.5 else None
    return F.linear(v, p.matrix(n, width, v.shape[-1]), bias)


OPS["linear again"] = OPS["linear once more"] = linear


@op
def factored(p, v, rng, n):
    return F.linear(v, p.par(n + "a", 8, 5) @ p.par(n + "b", 5, v.shape[-1]))


@op
def tied(p, v, rng, n):
    c = v.shape[-1]
    fits = [w for w in p.weights if w.shape[1] == c]
    fits += [w.T for w in p.weights if w.shape[0] == c]
    return F.linear(v, rng.choice(fits)) if fits else v


@op
def mixed_tokens(p, v, rng, n):
    return F.linear(v.mT, p.par(n, 4, 4)).mT


@op
def einsum(p, v, rng, n):
    c = v.shape[-1]
    if rng.random() < 0.5:
        return torch.einsum("btc,cd->btd", v, p.par(n, c, 8))
    heads = p.par(n, 2, c, 3)
    return torch.einsum("btc,hcd->bthd", v, heads).flatten(2)


@op
def gram(p, v, rng, n):
    if v.shape[-1] < 4:
        return v
    return torch.einsum("btc,btd->bcd", v, p.other(v, rng))[:, :4]


@op
def bilinear(p, v, rng, n):
    c = v.shape[-1]
    return F.bilinear(v, v, p.par(n, 4, c, c)) if c <= 8 else v


@op
def convolution(p, v, rng, n):
    c = v.shape[-1]
    groups = rng.choice((1, 2)) if c % 2 == 0 else 1
    size = rng.choice((1, 3))
    weight = p.par(n, 8, c // groups, size)
    bias = p.par(n + "b", 8)
    return F.conv1d(v.mT, weight, bias, padding=size // 2, groups=groups).mT


@op
def depthwise(p, v, rng, n):
    c, times = v.shape[-1], rng.choice((1, 2))
    return F.conv1d(v.mT, p.par(n, c * times, 1, 3), padding=1, groups=c).mT


@op
def transposed_convolution(p, v, rng, n):
    c = v.shape[-1]
    groups = rng.choice((1, 2)) if c % 2 == 0 else 1
    weight = p.par(n, c, 8 // groups, 3)
    return F.conv_transpose1d(v.mT, weight, padding=1, groups=groups).mT


@op
def convolution_of_an_image(p, v, rng, n):
    image = v.mT.unflatten(-1, (2, 2))
    weight = p.par(n, 8, v.shape[-1], 3, 3)
    return F.conv2d(image, weight, p.par(n + "b", 8), padding=1).flatten(2).mT


@op
def outer(p, v, rng, n):
    return (v[..., None] * p.par(n, 3)).flatten(2)


@op
def addmm(p, v, rng, n):
    c = v.shape[-1]
    y = torch.addmm(p.par(n + "b", 6), v.flatten(0, 1), p.matrix(n, 6, c).T)
    return y.unflatten(0, (2, 4))


@op
def fixed_matrix(p, v, rng, n):
    c = v.shape[-1]
    return v @ torch.linspace(-1, 1, c * c, dtype=v.dtype).view(c, c)


@op
def fused(p, v, rng, n):
    a, b, c = F.linear(v, p.par(n, 18, v.shape[-1])).chunk(3, -1)
    return a * b + c


@op
def joined_weights(p, v, rng, n):
    c = v.shape[-1]
    weight = torch.cat((p.par(n + "a", 4, c), p.matrix(n, 6, c)))
    return F.linear(v, weight)


@op
def flat_weight(p, v, rng, n):
    c = v.shape[-1]
    return F.linear(v, p.par(n, 6 * c).view(6, c))


@op
def made_weight(p, v, rng, n):
    w = p.par(n, 6, v.shape[-1])
    ways = (
        lambda: w / w.norm(),
        lambda: w - w.mean(1, keepdim=True),
        lambda: w.softmax(-1),
        lambda: w.tril(),
        lambda: w.square(),
        lambda: w * torch.ones_like(w).tril(),
        lambda: torch._weight_norm(w, p.par(n + "g", 6, 1), 0),
        lambda: F.normalize(w, dim=1) * p.par(n + "g", 6)[:, None],
    )
    return F.linear(v, rng.choice(ways)())


# Sums


@op
def add(p, v, rng, n):
    return v + p.other(v, rng) if rng.random() < 0.7 else v - p.other(v, rng)


@op
def residual(p, v, rng, n):
    c = v.shape[-1]
    return v + F.linear(F.linear(v, p.par(n + "a", 6, c)).relu(), p.par(n, c, 6))


@op
def bias(p, v, rng, n):
    c = v.shape[-1]
    shape = rng.choice(((c,), (1,), (4, 1), (4, c), (1, 1, c)))
    return v + p.par(n, *shape)


@op
def join(p, v, rng, n):
    if rng.random() < 0.5:
        return torch.cat((v, rng.choice(p.values)), -1)
    u = F.linear(v, p.par(n, v.shape[-1], v.shape[-1]))
    return torch.stack((v, u), -1).flatten(2)


@op
def blend(p, v, rng, n):
    u = p.other(v, rng)
    ways = (
        lambda: torch.lerp(v, u, 0.3),
        lambda: torch.addcmul(v, u, p.par(n, v.shape[-1])),
        lambda: torch.maximum(v, u),
        lambda: torch.where(v > 0, v, u),
        lambda: torch.where(torch.arange(4)[:, None] > 1, v, u),
    )
    return rng.choice(ways)()


@op
def centre(p, v, rng, n):
    return v - v.mean(rng.choice((-1, -2)), keepdim=True)


@op
def constant(p, v, rng, n):
    c = torch.linspace(0.5, 1.5, v.shape[-1], dtype=v.dtype)
    return rng.choice((v * c, v + c, 2 * v, v + 1, 1 - v, v / 3))


# Gating


@op
def multiply(p, v, rng, n):
    return v * p.other(v, rng)


@op
def vector(p, v, rng, n):
    c = v.shape[-1]
    shape = rng.choice(((c,), (1,), (4, 1), (c,)))
    return v * p.par(n, *shape)


@op
def divide(p, v, rng, n):
    if rng.random() < 0.5:
        return v / (v.abs() + 1)
    return v / (p.par(n, v.shape[-1]).abs() + 0.1)


@op
def gate(p, v, rng, n):
    c = v.shape[-1]
    u = F.linear(v, p.par(n, c, c))
    return v * rng.choice((torch.sigmoid, torch.relu, F.silu))(u)


@op
def glu(p, v, rng, n):
    return F.glu(v, -1) if v.shape[-1] % 2 == 0 else v


@op
def heads_scaled(p, v, rng, n):
    if v.shape[-1] % 2:
        return v
    return (v.unflatten(-1, (2, -1)) * p.par(n, 2, 1)).flatten(2)


@op
def mask(p, v, rng, n):
    return v * (v > 0) if rng.random() < 0.5 else v * torch.ones(4, 1).tril()


# Norms


@op
def layer_norm(p, v, rng, n):
    c = v.shape[-1]
    if rng.random() < 0.3:
        return F.layer_norm(v, (4, c), p.par(n, 4, c))
    if rng.random() < 0.3:
        return F.layer_norm(v, (c,))
    return F.layer_norm(v, (c,), p.par(n, c), p.par(n + "b", c))


@op
def rms_norm(p, v, rng, n):
    c = v.shape[-1]
    if rng.random() < 0.5:
        return F.rms_norm(v, (c,), p.par(n, c))
    return v * torch.rsqrt(v.pow(2).mean(-1, keepdim=True) + 1e-6)


@op
def batch_norm(p, v, rng, n):
    affine, track = rng.random() < 0.8, rng.random() < 0.8
    options = dict(affine=affine, track_running_stats=track)
    norm = p.module(n, lambda: nn.BatchNorm1d(v.shape[-1], **options))
    return norm(v.mT).mT


@op
def group_norm(p, v, rng, n):
    c = v.shape[-1]
    groups = 2 if c % 2 == 0 else 1
    return F.group_norm(v.mT, groups, p.par(n, c), p.par(n + "b", c)).mT


@op
def instance_norm(p, v, rng, n):
    return F.instance_norm(v.mT, weight=p.par(n, v.shape[-1])).mT


@op
def unit(p, v, rng, n):
    return F.normalize(v, dim=rng.choice((-1, -2)))


@op
def softmax(p, v, rng, n):
    f = rng.choice((torch.softmax, torch.log_softmax))
    return f(v, rng.choice((-1, -2)))


# Attention


@op
def attention(p, v, rng, n):
    c = v.shape[-1]
    h = 2 if c % 2 == 0 else 1

    def heads(name, t):
        return F.linear(t, p.par(n + name, c, c)).unflatten(-1, (h, -1)).mT.mT

    u = p.other(v, rng)
    q, k, w = (
        heads(name, t).transpose(1, 2)
        for name, t in (("q", v), ("k", u), ("v", u))
    )
    ways = (
        lambda: F.scaled_dot_product_attention(q, k, w),
        lambda: F.scaled_dot_product_attention(q, k, w, is_causal=True),
        lambda: F.scaled_dot_product_attention(q, k, w, p.par(n + "m", h, 4, 4)),
        lambda: F.scaled_dot_product_attention(
            q, k, w, torch.ones(4, 4).tril() > 0
        ),
        lambda: (q @ k.mT / 2).softmax(-1) @ w,
        lambda: (q @ k.mT + p.par(n + "m", 4, 4)).softmax(-1) @ w,
        lambda: (q @ k.mT).masked_fill(torch.ones(4, 4).triu(1) > 0, -9.0) @ w,
    )
    return rng.choice(ways)().transpose(1, 2).flatten(2)


@op
def grouped_queries(p, v, rng, n):
    c = v.shape[-1]
    if c % 4:
        return v
    q, k, w = (
        F.linear(v, p.par(n + name, width, c)).unflatten(-1, (-1, c // 4))
        for name, width in (("q", c), ("k", c // 2), ("v", c // 2))
    )
    q, k, w = (t.transpose(1, 2) for t in (q, k, w))
    if rng.random() < 0.5:
        k, w = (t.repeat_interleave(2, 1) for t in (k, w))
        y = F.scaled_dot_product_attention(q, k, w)
    else:
        y = F.scaled_dot_product_attention(q, k, w, enable_gqa=True)
    return y.transpose(1, 2).flatten(2)


@op
def rotary(p, v, rng, n):
    if v.shape[-1] % 2:
        return v
    angle = torch.linspace(0, 2, 4, dtype=v.dtype)[:, None]
    a, b = v.chunk(2, -1)
    return v * angle.cos() + torch.cat((-b, a), -1) * angle.sin()


@op
def multihead(p, v, rng, n):
    c = v.shape[-1]
    if c % 2:
        return v
    layer = p.module(n, lambda: nn.MultiheadAttention(c, 2, batch_first=True))
    return layer(v, v, v, need_weights=rng.random() < 0.5)[0]


# Pooling and what else looks at neighbours


@op
def pool(p, v, rng, n):
    t = v.mT if rng.random() < 0.7 else v
    ways = (
        lambda: F.max_pool1d(t, 3, 1, 1),
        lambda: F.avg_pool1d(t, 3, 1, 1),
        lambda: F.adaptive_avg_pool1d(t, t.shape[-1]),
        lambda: F.interpolate(t, scale_factor=2)[..., ::2],
        lambda: F.lp_pool1d(F.pad(t.abs() + 0.1, (1, 1)), 2.0, 3, 1),
    )
    y = rng.choice(ways)()
    return y.mT if t is not v else y


@op
def pad(p, v, rng, n):
    mode = rng.choice(("constant", "reflect", "circular", "replicate"))
    if mode == "constant":
        return F.pad(v, (1, 1))
    return F.pad(v.mT, (1, 1), mode)[..., 1:-1].mT


@op
def windows(p, v, rng, n):
    return v.unfold(-1, 3, 1).flatten(2) if v.shape[-1] >= 3 else v


# Reductions


@op
def reduction(p, v, rng, n):
    d = rng.choice((-1, -2))
    ways = (
        lambda: v - v.amax(d, keepdim=True),
        lambda: v * v.sum(d, keepdim=True),
        lambda: v / (v.norm(dim=d, keepdim=True) + 1),
        lambda: v + v.var(d, correction=0, keepdim=True),
        lambda: v - v.logsumexp(d, keepdim=True),
        lambda: v * v.min(d, keepdim=True).values,
        lambda: v + v.std(d, correction=0, keepdim=True),
        lambda: v + v.abs().prod(d, keepdim=True),
        lambda: v + v.sum(d, keepdim=True),
        lambda: v - v.median(d, keepdim=True).values,
        lambda: v * v.abs().mean(),
        lambda: v.sum(-2, keepdim=True).expand(v.shape),
        lambda: v + v.argmax(d, keepdim=True),
    )
    return rng.choice(ways)()


@op
def scan(p, v, rng, n):
    d = rng.choice((-1, -2))
    ways = (
        lambda: v.cumsum(d),
        lambda: v.cummax(d).values,
        lambda: v.sort(d).values,
        lambda: v.topk(min(3, v.shape[-1]), -1).values,
        lambda: v.gather(d, v.argsort(d)),
        lambda: v.diff(dim=-1, prepend=v[..., :1]),
        lambda: v.logcumsumexp(d),
        lambda: v.cumprod(d),
    )
    return rng.choice(ways)()


# Elementwise


ELEMENTWISE = (
    torch.relu,
    torch.abs,
    torch.tanh,
    torch.sigmoid,
    torch.neg,
    torch.square,
    torch.sin,
    torch.erf,
    torch.sign,
    torch.nan_to_num,
    F.leaky_relu,
    F.gelu,
    F.silu,
    F.mish,
    F.softplus,
    F.elu,
    F.celu,
    F.hardtanh,
    F.relu6,
    F.hardswish,
    F.hardshrink,
    F.softsign,
    F.logsigmoid,
    F.tanhshrink,
    lambda v: v.clamp(min=0),
    lambda v: v.clamp(max=0),
    lambda v: v.clamp(-1, 1),
    lambda v: v.clamp(max=2).exp(),
    lambda v: v.pow(3),
    lambda v: v.abs().sqrt(),
    lambda v: (v.abs() + 1).log(),
    lambda v: (v.abs() + 1).reciprocal(),
    lambda v: 1 / (v.square() + 1),
    lambda v: F.threshold(v, 0.0, 0.0),
    lambda v: F.threshold(v, 0.1, 0.0),
    lambda v: torch.maximum(v, torch.zeros_like(v)),
    lambda v: torch.where(v > 0, v, 0.0),
    lambda v: torch.where(v > 0, v, torch.zeros_like(v)),
    lambda v: v * (v > 0).to(v.dtype),
    lambda v: torch.atan2(v, torch.ones_like(v)),
    lambda v: v.remainder(1.0),
    lambda v: v.floor(),
    lambda v: v.heaviside(torch.ones((), dtype=v.dtype)),
    lambda v: v.copysign(torch.ones_like(v)),
    lambda v: v.hypot(torch.ones_like(v)),
)


@op
def elementwise(p, v, rng, n):
    return rng.choice(ELEMENTWISE)(v)


OPS["elementwise again"] = OPS["elementwise once more"] = elementwise


@op
def relu(p, v, rng, n):
    return v.relu()


@op
def prelu(p, v, rng, n):
    return F.prelu(v.mT, p.par(n, rng.choice((1, v.shape[-1])))).mT


# Dropout and embeddings


@op
def dropout(p, v, rng, n):
    if rng.random() < 0.5:
        return F.dropout(v, 0.3, p.training)
    return F.dropout1d(v.mT, 0.3, p.training).mT


@op
def embedding(p, v, rng, n):
    table = p.par(n, 5, v.shape[-1])
    ways = (
        lambda: F.embedding(p.tokens, table),
        lambda: table[p.tokens],
        lambda: table.index_select(0, p.tokens.flatten()).view_as(v),
        lambda: F.one_hot(p.tokens, 5).to(v.dtype) @ table,
    )
    return v + rng.choice(ways)()


# Indexing and movement


@op
def pick(p, v, rng, n):
    c = v.shape[-1]
    order = torch.tensor(rng.sample(range(c), c))
    few = torch.tensor([rng.randrange(c) for _ in range(5)])
    ways = (
        lambda: v.index_select(-1, order),
        lambda: v[..., order],
        lambda: v[..., few],
        lambda: v.gather(-1, order.expand(v.shape)),
        lambda: v[..., torch.arange(c) % 3 == 0],
        lambda: v[:, torch.tensor([3, 1, 1, 0])],
        lambda: torch.take_along_dim(v, few.expand(2, 4, 5), -1),
        lambda: v[..., 0, None] + v,
    )
    return rng.choice(ways)()


@op
def cut(p, v, rng, n):
    c = v.shape[-1]
    k = rng.randrange(1, max(2, c // 2 + 1))
    halves = v.chunk(2, -1)
    ways = (
        lambda: v[..., k - 1 :],
        lambda: v[..., :k],
        lambda: v[..., ::2],
        lambda: rng.choice(halves),
        lambda: v.split(k, -1)[0],
        lambda: torch.cat(v.tensor_split(3, -1)[::-1], -1),
        lambda: v.unbind(-1)[0][..., None] * v,
        lambda: torch.stack(v.unbind(1)[::-1], 1),
    )
    return rng.choice(ways)()


@op
def move(p, v, rng, n):
    c = v.shape[-1]
    h = 2 if c % 2 == 0 else 1
    u = v.unflatten(-1, (h, -1))
    ways = (
        lambda: v.roll(1, -1),
        lambda: v.flip(-1),
        lambda: v.flip(1),
        lambda: u.transpose(-1, -2).flatten(2),
        lambda: F.linear(u, p.par(n, c // h, c // h)).flatten(2),
        lambda: v.repeat(1, 1, 2),
        lambda: v.repeat_interleave(2, -1),
        lambda: v[..., None].expand(2, 4, c, 2).flatten(2),
        lambda: v.contiguous().as_strided((2, 4, c), (4 * c, c, 1)),
        lambda: v.reshape(2, c, 4).mT,
        lambda: v.mT.reshape(2, 4, c),
        lambda: v.movedim(0, 1).swapaxes(0, 1).clone(),
        lambda: F.pixel_shuffle(v.mT.reshape(2, c, 2, 2), 1).flatten(2).mT,
        lambda: F.channel_shuffle(v.mT[..., None], h).squeeze(-1).mT,
        lambda: v.tril(),
        lambda: torch.rot90(v, 2, (1, 2)),
        lambda: torch.block_diag(v[0], v[1])[None].expand(2, 8, 2 * c)[:, :4],
        lambda: v.mT if c == 4 else v,
    )
    return rng.choice(ways)()


# In place


@op
def in_place(p, v, rng, n):
    c = v.shape[-1]
    y, u, half = v.clone(), p.other(v, rng), max(1, c // 2)
    ways = (
        lambda: y.relu_(),
        lambda: y.add_(1),
        lambda: y.mul_(p.par(n, c)),
        lambda: y.add_(u),
        lambda: y.clamp_(min=0),
        lambda: y.masked_fill_(y > 1, 0.0),
        lambda: torch.zeros_like(y).copy_(u),
        lambda: F.relu(y, inplace=True) + y,
        lambda: torch.add(v, u, out=torch.empty_like(v)),
        lambda: y.zero_() + u,
        lambda: torch.zeros_like(y).index_add_(1, torch.tensor([1, 0, 2, 2]), u),
    )
    write = rng.randrange(len(ways) + 6)
    if write < len(ways):
        return ways[write]()
    write -= len(ways)
    if write == 0:
        y[..., 0] = 0
    elif write == 1:
        y[..., :half] = u[..., :half]
    elif write == 2:
        y[..., :half].mul_(2)
    elif write == 3:
        y.mT[:, 0].add_(1)
    elif write == 4:
        y = y.contiguous()
        y.view(-1).mul_(2)
        y = y + v
    else:
        view = y[:, :2]
        y.mul_(p.par(n, c))
        y = torch.cat((view, y[:, 2:]), 1)
    return y


# Complex numbers


@op
def spectrum(p, v, rng, n):
    if v.shape[-1] % 2:
        return torch.fft.fft(v, dim=rng.choice((-1, -2))).real
    z = torch.view_as_complex(v.unflatten(-1, (-1, 2)).contiguous())
    turned = z * torch.polar(torch.ones(4, 1), torch.arange(4.0)[:, None])
    return torch.view_as_real(turned).flatten(2).to(v.dtype)


# What is said about a program


def numbers(model: nn.Module) -> dict[str, Tensor]:
    "All parameters and buffers of a model"
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: t.detach() for name, t in named}


def moved(state: dict[str, Tensor], moves: list[tuple[Space, Tensor]], kind):
    "All numbers after some spaces have moved"
    elements = {space.name: element for space, element in moves}
    return Blocks(tuple((s, kind) for s, _ in moves)).move(state, elements)


def inputs(rng: Generator) -> tuple[Tensor, Tensor]:
    "What a program is called with"
    x = torch.randn(2, 4, 6, dtype=DOUBLE, generator=rng)
    return x, torch.randint(5, (2, 4), generator=rng)


def drawn(seed: int) -> tuple[Program, Wiring] | None:
    "A program that computes something finite, and what is read off it"
    torch.manual_seed(seed)
    program, rng = Program(seed), Generator().manual_seed(seed)
    state, x = numbers(program), inputs(rng)
    for train in (True, False):
        out = outputs(program, state, x, train)
        size = [t.abs().max().item() for t in out]
        if not all(1e-6 < s < 1e6 for s in size):
            return None
    return program, wire(program, inputs(rng))


def faults(seed: int, program: Program, wiring: Wiring, train: bool) -> list[str]:
    "Spaces whose moves change what the program says on fresh inputs"
    rng = Generator().manual_seed(seed + 1)
    state, x, found = numbers(program), inputs(rng), []
    before = outputs(program, state, x, train)
    for kind in KINDS:
        spaces = [s for s in wiring.spaces if kind in s.commutes]
        moves = [(s, draw(s, kind, rng)) for s in spaces]
        drift = change(
            before, outputs(program, moved(state, moves, kind), x, train)
        )
        if not drift < TOLERANCE:
            found.append(f"{kind} of all: {drift:.0e}, train {train}")
            for move in moves:
                after = outputs(program, moved(state, [move], kind), x, train)
                if not change(before, after) < TOLERANCE:
                    found.append(f"{kind}: {move[0]}")
    return found


def looked_at(seeds: range) -> tuple[int, Counter[str], list[str]]:
    "How many programs were looked at, spaces by kind, and programs with faults"
    found, looked, kinds = [], 0, Counter()
    for seed in seeds:
        program = drawn(seed)
        if program is None:
            continue
        looked += 1
        wrong = faults(seed, *program, train=bool(seed % 2))
        kinds.update(str(k) for s in program[1].spaces for k in s.commutes)
        if wrong:
            found.append("\n".join([program[0].told, *wrong]))
    return looked, kinds, found


def test_random_programs():
    "Every kind of every space of a thousand programs, in one mode or the other"
    blocks = [range(first, first + 50) for first in range(0, DRAWN, 50)]
    with ProcessPoolExecutor(2, get_context("spawn"), one_thread) as pool:
        looked, kinds, found = zip(*pool.map(looked_at, blocks))
    faults = [text for block in found for text in block]
    assert not faults, "\n\n".join(faults)
    assert sum(looked) >= PROGRAMS
    count = sum(kinds, Counter())
    assert all(count[str(kind)] > PROGRAMS for kind in KINDS), count


def one_thread() -> None:
    "For processes side by side"
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")


def test_every_step_is_drawn():
    "Else a family of ops is not looked at"
    taken = Counter(name for seed in range(DRAWN) for name in steps(seed))
    assert min(taken[name] for name in OPS) > 100


def without(space: Space, slot: Slot) -> Space:
    return replace(space, slots=[t for t in space.slots if t is not slot])


def shifted(space: Space, kind: Kind, rng: Generator) -> Tensor:
    "A large element that is never the identity"
    e = draw(space, kind, rng)
    return kind.zero(space).roll(1, -1) if kind is perm else e


def test_a_slot_left_behind_is_seen():
    "Only where a number does not matter is it not: a key's bias is one"
    changed = []
    for seed in range(60):
        program, wiring = drawn(seed) or (None, None)
        if program is None:
            continue
        rng = Generator().manual_seed(seed + 1)
        state, x = numbers(program), inputs(rng)
        before = outputs(program, state, x, False)
        for space in wiring.spaces:
            kind = next(k for k in (gl, scale, perm) if k in space.commutes)
            known = [t for t in kind.slots(space) if "running" not in t.param]
            lame = without(space, known[seed % len(known)])
            move = [(lame, shifted(space, kind, rng))]
            after = outputs(program, moved(state, move, kind), x, False)
            changed.append(change(before, after) > 1e-5)
    assert len(changed) > 200 and sum(changed) > 0.95 * len(changed)


WRONG = {  # Rules that let too much through
    "relu": lambda f, x: x,
    "_softmax": lambda f, x, *_: x,
    "native_layer_norm": lambda f, x, *_: [x],
    "add": lambda f, a, b, *_: a,
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_rule_is_seen(name, monkeypatch):
    "Among a few programs there is one that shows it"
    monkeypatch.setitem(RULES, name, WRONG[name])
    for seed in range(100):
        program = drawn(seed)
        if program and faults(seed, *program, train=False):
            return
    raise AssertionError(f"nothing shows that the rule of {name} is wrong")


# Nearly maximal


class Tiny(nn.Module):
    "A model made of named layers and a function of them"

    def __init__(self, f: Callable[..., Tensor], **layers: nn.Module):
        super().__init__()
        self.f, self.layers = f, nn.ModuleDict(layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self.layers, x)


def skip_by_joining(layers: nn.ModuleDict, x: Tensor) -> Tensor:
    y = layers["a"](x).relu()
    return layers["c"](torch.cat((y, layers["b"](y).relu()), -1))


def skip_by_adding(layers: nn.ModuleDict, x: Tensor) -> Tensor:
    y = layers["a"](x)
    return layers["c"](y + layers["d"](layers["b"](y).relu()))


def batch_norm_by_hand(x, mean, var, weight, bias, train, momentum, eps):
    "In evaluation; PyTorch's own gives no derivative by its statistics"
    return (x - mean) * torch.rsqrt(var + eps) * weight + bias


def between(layer: nn.Module) -> nn.Sequential:
    "A layer between two linear ones"
    return nn.Sequential(nn.Linear(3, 4), layer, nn.Linear(4, 2))


def convolutions() -> nn.Sequential:
    "Two convolutions with pooling between them"
    return nn.Sequential(
        nn.Conv2d(1, 3, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(3, 2, 2),
        nn.LeakyReLU(),
        nn.Flatten(),
        nn.Linear(8, 2),
    )


def grouped(groups: int, layer: type[nn.Module] = nn.Conv1d) -> nn.Sequential:
    "A convolution in groups between two pointwise ones"
    return nn.Sequential(
        nn.Conv1d(2, 4, 1),
        nn.ReLU(),
        layer(4, 4, 3, groups=groups),
        nn.ReLU(),
        nn.Conv1d(4, 2, 1),
    )


def adapters() -> nn.Sequential:
    "Two thin products beside frozen layers"
    layers = [LoRALinear(nn.Linear(n, m), 2) for n, m in ((3, 4), (4, 2))]
    return nn.Sequential(layers[0], nn.ReLU(), layers[1])


def bare() -> nn.Module:
    return nn.RMSNorm(4, elementwise_affine=False)


def joining() -> nn.Module:
    layers = dict(a=nn.Linear(3, 3), b=nn.Linear(3, 3), c=nn.Linear(6, 2))
    return Tiny(skip_by_joining, **layers)


def adding() -> nn.Module:
    layers = dict(a=nn.Linear(3, 3), b=nn.Linear(3, 4), c=nn.Linear(3, 2))
    return Tiny(skip_by_adding, d=nn.Linear(4, 3), **layers)


def zoo(name: str, **sizes: int) -> Callable[[], nn.Module]:
    "Makes a model of the zoo"
    return partial(ZOO[name].make, **sizes)


WORDS = torch.tensor([[0, 1, 2, 3], [4, 3, 2, 1], [0, 0, 4, 2]])
# Name -> a model, the shape of its inputs, or inputs, all directions there are,
# and how many of them are not found
TINY = {
    "ReLU": (partial(mlp, nn.ReLU, (3, 4, 3, 2)), (6, 3), 7, 0),
    "tanh": (partial(mlp, nn.Tanh, (3, 4, 2)), (6, 3), 0, 0),
    "linear": (partial(mlp, nn.Identity, (3, 4, 3, 2)), (6, 3), 25, 0),
    "PReLU": (lambda: between(nn.PReLU(4)), (6, 3), 4, 0),
    "convolutions": (convolutions, (4, 1, 8, 8), 5, 0),
    "depthwise": (partial(grouped, 4), (4, 2, 6), 8, 0),
    "transposed": (partial(grouped, 1, nn.ConvTranspose1d), (4, 2, 6), 8, 0),
    "BatchNorm": (lambda: between(nn.BatchNorm1d(4)), (6, 3), 8, 0),
    "bilinear": (zoo("bilinear"), (6, 5), 24, 0),
    "ReGLU": (zoo("ReGLU"), (6, 5), 24, 0),
    "LoRA": (adapters, (6, 3), 8, 0),
    "called twice": (zoo("called twice"), (6, 4), 80, 0),
    "two names": (zoo("two names"), (6, 4), 8, 0),
    "joined skip": (joining, (6, 3), 6, 0),
    "residual": (adding, (6, 3), 13, 0),
    "LSTM": (partial(nn.LSTM, 3, 3, batch_first=True), (2, 3, 3), 0, 0),
    "Llama without rotation": (
        partial(Llama, 5, 4, 1, 2, 1, rotary=False),
        WORDS,
        32,
        0,
    ),
    # One factor for each group: its columns are stored once for all groups.
    "grouped": (partial(grouped, 2), (4, 2, 6), 7, 1),
    # What a norm takes off: 1·uᵀ added to what it is given, and its size.
    "LayerNorm": (lambda: between(nn.LayerNorm(4)), (6, 3), 12, 8),
    "RMSNorm": (lambda: between(nn.RMSNorm(4)), (6, 3), 5, 1),
    # All rotations, and the size.
    "RMSNorm without weight": (lambda: between(bare()), (6, 3), 7, 7),
    # Turns of each pair of coordinates; their scalings are found.
    "Llama": (partial(Llama, 5, 8, 1, 2, 1), WORDS, 68, 2),
    # A key's bias adds the same to all scores of a query.
    "attention by einsum": (
        zoo("attention by einsum", width=4, heads=2),
        (3, 4, 4),
        28,
        4,
    ),
    # 20 by the key's bias and 48 by the norms.
    "GPT": (partial(GPT, 5, 4, 1, 2, 4), WORDS, 92, 68),
}


def directions(model: nn.Module, x: Tensor, rng: Generator) -> int:
    """How many independent linear moves of single axes keep the outputs at all
    points, counted numerically; those that only move factors between the axes
    of one tensor are taken off"""
    named = [*model.named_parameters(), *model.named_buffers()]
    shapes = {
        name: t.shape
        for name, t in named
        if t.requires_grad or name.endswith(("mean", "var"))
    }
    axes = [
        (k, d, n) for k, s in shapes.items() for d, n in enumerate(s) if n > 1
    ]
    unknown, rows = sum(n * n for *_, n in axes), []

    def flat(w):
        with patch.object(F, "batch_norm", batch_norm_by_hand):
            out = functional_call(model, w, (fresh(x, rng),))
        return torch.cat([t.flatten() for t in pytree.tree_leaves(out)])

    while sum(map(len, rows)) < 1.2 * unknown + 30:
        w = {name: number(name, shape, rng) for name, shape in shapes.items()}
        slopes = jacrev(flat)(w)
        count = len(next(iter(slopes.values())))
        picked, row = torch.randperm(count, generator=rng)[:5], []
        for name, d, n in axes:
            slope = slopes[name].detach()[picked].movedim(d + 1, 1)
            slope, t = slope.reshape(len(picked), n, -1), w[name].movedim(d, 0)
            t = t.reshape(n, -1)
            row.append(torch.einsum("ria,ja->rij", slope, t).flatten(1))
        row = torch.cat(row, 1)
        rows.append(row / row.abs().max())
    values = torch.linalg.svdvals(torch.cat(rows))
    rank = (values > 1e-10 * values[0]).sum().item()
    gap = 0 if rank == unknown else values[rank] / values[rank - 1]
    assert gap < 1e-5
    counts = Counter(name for name, *_ in axes)
    return unknown - rank - sum(count - 1 for count in counts.values())


def number(name: str, shape: torch.Size, rng: Generator) -> Tensor:
    "Random values for a parameter or a statistic"
    t = torch.randn(shape, generator=rng, dtype=DOUBLE)
    t = 0.4 * t + 0.8 if len(shape) == 1 else 0.5 * t
    return t.abs() + 0.1 if name.endswith("var") else t


def dimensions(wiring: Wiring) -> int:
    "How many directions the matrices and diagonals of a wiring have"
    count = 0
    for s in wiring.spaces:
        if gl in s.commutes:
            count += s.copies * s.size**2
        elif scale in s.commutes:
            count += s.copies * s.size
    return count


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", TINY)
def test_nearly_maximal(name):
    "Of all directions that exist, numerically, those listed are not found"
    make, given, exist, missing = TINY[name]
    torch.manual_seed(0)
    model, rng = make().double().eval(), Generator().manual_seed(0)
    x = given
    if isinstance(given, tuple):
        x = torch.randn(given, dtype=DOUBLE)
    found = dimensions(wire(model, x, train=False))
    assert (directions(model, x, rng), exist - found) == (exist, missing)


# A model is left as it was


class Restless(nn.Module):
    "A model that does to itself what models do"

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 8)
        self.norm, self.drop = nn.BatchNorm1d(8), nn.Dropout(0.5)
        self.out = nn.Linear(8, 2)
        self.calls, self.last, self.notes = 0, None, {"seen": []}
        self.register_buffer("total", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.total += 1
        self.last = self.norm(self.a(x))
        self.notes["calls"] = self.calls
        return self.out(self.drop(self.b(self.last.relu()).relu()))


def snapshot(model: nn.Module) -> list[object]:
    "What can be seen of a model, by identity and by value"
    tensors = [*model.named_parameters(), *model.named_buffers()]
    grads = [(k, p.grad) for k, p in model.named_parameters()]
    whole = [(k, id(t), t.data_ptr(), t._version) for k, t in tensors]
    modules = [
        (
            name,
            id(m),
            m.training,
            [*m.__dict__],
            [*m._forward_hooks.items()],
            [*m._forward_pre_hooks.items()],
        )
        for name, m in model.named_modules()
    ]
    values = [(k, t.tolist()) for k, t in tensors]
    return [whole, [(k, id(g), g.tolist()) for k, g in grads], modules, values]


@pytest.mark.parametrize("device", ["meta", "real"])
def test_a_model_is_left_as_it_was(device):
    "Parameters, buffers, mode, gradients, hooks, random state, own attributes"
    torch.manual_seed(0)
    model, x = Restless(), torch.randn(6, 4)
    model.norm.eval()  # a frozen norm in a model that trains
    heard = []
    model.a.register_forward_hook(lambda *_: heard.append(1))
    if device == "real":  # a look at a value, which has none on the meta device
        model.b.register_forward_pre_hook(lambda m, a: a[0].sum().item() and None)
    model(x).sum().backward()
    before, state = snapshot(model), torch.get_rng_state()
    own, given = (model.calls, model.last, dict(model.notes)), x.clone()
    wiring = wire(model, x)
    assert wiring.spaces and wiring.branch == (device == "real")
    assert snapshot(model) == before
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(x, given)
    assert (model.calls, model.last, model.notes) == own


# What users ran into


def exact(model: nn.Module, x: Tensor, share: float, kind: str = "any") -> None:
    "At least such a share moves, and outputs stay what they are"
    row = prove(model, x, elements=3)
    assert row["share"][kind] >= share, row["share"]
    assert all(v < 1e-11 for k, v in row["drift"].items() if "64" in k), row[
        "drift"
    ]


def clamped(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
    return out.clamp(max=1.0)


def test_what_really_runs_is_read():
    "A hook, or a forward that was replaced: the loss moved unseen"
    model, x = mlp(nn.ReLU), torch.randn(7, 5)
    exact(model, x, 0.9, "scale")
    model[1].register_forward_hook(clamped)
    exact(model, x, 0.9, "perm")
    scaled = shares(wire(model, x))["scale"]
    assert 0 < scaled < 0.8
    model[3].forward = torch.tanh
    exact(model, x, 0.9, "perm")
    assert shares(wire(model, x))["scale"] == 0


class Keeps(nn.Module):
    "It cannot be copied: it holds a part of a graph, a lock, a generator"

    def __init__(self):
        super().__init__()
        self.body, self.lock = mlp(nn.ReLU), Lock()
        self.rng, self.feature = Generator(), None

    def forward(self, x: Tensor) -> Tensor:
        self.feature = self.body[:2](x)
        return self.body[2:](self.feature)


def test_a_model_need_not_be_copied():
    model, x = Keeps(), torch.randn(7, 5)
    model(x)
    with pytest.raises(Exception):  # noqa: B017
        copy.deepcopy(model)
    exact(model, x, 0.9, "scale")


def pruned(model: nn.Module) -> nn.Module:
    "A network of which a third of one matrix is masked"
    prune.l1_unstructured(model[2], "weight", 0.3)
    return model


@pytest.mark.parametrize(
    ("model", "share"),
    [
        (ZOO["weight_norm, old"].make, 0.9),
        (lambda: nn.utils.spectral_norm(nn.Linear(4, 3)), 0),
        (lambda: pruned(mlp(nn.ReLU, (4, 8, 8, 8, 2))), 0.3),
    ],
)
def test_weights_that_are_made_of_others(model, share):
    "`KeyError: '2.weight'`, where a layer just cannot move"
    exact(model(), torch.randn(5, 4), share)


class Asks(nn.Module):
    "Defaults, flags, assertions, shapes and the mode are looked at"

    def __init__(self):
        super().__init__()
        self.body, self.drop = mlp(nn.ReLU), nn.Dropout(0.5)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        return_features: bool = False,
        targets: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        assert x.ndim == 2 and len(x) > 1
        features = self.body[:4](x if mask is None else x * mask)
        if self.training:
            features = self.drop(features)
        if x.shape[0] > 100:
            features = features.sin()
        out = self.body[4](features)
        if targets is not None:
            return F.cross_entropy(out, targets)
        return (out, features.sum(1)) if return_features else out


@pytest.mark.parametrize(
    ("more", "share"),
    [
        ({}, 0.9),
        ({"mask": torch.ones(5)}, 0.9),
        ({"return_features": True}, 0.2),  # their sum does not scale
        ({"targets": torch.tensor([0, 1, 2, 0, 1, 2, 0])}, 0.9),
    ],
)
def test_forward_may_ask(more, share):
    "`symbolically traced variables cannot be used as inputs to control flow`"
    x = torch.randn(7, 5)
    model = Asks()
    exact(model, {"x": x} | more if more else x, share, "scale")


@pytest.mark.parametrize(
    ("name", "kind", "share"),
    [
        ("SmallResNet", "scale", 0.99),
        ("UNet", "perm", 0.99),
        ("SmallViT", "gl", 0.3),
        ("LoRA", "gl", 0.5),
        ("TransformerEncoderLayer", "gl", 0.4),
    ],
)
def test_ordinary_models_move(name, kind, share):
    "`GL finds nothing to move (fc: it is the output of the model)`"
    make, data = ZOO[name]
    exact(make(), data(), share, kind)


def other_strides(layers, x):
    "Of the same shape, but other entries"
    y = layers["a"](x).relu().contiguous()
    return layers["b"](y.as_strided(y.shape, (1, 4)))


def drawn_by_values(layers, x):
    return layers["b"](torch.bernoulli(layers["a"](x).sigmoid()))


def trace(layers, x):
    return layers["b"](layers["a"](x)) + torch.einsum("ii->", layers["c"].weight)


def written_to_data(layers, x):
    y = layers["a"](x).relu()
    z = torch.zeros_like(y)
    z.data = y
    return layers["b"](z)


def layout_in_place(layers, x):
    y = layers["a"](x).relu()
    y.t_()
    return layers["b"](y.mT)


def asked_as_list(layers, x):
    return layers["b"](layers["a"](x).relu()) * sum(layers["a"].bias.tolist())


def larger(layers, x):
    return layers["b"](torch.maximum(layers["a"](x), layers["c"](x)))


def with_itself(layers, x):
    y = layers["a"](x)
    return layers["b"](y + y)


def ranked_pairs(layers, x):
    y = layers["a"](x)
    return (y[..., None] - y[..., None, :]).relu().triu(1).sum((1, 2))


def triangle(layers, x):
    return layers["a"](x), layers["b"].weight.tril().square().sum()


def cut_twice(layers, x):
    y = layers["a"](x)
    halves = y[:, :4] - y[:, 4:].relu()
    return halves.square().sum(1) + y[:, 1:5].sum(1)


def gated_and_cut(layers, x):
    y = layers["a"](x)
    return F.glu(y).square().sum(1) + y[:, 1:5].sum(1)


def turned_around(layers, x):
    y = layers["a"](x)
    return (y.relu() * y.roll(2, 1) * y.flip(1).roll(-1, 1).sigmoid()).sum(1)


def value_copied(layers, x):
    return layers["b"](copy.deepcopy(layers["a"](x)).relu())


def layer_copied(layers, x):
    return copy.deepcopy(layers["b"])(layers["a"](x).relu())


def behind_a_view(layers, x):
    y = layers["a"](x)[:, 4:]
    return layers["b"](layers["a"](x)), y.as_strided((4, 4), (8, 1), 0)


def picked_by_units(layers, x):
    y = layers["a"](x)
    return layers["b"](y) * x[y > 0].sum()


def names_of_units(layers, x):
    y = layers["a"](x)
    return layers["b"](y), layers["c"].weight[(y[0] > 0).long()]


def whole_numbers(layers, x):
    return layers["b"]((3 * layers["a"](x)).long().to(x.dtype))


def filled_zeros(layers, x):
    held = x.new_empty(8)
    z = torch.zeros(8, dtype=x.dtype, out=held)
    held[2] = 3.0
    return layers["b"](layers["a"](x) * z)


def set_to_units(layers, x):
    y, held = layers["a"](x), torch.empty(0, dtype=x.dtype, device=x.device)
    held.set_(y)
    return layers["b"](y), held


def through_numpy(layers, x):
    y = layers["a"](x).detach()
    return layers["b"](y + torch.from_numpy(y.numpy()))


CORNERS = (
    ranked_pairs,
    triangle,
    cut_twice,
    gated_and_cut,
    turned_around,
    value_copied,
    layer_copied,
    behind_a_view,
    picked_by_units,
    names_of_units,
    whole_numbers,
    filled_zeros,
    set_to_units,
    through_numpy,
    other_strides,
    drawn_by_values,
    trace,
    written_to_data,
    layout_in_place,
    asked_as_list,
    larger,
    with_itself,
)


@pytest.mark.parametrize("f", CORNERS)
def test_corners(f):
    "Each of them was read wrongly, or not at all"
    torch.manual_seed(0)
    layers = {name: nn.Linear(8, 8) for name in "abc"}
    exact(Tiny(f, **layers), torch.randn(4, 8), 0)


class Named(dict):
    "An output of names and values, no class that PyTorch knows"


@dataclass(slots=True)
class Slotted:
    "An output without a `__dict__`"

    held: Tensor


class Circular:
    "An output that holds itself"

    def __init__(self, held: Tensor):
        self.held, self.own = held, self


def in_array(y: Tensor) -> np.ndarray:
    "An array of one object"
    held = np.empty(1, object)
    held[0] = y
    return held


@pytest.mark.parametrize(
    "hold",
    [
        lambda y: Named(held=y),
        lambda y: [{y}],
        lambda y: deque([y]),
        Slotted,
        Circular,
        lambda y: SimpleNamespace(held=[y]),
        lambda y: lambda: y,
        in_array,
    ],
)
def test_an_output_stays_whatever_holds_it(hold):
    layers = {name: nn.Linear(5, 5) for name in "ab"}
    model = Tiny(lambda layers, x: hold(layers["a"](x)), **layers)
    assert not wire(model, torch.randn(3, 5)).spaces


def in_list(model: nn.Module, weight: nn.Parameter) -> None:
    model.other = [weight]


def as_buffer(model: nn.Module, weight: nn.Parameter) -> None:
    model.register_buffer("other", weight.detach())


def as_frozen(model: nn.Module, weight: nn.Parameter) -> None:
    model.other = nn.Parameter(weight.data, requires_grad=False)


def as_attribute(model: nn.Module, weight: nn.Parameter) -> None:
    model.other = weight.data


def applied(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight.mT


def mapped(x: Tensor, weight: Tensor) -> Tensor:
    return torch.vmap(torch.sin)(weight)


@pytest.mark.parametrize("f", [applied, mapped])
@pytest.mark.parametrize("keep", [in_list, as_buffer, as_frozen, as_attribute])
def test_a_weight_that_is_kept_twice_stays(keep, f):
    "What it does under its other name counts, too: here it makes an output"

    def both(layers, x):
        other = model.other[0] if type(model.other) is list else model.other
        return layers["b"](layers["a"](x)), f(x, other)

    layers = {name: nn.Linear(5, 5) for name in "ab"}
    model, x = Tiny(both, **layers), torch.randn(3, 5)
    assert wire(Tiny(lambda k, x: k["b"](k["a"](x)), **layers), x).spaces
    keep(model, layers["a"].weight)
    assert not wire(model, x).spaces


@lru_cache
def causal(n: int, dtype: torch.dtype) -> Tensor:
    "A mask, made once for all models"
    later = torch.ones(n, n, dtype=torch.bool).triu(1)
    return torch.zeros(n, n, dtype=dtype).masked_fill(later, -torch.inf)


class Caches(nn.Module):
    "It keeps what it makes: in a list of its own, in a function, in its class"

    of_class: ClassVar[dict[int, Tensor]] = {}

    def __init__(self, in_class: bool):
        super().__init__()
        self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 2)
        self.in_class, self.own = in_class, {"kept": []}

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).relu()
        if not self.own["kept"]:
            self.own["kept"].append(y)
        if self.in_class and len(x) not in self.of_class:
            self.of_class[len(x)] = x.new_ones(len(x), 1)
        if self.in_class:
            return self.b(self.of_class[len(x)] * y)
        scores = (y @ y.mT + causal(len(x), x.dtype)).softmax(1)
        return self.b(scores @ y + self.own["kept"][0])


def test_what_a_model_keeps_is_no_longer_heard():
    "A second reading found matrices that pass a ReLU"
    model, x = Caches(in_class=False), torch.randn(3, 5)
    first, second = (wire(model, x).spaces for _ in range(2))
    assert first == second and first[0].commutes == {perm}
    assert model.own == {"kept": []}
    assert model(x).isfinite().all()


class ReadOnly(dict):
    "A dict that nobody changes, as settings often are"

    def __setitem__(self, *_):
        raise TypeError("read-only")

    update = clear = __setitem__


def test_what_did_not_change_is_left_alone():
    "`ValueError: wire cannot run Sequential: read-only`, in train mode after it"
    model, x = mlp(nn.ReLU).eval(), torch.randn(7, 5)
    model.settings = ReadOnly(width=5)
    assert wire(model, x).spaces
    assert model.settings == {"width": 5} and not model.training


def test_a_tensor_without_values_says_so():
    "The class keeps one that has a shape only"
    model, x = Caches(in_class=True), torch.randn(3, 5)
    assert wire(model, x).spaces[0].commutes == {perm, scale}
    with pytest.raises(RuntimeError, match="a tensor without values"):
        model(x)
    Caches.of_class.clear()
    assert model(x).isfinite().all()


# An op of one's own


@torch.library.custom_op("symtele_test::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    return 2 * x


@twice.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Doubles(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return twice(x)


def test_an_op_of_ones_own(monkeypatch):
    "It stops what it touches and is named; a rule of one line lets it through"
    model, x = mlp(Doubles, (4, 8, 2)), torch.randn(5, 4)
    wiring = wire(model, x)
    words = str(wiring.stays) + str(wiring.spaces)
    assert (
        shares(wiring)["any"] == 0 and "twice in 1, which no rule knows" in words
    )
    monkeypatch.setitem(RULES, "twice", lambda f, x: x)
    exact(model, x, 0.9, "gl")
