"""Plans of neighborhood attention: which keys each query of a grid reads, per axis, and the tiles of it.

An axis splits into `dilation` groups: token i is place i // dilation of group i % dilation. Within a group,
query p reads the keys [a(p), b(p)), and neither end ever decreases with p, so the queries that read a key are
a range too. The definition of a and b is `key_ranges`, and nothing else computes it.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from .plan import ROW_RANGES, Plan, _product_rows, _strides


class AxisNeighborhood(NamedTuple):
    """One axis, resolved: `length` keys; `left` and `right`, the keys on either side of the leader, -1 for
    unlimited; `shift`: the window of left + right + 1 keys moves inward at the borders, otherwise its
    overhang is dropped. The `q_length` queries stand at the last places of the axis."""

    length: int
    left: int
    right: int
    dilation: int
    stride: int
    causal: bool
    shift: bool
    q_length: int

    @property
    def kernel(self) -> int:
        """Keys of a full window; only where neither side is unlimited."""
        return self.left + self.right + 1


def key_ranges(axis: AxisNeighborhood, n: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """a, b of the queries at places p in groups of n tokens (int64 tensors of one shape)."""
    s = axis.stride
    leader = p // s * s + (s - 1 if axis.causal else s // 2)
    if axis.shift:
        k = axis.kernel
        if axis.causal:
            return (leader.minimum(n - 1) - k + 1).clamp_min(0), p + 1
        a = (leader - k // 2).clamp_min(0).minimum(n - k)
        return a, a + k
    a = torch.zeros_like(p) if axis.left < 0 else (leader - axis.left).clamp_min(0)
    b = n if axis.right < 0 else (leader + axis.right + 1).minimum(n)
    return a, p + 1 if axis.causal else b


class Group(NamedTuple):
    """A dilation group: its tokens are entries begin .. begin + n - 1 of its axis; the first `skipped` places
    have no query; place p reads keys [a[p], b[p])."""

    begin: int
    n: int
    skipped: int
    a: list[int]
    b: list[int]


class AxisTable(NamedTuple):
    """One axis, group after group: token coordinate i, place p, and range of keys [a, b), each [length]."""

    groups: list[Group]
    i: Tensor
    p: Tensor
    a: Tensor
    b: Tensor


def axis_table(axis: AxisNeighborhood) -> AxisTable:
    length, d = axis.length, min(axis.dilation, axis.length)
    i = torch.cat([torch.arange(g, length, d) for g in range(d)])
    p = i // d
    a, b = key_ranges(axis, (length - i % d + d - 1) // d, p)
    groups, begin, offset = [], 0, length - axis.q_length
    for g in range(d):
        n = (length - g + d - 1) // d
        skipped = min(n, max(0, (offset - g + d - 1) // d))
        groups.append(Group(begin, n, skipped, a[begin : begin + n].tolist(), b[begin : begin + n].tolist()))
        begin += n
    return AxisTable(groups, i, p, a, b)


class Tile(NamedTuple):
    """One axis of a row: places [q0, q1) of the group's queries, [k0, k1) of its keys."""

    group: Group
    q0: int
    q1: int
    k0: int
    k1: int

    @property
    def ranged(self) -> bool:
        """Whether a query of the tile does not read all of its keys."""
        if self.q0 == self.q1:
            return False
        return self.group.a[self.q1 - 1] > self.k0 or self.group.b[self.q0] < self.k1


def _cuts(first: int, last: int, size: int, multiple: int) -> list[tuple[int, int]]:
    """[first, last) in pieces of at most `size`, of nearly equal length; cut at multiples of `multiple` where
    a piece holds that many."""
    multiple = multiple if size >= multiple else 1
    most = size // multiple
    begin = first // multiple
    steps = -(-last // multiple) - begin
    even = -(-steps // max(1, -(-steps // most)))
    edges = [first, *range((begin + even) * multiple, last, max(even, 1) * multiple), last]
    return list(pairwise(edges)) if first < last else []


def query_tiles(axis: AxisNeighborhood, table: AxisTable, size: int) -> list[Tile]:
    """Tiles of at most `size` queries with the union of their keys."""
    return [
        Tile(group, q0, q1, group.a[q0], group.b[q1 - 1])
        for group in table.groups
        for q0, q1 in _cuts(group.skipped, group.n, size, axis.stride)
    ]


def key_tiles(table: AxisTable, size: int) -> list[Tile]:
    """Tiles of at most `size` keys with the queries that read any of them."""
    made = []
    for group in table.groups:
        for k0, k1 in _cuts(0, group.n, size, 1):
            q0 = max(bisect_right(group.b, k0), group.skipped)  # the first with b > k0
            q1 = max(bisect_left(group.a, k1), q0)  # behind the last with a < k1
            made.append(Tile(group, q0, q1, k0, k1))
    return made


def _partition(tiles: Sequence[Tile], length: int) -> bool:
    """Whether the tiles' key ranges hold every key of the axis once."""
    apart = all(x.group is not y.group or x.k1 <= y.k0 for x, y in pairwise(tiles))
    return apart and sum(t.k1 - t.k0 for t in tiles) == length


def _entries(
    axes: Sequence[AxisNeighborhood], tables: Sequence[AxisTable], biased: bool
) -> tuple[Tensor, list[int], int]:
    """The axis lists int32 [A, 4]: per axis the queries of all places, then the keys; where each axis's
    begins; the guard bits."""
    rank = len(axes)
    widths = [max(g.n for g in t.groups).bit_length() for t in tables]
    fields = [sum(widths[a + 1 :]) + rank - 1 - a for a in range(rank)]
    if fields[0] + widths[0] > 30:
        sizes = " x ".join(str(a.length) for a in axes)
        raise NotImplementedError(f"a grid of {sizes} tokens needs more than 30 bits for its places")
    q_strides, k_strides = _strides([a.q_length for a in axes]), _strides([a.length for a in axes])
    code_strides = _strides([2 * a.kernel - 1 for a in axes]) if biased else [0] * rank
    parts, begins, size = [torch.zeros(1, 4, dtype=torch.long)], [], 1
    for a, (axis, t) in enumerate(zip(axes, tables, strict=True)):
        code, zero = code_strides[a], torch.zeros_like(t.p)
        token = (t.i - (axis.length - axis.q_length)) * q_strides[a]
        q_code = (axis.kernel - 1 - t.p) * code
        parts.append(torch.stack([token, t.a << fields[a], q_code, (t.b - 1) << fields[a]], 1))
        parts.append(torch.stack([t.i * k_strides[a], zero, t.p * code, t.p << fields[a]], 1))
        begins.append(size)
        size += 2 * axis.length
    guard = sum(1 << (f + w) for f, w in zip(fields, widths, strict=True))
    return torch.cat(parts).to(torch.int32), begins, guard


def _plan(
    axes: Sequence[AxisNeighborhood],
    tiles: Sequence[Sequence[Tile]],
    entries: tuple[Tensor, list[int], int],
    device: torch.device | str,
    key_plan: Plan | None = None,
) -> Plan:
    lists, begins, guard = entries
    columns = []
    for axis, column, begin in zip(axes, tiles, begins, strict=True):
        rows = [
            (
                begin + t.group.begin + t.q0,
                t.q1 - t.q0,
                begin + axis.length + t.group.begin + t.k0,
                t.k1 - t.k0,
                ROW_RANGES * t.ranged,
            )
            for t in column
        ]
        columns.append(torch.tensor(rows, dtype=torch.int32).view(-1, 5))
    table = _product_rows(columns, len(axes))
    flags = ROW_RANGES * bool((table[:, 12] & ROW_RANGES).any())
    return Plan(
        axes=lists.to(device),
        rows=table.to(device),
        n_rows=len(table),
        q_slots=prod(max((t.q1 - t.q0 for t in column), default=0) for column in tiles),
        k_slots=prod(max((t.k1 - t.k0 for t in column), default=0) for column in tiles),
        flags=flags,
        overlap=False,
        n_k=prod(a.length for a in axes),
        guard=guard if flags else 0,
        key_plan=key_plan,
    )


@lru_cache(maxsize=512)
def neighborhood_plan(
    axes: tuple[AxisNeighborhood, ...],
    biased: bool,
    tile: tuple[int, ...],
    key_tile: tuple[int, ...],
    grouped: bool = False,
    device: torch.device | str = "cpu",
) -> Plan:
    """The plan of a grid: rows of at most `tile` queries per axis with the union of their keys. Where the
    key boxes are not a partition of the keys, or `grouped` queries share key heads, `key_plan` has rows of
    at most `key_tile` keys with the queries that read any of them."""
    tables = [axis_table(a) for a in axes]
    tiles = [query_tiles(*pair) for pair in zip(axes, tables, tile, strict=True)]
    entries = _entries(axes, tables, biased)
    key_plan = None
    if grouped or not all(_partition(t, a.length) for t, a in zip(tiles, axes, strict=True)):
        by_keys = [key_tiles(t, size) for t, size in zip(tables, key_tile, strict=True)]
        key_plan = _plan(axes, by_keys, entries, device)
    return _plan(axes, tiles, entries, device, key_plan)
