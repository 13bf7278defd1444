"""Windowed attention of a grid that is split over ranks along one of its axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from torch import Tensor

from .. import _check as checks
from .._windowed_run import as_windows, geometry_of
from .._windowed_types import RelativeBias, Size, Windows, per_axis
from ..windowed import windowed_attention as attend
from ._exchange import Layout, Route, bounds_of, move, move_mask, rank_of, replicated, route, split_axis


def windowed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    windows: Windows | Size,
    *,
    axis: int = 0,
    lengths: Sequence[int] | None = None,
    bias: Tensor | RelativeBias | None = None,
    scale: float | None = None,
    logit_scale: Tensor | None = None,
    edge_k: Tensor | None = None,
    edge_v: Tensor | None = None,
    extra_k: Tensor | None = None,
    extra_v: Tensor | None = None,
    extra_bias: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    activation: str = "softmax",
    return_lse: bool = False,
    backend: str | None = None,
    group: Any = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`vicinal.windowed_attention` of a grid with one axis split over the ranks of a process group.

    Every rank calls it with its rows and gets the output of its rows. Without a shift on the split axis
    nothing is sent. With a shift of s, the first s rows of q, k and v go to the previous rank, in a ring,
    and the first s rows of the output come back.

    Args:
        q, k, v: this rank's rows, [B, *S, h, d] with S[axis] = lengths[rank]; ranks hold them in order.
        windows: as `vicinal.windowed_attention`, partition "block", no q_size or kv_size. The window must
            not be -1 on the split axis and must divide the rows of every rank; on the last rank it need not,
            if there is no shift on that axis.
        axis: the split axis of the grid, counted from 0.
        lengths: rows of each rank. Default None: all hold as many as this one.
        bias, logit_scale, edge_k, edge_v, extra_k, extra_v, extra_bias: the same on all ranks; their
            gradients are summed over the ranks, on every rank.
        key_padding_mask: [B, *S], of this rank's rows.
        group: the process group; None: all ranks.
        Others: as `vicinal.windowed_attention`.

    Returns:
        out [B, *S, h, dv], and with return_lse also lse: what one process would have in these rows.

    Raises:
        ValueError: an argument does not fit the split; whatever `vicinal.windowed_attention` raises.
        RuntimeError: torch.distributed is not initialised.

    Example:
        >>> import os
        >>> import torch.distributed as dist
        >>> from vicinal import Windows, distributed
        >>> store = dist.HashStore()
        >>> dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        >>> q = k = v = torch.randn(1, 14, 14, 3, 32)
        >>> distributed.windowed_attention(q, k, v, Windows(7, shift=3)).shape
        torch.Size([1, 14, 14, 3, 32])
        >>> dist.destroy_process_group()
    """
    checks.tokens(q=q, k=k, v=v)
    windows = as_windows(windows)
    rank, ranks = rank_of(group)
    split_axis(axis, q)
    bounds = bounds_of(lengths, q.shape[1 + axis], group)
    shift = _shift(windows, axis, q.dim() - 3, bounds)
    there, back = _routes(bounds, shift, rank)
    table = bias.table if isinstance(bias, RelativeBias) else bias
    shared = (table, logit_scale, edge_k, edge_v, extra_k, extra_v, extra_bias)
    table, logit_scale, edge_k, edge_v, extra_k, extra_v, extra_bias = replicated(group, *shared)
    if shift:
        q, k, v = move((q, k, v), 1 + axis, there, group)
        key_padding_mask = move_mask(key_padding_mask, 1 + axis, there, group)
    found = attend(
        q,
        k,
        v,
        windows if rank == ranks - 1 else _unshifted(windows, axis, q.dim() - 3),
        bias=table if table is None or not isinstance(bias, RelativeBias) else replace(bias, table=table),
        scale=scale,
        logit_scale=logit_scale,
        edge_k=edge_k,
        edge_v=edge_v,
        extra_k=extra_k,
        extra_v=extra_v,
        extra_bias=extra_bias,
        key_padding_mask=key_padding_mask,
        activation=activation,
        return_lse=return_lse,
        backend=backend,
    )
    if not shift:
        return found
    results = (found,) if isinstance(found, Tensor) else found
    moved = move(results, 1 + axis, back, group)
    return (moved[0], moved[1]) if return_lse else moved[0]


def _shift(windows: Windows, axis: int, rank: int, bounds: tuple[int, ...]) -> int:
    """The shift along the split axis, after checking that no window lies on two ranks."""
    if windows.partition != "block":
        raise ValueError(f"windows has partition {windows.partition!r}; a split grid needs 'block'")
    for name in ("q_size", "kv_size"):
        if getattr(windows, name) is not None:
            raise ValueError(
                f"windows has {name} {getattr(windows, name)!r}; on a split grid it must be None"
            )
    groups = geometry_of(windows, rank).groups
    shifts = {g.shift[axis] for g in groups}
    if len(shifts) != 1:
        raise ValueError(f"windows has shifts {sorted(shifts)} on the split axis {axis}; they must be equal")
    shift = shifts.pop()
    rows = [b - a for a, b in pairwise(bounds)]
    for size in {g.window[axis] for g in groups}:
        if size == -1:
            raise ValueError(f"windows has -1 on the split axis {axis}; it must be a size there")
        whole = rows if shift else rows[:-1]
        if min(rows) < 1 or any(n % size for n in whole):
            which = "every rank" if shift else "every rank but the last"
            raise ValueError(
                f"the ranks hold {rows} rows; windows of {size} on the split axis {axis} with shift {shift} "
                f"must divide the rows of {which}, which are at least 1"
            )
        if rows[-1] % size and windows.pad_side != "end":
            raise ValueError(f"windows has pad_side {windows.pad_side!r}; with an overhang it must be 'end'")
    return shift


def _routes(bounds: tuple[int, ...], shift: int, rank: int) -> tuple[Route, Route]:
    """From the rows that ranks hold to those of their shifted windows, and back. The last rank puts the rows
    that wrap around first, where its own shift takes them from."""
    held: Layout = tuple(((a, b),) for a, b in pairwise(bounds))
    shifted = [((a + shift, b + shift),) for a, b in pairwise(bounds)]
    wrapped: Layout = (*shifted[:-1], ((0, shift), (bounds[-2] + shift, bounds[-1])))
    return route(held, wrapped, rank), route(wrapped, held, rank)


def _unshifted(windows: Windows, axis: int, rank: int) -> Windows:
    """The same windows without the shift on the split axis: no rank but the last has a border in them."""

    def without(shift: Size) -> Size:
        return tuple(0 if a == axis else s for a, s in enumerate(per_axis(shift, rank)))

    if windows.head_groups is None:
        return replace(windows, shift=without(windows.shift))
    groups = tuple((n, size, without(shift)) for n, size, shift in windows.head_groups)
    return replace(windows, head_groups=groups)
