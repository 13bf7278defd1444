"""Segments of voxel windows: plain windows and cells, SST's buckets, DSVT's rotated sets, ConDaFormer's
planes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _segments_keys as keys
from ._segments_keys import Runs, Sorted, Tables
from ._segments_type import SegmentGroups, Segments, derived, own_keys

NAMES = ("batch", "x", "y", "z")
AXES = (0, 1, 2)


@lru_cache(maxsize=256)
def _window_tables(
    grid: tuple[int, ...],
    batch_size: int,
    window: tuple[int, ...],
    shift: tuple[int, ...],
    within: tuple[int, ...],
    columns: tuple[int, ...],
    device: torch.device,
) -> tuple[Tables, int, int]:
    """Keys (b, window x, y, z, place in the window over the axes `within`); bits of the place; windows."""
    counts = [(x - 1 + s) // w + 1 for x, w, s in zip(grid, window, shift, strict=True)]
    place_bits = {a: keys.bits_of(min(window[a], grid[a] + shift[a])) for a in AXES}
    at, place_at = 0, {}
    for a in reversed(within):
        place_at[a] = at
        at += place_bits[a]
    total = at
    window_at = {}
    for a in reversed(AXES):
        window_at[a] = total
        total += keys.bits_of(counts[a])
    keys.key_dtype(total + keys.bits_of(batch_size), "the key of grid, windows and batch")
    fields = [torch.arange(batch_size) << total]
    for a in AXES:
        u = torch.arange(grid[a]) + shift[a]
        fields.append(((u // window[a]) << window_at[a]) | ((u % window[a]) << place_at[a]))
    bits = total + keys.bits_of(batch_size)
    tables = keys.make_tables((0, *columns), fields, bits, device)
    return tables, at, max(batch_size, 1) * counts[0] * counts[1] * counts[2]


class _Sorted(NamedTuple):
    rows: Sorted
    windows: Runs


def _sorted(
    coords: Tensor,
    grid: Any,
    batch_size: Any,
    window: Any,
    shift: Any,
    order: str,
    within: tuple[int, ...],
    duplicates: str,
    validate: bool | None,
) -> _Sorted:
    columns = keys.check_coords(coords, grid, batch_size, order)
    keys.positive("window", window, 3)
    keys.positive("shift", shift, 3, lowest=0)
    if duplicates not in ("raise", "keep"):
        raise ValueError(f"duplicates is {duplicates!r}; it must be 'raise' or 'keep'")
    made = (tuple(grid), batch_size, tuple(window), tuple(shift))
    tables, place_bits, bound = _window_tables(*made, within, columns, coords.device)
    rows = keys.sort(keys.pack(coords, tables, NAMES, validate), tables.bits)
    return _Sorted(rows, keys.runs(rows, place_bits, bound, validate, duplicates == "raise"))


def windows(
    coords: Tensor,
    grid: Sequence[int],
    batch_size: int,
    window: Sequence[int],
    shift: Sequence[int] = (0, 0, 0),
    *,
    order: str = "bxyz",
    duplicates: str = "raise",
    validate: bool | None = None,
) -> Segments:
    """A segment per occupied window of a voxel grid (SST, Swin3D, TRELLIS's windowed attention).

    Voxel c lies in window (c + shift) // window; the voxels of a window are ordered by their place in it, x
    first.

    Args:
        coords: int [N, 4], a row per voxel: batch, then x, y, z (or z, y, x).
        grid: voxels along x, y and z.
        batch_size: samples; ids run from 0 to batch_size - 1, and samples may be empty.
        window: its size along x, y and z.
        shift: added to the coordinates before they are cut. Default 0.
        order: "bxyz" or "bzyx", the columns of coords. Default "bxyz".
        duplicates: "raise", or "keep" equal voxels in the order of their rows. Default "raise".
        validate: True: check now; None: now on CPUs, elsewhere by an assertion that fails at the device's
            next synchronisation; False: not at all (coordinates outside then fall into some window). Default
            None.

    Returns:
        Segments whose keys are their queries.

    Raises:
        TypeError, ValueError: names the argument, its value and the limit.

    Example:
        >>> windows(torch.tensor([[0, 0, 0, 0], [0, 1, 1, 0], [0, 5, 0, 0]]), (8, 8, 1), 1, (4, 4, 1))
        Segments(2 segments, 3 queries, 3 keys, at most 3 x 3)
    """
    found = _sorted(coords, grid, batch_size, window, shift, order, AXES, duplicates, validate)
    return own_keys(found.rows.order, found.windows.ptr, len(coords), _longest(window, coords, duplicates))


def _longest(window: Sequence[int], coords: Tensor, duplicates: str) -> int:
    """Bound of the voxels in a window."""
    return window[0] * window[1] * window[2] if duplicates == "raise" else len(coords)


def dsvt_sets(
    coords: Tensor,
    grid: Sequence[int],
    batch_size: int,
    window: Sequence[int],
    shift: Sequence[int],
    set_size: int,
    *,
    order: str = "bxyz",
    duplicates: str = "raise",
    validate: bool | None = None,
) -> tuple[Segments, Segments]:
    """DSVT's rotated sets: every window split evenly into ceil(n / set_size) sets, along y and along x.

    Set j of a window of n voxels and S sets holds its voxels j n // S .. (j + 1) n // S - 1, in the order of
    (y, x, z) for the first result and of (x, y, z) for the second. The published code pads the sets to
    set_size with repeated voxels and masks the repeats; these are its sets without them.

    Args:
        set_size: most voxels of a set.
        Others, Raises: as `windows`. Configuration 1 of a block has its own window and shift.

    Returns:
        The sets of orientation 0 (y) and of orientation 1 (x). Layer i of a block uses orientation i.
    """
    keys.positive("set_size", set_size, 0)
    options = (duplicates, validate)
    y = _sorted(coords, grid, batch_size, window, shift, order, (1, 0, 2), *options)
    ptr = split_evenly(y.windows.ptr, set_size, len(coords))  # windows hold as many voxels in either order
    made = (tuple(grid), batch_size, tuple(window), tuple(shift))
    tables, _, _ = _window_tables(*made, AXES, keys.ORDERS[order], coords.device)
    x = keys.sort(keys.pack(coords, tables, NAMES, False), tables.bits)
    rows = len(coords)
    return own_keys(y.rows.order, ptr, rows, set_size), own_keys(x.order, ptr, rows, set_size)


def split_evenly(ptr: Tensor, size: int, rows: int) -> Tensor:
    """Where the parts begin when every run of `ptr` is cut into the least number of parts of at most `size`,
    whose lengths differ by at most 1."""
    begin, n = ptr[:-1].long(), (ptr[1:] - ptr[:-1]).long()
    parts = (n + size - 1) // size
    run, part = keys.expand(parts, min(rows, rows // size + len(n)))
    whole = torch.cat([begin, begin.new_full((1,), rows)])
    length = torch.cat([n, n.new_zeros(1)])[run]
    into = torch.cat([parts, parts.new_ones(1)])[run]
    cut = whole[run] + part * length // into
    return torch.cat([cut, cut.new_full((1,), rows)]).to(torch.int32)


class Buckets(NamedTuple):
    """`segments` over the rows that are kept, and `keep`, bool [N]."""

    segments: Segments
    keep: Tensor


def sst_buckets(
    coords: Tensor,
    grid: Sequence[int],
    batch_size: int,
    window: Sequence[int],
    shift: Sequence[int],
    levels: Sequence[tuple[int, int, int]],
    *,
    keep: Tensor | None = None,
    order: str = "bxyz",
    validate: bool | None = None,
) -> Buckets:
    """SST's windows under its limits of tokens: a window keeps its first `most` rows.

    Args:
        levels: (lower, upper, most): a window of lower <= n < upper voxels keeps `most` of them. A window in
            no level keeps all.
        keep: bool [N], the rows that an earlier call kept: the others take no part and are not counted.
            Default: all.
        Others, Raises: as `windows`. Rows count in the order of coords, which training shuffles first.

    Returns:
        Segments over the kept rows (the others get output 0), and which rows those are.
    """
    for level in levels:
        if len(level) != 3 or not all(isinstance(x, int) for x in level) or not 0 <= level[0] < level[1]:
            raise ValueError(f"levels has {level!r}; an entry is (lower, upper, most) with lower < upper")
        if level[2] < 1:
            raise ValueError(f"levels has {level!r}; a window must keep at least 1 voxel")
    chosen = torch.arange(len(coords), device=coords.device)
    if keep is not None:
        if keep.dtype != torch.bool or tuple(keep.shape) != (len(coords),):
            raise ValueError(f"keep has shape {list(keep.shape)} and {keep.dtype}; it must be bool [N]")
        chosen = torch.nonzero(keep).flatten()
    part = coords.index_select(0, chosen)
    found = _sorted(part, grid, batch_size, window, shift, order, AXES, "raise", validate)
    counts = found.windows.lengths().long()
    most = counts.clone()
    for lower, upper, limit in levels:
        most = torch.where((counts >= lower) & (counts < upper), counts.clamp_max(limit), most)
    # Ranks in the order of rows: the rows of a window, sorted.
    sizes = (len(part),)
    owner = torch.searchsorted(
        found.windows.ptr[1:].long(), torch.arange(*sizes, device=part.device), right=True
    )
    by_row = torch.argsort(found.rows.order.long() + owner * max(len(part), 1), stable=True)
    rank = torch.empty_like(owner)
    rank[by_row] = torch.arange(*sizes, device=part.device) - found.windows.ptr.long()[owner]
    stays = rank < most[owner]
    kept = torch.zeros(len(coords), dtype=torch.bool, device=coords.device)
    kept[chosen[found.rows.order.long()[stays]]] = True
    lengths = torch.zeros_like(counts).index_add_(0, owner, stays.long())
    ptr = torch.cat([lengths.new_zeros(1), torch.cumsum(lengths, 0)]).to(torch.int32)
    index = chosen[found.rows.order.long()[stays]].to(torch.int32)
    return Buckets(own_keys(index, ptr, len(coords), _longest(window, coords, "raise")), kept)


def cells(
    coords: Tensor, grid: Sequence[int], batch_size: int, *, empty: bool = False, order: str = "bxyz"
) -> Segments:
    """A segment per cell of a grid, whose members are points (GridFormer): rows may share a cell.

    Args:
        coords: int [N, 4], the cell of every point: batch, x, y, z.
        empty: also a segment for every cell without points, in the order of (batch, x, y, z).
        Others, Raises: as `windows`.

    Returns:
        Segments; the points of a cell are in the order of their rows.
    """
    found = _sorted(coords, grid, batch_size, (1, 1, 1), (0, 0, 0), order, AXES, "keep", None)
    ptr = found.windows.ptr
    if empty:
        columns = keys.ORDERS[order]
        total = batch_size * grid[0] * grid[1] * grid[2]
        ids = coords[:, 0].long()
        for axis, column in zip(AXES, columns, strict=True):
            ids = ids * grid[axis] + coords[:, column]
        ids = ids[found.rows.order.long()]
        ptr = torch.searchsorted(ids, torch.arange(total + 1, device=ids.device)).to(torch.int32)
    return own_keys(found.rows.order, ptr, len(coords), len(coords))


def condaformer_planes(
    points: Tensor,
    batch: Tensor,
    batch_size: int,
    window: float,
    quant: float,
    *,
    shifted: bool = False,
    heads: int = 3,
    origin: str | Tensor = "batch",
) -> tuple[SegmentGroups, list[Tensor], int]:
    """ConDaFormer's three planes: a third of the heads each in windows (w, w, 1), (w, 1, w) and (1, w, w).

    Window floor((p + shift - origin) / size) and cell floor(((p - origin + shift) mod size) / quant) of
    real-valued coordinates, in float32 and in the order written; odd blocks shift by half the size on every
    axis.

    Args:
        points: float [N, 3], in the voxel units of the level.
        batch: int [N], ids from 0 to batch_size - 1.
        window: w. quant: size of a cell of the tables.
        shifted: shift by half the window.
        heads: divisible by 3.
        origin: "batch", the least coordinate per axis over the whole batch, as published; "sample", of each
            sample; or [3]. Default "batch".

    Returns:
        SegmentGroups; per plane the cells int32 [N, 3] for `ContextTable`; L = 2 floor((w + 1e-4) / quant)
        - 1, the offsets that the tables have per axis.
    """
    if heads < 3 or heads % 3:
        raise ValueError(f"heads is {heads}; it must be a multiple of 3")
    if points.dim() != 2 or points.shape[1] != 3 or not points.is_floating_point():
        raise ValueError(f"points has shape {list(points.shape)} and {points.dtype}; it must be float [N, 3]")
    if not window > 0 or not quant > 0:
        raise ValueError(f"window is {window} and quant {quant}; they must be above 0")
    if len(batch) and not bool(((batch >= 0) & (batch < batch_size)).all()):
        raise ValueError(
            f"batch has ids from {int(batch.min())} to {int(batch.max())}; they must be below {batch_size}"
        )
    p, low = points.float(), _origin(points.float(), batch.long(), batch_size, origin)
    extent = int((window + 1e-4) / quant)
    sizes = ((window, window, 1.0), (window, 1.0, window), (1.0, window, window))
    groups, cells_of = [], []
    for plane in sizes:
        size = torch.tensor(plane, dtype=torch.float32, device=p.device)
        shift = size / 2 if shifted else torch.zeros_like(size)
        place = torch.floor((p + shift - low) / size).to(torch.int64)
        cell = torch.floor(torch.remainder(p - low + shift, size) / quant).to(torch.int32)
        most = torch.floor((size + 1e-4) / quant).to(torch.int32) - 1
        cells_of.append(torch.minimum(cell.clamp_min(0), most.clamp_min(0)))
        groups.append((_runs_of(place, batch.long(), batch_size), heads // 3))
    return SegmentGroups(groups), cells_of, 2 * extent - 1


def _origin(p: Tensor, batch: Tensor, batch_size: int, origin: str | Tensor) -> Tensor:
    if isinstance(origin, Tensor):
        return origin.to(p)
    if origin == "batch":
        return p.amin(0) if len(p) else p.new_zeros(3)
    if origin != "sample":
        raise ValueError(f"origin is {origin!r}; it must be 'batch', 'sample' or a tensor [3]")
    least = p.new_full((batch_size, 3), torch.inf)
    return least.scatter_reduce_(0, batch[:, None].expand(-1, 3), p, "amin")[batch]


def _runs_of(place: Tensor, batch: Tensor, batch_size: int) -> Segments:
    """Segments of equal (batch, place), rows in their order; the sizes are read from the data."""
    n = len(place)
    if n == 0:
        empty = torch.zeros(0, dtype=torch.int32, device=place.device)
        return own_keys(empty, empty.new_zeros(1), 0, 0)
    place = place - place.amin(0)
    sizes = (place.amax(0) + 1).tolist()
    bits = [keys.bits_of(s) for s in sizes]
    total = sum(bits) + keys.bits_of(batch_size)
    dtype = keys.key_dtype(total)
    key = batch
    for a in AXES:
        key = (key << bits[a]) | place[:, a]
    rows = keys.sort(key.to(dtype), total)
    ptr = keys.runs(rows, 0, n, False, False).ptr
    return derived(rows.order, rows.order, ptr, ptr[:-1], ptr[1:], n, n)
