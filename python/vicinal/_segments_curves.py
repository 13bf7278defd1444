"""Segments along a curve: serialization and patches of Point Transformer V3, FlatFormer's groups, TRELLIS's
shifted windows of a sequence, OctFormer's octree groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from . import _segments_keys as keys
from ._backends import _C
from ._segments_keys import Tables
from ._segments_type import Segments, own_keys
from ._segments_windows import NAMES

CURVES = ("z", "z-trans", "hilbert", "hilbert-trans")
MOST_DEPTH = 20


class Serialization(NamedTuple):
    """Voxels along a curve: `order` int32 [N], rows of the voxels; `codes` [N], sorted, the batch id above
    3 * depth bits of the place on the curve; `ptr` int32 [B + 1], where samples begin; `depth`, `curve`."""

    order: Tensor
    codes: Tensor
    ptr: Tensor
    depth: int
    curve: str

    def patches(self, size: int) -> Segments:
        """Groups of `size` consecutive voxels per sample. The incomplete last group of a sample attends to
        the sample's last `size` voxels; a sample of at most `size` is one group."""
        return groups(self.order, self.ptr, size)


def _depth(grid: Sequence[int], depth: int | None, batch_size: int) -> int:
    least = max(keys.bits_of(max(grid)), 1)
    depth = least if depth is None else depth
    if not isinstance(depth, int) or not least <= depth <= MOST_DEPTH:
        raise ValueError(
            f"depth is {depth!r}; it must be {least} <= depth <= {MOST_DEPTH} for grid {tuple(grid)}"
        )
    keys.key_dtype(3 * depth + keys.bits_of(batch_size), "the code of depth and batch")
    return depth


@lru_cache(maxsize=64)
def _z_tables(
    grid: tuple[int, ...], batch_size: int, depth: int, columns: tuple[int, ...], device: torch.device
) -> Tables:
    fields = [torch.arange(batch_size) << (3 * depth)]
    fields += [keys.spread_bits(torch.arange(n), 3, depth) << (2 - a) for a, n in enumerate(grid)]
    return keys.make_tables((0, *columns), fields, 3 * depth + keys.bits_of(batch_size), device)


def hilbert_codes(x: Tensor, y: Tensor, z: Tensor, depth: int) -> Tensor:
    """int64 places of voxels on the Hilbert curve of `depth` bits per axis."""
    p = [x.long().clone(), y.long().clone(), z.long().clone()]
    for b in reversed(range(depth)):
        low = (1 << b) - 1
        for a in range(3):
            set_bit = (p[a] >> b) & 1 == 1
            swap = torch.where(set_bit, 0, (p[0] ^ p[a]) & low)
            p[0] = p[0] ^ torch.where(set_bit, low, swap)
            p[a] = p[a] ^ swap if a else p[0]
    h = sum(keys.spread_bits(p[a], 3, depth) << (2 - a) for a in range(3))
    assert isinstance(h, Tensor)
    shift = 1
    while shift < 3 * depth:
        h = h ^ (h >> shift)
        shift *= 2
    return h


def serialize(
    coords: Tensor,
    grid: Sequence[int],
    batch_size: int,
    curve: str = "z",
    *,
    depth: int | None = None,
    order: str = "bxyz",
    duplicates: str = "raise",
    validate: bool | None = None,
) -> Serialization:
    """Sort voxels along a space-filling curve, sample after sample (Point Transformer V3).

    Args:
        coords, grid, batch_size, order, duplicates, validate: as `windows`.
        curve: "z", "z-trans", "hilbert" or "hilbert-trans"; "trans" swaps x and y first.
        depth: bits per axis, up to 20. The Hilbert order depends on it. Default: those of the grid; published
            code takes bit_length(largest coordinate), or of that plus 1, of the batch.

    Returns:
        A Serialization. Pooled levels need no further sort: `pool`.
    """
    columns = keys.check_coords(coords, grid, batch_size, order)
    if curve not in CURVES:
        raise ValueError(f"curve is {curve!r}; it must be one of {', '.join(map(repr, CURVES))}")
    if duplicates not in ("raise", "keep"):
        raise ValueError(f"duplicates is {duplicates!r}; it must be 'raise' or 'keep'")
    grid, depth = tuple(grid), _depth(grid, depth, batch_size)
    if curve.endswith("trans"):
        columns, grid = (columns[1], columns[0], columns[2]), (grid[1], grid[0], grid[2])
    bits = 3 * depth + keys.bits_of(batch_size)
    if curve.startswith("z"):
        packed = keys.pack(
            coords, _z_tables(grid, batch_size, depth, columns, coords.device), NAMES, validate
        )
    else:
        packed = _hilbert_keys(coords, grid, batch_size, depth, columns, bits, validate)
    rows = keys.sort(packed, bits)
    keys.runs(rows, 0, len(coords), validate, duplicates == "raise")
    return Serialization(rows.order, rows.keys, _sample_ptr(rows.keys, 3 * depth, batch_size), depth, curve)


def _hilbert_keys(
    coords: Tensor,
    grid: tuple[int, ...],
    batch_size: int,
    depth: int,
    columns: tuple[int, ...],
    bits: int,
    validate: bool | None,
) -> Tensor:
    batch = _batch_tables(grid, batch_size, 3 * depth, columns, coords.device)._replace(bits=bits)
    packed = keys.pack(coords, batch, NAMES, validate)
    x, y, z = (coords[:, c].clamp(0, n - 1) for c, n in zip(columns, grid, strict=True))
    if keys.native(coords):
        codes = torch.empty(len(coords), dtype=torch.int64)
        x, y, z = (a.to(torch.int32).contiguous() for a in (x, y, z))
        pointers = (x.data_ptr(), y.data_ptr(), z.data_ptr(), codes.data_ptr())
        _C.hilbert_codes(*pointers, len(coords), depth, torch.get_num_threads())
        return packed + codes.to(packed.dtype)
    return packed + hilbert_codes(x, y, z, depth).to(packed.dtype)


@lru_cache(maxsize=64)
def _batch_tables(
    grid: tuple[int, ...], batch_size: int, shift: int, columns: tuple[int, ...], device: torch.device
) -> Tables:
    """The batch id above `shift` bits; the axes, checked, add nothing."""
    fields = [torch.arange(batch_size) << shift, *(torch.zeros(n, dtype=torch.int64) for n in grid)]
    return keys.make_tables((0, *columns), fields, shift + keys.bits_of(batch_size), device)


def _sample_ptr(sorted_keys: Tensor, shift: int, batch_size: int) -> Tensor:
    """int32 [B + 1]: where the samples begin among keys with the batch id above `shift` bits."""
    ids = torch.arange(batch_size + 1, device=sorted_keys.device)
    return torch.searchsorted(sorted_keys >> shift, ids.to(sorted_keys.dtype)).to(torch.int32)


def pool(levels: Sequence[Serialization]) -> tuple[Tensor, list[Serialization]]:
    """The next coarser level of serializations of the same voxels: coordinates halved, without a sort.

    Args:
        levels: one or more serializations of equal depth, at least 2.

    Returns:
        cluster int64 [N], the coarse voxel of every row, numbered along the first order; and the coarse
        serializations. Reads the number of coarse voxels (one synchronisation).
    """
    first = levels[0]
    if any(s.depth != first.depth or len(s.order) != len(first.order) for s in levels):
        raise ValueError("levels must be serializations of the same voxels with the same depth")
    if first.depth < 2:
        raise ValueError(f"levels have depth {first.depth}; it must be at least 2")
    cluster = torch.empty(len(first.order), dtype=torch.int64, device=first.order.device)
    coarse = []
    for i, s in enumerate(levels):
        codes = s.codes >> 3
        begins = torch.ones_like(codes, dtype=torch.bool)
        begins[1:] = codes[1:] != codes[:-1]
        if i == 0:
            cluster[s.order.long()] = torch.cumsum(begins, 0) - 1
        order = cluster[s.order[begins].long()].to(torch.int32)
        shift = 3 * (s.depth - 1)
        ptr = _sample_ptr(codes[begins], shift, len(s.ptr) - 1)
        coarse.append(Serialization(order, codes[begins], ptr, s.depth - 1, s.curve))
    return cluster, coarse


def groups(order: Tensor, ptr: Tensor, size: int) -> Segments:
    """Groups of `size` consecutive rows of each sample, with the rule of the incomplete last group."""
    keys.positive("size", size, 0)
    rows = order.shape[0]
    begin, n = ptr[:-1].long(), (ptr[1:] - ptr[:-1]).long()
    sample, part = keys.expand((n + size - 1) // size, rows // size + len(n))
    begin = torch.cat([begin, begin.new_full((1,), rows)])[sample]
    n = torch.cat([n, n.new_zeros(1)])[sample]
    first = begin + part * size
    last = begin + torch.minimum((part + 1) * size, n)
    q_ptr = torch.cat([first, first.new_full((1,), rows)]).to(torch.int32)
    k_begin = torch.where(last - first < size, begin + (n - size).clamp_min(0), first).to(torch.int32)
    longest = min(size, rows)
    apart = order.device.type == "cpu" and torch.equal(k_begin, q_ptr[:-1])
    sizes = (rows, rows, longest, longest)
    return Segments(
        order, order, q_ptr, k_begin, last.to(torch.int32), *sizes, True, True, False, apart, True
    )


def flatformer_groups(
    coords: Tensor,
    grid: Sequence[int],
    batch_size: int,
    window: Sequence[int],
    size: int,
    *,
    axis: str = "x",
    shifted: bool = False,
    order: str = "bxyz",
    validate: bool | None = None,
) -> Segments:
    """FlatFormer's groups: pillars in the serpentine order of their windows, cut into groups of `size`.

    Args:
        coords: int [N, 4]; z plays no part and is 0.
        window: its size along x and y.
        size: pillars of a group.
        axis: "x" or "y", the axis along which windows are sorted.
        shifted: shift the windows by half their size. Layers cycle x, x shifted, y, y shifted.
        Others, Raises: as `windows`.

    Returns:
        Segments. The incomplete last group of a sample attends to its last `size` pillars, and a sample of at
        most `size` is one group (the published code raises there, or reads another sample).
    """
    columns = keys.check_coords(coords, grid, batch_size, order)
    keys.positive("window", window, 2)
    if axis not in ("x", "y"):
        raise ValueError(f"axis is {axis!r}; it must be 'x' or 'y'")
    if grid[2] != 1:
        raise ValueError(f"grid is {tuple(grid)}; pillars need 1 voxel along z")
    shift = (window[0] // 2, window[1] // 2) if shifted else (0, 0)
    made = (tuple(grid), batch_size, columns, coords.device)
    batch = keys.pack(coords, _batch_tables(made[0], batch_size, 0, columns, coords.device), NAMES, validate)
    across, along = (1, 0) if axis == "x" else (0, 1)  # x order: windows of y, then of x
    u = [coords[:, columns[a]].clamp(0, grid[a] - 1) + shift[a] for a in (0, 1)]
    outer_window, outer_place = u[across] // window[across], u[across] % window[across]
    inner_window, inner_place = u[along] // window[along], u[along] % window[along]
    s, t = (outer_window & 1) == 1, (inner_place & 1) == 1
    fields = []
    for a, value, limit, flip in (
        (across, outer_window, None, None),
        (along, inner_window, None, s),
        (along, inner_place, window[along], s),
        (across, outer_place, window[across], s ^ t),
    ):
        most = (limit if limit is not None else (grid[a] - 1 + shift[a]) // window[a] + 1) - 1
        fields.append(
            (value if flip is None else torch.where(flip, most - value, value), keys.bits_of(most + 1))
        )
    bits = sum(width for _, width in fields)
    total = bits + keys.bits_of(batch_size)
    key = batch.to(keys.key_dtype(total))
    for value, width in fields:
        key = (key << width) | value.to(key.dtype)
    rows = keys.sort(key, total)
    keys.runs(rows, 0, len(coords), validate, True)
    return groups(rows.order, _sample_ptr(rows.keys, bits, batch_size), size)


def trellis_serialized(serialization: Serialization, window: int, shift: int = 0) -> Segments:
    """TRELLIS's windows of a sequence: w = ceil(n / window) even query ranges per sample, each attending to
    `window` consecutive voxels around it; places count modulo n, from `shift` on.

    A sample of at most `window` voxels attends to itself. The keys around both ends are repeated rows.
    """
    keys.positive("window", window, 0)
    order, ptr = serialization.order, serialization.ptr.long()
    rows, device = order.shape[0], order.device
    begin, n = ptr[:-1], ptr[1:] - ptr[:-1]
    w = (n + window - 1) // window
    several = w > 1
    low = torch.where(several, -((n - window * w) // (2 * w).clamp_min(1)), 0)  # keys before place 0
    last = ((2 * w - 1) * n - window * w) // (2 * w).clamp_min(1) + window
    high = torch.where(several, (last - n).clamp_min(0), 0)
    samples = len(n)
    turn = torch.where(several, shift, 0)
    # Query slots: the order of the sample, rotated by shift.
    slot = torch.arange(rows, device=device)
    sample = torch.searchsorted(ptr[1:], slot, right=True)
    q_index = order[begin[sample] + (slot - begin[sample] + turn[sample]) % n[sample]]
    # Key slots: the same with `low` places before and `high` behind.
    longest = window // 2 + 1  # of either side
    owner, place = keys.expand(n + low + high, rows + samples * 2 * longest)
    key_ptr = torch.cumsum(n + low + high, 0) - (n + low + high)
    safe = owner.clamp_max(max(samples - 1, 0))
    at = (place - low[safe] + turn[safe]) % n[safe].clamp_min(1) + begin[safe] if samples else place
    k_index = order[at.clamp(0, max(rows - 1, 0))] if rows else order
    # Segments.
    part_of, i = keys.expand(w, rows // window + samples)
    inside = part_of < samples
    b = part_of.clamp_max(max(samples - 1, 0))
    if not samples:
        return own_keys(order, ptr.to(torch.int32).new_zeros(1), 0, 0)
    m, parts = n[b], w[b].clamp_min(1)
    first = torch.where(inside, begin[b] + i * m // parts, rows)
    centre = torch.where(several[b], ((2 * i + 1) * m - window * parts) // (2 * parts), 0)
    k_begin = torch.where(inside, key_ptr[b] + low[b] + centre, k_index.shape[0])
    k_end = torch.where(inside, k_begin + torch.where(several[b], window, m), k_index.shape[0])
    q_ptr = torch.cat([first, first.new_full((1,), rows)])
    q, k, ptr, k_begin, k_end = (x.to(torch.int32) for x in (q_index, k_index, q_ptr, k_begin, k_end))
    bound = min(window, rows)
    return Segments(q, k, ptr, k_begin, k_end, rows, rows, bound, bound, True, True, True, False, True)


def octree_groups(serialization: Serialization, size: int, dilation: int = 1) -> Segments:
    """OctFormer's groups: token i of the batch in z-order is in group (i // (size * dilation), i mod size *
    dilation mod dilation), cut where a sample ends.

    Args:
        serialization: of curve "z".
        size: tokens of a group. dilation: groups that interleave.

    Returns:
        Segments whose keys are their queries.
    """
    keys.positive("size", size, 0)
    keys.positive("dilation", dilation, 0)
    order, ptr = serialization.order, serialization.ptr
    rows, span = order.shape[0], size * dilation
    i = torch.arange(rows, device=order.device)
    sample = torch.searchsorted(ptr[1:].long(), i, right=True)
    group = i // span * dilation + i % span % dilation
    count = max(-(-rows // span) * dilation, 1)
    bits = keys.bits_of(count) + keys.bits_of(len(ptr))
    key = (group << keys.bits_of(len(ptr))) | sample
    by_group = keys.sort(key.to(keys.key_dtype(bits)), bits)
    runs = keys.runs(by_group, 0, count + len(ptr) * dilation, False, False)
    return own_keys(order[by_group.order.long()], runs.ptr, rows, size)
