"""The published padded forms of set attention, from their description: gather rows into sets of one size,
mask the repeats as keys, attend with torch.nn.MultiheadAttention, scatter back one copy of each voxel.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vicinal import Segments


def padded_sets(coords: Tensor, window: list[int], shift: list[int], size: int, orientation: int) -> Tensor:
    """DSVT's sets: rows [S, size], slot k of set j of a window of n voxels with ceil(n / size) = m sets
    holding the voxel of rank (j * size + k) * n // (m * size), by unique, bincount and sort."""
    u = coords[:, 1:].long() + torch.tensor(shift)
    w = torch.tensor(window)
    cell, place = u // w, u % w
    counts = cell.amax(0) + 1
    key = ((coords[:, 0].long() * counts[0] + cell[:, 0]) * counts[1] + cell[:, 1]) * counts[2] + cell[:, 2]
    inverse = torch.unique(key, return_inverse=True)[1]
    n = torch.bincount(inverse)
    sets = (n + size - 1) // size
    order = (1, 0, 2) if orientation == 0 else (0, 1, 2)
    inside = (place[:, order[0]] * w[order[1]] + place[:, order[1]]) * w[order[2]] + place[:, order[2]]
    by_place = torch.sort(inverse * int(w.prod()) + inside)[1]
    start = torch.cumsum(n, 0) - n
    owner = torch.repeat_interleave(torch.arange(len(n)), sets)
    j = torch.arange(len(owner)) - (torch.cumsum(sets, 0) - sets)[owner]
    slot = j[:, None] * size + torch.arange(size)
    rank = slot * n[owner][:, None] // (sets[owner] * size)[:, None]
    return by_place[start[owner][:, None] + rank]


def repeats(sets: Tensor) -> Tensor:
    """bool [S, size]: slots that hold the voxel of the slot before."""
    again = torch.zeros_like(sets, dtype=torch.bool)
    again[:, 1:] = sets[:, 1:] == sets[:, :-1]
    return again


def padded(segments: Segments) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [S, slots] of segments whose keys are their queries, which slots are empty, and each row's
    slot."""
    lengths = (segments.q_ptr[1:] - segments.q_ptr[:-1]).long()
    slots = int(lengths.max())
    there = torch.arange(slots) < lengths[:, None]
    place = (segments.q_ptr[:-1, None].long() + torch.arange(slots)).clamp_max(len(segments.q_index) - 1)
    rows = segments.q_index.long()[place]
    slot_of = torch.empty(segments.n_q, dtype=torch.long)
    slot_of[rows[there]] = torch.arange(there.numel()).view_as(there)[there]
    return rows, ~there, slot_of


def padded_attention(
    attend: nn.MultiheadAttention, qk: Tensor, value: Tensor, rows: Tensor, empty: Tensor, slot_of: Tensor
) -> Tensor:
    """[N, C]: the gathered, masked and scattered form."""
    query, values = qk[rows], value[rows]
    out = attend(query, query, values, empty, need_weights=False)[0]
    return out.flatten(0, 1)[slot_of]
