"""Sums over the slots of neighborhoods in plain PyTorch, differentiable any number of times.

Three products, each of which is the derivative of the other two:

    scores     s[i, r] = q[i] . k[key(i, r)]
    gather     y[i] = sum_r w[i, r] x[key(i, r)]
    scatter    y[j] = sum over the (i, r) with key(i, r) = j of w[i, r] x[i]

They run slot after slot: nothing of the size of slots times head dim is made, also not for the backward.
The scatter goes by key, over the queries that read it, so nothing is added atomically.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import product
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._attend import accumulator
from ._family import LIBRARY
from ._neighborhood_plan import AxisNeighborhood
from .reference_neighborhood import axis_slots

Axes = tuple[AxisNeighborhood, ...]


class Step(NamedTuple):
    """One step of a sum: per row (query, or key of a scatter) the token that it takes, 0 where none; whether
    there is one, None if in every row; and the slot, an int for all rows or one per row."""

    token: Tensor
    there: Tensor | None
    slot: Any


@lru_cache(maxsize=256)
def _forward_axis(axis: AxisNeighborhood, device: torch.device) -> Tensor:
    """int64 [slots, queries]: the key in every slot of every query, -1 for a hole."""
    return axis_slots(axis)[0].t().contiguous().to(device)


@lru_cache(maxsize=256)
def _backward_axis(axis: AxisNeighborhood, device: torch.device) -> tuple[Tensor, Tensor]:
    """int64 [most readers, keys]: the queries that read every key, ascending, -1 where there are fewer; and
    the slot that the key has there."""
    keys = axis_slots(axis)[0]
    query, slot = torch.nonzero(keys >= 0, as_tuple=True)
    owner, order = torch.sort(keys[query, slot], stable=True)
    counts = torch.bincount(owner, minlength=axis.length)
    rank = torch.arange(len(owner)) - (torch.cumsum(counts, 0) - counts)[owner]
    found = torch.full((2, int(counts.max()), axis.length), -1)
    found[0, rank, owner], found[1, rank, owner] = query[order], slot[order]
    return found[0].to(device), found[1].to(device)


def _outer(parts: list[Tensor], sizes: list[int]) -> Tensor:
    """Row-major combination of one index per axis, -1 where any is -1."""
    total = parts[0]
    for part, size in zip(parts[1:], sizes[1:], strict=True):
        both = total[:, None] * size + part
        total = both.masked_fill((total < 0)[:, None] | (part < 0), -1).flatten()
    return total


def _step(token: Tensor, slot: Any) -> Step:
    return Step(token.clamp_min(0), token >= 0, slot)


def forward_steps(axes: Axes, device: torch.device) -> Iterator[Step]:
    """A step per slot, in order: rows are queries."""
    tables = [_forward_axis(axis, device) for axis in axes]
    lengths = [axis.length for axis in axes]
    for slot, entry in enumerate(product(*[range(len(t)) for t in tables])):
        yield _step(_outer([t[e] for t, e in zip(tables, entry, strict=True)], lengths), slot)


def backward_steps(axes: Axes, device: torch.device) -> Iterator[Step]:
    """A step per possible reader: rows are keys, tokens are queries."""
    tables = [_backward_axis(axis, device) for axis in axes]
    lengths, kernels = [axis.q_length for axis in axes], [axis.kernel for axis in axes]
    for entry in product(*[range(len(query)) for query, _ in tables]):
        chosen = [(q[e], s[e]) for (q, s), e in zip(tables, entry, strict=True)]
        slot = _outer([s for _, s in chosen], kernels)
        yield _step(_outer([q for q, _ in chosen], lengths), slot.clamp_min(0))


def _grouped(x: Tensor, kv_heads: int) -> Tensor:
    """[B, N, H, ...] -> [B, N, kv heads, group, ...] in the accumulation type."""
    return x.unflatten(2, (kv_heads, -1)).to(accumulator(x.dtype))


def _kept(x: Tensor, there: Tensor | None) -> Tensor:
    """x [B, N, ...], 0 in the rows that take nothing."""
    return x if there is None else x.masked_fill(~there.view(1, -1, *[1] * (x.dim() - 2)), 0.0)


def _scores(q: Tensor, k: Tensor, axes: Axes) -> Tensor:
    """q [B, Nq, H, D], k [B, Nk, Hkv, D] -> [B, Nq, H, S], 0 in holes."""
    grouped, wide = _grouped(q, k.shape[2]), k.to(accumulator(k.dtype))
    s = q.new_empty(*q.shape[:3], prod([axis.kernel for axis in axes]))
    for step in forward_steps(axes, q.device):
        key = wide.index_select(1, step.token)[:, :, :, None]
        s[..., step.slot] = _kept((grouped * key).sum(-1), step.there).flatten(2)
    return s


def _gather(w: Tensor, x: Tensor, axes: Axes) -> Tensor:
    """w [B, Nq, H, S], x [B, Nk, Hkv, D] -> [B, Nq, H, D]."""
    weights, wide = _grouped(w, x.shape[2]), x.to(accumulator(x.dtype))
    y = wide.new_zeros(*w.shape[:2], *weights.shape[2:4], x.shape[3])
    for step in forward_steps(axes, w.device):
        value = wide.index_select(1, step.token)[:, :, :, None]
        y += _kept(weights[..., step.slot, None], step.there) * value
    return y.flatten(2, 3).to(x.dtype)


def _scatter(w: Tensor, x: Tensor, axes: Axes, kv_heads: int) -> Tensor:
    """w [B, Nq, H, S], x [B, Nq, H, D] -> [B, Nk, kv_heads, D]: heads of a group are summed."""
    weights, wide = _grouped(w, kv_heads), _grouped(x, kv_heads)
    n_k = prod([axis.length for axis in axes])
    y = wide.new_zeros(w.shape[0], n_k, kv_heads, x.shape[3])
    for step in backward_steps(axes, w.device):
        read = weights[:, step.token, :, :, step.slot].movedim(0, 1)  # [B, Nk, kv heads, group]
        value = wide.index_select(1, step.token)
        y += (_kept(read, step.there)[..., None] * value).sum(3)
    return y.to(x.dtype)


def encode(axes: Axes) -> str:
    """The axes as text, a constant to torch.compile."""
    return " ".join([":".join([str(int(field)) for field in axis]) for axis in axes])


@lru_cache(maxsize=256)
def decode(text: str) -> Axes:
    found = []
    for axis in text.split(" "):
        length, left, right, dilation, stride, causal, shift, q_length = map(int, axis.split(":"))
        flags = bool(causal), bool(shift)
        found.append(AxisNeighborhood(length, left, right, dilation, stride, *flags, q_length))
    return tuple(found)


def _define(schema: str, implementation: Callable[..., Tensor], fake: Callable[..., Tensor]) -> Any:
    name = schema.partition("(")[0]
    LIBRARY.define(f"{schema} -> Tensor")
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vicinal::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.vicinal, name)


scores_op = _define(
    "neighborhood_slot_scores(Tensor q, Tensor k, str geometry)",
    lambda q, k, geometry: _scores(q, k, decode(geometry)),
    lambda q, k, geometry: q.new_empty(*q.shape[:3], prod([a.kernel for a in decode(geometry)])),
)
gather_op = _define(
    "neighborhood_slot_gather(Tensor w, Tensor x, str geometry)",
    lambda w, x, geometry: _gather(w, x, decode(geometry)),
    lambda w, x, geometry: x.new_empty(*w.shape[:3], x.shape[3]),
)
scatter_op = _define(
    "neighborhood_slot_scatter(Tensor w, Tensor x, str geometry, int kv_heads)",
    lambda w, x, geometry, kv_heads: _scatter(w, x, decode(geometry), kv_heads),
    lambda w, x, geometry, kv_heads: x.new_empty(
        w.shape[0], prod([a.length for a in decode(geometry)]), kv_heads, x.shape[3]
    ),
)


class Scores(torch.autograd.Function):
    """apply(q, k, geometry) -> s"""

    generate_vmap_rule = True

    @staticmethod
    def forward(q: Tensor, k: Tensor, geometry: str) -> Tensor:
        return scores_op(q, k, geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        q, k, ctx.geometry = inputs
        ctx.save_for_backward(q, k)

    @staticmethod
    def backward(ctx: Any, ds: Tensor) -> Any:
        q, k = ctx.saved_tensors
        return Gather.apply(ds, k, ctx.geometry), Scatter.apply(ds, q, ctx.geometry, k.shape[2]), None


class Gather(torch.autograd.Function):
    """apply(w, x, geometry) -> y"""

    generate_vmap_rule = True

    @staticmethod
    def forward(w: Tensor, x: Tensor, geometry: str) -> Tensor:
        return gather_op(w, x, geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        w, x, ctx.geometry = inputs
        ctx.save_for_backward(w, x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        w, x = ctx.saved_tensors
        return Scores.apply(dy, x, ctx.geometry), Scatter.apply(w, dy, ctx.geometry, x.shape[2]), None


class Scatter(torch.autograd.Function):
    """apply(w, x, geometry, kv_heads) -> y"""

    generate_vmap_rule = True

    @staticmethod
    def forward(w: Tensor, x: Tensor, geometry: str, kv_heads: int) -> Tensor:
        return scatter_op(w, x, geometry, kv_heads)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        w, x, ctx.geometry, _ = inputs
        ctx.save_for_backward(w, x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        w, x = ctx.saved_tensors
        return Scores.apply(x, dy, ctx.geometry), Gather.apply(w, dy, ctx.geometry), None, None
