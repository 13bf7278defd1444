"""Neighborhood attention of a grid that is split over ranks along one of its axes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn import functional as F

from .. import _check as checks
from .. import _neighborhood_check as check
from .._neighborhood_plan import AxisNeighborhood, axis_table
from .._neighborhood_run import as_neighborhood
from .._neighborhood_types import Kernel, Neighborhood, Size, resolve
from ..neighborhood import neighborhood_attention as attend
from ._exchange import Range, bounds_of, move, move_mask, rank_of, replicated, route, split_axis


class Halo(NamedTuple):
    """The rows of the whole that each rank's queries and keys stand on."""

    wanted: tuple[Range, ...]

    def around(self, rank: int, bounds: tuple[int, ...]) -> tuple[int, int]:
        """Rows before and behind a rank's own."""
        return bounds[rank] - self.wanted[rank][0], self.wanted[rank][1] - bounds[rank + 1]


def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: Neighborhood | Kernel,
    *,
    dilation: Size = 1,
    stride: Size = 1,
    is_causal: bool | tuple[bool, ...] = False,
    border: str = "shift",
    axis: int = 0,
    lengths: Sequence[int] | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    extra_k: Tensor | None = None,
    extra_v: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
    group: Any = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`vicinal.neighborhood_attention` of a grid with one axis split over the ranks of a process group.

    Every rank calls it with its rows and gets the output of its rows. The rows of k and v that its queries
    read on other ranks, about dilation * (kernel_size - 1) / 2 on either side, are brought there; their
    gradients go back. q and the output stay.

    Args:
        q, k, v: this rank's rows, [B, *S, h, d] with S[axis] = lengths[rank]; ranks hold them in order.
        kernel_size, dilation, stride, is_causal, border: as `vicinal.neighborhood_attention`, of the whole
            grid.
        axis: the split axis of the grid, counted from 0.
        lengths: rows of each rank, at least 1. Default None: all hold as many as this one.
        bias, extra_k, extra_v: the same on all ranks; their gradients are summed over the ranks, on every
            rank.
        key_padding_mask: [B, *S], of this rank's rows.
        group: the process group; None: all ranks.
        Others: as `vicinal.neighborhood_attention`.

    Returns:
        out [B, *S, h, dv], and with return_lse also lse: what one process would have in these rows.

    Raises:
        ValueError: an argument does not fit the split; whatever `vicinal.neighborhood_attention` raises.
        RuntimeError: torch.distributed is not initialised.

    Example:
        >>> import torch.distributed as dist
        >>> from vicinal import distributed
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> q = k = v = torch.randn(1, 14, 14, 3, 32)
        >>> distributed.neighborhood_attention(q, k, v, 7, dilation=2).shape
        torch.Size([1, 14, 14, 3, 32])
        >>> dist.destroy_process_group()
    """
    checks.tokens(q=q, k=k, v=v)
    neighborhood = as_neighborhood(kernel_size, dilation, stride, is_causal, border)
    check.check_rank(neighborhood, q.dim() - 3)
    rank, _ = rank_of(group)
    split_axis(axis, q)
    dim = 1 + axis
    bounds = bounds_of(lengths, q.shape[dim], group)
    halo = halo_of(neighborhood, axis, q.dim() - 3, bounds)
    before, behind = halo.around(rank, bounds)
    held = tuple(((a, b),) for a, b in pairwise(bounds))
    way = route(held, tuple((rows,) for rows in halo.wanted), rank)
    bias, extra_k, extra_v = replicated(group, bias, extra_k, extra_v)
    k, v = move((k, v), dim, way, group)
    found = attend(
        F.pad(q, [0, 0] * (q.dim() - 1 - dim) + [before, behind]),
        k,
        v,
        neighborhood,
        bias=bias,
        scale=scale,
        extra_k=extra_k,
        extra_v=extra_v,
        key_padding_mask=move_mask(key_padding_mask, dim, way, group),
        return_lse=return_lse,
        backend=backend,
    )
    rows = q.shape[dim]
    if isinstance(found, Tensor):
        return found.narrow(dim, before, rows)
    return found[0].narrow(dim, before, rows), found[1].narrow(dim, before, rows)


@lru_cache(maxsize=256)
def halo_of(neighborhood: Neighborhood, axis: int, rank: int, bounds: tuple[int, ...]) -> Halo:
    """Per rank the smallest range of rows on which its own queries see what they see in the whole: the keys
    that they read, whole dilation and stride groups, and room for a kernel."""
    length = bounds[-1]
    one = resolve(neighborhood, rank, False).on((length,) * rank, (length,) * rank)[axis]
    if min(b - a for a, b in pairwise(bounds)) < 1:
        raise ValueError(f"the ranks hold rows up to {list(bounds[1:])}; each must hold at least 1")
    if one.shift and one.kernel * one.dilation > length:
        raise ValueError(
            f"kernel_size {one.kernel} with dilation {one.dilation} spans more than the {length} rows of the "
            f"split axis {axis}"
        )
    first, last = _reach(one)
    step = one.dilation * one.stride
    wanted = []
    for a, b in pairwise(bounds):
        low = min(min(first[a:b]), a) // step * step
        high = min(length, -(-max(max(last[a:b]), b) // step) * step)
        if one.shift:
            room = one.kernel * one.dilation
            low = max(0, min(low, (high - room) // step * step))
            high = min(length, max(high, low + room))
        wanted.append((low, high))
    return Halo(tuple(wanted))


def _reach(axis: AxisNeighborhood) -> tuple[list[int], list[int]]:
    """Of each token of the axis: the first token that it reads, and the one behind the last."""
    table = axis_table(axis)
    group = table.i % min(axis.dilation, axis.length)
    order = table.i.argsort()
    first = (group + axis.dilation * table.a)[order]
    last = (group + axis.dilation * (table.b - 1) + 1)[order]
    return first.tolist(), last.tolist()
