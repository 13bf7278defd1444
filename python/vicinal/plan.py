"""Plans: int32 tables that tell a kernel which tokens a tile owns and which keys it needs (docs/design.md,
section 1).

A box is a product of up to three axis lists; the entry of a slot is the sum of its axes' entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

PAD = -(2**29)
MAX_TOKENS = 2**29 - 1
ROW_REGIONS, ROW_KEY_PADS, ROW_QUERY_PADS, ROW_RANGES = 1, 2, 4, 8


@dataclass(frozen=True, eq=False)
class Plan:
    """axes int32 [A, 4]: (token, region, code, coord); rows int32 [R, 16]: q_begin[3] q_extent[3] k_begin[3]
    k_extent[3] flags reserved[3]. `flags` is the union of the rows' flags, `overlap` says that key boxes
    share tokens and have no key_plan. `guard`: the bit above each field of the ranges, 0 without ranges.
    `key_plan`: its rows own the gradients of the keys; None: the rows of this plan do."""

    axes: Tensor
    rows: Tensor
    n_rows: int
    q_slots: int
    k_slots: int
    flags: int
    overlap: bool
    n_k: int
    guard: int = 0
    key_plan: Plan | None = None


class AxisWindows(NamedTuple):
    """One axis of a windowed grid, resolved: `length` tokens, `window` slots a window, windows shifted by
    `shift`. `kv` > 0: key windows of that width, centred on the query window. `q_length`, `q_window`: the
    query grid."""

    length: int
    window: int
    shift: int
    kv: int
    q_length: int
    q_window: int

    @property
    def padded(self) -> int:
        return -(-self.length // self.window) * self.window

    @property
    def n_windows(self) -> int:
        return self.padded // self.window


Entry = tuple[int, int]  # token coordinate or PAD, wrap bit


def block_entries(
    length: int, window: int, shift: int, pad_order: str = "pad_roll", pad_side: str = "end"
) -> list[list[Entry]]:
    """Per window of one axis: (coordinate or PAD, wrap bit) of its slots."""
    count = -(-length // window)
    padded = count * window
    low = (padded - length) // 2 if pad_side == "center" else 0

    def coordinate(slot: int) -> int:
        if pad_order == "roll_pad":
            return (slot + shift) % length if slot < length else PAD
        g = (slot + shift) % padded - low
        return g if 0 <= g < length else PAD

    def wraps(i: int, r: int) -> int:
        return int(shift > 0 and i == count - 1 and r >= window - shift)

    return [[(coordinate(i * window + r), wraps(i, r)) for r in range(window)] for i in range(count)]


def grid_entries(length: int, window: int, pad_side: str = "end") -> list[list[Entry]]:
    """Per group of one axis: slots at a stride of the number of groups."""
    count = -(-length // window)
    low = (count * window - length) // 2 if pad_side == "center" else 0

    def coordinate(p: int) -> int:
        return p - low if 0 <= p - low < length else PAD

    return [[(coordinate(r * count + i), 0) for r in range(window)] for i in range(count)]


def overlap_entries(length: int, window: int, kv: int) -> list[list[Entry]]:
    """Per window of one axis: `kv` key slots centred on the window."""
    count, before = -(-length // window), (kv - window) // 2

    def coordinate(g: int) -> int:
        return g if 0 <= g < length else PAD

    return [[(coordinate(i * window - before + r), 0) for r in range(kv)] for i in range(count)]


def _strides(extents: Sequence[int]) -> list[int]:
    return [prod(extents[a + 1 :]) for a in range(len(extents))]


def bias_size(axes: Sequence[AxisWindows], kind: str) -> int:
    """Entries per head of the table that a plan of this kind indexes."""
    if kind == "dense":
        return prod(a.q_window for a in axes) * prod(a.kv or a.window for a in axes)
    if kind == "none":
        return 1
    return prod(a.q_window + (a.kv or a.window) - 1 for a in axes)


def _codes(axes: Sequence[AxisWindows], kind: str) -> tuple[list[list[int]], list[list[int]]]:
    """Per axis, the codes of the query slots and of the key slots."""
    q_extents, k_extents = [a.q_window for a in axes], [a.kv or a.window for a in axes]
    if kind == "none":
        return [[0] * n for n in q_extents], [[0] * n for n in k_extents]
    if kind == "dense":
        k_slots = prod(k_extents)
        q_strides = [s * k_slots for s in _strides(q_extents)]
        k_strides = _strides(k_extents)
        q = [[r * s for r in range(n)] for n, s in zip(q_extents, q_strides, strict=True)]
        return q, [[r * s for r in range(n)] for n, s in zip(k_extents, k_strides, strict=True)]
    strides = _strides([n + m - 1 for n, m in zip(q_extents, k_extents, strict=True)])
    q, k = [], []
    for n, m, s in zip(q_extents, k_extents, strides, strict=True):
        if kind == "q-k":
            q.append([(r + m - 1) * s for r in range(n)])
            k.append([-r * s for r in range(m)])
        else:
            q.append([(n - 1 - r) * s for r in range(n)])
            k.append([r * s for r in range(m)])
    return q, k


class _Table:
    """Axis entries under construction; entry 0 is zero and serves unused axes."""

    def __init__(self) -> None:
        self.entries: list[tuple[int, int, int, int]] = [(0, 0, 0, 0)]

    def append(
        self, entries: Sequence[Entry], stride: int, bit: int, codes: Sequence[int]
    ) -> tuple[int, int]:
        begin = len(self.entries)
        for (g, wrap), code in zip(entries, codes, strict=True):
            self.entries.append((PAD if g == PAD else g * stride, wrap << bit, code, g))
        return begin, len(entries)


def _axis_lists(axis: AxisWindows, partition: str, pad_order: str, pad_side: str) -> tuple[list, list]:
    """Query windows and key windows of one axis."""

    def split(length: int, window: int, shift: int) -> list[list[Entry]]:
        if partition == "grid":
            return grid_entries(length, window, pad_side)
        return block_entries(length, window, shift, pad_order, pad_side)

    keys = (
        overlap_entries(axis.length, axis.window, axis.kv)
        if axis.kv
        else split(axis.length, axis.window, axis.shift)
    )
    return split(axis.q_length, axis.q_window, axis.shift), keys


@lru_cache(maxsize=512)
def window_plan(
    axes: tuple[AxisWindows, ...],
    bias: str = "none",
    partition: str = "block",
    pad_order: str = "pad_roll",
    pad_side: str = "end",
    device: torch.device | str = "cpu",
) -> Plan:
    """The plan of a windowed grid of one to three axes: a row per window, windows row-major, last axis
    fastest."""
    table, rank = _Table(), len(axes)
    q_strides, k_strides = _strides([a.q_length for a in axes]), _strides([a.length for a in axes])
    q_codes, k_codes = _codes(axes, bias)
    per_axis = []
    for a, axis in enumerate(axes):
        q_lists, k_lists = _axis_lists(axis, partition, pad_order, pad_side)
        windows = []
        for q_list, k_list in zip(q_lists, k_lists, strict=True):
            flags = ROW_REGIONS * (len({wrap for _, wrap in k_list}) > 1)
            flags |= ROW_KEY_PADS * any(g == PAD for g, _ in k_list)
            flags |= ROW_QUERY_PADS * any(g == PAD for g, _ in q_list)
            q_box = table.append(q_list, q_strides[a], a, q_codes[a])
            k_box = table.append(k_list, k_strides[a], a, k_codes[a])
            windows.append((*q_box, *k_box, flags))
        per_axis.append(torch.tensor(windows, dtype=torch.int32))
    rows = _product_rows(per_axis, rank)
    return Plan(
        axes=torch.tensor(table.entries, dtype=torch.int32).to(device),
        rows=rows.to(device),
        n_rows=rows.shape[0],
        q_slots=prod(a.q_window for a in axes),
        k_slots=prod(a.kv or a.window for a in axes),
        flags=_union(rows[:, 12]),
        overlap=any(a.kv > 0 for a in axes),
        n_k=prod(a.length for a in axes),
    )


def visible_pairs(
    axes: Sequence[AxisWindows], partition: str, pad_order: str, pad_side: str, pads: bool
) -> int:
    """Pairs of a query token and a key of its window; pads: they are keys too. Per axis, because boxes are
    products."""
    counts = []
    for axis in axes:
        lists = _axis_lists(axis, partition, pad_order, pad_side)
        real = [[sum(g != PAD for g, _ in slots) for slots in side] for side in lists]
        keys = [len(slots) for slots in lists[1]] if pads else real[1]
        counts.append(sum(n * m for n, m in zip(real[0], keys, strict=True)))
    return prod(counts)


def _union(flags: Tensor) -> int:
    bits = (ROW_REGIONS, ROW_KEY_PADS, ROW_QUERY_PADS, ROW_RANGES)
    return sum(bit for bit in bits if bool((flags & bit).any()))


def _product_rows(per_axis: list[Tensor], rank: int) -> Tensor:
    """Rows of all combinations of the axes' windows ([n_a, 5]: q_begin, q_extent, k_begin, k_extent,
    flags)."""
    grids = torch.meshgrid(*[torch.arange(len(p)) for p in per_axis], indexing="ij")
    rows = torch.zeros(grids[0].numel(), 16, dtype=torch.int32)
    rows[:, 3:6] = rows[:, 9:12] = 1
    for a, (entries, index) in enumerate(zip(per_axis, grids, strict=True)):
        chosen, slot = entries[index.flatten()], a + 3 - rank
        for column, field in ((slot, 0), (3 + slot, 1), (6 + slot, 2), (9 + slot, 3)):
            rows[:, column] = chosen[:, field]
        rows[:, 12] |= chosen[:, 4]
    return rows


def box_tokens(plan: Plan, keys: bool = False) -> Tensor:
    """int64 [R, slots]: the token of every slot, -1 for a pad. For tests, pictures and copies of key
    boxes."""
    axes, rows = plan.axes.cpu().long(), plan.rows.cpu().long()
    base = 6 if keys else 0
    extents = rows[0, base + 3 : base + 6].tolist()
    total = torch.zeros(len(rows), *extents, dtype=torch.long)
    for a in range(3):
        index = rows[:, base + a, None] + torch.arange(extents[a])
        shape = [len(rows), 1, 1, 1]
        shape[a + 1] = extents[a]
        total += axes[index, 0].view(shape)
    return total.flatten(1).clamp_min(-1)


@lru_cache(maxsize=64)
def readers(plan: Plan) -> Tensor:
    """int64 [tokens, m]: flat key slots (row * k_slots + slot) that hold each token, ascending, -1 where
    there are fewer."""
    tokens = box_tokens(plan, keys=True).flatten()
    slots = torch.nonzero(tokens >= 0).flatten()
    owner, order = torch.sort(tokens[slots], stable=True)
    counts = torch.bincount(owner, minlength=plan.n_k)
    first = torch.cumsum(counts, 0) - counts
    table = torch.full((plan.n_k, int(counts.max()) if len(owner) else 0), -1, dtype=torch.long)
    table[owner, torch.arange(len(owner)) - first[owner]] = slots[order]
    return table.to(plan.axes.device)


@lru_cache(maxsize=64)
def copied_keys(plan: Plan) -> Plan:
    """The same plan over a copy of its key boxes: key slot (row, slot) is token row * k_slots + slot, pads
    stay pads."""
    axes, rows = plan.axes.cpu(), plan.rows.cpu().clone()
    tables, begin = [axes], len(axes)
    strides = _strides(rows[0, 9:12].tolist())
    row_index = torch.arange(plan.n_rows, dtype=torch.int32)
    for a in range(3):
        extent = int(rows[0, 9 + a])
        entries = axes[(rows[:, 6 + a, None] + torch.arange(extent)).long()].clone()  # [R, extent, 4]
        copy = (torch.arange(extent, dtype=torch.int32) * strides[a])[None]
        copy = copy + (row_index * plan.k_slots)[:, None] * (a == 2)
        entries[..., 0] = torch.where(entries[..., 0] < 0, entries[..., 0], copy)
        rows[:, 6 + a] = begin + row_index * extent
        tables.append(entries.flatten(0, 1))
        begin += entries.shape[0] * extent
    device = plan.axes.device
    return Plan(
        axes=torch.cat(tables).to(device),
        rows=rows.to(device),
        n_rows=plan.n_rows,
        q_slots=plan.q_slots,
        k_slots=plan.k_slots,
        flags=plan.flags,
        overlap=False,
        n_k=plan.n_rows * plan.k_slots,
    )
