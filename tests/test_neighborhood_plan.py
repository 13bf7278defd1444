"""Plans of neighborhoods against windows written pair by pair, and the closed forms that they rest on."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from math import ceil, prod

import neighborhood_brute_force as brute
import pytest
import torch

from vicinal import _backends, pattern
from vicinal._neighborhood_plan import AxisNeighborhood, key_ranges, neighborhood_plan
from vicinal._neighborhood_tiles import choose_tiles
from vicinal.plan import ROW_RANGES, Plan

Pairs = dict[tuple[int, int], int]


def axis(
    length: int, left: int, right: int, d: int, s: int, causal: bool, border: str, q_length: int = 0
) -> brute.Axis:
    kernel = 0 if -1 in (left, right) else left + right + 1
    return brute.Axis(length, kernel, left, right, d, s, causal, border, q_length or length)


def resolved(a: brute.Axis) -> AxisNeighborhood:
    shift = a.border == "shift"
    return AxisNeighborhood(a.length, a.left, a.right, a.dilation, a.stride, a.causal, shift, a.q_length)


def sides(k: int, causal: bool) -> tuple[int, int]:
    return (k - 1, 0) if causal else (k // 2, k - 1 - k // 2)


def allowed(left: int, right: int, s: int, causal: bool) -> bool:
    """The rule for pairs: every query is in the window of its leader."""
    if causal:
        return right == 0 and (left < 0 or left >= s - 1)
    return (left < 0 or left >= s // 2) and (right < 0 or right >= s - 1 - s // 2)


def shifted(length: int, dilations: tuple[int, ...] = (1, 2, 3)) -> Iterator[brute.Axis]:
    for d in dilations:
        for k in range(1, length // d + 1):
            for s, causal in itertools.product(range(1, k + 1), (False, True)):
                yield axis(length, *sides(k, causal), d, s, causal, "shift")


PAIRS = ((0, 0), (1, 0), (1, 1), (0, 2), (3, 2), (9, 0), (-1, 0), (-1, -1), (2, -1))


def truncated(length: int, dilations: tuple[int, ...] = (1, 2, 5)) -> Iterator[brute.Axis]:
    for d, (left, right), s, causal in itertools.product(dilations, PAIRS, (1, 2, 3, 4), (False, True)):
        if allowed(left, right, s, causal):
            yield axis(length, left, right, d, s, causal, "truncate")
            if length > 2:
                yield axis(length, left, right, d, s, causal, "truncate", length - 2)


def test_key_ranges_are_those_of_the_definition() -> None:
    for n in range(1, 26):
        cases = [a for a in shifted(n, (1,)) if n < 13 or a.kernel % 3 == n % 3]
        for a in [*cases, *truncated(n, (1,))]:
            p = torch.arange(n)
            first, end = key_ranges(resolved(a), torch.full_like(p, n), p)
            got = list(zip(first.tolist(), end.tolist()))
            assert got == [brute.places(a, i, n) for i in range(n)], (a, n)


def readers(a: brute.Axis, q: int, n: int) -> tuple[int, int]:
    """[lo, hi): the closed form of the queries that read place q."""
    k, s, left, right = a.kernel, a.stride, a.left, a.right
    if a.border == "shift":
        if a.causal:
            return q, n if q + k >= n else s * ((q + k) // s)
        lo = 0 if q < k else s * ceil((q - (k - 1 - k // 2) - s // 2) / s)
        return lo, n if q >= n - k else min(n, s * ((q + k // 2 - s // 2) // s + 1))
    if a.causal:
        return q, min(n, s * ((q + left + 1) // s))
    lo = s * max(0, ceil((q - right - s // 2) / s))
    return lo, min(n, s * ((q + left - s // 2) // s + 1))


def test_the_readers_of_a_key_are_a_range() -> None:
    for n in range(1, 26):
        for a in [*shifted(n, (1,)), *truncated(n, (1,))]:
            if a.kernel == 0 or a.q_length != n or (n > 12 and a.kernel % 4 != n % 4):
                continue
            windows = [brute.places(a, p, n) for p in range(n)]
            for q in range(n):
                expected = [p for p, (first, end) in enumerate(windows) if first <= q < end]
                assert list(range(*readers(a, q, n))) == expected, (a, n, q)


def test_windows_hold_their_query_and_never_move_back() -> None:
    for n in range(1, 20):
        for a in [*shifted(n, (1,)), *truncated(n, (1,))]:
            windows = [brute.places(a, p, n) for p in range(n)]
            for p, (first, end) in enumerate(windows):
                assert 0 <= first <= p < end <= n
                assert a.kernel == 0 or max(p - first, end - 1 - p) <= a.kernel - 1
            for (a0, b0), (a1, b1) in itertools.pairwise(windows):
                assert a0 <= a1
                assert b0 <= b1


def pairs_of(plan: Plan) -> Pairs:
    """(query token, key token) -> bias entry of all pairs that the rows of a plan see; no pair twice."""
    entries, found = plan.axes.tolist(), {}

    def slots(begin: list[int], extent: list[int]) -> list[list[int]]:
        boxes = itertools.product(*[range(b, b + e) for b, e in zip(begin, extent)])
        return [[sum(entries[i][field] for i in slot) for field in range(4)] for slot in boxes]

    for row in plan.rows.tolist():
        keys, ranged = slots(row[6:9], row[9:12]), row[12] & ROW_RANGES
        for q in slots(row[0:3], row[3:6]):
            for k in keys:
                if not ranged or pattern.visible(q[1], q[3], k[3], plan.guard):
                    assert (q[0], k[0]) not in found
                    found[q[0], k[0]] = pattern.bias_index(q[2], k[2])
    return found


def expected_pairs(axes: list[brute.Axis]) -> Pairs:
    return {(i, j): entry for i, keys in enumerate(brute.pairs(axes)) for j, (entry, _) in keys.items()}


def check(axes: list[brute.Axis], tile: tuple[int, ...], key_tile: tuple[int, ...]) -> None:
    biased, resolution = all(a.kernel for a in axes), tuple(resolved(a) for a in axes)
    expected = expected_pairs(axes)
    plan = neighborhood_plan(resolution, biased, tile, key_tile, True)
    assert plan.key_plan is not None
    for found in (plan, plan.key_plan):
        got = pairs_of(found)
        assert got.keys() == expected.keys(), (axes, tile)
        assert not biased or got == expected, (axes, tile)
    check_ownership(plan, prod(a.q_length for a in axes), prod(a.length for a in axes))
    alone = neighborhood_plan(resolution, biased, tile, key_tile, False)
    if alone.key_plan is None:
        assert tokens(alone, 6) == list(range(alone.n_k))


def tokens(plan: Plan, base: int) -> list[int]:
    """The tokens of all boxes of queries (base 0) or keys (base 6), in ascending order."""
    entries, found = plan.axes[:, 0].tolist(), []
    for row in plan.rows.tolist():
        begin, extent = row[base : base + 3], row[base + 3 : base + 6]
        for slot in itertools.product(*[range(b, b + e) for b, e in zip(begin, extent)]):
            found.append(sum(entries[i] for i in slot))
    return sorted(found)


def check_ownership(plan: Plan, n_q: int, n_k: int) -> None:
    """Every query is in one row, every key in one row of the key_plan; slots are the most of any row."""
    assert plan.key_plan is not None
    assert tokens(plan, 0) == list(range(n_q))
    assert tokens(plan.key_plan, 6) == list(range(n_k))
    for found in (plan, plan.key_plan):
        assert found.q_slots == int(found.rows[:, 3:6].prod(1).max())
        assert found.k_slots == int(found.rows[:, 9:12].prod(1).max())
        assert bool(found.flags & ROW_RANGES) == bool((found.rows[:, 12] & ROW_RANGES).any())
        assert bool(found.guard) == bool(found.flags & ROW_RANGES)


@pytest.mark.parametrize("length", range(1, 10))
def test_every_small_axis(length: int) -> None:
    for a in [*shifted(length), *truncated(length)]:
        for tile in (1, 3, 4, 16):
            check([a], (tile,), (3,))


GRID = [
    axis(7, 1, 1, 2, 1, False, "shift"),
    axis(9, 2, 1, 1, 2, True, "truncate"),
    axis(6, 1, 1, 2, 3, False, "shift"),
    axis(5, 2, 0, 1, 1, True, "shift"),
    axis(4, -1, 1, 1, 1, False, "truncate"),
    axis(8, 2, 1, 2, 4, False, "truncate"),
]


def test_grids() -> None:
    for axes in itertools.product(GRID, repeat=2):
        check(list(axes), (2, 4), (3, 3))
    for axes in itertools.product(GRID[::2], repeat=3):
        check(list(axes), (2, 2, 3), (3, 2, 1))


EXACT = [
    [axis(12, 2, 1, 3, 1, False, "shift")],  # whole dilation groups
    [axis(12, 2, 1, 3, 4, False, "shift"), axis(8, 2, 1, 1, 4, False, "truncate")],  # and blocks
    [axis(8, 2, 1, 1, 4, False, "shift")],
    [axis(14, 2, 1, 1, 4, False, "truncate")],  # a short last block
    [axis(9, -1, -1, 2, 1, False, "truncate")],  # groups that differ in length
    [axis(9, 4, 4, 1, 1, False, "shift"), axis(6, 1, 1, 2, 1, False, "shift")],
]


@pytest.mark.parametrize("backend", ["cpu", "triton", "cuda"])
@pytest.mark.parametrize("axes", EXACT, ids=str)
def test_dense_groups_and_blocks_are_rows_without_ranges(axes: list[brute.Axis], backend: str) -> None:
    resolution = tuple(resolved(a) for a in axes)
    plan = neighborhood_plan(resolution, False, *choose_tiles(backend, resolution))
    assert plan.flags == plan.guard == 0
    assert plan.key_plan is None
    assert pairs_of(plan).keys() == expected_pairs(axes).keys()


@pytest.mark.parametrize("backend", ["cpu", "triton", "cuda"])
def test_chosen_tiles_cover_every_case(backend: str) -> None:
    for axes in itertools.product([*GRID, EXACT[0][0], EXACT[3][0]], repeat=2):
        resolution = tuple(resolved(a) for a in axes)
        check(list(axes), *choose_tiles(backend, resolution))


def test_tables_grow_with_the_axes_alone() -> None:
    grid = tuple(resolved(axis(n, 3, 3, 1, 1, False, "shift")) for n in (40, 56))
    plan = neighborhood_plan(grid, True, (4, 8), (8, 8))
    assert len(plan.axes) == 1 + 2 * (40 + 56)
    assert plan.key_plan is not None
    assert plan.key_plan.axes.data_ptr() == plan.axes.data_ptr()


def test_places_of_more_than_30_bits_are_refused() -> None:
    grid = tuple(resolved(axis(2**11, 1, 1, 1, 1, False, "shift")) for _ in range(3))
    with pytest.raises(NotImplementedError, match="2048 x 2048 x 2048 tokens needs more than 30 bits"):
        neighborhood_plan(grid, False, (1, 1, 1), (1, 1, 1))


@pytest.mark.skipif(_backends._C is None, reason=f"cpu: {_backends.have_cpu('cpu')}")
def test_visible_of_cpp_is_that_of_python() -> None:
    width, fields = 3, (0, 4)  # two fields of three bits, a guard bit above each
    guard = sum(1 << (f + width) for f in fields)
    values = [0, 1, 3, 6, 7]
    for first, last, place in itertools.product(itertools.product(values, repeat=2), repeat=3):
        packed = tuple(sum(x << f for x, f in zip(pair, fields)) for pair in (first, last, place))
        expected = all(lo <= x <= hi for lo, x, hi in zip(first, place, last))
        assert pattern.visible(packed[0], packed[1], packed[2], guard) == expected
        assert _backends._C.visible(*packed, guard) == expected
