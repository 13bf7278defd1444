"""Rows between ranks: who holds which rows of a dimension, who wants which, and the gradients back.

Everything goes point to point through torch.distributed, as rows of a tensor; a route is made once per
geometry. The backward sends gradients along the same route the other way and adds them in the order of the
ranks, so it is deterministic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import batch_isend_irecv as batch

Range = tuple[int, int]
Layout = tuple[tuple[Range, ...], ...]  # per rank: ranges of rows of the whole, in the order of its tensor


@dataclass(frozen=True, eq=False)
class Route:
    """What one rank sends and receives. `send[r]`: its rows that go to rank r; `place[r]`: where rank r's
    rows go in the result, which has `rows` of them; `held`: rows of its own tensor. A row goes to a rank at
    most once."""

    send: tuple[Tensor, ...]
    place: tuple[Tensor, ...]
    rows: int
    held: int

    def sent_rows(self, rank: int) -> int:
        """Rows that leave this rank in a forward; a backward brings as many back."""
        return sum(len(rows) for r, rows in enumerate(self.send) if r != rank)


def _overlaps(held: Sequence[Range], wanted: Sequence[Range]) -> tuple[list[int], list[int]]:
    """Places in a holder's tensor, and in the wanting rank's, of the rows that both have."""
    at: list[int] = []
    to: list[int] = []
    offset = 0
    for first, last in wanted:
        begin = 0
        for low, high in held:
            a, b = max(first, low), min(last, high)
            at += range(begin + a - low, begin + b - low)
            to += range(offset + a - first, offset + b - first)
            begin += high - low
        offset += last - first
    return at, to


@lru_cache(maxsize=256)
def route(held: Layout, wanted: Layout, rank: int) -> Route:
    """The route of `rank` from what every rank holds to what every rank wants."""
    send = [torch.tensor(_overlaps(held[rank], w)[0], dtype=torch.long) for w in wanted]
    place = [torch.tensor(_overlaps(h, wanted[rank])[1], dtype=torch.long) for h in held]
    sizes = [sum(b - a for a, b in layout[rank]) for layout in (wanted, held)]
    return Route(tuple(send), tuple(place), *sizes)


def rank_of(group: Any) -> tuple[int, int]:
    """This rank in the group, and the number of its ranks."""
    if not dist.is_initialized():
        raise RuntimeError("torch.distributed is not initialised; call torch.distributed.init_process_group")
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError("group does not contain this process")
    return rank, dist.get_world_size(group)


def _transfer(buffers: Sequence[Tensor], received: Sequence[Tensor], rank: int, group: Any) -> None:
    """Send buffers[r] to rank r and fill received[r] from rank r; own rows are not touched."""
    operations = []
    for r in range(len(buffers)):
        if r == rank:
            continue
        peer = r if group is None else dist.get_global_rank(group, r)
        if received[r].numel():
            operations.append(dist.P2POp(dist.irecv, received[r], peer, group))
        if buffers[r].numel():
            operations.append(dist.P2POp(dist.isend, buffers[r], peer, group))
    for work in batch(operations) if operations else ():
        work.wait()


def _sized(x: Tensor, dim: int, rows: int) -> list[int]:
    return [*x.shape[:dim], rows, *x.shape[dim + 1 :]]


class _Move(torch.autograd.Function):
    """One node for several tensors, so that ranks cannot meet in different orders in the backward."""

    @staticmethod
    def forward(ctx: Any, dim: int, way: Route, group: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.dim, ctx.way, ctx.group = dim, way, group
        return tuple(_moved(x, dim, way.send, way.place, way.rows, group) for x in tensors)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        way = ctx.way
        back = [_moved(g, ctx.dim, way.place, way.send, way.held, ctx.group) for g in grads]
        return (None, None, None, *back)


def _moved(
    x: Tensor, dim: int, send: Sequence[Tensor], place: Sequence[Tensor], rows: int, group: Any
) -> Tensor:
    """Rows send[r] of x to rank r, and those of rank r added to rows place[r] of the result, rank by rank."""
    rank, _ = rank_of(group)
    send, place = ([index.to(x.device) for index in side] for side in (send, place))
    buffers = [x.index_select(dim, index) for index in send]
    received = [x.new_empty(_sized(x, dim, len(index))) for index in place]
    _transfer(buffers, received, rank, group)
    received[rank] = buffers[rank]
    result = x.new_zeros(_sized(x, dim, rows))
    for index, part in zip(place, received, strict=True):
        result.index_copy_(dim, index, result.index_select(dim, index) + part)
    return result


def move(tensors: Sequence[Tensor], dim: int, way: Route, group: Any) -> tuple[Tensor, ...]:
    """Rows along `dim` brought to where they are wanted; rows that nobody holds are 0. Differentiable."""
    for x in tensors:
        if x.shape[dim] != way.held:
            raise ValueError(
                f"a tensor has {x.shape[dim]} rows on dimension {dim}; this rank holds {way.held}"
            )
    return _Move.apply(dim, way, group, *tensors)


def move_mask(mask: Tensor | None, dim: int, way: Route, group: Any) -> Tensor | None:
    """`move` of a mask, which has no gradient; bool as bytes, which every backend can send."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        return move([mask.to(torch.uint8)], dim, way, group)[0].bool()
    return move([mask.detach()], dim, way, group)[0]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(rank_of(group)[1])]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.stack(parts)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        total = grad.contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total[rank_of(ctx.group)[0]], None


def gather(x: Tensor, group: Any) -> Tensor:
    """[ranks, *x.shape]: everyone's x, which is the same on all ranks. Differentiable."""
    return _Gather.apply(x, group)


class _Replicated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        totals = [g.contiguous().clone() for g in grads]
        for total in totals:
            dist.all_reduce(total, group=ctx.group)
        return (None, *totals)


def replicated(group: Any, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Tensors that all ranks hold: their gradients are summed over the ranks, on every rank."""
    trained = [x for x in tensors if x is not None and x.requires_grad]
    views = iter(_Replicated.apply(group, *trained) if trained else ())
    return tuple(next(views) if x is not None and x.requires_grad else x for x in tensors)


def bounds_of(lengths: Sequence[int] | None, own: int, group: Any) -> tuple[int, ...]:
    """Where the rows of each rank begin, and the end. lengths: rows per rank; None: all hold `own`."""
    rank, ranks = rank_of(group)
    given = (own,) * ranks if lengths is None else tuple(lengths)
    if len(given) != ranks or any(not isinstance(n, int) or isinstance(n, bool) or n < 0 for n in given):
        raise ValueError(f"lengths is {lengths!r}; it must be one int >= 0 for each of the {ranks} ranks")
    if given[rank] != own:
        raise ValueError(f"lengths[{rank}] is {given[rank]}; this rank holds {own} rows")
    found = [0]
    for n in given:
        found.append(found[-1] + n)
    return tuple(found)


def split_axis(axis: object, q: Tensor) -> None:
    """axis is one of the grid's axes of q [B, *S, heads, head_dim]."""
    rank = q.dim() - 3
    if not isinstance(axis, int) or isinstance(axis, bool) or not 0 <= axis < rank:
        raise ValueError(f"axis is {axis!r}; it must be an int, 0 <= axis < {rank}, an axis of the grid of q")
