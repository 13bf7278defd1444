"""Segment attention of rows that are split over ranks: every segment is computed on one of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from .. import _check as checks
from .._segments_type import Segments, from_arrays
from .._voxel_types import Bias, ContextTable, KeyBias, RelTable, Rope3D
from ..voxel import voxel_attention as attend
from ._exchange import Route, bounds_of, move, rank_of, replicated


@dataclass(frozen=True, eq=False)
class SegmentPartition:
    """What one rank computes of segments over split rows, and where its rows come from and go to. Made by
    `partition_segments`; keep it as long as the segments."""

    local: Segments
    queries: Route
    keys: Route
    back: Route
    answered: Tensor  # rows of `local` that are queries, in the order in which they go back
    covered: Tensor  # bool, of this rank's own rows: whether a segment has it as a query
    shared: bool  # queries and keys are the same rows, brought once
    group: Any


def partition_segments(
    segments: Segments,
    own: int,
    *,
    own_k: int | None = None,
    lengths: Sequence[int] | None = None,
    lengths_k: Sequence[int] | None = None,
    group: Any = None,
) -> SegmentPartition:
    """Share segments out to the ranks of a process group, consecutive ones to a rank, with about equal costs
    (queries times keys, plus rows).

    Args:
        segments: `Segments` over all rows, the same on every rank.
        own: rows of q on this rank; ranks hold rows in order. own_k: rows of k; default: as q, whose rows
            then are the same.
        lengths: rows of q of each rank. Default None: all hold `own`. lengths_k: likewise of k.
        group: the process group; None: all ranks.

    Returns:
        The partition, for any number of calls of `voxel_attention`. Reads the segments back to the host once.

    Raises:
        TypeError, ValueError: an argument has the wrong type, or does not fit the segments.
    """
    if not isinstance(segments, Segments):
        raise TypeError(f"segments is a {type(segments).__name__}; it must be Segments")
    rank, ranks = rank_of(group)
    bounds = bounds_of(lengths, own, group)
    shared = own_k is None
    bounds_k = bounds if own_k is None else bounds_of(lengths_k, own_k, group)
    for name, given, rows in (("q", bounds[-1], segments.n_q), ("k", bounds_k[-1], segments.n_k)):
        if given != rows:
            raise ValueError(f"the ranks hold {given} rows of {name}; segments was built for {rows}")
    host = segments.to("cpu")
    cuts = _cuts(host, ranks)
    parts = [_Part.of(host, cuts[r], cuts[r + 1], shared) for r in range(ranks)]
    queries = _route([p.q_rows for p in parts], bounds, rank)
    answers = _route([p.q_rows[p.answered] for p in parts], bounds, rank)
    back = Route(answers.place, answers.send, answers.held, answers.rows)
    keys = queries if shared else _route([p.k_rows for p in parts], bounds_k, rank)
    covered = torch.zeros(own, dtype=torch.bool)
    for index in answers.send:
        covered[index] = True
    mine, device = parts[rank], segments.device
    local = mine.local.to(device)
    where = mine.answered.to(device), covered.to(device)
    return SegmentPartition(local, queries, keys, back, *where, shared, group)


@dataclass(frozen=True)
class _Part:
    """The segments of one rank over the rows that they need."""

    local: Segments
    q_rows: Tensor
    k_rows: Tensor
    answered: Tensor

    @staticmethod
    def of(s: Segments, first: int, last: int, shared: bool) -> _Part:
        ptr = s.q_ptr[first : last + 1].long()
        begin, end = s.k_begin[first:last].long(), s.k_end[first:last].long()
        used = end > begin
        low = int(begin[used].min()) if used.any() else 0
        high = int(end[used].max()) if used.any() else 0
        q, k = s.q_index[ptr[0] : ptr[-1]].long(), s.k_index[low:high].long()
        q_rows = torch.unique(torch.cat([q, k]) if shared else q)
        k_rows = q_rows if shared else torch.unique(k)
        answered = torch.searchsorted(q_rows, q)
        local = from_arrays(
            answered,
            ptr - ptr[0],
            torch.searchsorted(k_rows, k),
            torch.where(used, begin - low, 0),
            torch.where(used, end - low, 0),
            n_q=len(q_rows),
            n_k=len(k_rows),
        )
        return _Part(local, q_rows, k_rows, answered)


def _cuts(s: Segments, ranks: int) -> list[int]:
    """Where each rank's segments begin, and the end."""
    queries = (s.q_ptr[1:] - s.q_ptr[:-1]).long()
    keys = (s.k_end - s.k_begin).long()
    cost = torch.cumsum(queries * keys + queries + keys, 0)
    total = int(cost[-1]) if len(cost) else 0
    marks = torch.tensor([total * r // ranks for r in range(1, ranks)], dtype=cost.dtype)
    inner = torch.searchsorted(cost, marks, right=True).tolist() if total else [0] * (ranks - 1)
    return [0, *inner, s.count]


def _route(wanted: Sequence[Tensor], bounds: tuple[int, ...], rank: int) -> Route:
    """From rows that ranks hold in order, to the lists of rows that each wants."""
    edges = torch.tensor(bounds[1:])

    def of(rows: Tensor, holder: int) -> Tensor:
        return torch.nonzero(torch.searchsorted(edges, rows, right=True) == holder)[:, 0]

    send = tuple(rows[of(rows, rank)] - bounds[rank] for rows in wanted)
    place = tuple(of(wanted[rank], holder) for holder in range(len(wanted)))
    return Route(send, place, len(wanted[rank]), bounds[rank + 1] - bounds[rank])


def voxel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    partition: SegmentPartition,
    *,
    bias: Bias | tuple[Bias, ...] | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`vicinal.voxel_attention` of rows that are split over the ranks of a process group.

    Every rank calls it with its rows and gets the output of its rows. Rows go to the ranks that compute their
    segments, outputs come back, gradients take the same ways.

    Args:
        q, k, v: this rank's rows, [N, h, d].
        partition: of `partition_segments`.
        bias: as `vicinal.voxel_attention`: coordinates and `KeyBias.b` of this rank's rows; tables and
            angles the same on all ranks, their gradients summed over the ranks, on every rank.
        Others: as `vicinal.voxel_attention`.

    Returns:
        out [N, h, dv], and with return_lse also lse: what one process would have in these rows.

    Raises:
        ValueError: an argument does not fit the partition; whatever `vicinal.voxel_attention` raises.

    Example:
        >>> import torch.distributed as dist
        >>> from vicinal import distributed, segments
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> part = distributed.partition_segments(segments.from_lengths(torch.tensor([3, 2])), 5)
        >>> q = k = v = torch.randn(5, 4, 16)
        >>> distributed.voxel_attention(q, k, v, part).shape
        torch.Size([5, 4, 16])
        >>> dist.destroy_process_group()
    """
    if not isinstance(partition, SegmentPartition):
        raise TypeError(f"partition is a {type(partition).__name__}; partition_segments makes one")
    checks.flag("return_lse", return_lse)
    group = partition.group
    if partition.shared:
        q, k, v = move((q, k, v), 0, partition.queries, group)
    else:
        (q,) = move((q,), 0, partition.queries, group)
        k, v = move((k, v), 0, partition.keys, group)
    terms = () if bias is None else bias if isinstance(bias, tuple) else (bias,)
    terms = tuple(_moved_term(term, partition) for term in terms)
    found = attend(
        q, k, v, partition.local, bias=terms or None, scale=scale, return_lse=return_lse, backend=backend
    )
    results = (found,) if isinstance(found, Tensor) else found
    answered = [x.index_select(0, partition.answered) for x in results]
    moved = move(answered, 0, partition.back, group)
    if not return_lse:
        return moved[0]
    return moved[0], moved[1].masked_fill(~partition.covered[:, None], -torch.inf)


def _moved_term(term: Bias, partition: SegmentPartition) -> Bias:
    group, way = partition.group, partition.keys
    if isinstance(term, KeyBias):
        return KeyBias(move((term.b,), 0, way, group)[0])
    if isinstance(term, ContextTable):
        tables = replicated(group, term.q_table, term.k_table, term.v_table)
        several = isinstance(term.cells, tuple)
        cells = move(term.cells if isinstance(term.cells, tuple) else (term.cells,), 0, way, group)
        return ContextTable(tuple(cells) if several else cells[0], *cast(tuple[Tensor, ...], tables))
    coords = move((term.coords,), 0, way, group)[0]
    if isinstance(term, RelTable):
        return RelTable(coords, *cast(tuple[Tensor, ...], replicated(group, term.table)))
    return Rope3D(coords, *cast(tuple[Tensor, ...], replicated(group, term.angles)))
