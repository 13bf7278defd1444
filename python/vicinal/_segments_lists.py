"""Segments of plain lists: samples, slices of a permutation, free ranges, nearest neighbours; and the table
of a voxel's neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

from . import _segments_keys as keys
from ._segments_keys import Sorted
from ._segments_type import Segments, derived, own_keys
from ._segments_windows import AXES, NAMES, _window_tables


def _integers(name: str, value: Any, rank: int = 1) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; it must be an integer tensor")
    if value.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} is {value.dtype}; it must be torch.int32 or torch.int64")
    if value.dim() != rank:
        raise ValueError(f"{name} has shape {list(value.shape)}; it must have {rank} dimensions")
    return value


def from_lengths(lengths: Tensor, longest: int | None = None) -> Segments:
    """Consecutive segments of these lengths.

    Args:
        lengths: int [S], at least 0.
        longest: bound of them. Default: read from them (a synchronisation on devices).

    Returns:
        Segments over sum(lengths) rows.
    """
    lengths = _integers("lengths", lengths)
    if len(lengths) and int(lengths.min()) < 0:
        raise ValueError(f"lengths has {int(lengths.min())}; they must be at least 0")
    ends = torch.cumsum(lengths.long(), 0)
    return from_cu_seqlens(torch.cat([ends.new_zeros(1), ends]), longest)


def from_cu_seqlens(cu_seqlens: Tensor, longest: int | None = None) -> Segments:
    """Consecutive segments from their bounds, as variable-length attention takes them.

    Args:
        cu_seqlens: int [S + 1], ascending from 0 to the number of rows.
        longest: bound of their lengths. Default: read from them (a synchronisation on devices).

    Returns:
        Segments.
    """
    ptr = _integers("cu_seqlens", cu_seqlens)
    if not len(ptr) or int(ptr[0]) != 0 or bool((ptr[1:] < ptr[:-1]).any()):
        raise ValueError("cu_seqlens must have at least one entry, begin with 0 and never decrease")
    rows = int(ptr[-1])
    if longest is None:
        longest = int((ptr[1:] - ptr[:-1]).max()) if len(ptr) > 1 else 0
    index = torch.arange(rows, dtype=torch.int32, device=ptr.device)
    return own_keys(index, ptr.to(torch.int32).contiguous(), rows, longest)


def from_batch(batch: Tensor, batch_size: int, validate: bool | None = None) -> Segments:
    """A segment per sample (GPS's global branch). Ids need not be sorted; samples may be empty.

    Args:
        batch: int [N], 0 <= id < batch_size. batch_size: samples. validate: as `windows`.

    Returns:
        Segments; the rows of a sample keep their order.
    """
    batch = _integers("batch", batch)
    keys.positive("batch_size", batch_size, 0, lowest=0)
    bits = keys.bits_of(batch_size)
    tables = keys.make_tables((0,), (torch.arange(batch_size),), bits, batch.device)
    rows = keys.sort(keys.pack(batch[:, None], tables, ("batch",), validate), bits)
    ids = torch.arange(batch_size + 1, device=batch.device, dtype=rows.keys.dtype)
    ptr = torch.searchsorted(rows.keys, ids).to(torch.int32)
    return own_keys(rows.order, ptr, len(batch), len(batch))


def chunks(n: int, size: int, back: int = 0, permutation: Tensor | None = None) -> Segments:
    """Equal slices of a permutation (SReT), which may also read the slices before them.

    Args:
        n: rows. size: rows of a slice; the last one may be shorter. back: slices before it that a slice reads
        besides its own. permutation: int [n], default the rows in their order.

    Returns:
        Segments.
    """
    keys.positive("n", n, 0, lowest=0)
    keys.positive("size", size, 0)
    keys.positive("back", back, 0, lowest=0)
    if permutation is None:
        index = torch.arange(n, dtype=torch.int32)
    else:
        index = _integers("permutation", permutation).to(torch.int32).contiguous()
        if len(index) != n or not bool((torch.sort(index)[0] == torch.arange(n, device=index.device)).all()):
            raise ValueError(f"permutation must hold each of the {n} rows once")
    first = torch.arange(0, n, size, dtype=torch.int32, device=index.device)
    ptr = torch.cat([first, first.new_full((1,), n)])
    begin = (first - back * size).clamp_min(0)
    bounds = (n, n, min(size, n), min(size * (back + 1), n))
    apart = back == 0 or n <= size
    return Segments(index, index, ptr, begin, ptr[1:], *bounds, True, True, False, apart, True)


def ranges(q_lengths: Tensor, k_begin: Tensor, k_end: Tensor, n_k: int | None = None) -> Segments:
    """Consecutive queries with free ranges of keys (MixFormer: template to template, search to all; views of
    iLRM; parts and shared context of PartCrafter).

    Args:
        q_lengths: int [S], queries of each segment.
        k_begin: int [S]. k_end: int [S]: rows k_begin .. k_end - 1 are its keys.
        n_k: rows of k. Default: as many as queries.

    Returns:
        Segments. Reads the arrays (a synchronisation on devices).
    """
    lengths = _integers("q_lengths", q_lengths).long()
    begin, end = (_integers(name, x) for name, x in (("k_begin", k_begin), ("k_end", k_end)))
    if not len(lengths) == len(begin) == len(end):
        raise ValueError(
            f"q_lengths, k_begin and k_end have {len(lengths)}, {len(begin)} and {len(end)} entries; "
            "they must have as many"
        )
    if len(lengths) and int(lengths.min()) < 0:
        raise ValueError(f"q_lengths has {int(lengths.min())}; they must be at least 0")
    rows = int(lengths.sum())
    n_k = rows if n_k is None else n_k
    if len(begin) and (int(begin.min()) < 0 or int(end.max()) > n_k or bool((end < begin).any())):
        raise ValueError(f"k_begin and k_end must be 0 <= k_begin <= k_end <= {n_k}")
    ends = torch.cumsum(lengths, 0)
    ptr = torch.cat([ends.new_zeros(1), ends]).to(torch.int32)
    device = lengths.device
    q, k = (torch.arange(m, dtype=torch.int32, device=device) for m in (rows, n_k))
    return derived(q, k, ptr, begin.to(torch.int32), end.to(torch.int32), rows, n_k)


def from_knn(neighbours: Tensor, mask: Tensor | None = None, n_k: int | None = None) -> Segments:
    """A segment per query row, whose keys are its listed neighbours.

    Args:
        neighbours: int [Nq, K], rows of k. mask: bool [Nq, K], True where there is a neighbour (entries of
        others may be anything). n_k: rows of k, default Nq.

    Returns:
        Segments.
    """
    neighbours = _integers("neighbours", neighbours, 2)
    n, most = neighbours.shape
    n_k = n if n_k is None else n_k
    there = torch.ones_like(neighbours, dtype=torch.bool) if mask is None else mask
    if there.dtype != torch.bool or there.shape != neighbours.shape:
        raise ValueError(f"mask has shape {list(there.shape)} and {there.dtype}; it must be bool {[n, most]}")
    listed = neighbours[there]
    if len(listed) and (int(listed.min()) < 0 or int(listed.max()) >= n_k):
        raise ValueError(
            f"neighbours has rows from {int(listed.min())} to {int(listed.max())}; "
            f"they must be 0 <= row < {n_k}"
        )
    ends = torch.cumsum(there.sum(1), 0)
    begin = torch.cat([ends.new_zeros(1), ends])[:-1]
    q = torch.arange(n + 1, dtype=torch.int32, device=neighbours.device)
    arrays = (q[:-1], listed.to(torch.int32), q, begin.to(torch.int32), ends.to(torch.int32))
    covers_k = len(torch.unique(listed)) == n_k
    traits = (bool((ends > begin).all()), covers_k, True, True, True)
    return Segments(*arrays, n, n_k, min(n, 1), most, *traits)


def neighbour_table(
    coords: Tensor,
    grid: Sequence[int],
    batch_size: int,
    *,
    order: str = "bxyz",
    validate: bool | None = None,
) -> Tensor:
    """Rows of the 27 voxels around each voxel, for submanifold 3 x 3 x 3 convolutions.

    Args:
        As `windows`.

    Returns:
        int64 [N, 27]: the row of the voxel at offset (dx, dy, dz) in (-1, 0, 1), dz fastest; -1 where there
        is none.
    """
    columns = keys.check_coords(coords, grid, batch_size, order)
    tables, _, _ = _window_tables(tuple(grid), batch_size, (1, 1, 1), (0, 0, 0), AXES, columns, coords.device)
    packed = keys.pack(coords, tables, NAMES, validate)
    rows = keys.sort(packed, tables.bits)
    keys.runs(rows, 0, len(coords), validate, True)
    found = []
    for offset in product((-1, 0, 1), repeat=3):
        there = torch.ones(len(coords), dtype=torch.bool, device=coords.device)
        moved = coords.clone()
        for a in AXES:
            moved[:, columns[a]] += offset[a]
            there &= (moved[:, columns[a]] >= 0) & (moved[:, columns[a]] < grid[a])
            moved[:, columns[a]].clamp_(0, grid[a] - 1)
        found.append(_look_up(rows, keys.pack(moved, tables, NAMES, False), there))
    return torch.stack(found, 1) if found else torch.empty(0, 27, dtype=torch.int64)


def _look_up(rows: Sorted, wanted: Tensor, there: Tensor) -> Tensor:
    if not len(rows.keys):
        return torch.full_like(wanted, -1, dtype=torch.int64)
    place = torch.searchsorted(rows.keys, wanted).clamp_max(len(rows.keys) - 1)
    hit = there & (rows.keys[place] == wanted)
    return torch.where(hit, rows.order[place].long(), -1)
