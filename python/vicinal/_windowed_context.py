"""Contextual relative position of windowed attention: a call with `rel_pos` becomes one without it.

Channels say where a key stands, and pads have no row of their own to say so in. So grids that windows
overhang get their pads physically, on the side of the keys alone: queries, and with them the dropout bits and
the windows of a mask, stay what they are.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._attend import accumulator
from ._axis_terms import added_channels, axis_channels, window_term
from .plan import AxisWindows

if TYPE_CHECKING:
    from ._windowed_run import Call
    from ._windowed_types import Windows

LOG_100 = 4.605170185988092
HeadGroup = tuple[int, int, tuple[AxisWindows, ...]]  # first head, last head + 1, axes


def norm(x: Tensor, acc: torch.dtype) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, dtype=acc).clamp_min(1e-12)


def channels(dim: int, axes: tuple[AxisWindows, ...]) -> int:
    """Channels that heads of `dim` get for the axes of a head group."""
    return added_channels(dim, [a.kv or a.window for a in axes])


def of_heads(table: Tensor, first: int, last: int) -> Tensor:
    """The part of a table [T, dk] or [h, T, dk] for some heads."""
    return table if table.dim() == 2 else table[first:last]


def without_rel_pos(call: Call, groups: list[HeadGroup]) -> Call:
    """The same attention with longer rows."""
    padded = [_with_pads(call, group) for group in groups]
    windows, mask = padded[0].windows, padded[0].mask
    q, keys, extra_k, scale = _scaled(call, [p.k for p in padded])
    where = (windows.partition, windows.pad_order, windows.pad_side, q.device)
    more_q, longer_k = [], []
    for (first, last, _), part, k in zip(groups, padded, keys, strict=True):
        tables = tuple(of_heads(t, first, last) for t in call.rel_pos or ())
        terms = [window_term(axis, *where) for axis in part.axes]
        a, b = axis_channels(call.q[..., first:last, :], k, tables, terms, scale)
        more_q.append(a)
        longer_k.append(torch.cat([k, b], -1))
    longer_q = torch.cat([q, torch.cat(more_q, -2)], -1)
    wide = longer_q.shape[-1] - q.shape[-1]
    kept = windows.edge != "mask"  # and then no pad is there to read the edge row
    return replace(
        call,
        q=longer_q,
        k=torch.cat(longer_k, -2),
        v=torch.cat([p.v for p in padded], -2),
        windows=windows,
        scale=scale,
        logit_scale=None,
        edge_k=F.pad(call.edge_k, (0, wide)) if kept and call.edge_k is not None else None,
        edge_v=call.edge_v if kept else None,
        extra_k=None if extra_k is None else F.pad(extra_k, (0, wide)),
        key_padding_mask=mask,
        rel_pos=None,
    )


def _scaled(call: Call, keys: list[Tensor]) -> tuple[Tensor, list[Tensor], Tensor | None, float]:
    """q, keys and extra keys such that their products take one factor, which is not 0, and the factor."""
    q, extra_k = call.q, call.extra_k
    if call.logit_scale is not None:
        acc = accumulator(q.dtype)
        tau = call.logit_scale.to(acc).flatten().clamp(max=LOG_100).exp()
        return _unit(q, tau), [_unit(k) for k in keys], None if extra_k is None else _unit(extra_k), 1.0
    scale = q.shape[-1] ** -0.5 if call.scale is None else float(call.scale)
    return (q * 0, keys, extra_k, 1.0) if scale == 0 else (q, keys, extra_k, scale)


def _unit(x: Tensor, factor: Tensor | float = 1.0) -> Tensor:
    """Rows of length `factor`."""
    acc = accumulator(x.dtype)
    return (x.to(acc) * (factor / norm(x, acc))[..., None]).to(x.dtype)


class _Padded(NamedTuple):
    k: Tensor
    v: Tensor
    windows: Windows
    mask: Tensor | None
    axes: tuple[AxisWindows, ...]


def _with_pads(call: Call, group: HeadGroup) -> _Padded:
    """k and v of the group's heads, the windows, the key mask and the axes, where no pad takes part."""
    first, last, axes = group
    k, v = call.k[..., first:last, :], call.v[..., first:last, :]
    windows, mask = call.windows, call.key_padding_mask
    whole = all(a.length == a.padded and not a.kv for a in axes)
    if windows.edge == "mask" or whole:
        return _Padded(k, v, windows, mask, axes)
    edges = [None if e is None else e[first:last] for e in (call.edge_k, call.edge_v)]
    rows = [_padded(x, axes, windows.pad_order, windows.pad_side) for x in (k, v)]
    inside = _padded(k.new_ones(1, *k.shape[1:-2], 1, 1), axes, windows.pad_order, windows.pad_side) > 0
    k, v = (
        x if e is None else torch.where(inside, x, e.to(x.dtype)) for x, e in zip(rows, edges, strict=True)
    )
    if mask is not None:
        mask = _padded(mask[..., None, None], axes, windows.pad_order, windows.pad_side)[..., 0, 0]
    if any(a.kv for a in axes):
        widths = tuple(a.kv or a.window for a in axes)
        windows = replace(windows, size=widths, q_size=tuple(a.q_window for a in axes), kv_size=None)
        found = [
            a._replace(length=a.n_windows * n, window=n, kv=0) for a, n in zip(axes, widths, strict=True)
        ]
    else:
        found = [a._replace(length=a.padded) for a in axes]
    return _Padded(k, v, replace(windows, edge="mask"), mask, tuple(found))


def _padded(x: Tensor, axes: tuple[AxisWindows, ...], order: str, side: str) -> Tensor:
    """[B, *S, h, d] with zeros for the pads, where a window's slots look for them; key windows that overlap
    are written out one after the other."""
    for a, axis in enumerate(axes):
        dim = 1 + a
        if axis.kv:
            before = (axis.kv - axis.window) // 2
            behind = axis.padded + axis.kv - axis.window - before - axis.length
            x = _pad(x, dim, before, behind).unfold(dim, axis.kv, axis.window).movedim(-1, dim + 1)
            x = x.flatten(dim, dim + 1)
            continue
        missing = axis.padded - axis.length
        before = missing // 2 if side == "center" else 0
        if order == "roll_pad" and axis.shift:  # rolled, padded, and rolled back for the kernel's own shift
            x = _pad(x.roll(-axis.shift, dim), dim, before, missing - before).roll(axis.shift, dim)
        else:
            x = _pad(x, dim, before, missing - before)
    return x


def _pad(x: Tensor, dim: int, before: int, behind: int) -> Tensor:
    if x.dtype == torch.bool:
        return _pad(x.to(torch.uint8), dim, before, behind).to(torch.bool)
    return F.pad(x, [0, 0] * (x.dim() - 1 - dim) + [before, behind])
