"""Contextual relative position (q_i.R_a[offset of i and j on axis a], added to the scores) as channels.

On one axis the term depends on the query and on where the key stands, and a window has only C places for a
key. So q gets C more channels per axis, q_i.R_a[the row that a key of class c reads] / scale, and k a one in
the channel of its class: the product of the longer rows is the score, term and all, exactly, on every
backend, and autograd brings the gradients of q and of the tables.

The other way, a per-axis term in the kernels ([.., C] read per pair), saves C of D + C products a pair in the
forward and two of five backward products of that width, but is a sixth tensor in nine kernels. At the
published shapes (windows of 14 x 14 with heads of 64: 28 channels; 4 x 4 x 4: 12) the products grow by 1.4
and 1.2, while projections around them dominate; a window of a whole sequence is where it would pay.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._attend import accumulator
from ._neighborhood_plan import AxisNeighborhood, key_ranges
from .plan import AxisWindows

Tables = tuple[Tensor, ...]
_MULTIPLE = 8  # of elements: head dims that were whole vectors stay so


class AxisTerm(NamedTuple):
    """One axis: rows int64 [queries, C], the row of the axis's table that a query reads for a key of class c;
    classes int64 [keys]. The keys of one window are of different classes."""

    rows: Tensor
    classes: Tensor

    @property
    def width(self) -> int:
        return self.rows.shape[1]


def window_term(
    axis: AxisWindows, partition: str, pad_order: str, pad_side: str, device: torch.device
) -> AxisTerm:
    """Row r - r' + (slots of the key window) - 1 of slots r of a query window and r' of its key window."""

    def places(length: int, window: int) -> Tensor:
        padded = axis.n_windows * window
        low = (padded - length) // 2 if pad_side == "center" else 0
        token = torch.arange(length, device=device)
        if partition == "grid":
            return token + low
        rolled = token - axis.shift
        return rolled % length if pad_order == "roll_pad" else (rolled + low) % padded

    q_place = places(axis.q_length, axis.q_window)
    if partition == "grid":
        q_slot = q_place // axis.n_windows
    else:
        q_slot = q_place % axis.q_window
    if axis.kv:  # a key stands in several windows, at slots that differ by whole windows
        before = (axis.kv - axis.window) // 2
        classes = (torch.arange(axis.length, device=device) + before) % axis.kv
        begin = q_place // axis.q_window * axis.window
        slot = (torch.arange(axis.kv, device=device) - begin[:, None]) % axis.kv
    else:
        k_place = places(axis.length, axis.window)
        classes = k_place // axis.n_windows if partition == "grid" else k_place % axis.window
        slot = torch.arange(axis.window, device=device)[None]
    return AxisTerm(q_slot[:, None] - slot + (axis.kv or axis.window) - 1, classes)


def neighborhood_term(axis: AxisNeighborhood, device: torch.device) -> AxisTerm:
    """Row (place of the key) - (place of the query) + K - 1, as tables of a bias count; the K places of a
    window differ modulo K."""
    d, kernel = min(axis.dilation, axis.length), axis.kernel
    token = torch.arange(axis.q_length, device=device) + (axis.length - axis.q_length)
    place = token // d
    first, _ = key_ranges(axis, (axis.length - token % d + d - 1) // d, place)
    key = first[:, None] + (torch.arange(kernel, device=device) - first[:, None]) % kernel
    rows = (key - place[:, None] + kernel - 1).clamp(0, 2 * kernel - 2)  # what no key of the window reads
    return AxisTerm(rows, torch.arange(axis.length, device=device) // d % kernel)


def added_channels(dim: int, widths: Sequence[int]) -> int:
    """How many channels heads of `dim` get for axes of these numbers of classes."""
    added = sum(widths)
    return added + (-(dim + added) % _MULTIPLE if dim % _MULTIPLE == 0 else 0)


def axis_channels(
    q: Tensor, k: Tensor, tables: Tables, terms: Sequence[AxisTerm], scale: float
) -> tuple[Tensor, Tensor]:
    """What q [B, *Sq, h, D] and k [B, *S, h or fewer, D] are to be longer by; tables [T, D] or [h, T, D],
    scale: the factor that the longer rows' product gets."""
    acc = accumulator(q.dtype)
    with torch.autocast(q.device.type, enabled=False):
        q_parts, k_parts = [], []
        for a, (table, term) in enumerate(zip(tables, terms, strict=True)):
            q_parts.append((_of_queries(q.to(acc), table.to(acc), term.rows, 1 + a) / scale).to(q.dtype))
            one_hot = (term.classes[:, None] == torch.arange(term.width, device=k.device)).to(k.dtype)
            shape = [1] * k.dim()
            shape[1 + a], shape[-1] = one_hot.shape
            k_parts.append(one_hot.view(shape).expand(*k.shape[:-1], -1))
        widths = [term.width for term in terms]
        missing = added_channels(q.shape[-1], widths) - sum(widths)
        if missing:
            q_parts.append(q.new_zeros(*q.shape[:-1], missing))
            k_parts.append(k.new_zeros(*k.shape[:-1], missing))
        return torch.cat(q_parts, -1), torch.cat(k_parts, -1)


def _of_queries(q: Tensor, table: Tensor, rows: Tensor, axis: int) -> Tensor:
    """[B, *Sq, h, C]: the products of every query with the rows of its coordinate on this axis."""
    moved = q.movedim(axis, 0)  # [n, B, .., h, D]
    if table.dim() == 2:
        made = moved.flatten(1, -2) @ table[rows].transpose(-1, -2)  # [n, .., D] @ [n, D, C]
        return made.view(*moved.shape[:-1], rows.shape[1]).movedim(0, axis)
    by_head = moved.movedim(-2, 1)  # [n, h, B, .., D]
    picked = table[:, rows].transpose(0, 1)  # [n, h, C, D]
    made = by_head.flatten(2, -2) @ picked.transpose(-1, -2)
    return made.view(*by_head.shape[:-1], rows.shape[1]).movedim(1, -2).movedim(0, axis)
