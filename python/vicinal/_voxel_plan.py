"""Plans of segments: a row per segment over a list of query rows and a list of key rows.

Where key ranges overlap, or a key row stands at several slots, the backward works on copies: the first
segment that reads a key owns its gradient, every other one writes to a copy of its keys, and the copies of a
key are summed in their order. Everything is vectorised, without a loop over segments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ._segments_keys import expand
from ._segments_type import SegmentGroups, Segments
from .plan import Plan


class Group(NamedTuple):
    """Consecutive heads (0: all) and their part of the tables: `rows` rows, of which the first `owners` own
    the gradients of their keys and the others work on `copies` copies; most slots of a row."""

    heads: int
    rows: int
    owners: int
    copies: int
    q_slots: int
    k_slots: int


@dataclass(frozen=True, eq=False)
class SegmentPlan:
    """Plans of all head groups: one table `axes` int32 [A, 4] of entries, and the groups' rows one after the
    other.

    `rows` int32 [R, 16] is the forward's. `copy_rows`: the rows that do not own their keys, over copies;
    `copies` int32 [C]: the key row behind every copy, group after group. fill_q, fill_k: whether there are
    rows of q, of k, that no row of the plan writes.
    """

    axes: Tensor
    rows: Tensor
    copy_rows: Tensor
    copies: Tensor
    groups: tuple[Group, ...]
    fill_q: bool
    fill_k: bool


def plan_of(segments: Segments | SegmentGroups) -> SegmentPlan:
    """The plan, built at the first call."""
    kept = segments.kept
    if "plan" not in kept:
        groups = segments.groups if isinstance(segments, SegmentGroups) else ((segments, 0),)
        kept["plan"] = _make(groups)
    found = kept["plan"]
    assert isinstance(found, SegmentPlan)
    return found


def _make(groups: Sequence[tuple[Segments, int]]) -> SegmentPlan:
    axes = [torch.zeros(1, 4, dtype=torch.int32, device=groups[0][0].device)]
    parts, made, begin, fill_k = [], [], 1, False
    for s, heads in groups:
        part = _tables(s, begin)
        begin += len(part.entries)
        axes.append(part.entries)
        parts.append(part)
        owners = len(part.rows) - len(part.copy_rows)
        made.append(Group(heads, len(part.rows), owners, len(part.copies), s.max_q, s.max_k))
        fill_k = fill_k or not s.covers_k or (len(part.copy_rows) > 0)
    rows, copy_rows, copies = (torch.cat([p[i] for p in parts]) for i in (1, 2, 3))
    fill_q = not all(s.covers_q for s, _ in groups)
    return SegmentPlan(torch.cat(axes), rows, copy_rows, copies, tuple(made), fill_q, fill_k)


class _Parts(NamedTuple):
    entries: Tensor
    rows: Tensor
    copy_rows: Tensor
    copies: Tensor


def _tables(s: Segments, begin: int) -> _Parts:
    """The axis entries of one Segments, which stand from `begin` on, and its rows."""
    same = s.k_index is s.q_index
    lists = [s.q_index] if same else [s.q_index, s.k_index]
    k_at = begin if same else begin + len(s.q_index)
    bounds = torch.stack([s.q_ptr[:-1], s.q_ptr[1:] - s.q_ptr[:-1], s.k_begin, s.k_end - s.k_begin])
    if s.device.type == "cpu" or not s.apart or s.repeats:
        used = (bounds[1] > 0) & (bounds[3] > 0)
        if not bool(used.all()):
            bounds = bounds[:, used]
    copies = s.k_index[:0]
    owns = None
    if s.repeats:
        owns = torch.zeros(bounds.shape[1], dtype=torch.bool, device=s.device)
    elif not s.apart:
        owns = _first_readers(bounds[2], bounds[2] + bounds[3])
    if owns is None:
        rows = _rows(begin + bounds[0], bounds[1], k_at + bounds[2], bounds[3])
        return _Parts(_entries(lists), rows, rows[:0], copies)
    bounds = torch.cat([bounds[:, owns], bounds[:, ~owns]], 1)
    rows = _rows(begin + bounds[0], bounds[1], k_at + bounds[2], bounds[3])
    other = bounds[:, int(owns.sum()) :]
    counts = other[3].long()
    row, place = expand(counts, int(counts.sum()))
    copies = s.k_index[other[2].long()[row] + place]
    lists.append(torch.arange(len(copies), dtype=torch.int32, device=s.device))
    at = begin + sum(len(x) for x in lists[:-1])
    copy_begin = at + torch.cumsum(counts, 0) - counts
    return _Parts(_entries(lists), rows, _rows(begin + other[0], other[1], copy_begin, other[3]), copies)


def _first_readers(begin: Tensor, end: Tensor) -> Tensor:
    """bool [S]: segments none of whose keys are read by an earlier one, in the order of k_begin."""
    order = torch.sort(begin, stable=True)[1]
    reach = torch.cummax(end[order], 0)[0]
    free = torch.ones_like(order, dtype=torch.bool)
    free[1:] = begin[order][1:] >= reach[:-1]
    owns = torch.empty_like(free)
    owns[order] = free
    return owns


def _entries(lists: Sequence[Tensor]) -> Tensor:
    """Axis entries [A, 4] with nothing but tokens."""
    tokens = torch.cat(list(lists))
    entries = torch.zeros(len(tokens), 4, dtype=torch.int32, device=tokens.device)
    entries[:, 0] = tokens
    return entries


def _rows(q_begin: Tensor, q_count: Tensor, k_begin: Tensor, k_count: Tensor) -> Tensor:
    """Plan rows [R, 16] of one query list and one key list each."""
    rows = torch.zeros(len(q_begin), 16, dtype=torch.int32, device=q_begin.device)
    rows[:, 3:6] = 1
    rows[:, 9:12] = 1
    for column, x in ((2, q_begin), (5, q_count), (8, k_begin), (11, k_count)):
        rows[:, column] = x
    return rows


def kernel_plan(axes: Tensor, rows: Tensor, group: Group, n_k: int) -> Plan:
    """The kernels' plan of some rows of a group."""
    return Plan(axes, rows, len(rows), group.q_slots, group.k_slots, flags=0, overlap=False, n_k=n_k)
