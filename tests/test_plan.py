"""Plans against the reference's grids of token ids, and the pairwise facts of Python, C++ and Triton against
each other."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vicinal import Windows, _backends, pattern, reference
from vicinal._windowed_run import prepare
from vicinal.plan import (
    MAX_TOKENS,
    PAD,
    ROW_KEY_PADS,
    ROW_QUERY_PADS,
    ROW_REGIONS,
    AxisWindows,
    Plan,
    bias_size,
    box_tokens,
    copied_keys,
    readers,
    window_plan,
)

PADS = (("pad_roll", "end"), ("pad_roll", "center"), ("roll_pad", "end"))


def axis(length: int, window: int, shift: int = 0, kv: int = 0) -> AxisWindows:
    return AxisWindows(length, window, shift, kv, length, window)


def fields(plan: Plan, field: int, keys: bool) -> Tensor:
    """int64 [R, slots]: the sum of one field of the axis entries of every slot, slot by slot."""
    axes, base, rows = plan.axes.tolist(), 6 if keys else 0, []
    for row in plan.rows.tolist():
        begin, extent = row[base : base + 3], row[base + 3 : base + 6]
        slots = itertools.product(*[range(b, b + e) for b, e in zip(begin, extent)])
        rows.append([sum(axes[entry][field] for entry in slot) for slot in slots])
    return torch.tensor(rows)


def ids(axes: Sequence[AxisWindows], partition: str, order: str, side: str) -> Tensor:
    lengths, windows, shifts = [a.length for a in axes], [a.window for a in axes], [a.shift for a in axes]
    return reference.window_ids(lengths, windows, shifts, partition, order, side)


def check_blocks(axes: tuple[AxisWindows, ...], order: str, side: str) -> None:
    plan = window_plan(axes, "none", "block", order, side)
    expected = ids(axes, "block", order, side)
    assert torch.equal(box_tokens(plan), expected), (axes, order, side)
    assert torch.equal(box_tokens(plan, keys=True), expected)
    labels = reference.region_ids([a.length for a in axes], [a.window for a in axes], [a.shift for a in axes])
    bits = fields(plan, 1, True)
    assert torch.equal(bits[:, :, None] != bits[:, None], labels[:, :, None] != labels[:, None])
    assert torch.equal(bits, fields(plan, 1, False))
    for flags, row, pads in zip(plan.rows[:, 12].tolist(), bits, expected < 0):
        assert bool(flags & ROW_REGIONS) == (len(row.unique()) > 1)
        assert bool(flags & ROW_KEY_PADS) == bool(flags & ROW_QUERY_PADS) == bool(pads.any())


def small_axes(longest: int) -> Iterator[AxisWindows]:
    for length in range(1, longest + 1):
        for window in range(1, length + 3):
            for shift in range(window):
                yield axis(length, window, shift)


@pytest.mark.parametrize(("order", "side"), PADS)
def test_blocks_of_every_small_axis(order: str, side: str) -> None:
    for one in small_axes(9):
        check_blocks((one,), order, side)


@pytest.mark.parametrize(("order", "side"), PADS)
def test_blocks_in_two_and_three_dimensions(order: str, side: str) -> None:
    some = [axis(5, 2, 1), axis(4, 4, 0), axis(7, 3, 2), axis(1, 2, 1), axis(6, 3, 0), axis(2, 3, 2)]
    for axes in itertools.product(some, repeat=2):
        check_blocks(axes, order, side)
    for axes3 in itertools.product(some[:1] + some[2:5], repeat=3):
        check_blocks(axes3, order, side)


@pytest.mark.parametrize("side", ["end", "center"])
def test_grid_groups(side: str) -> None:
    some = [axis(n, w) for n in range(1, 8) for w in range(1, n + 2)]
    for axes in [(a,) for a in some] + list(itertools.product(some[::5], repeat=2)):
        plan = window_plan(axes, "none", "grid", "pad_roll", side)
        expected = ids(axes, "grid", "pad_roll", side)
        assert torch.equal(box_tokens(plan), expected)
        assert torch.equal(box_tokens(plan, keys=True), expected)
        assert not plan.flags & ROW_REGIONS


def overlapping() -> Iterator[tuple[AxisWindows, ...]]:
    some = [axis(n, w, 0, o) for n in range(1, 8) for w in range(1, n + 2) for o in range(w, w + 4)]
    yield from ((a,) for a in some)
    yield from itertools.product(some[::13], repeat=2)
    yield from itertools.product(some[::50], repeat=3)


def test_overlapping_key_windows() -> None:
    for axes in overlapping():
        plan = window_plan(axes)
        lengths, windows, kv = zip(*[(a.length, a.window, a.kv) for a in axes])
        expected = reference.overlapping_ids(lengths, windows, kv)
        assert torch.equal(box_tokens(plan, keys=True), expected)
        assert torch.equal(box_tokens(plan), ids(axes, "block", "pad_roll", "end"))
        assert plan.overlap


def test_the_readers_of_a_key_are_its_slots() -> None:
    for axes in overlapping():
        plan = window_plan(axes)
        slots, table = box_tokens(plan, keys=True).flatten().tolist(), readers(plan).tolist()
        assert len(table) == prod(a.length for a in axes)
        for token, row in enumerate(table):
            expected = [slot for slot, held in enumerate(slots) if held == token]
            assert row == expected + [-1] * (len(row) - len(expected))


def test_copied_keys_are_read_once_and_lie_where_their_slot_says() -> None:
    for axes in overlapping():
        plan = window_plan(axes, "k-q")
        copy = copied_keys(plan)
        pads = box_tokens(plan, keys=True).flatten() < 0
        own = torch.arange(plan.n_rows * plan.k_slots)
        assert torch.equal(box_tokens(copy, keys=True).flatten(), own.masked_fill(pads, -1))
        assert torch.equal(box_tokens(copy), box_tokens(plan))
        assert torch.equal(fields(copy, 2, True), fields(plan, 2, True))
        assert torch.equal(copy.rows[:, 12], plan.rows[:, 12])
        assert not copy.overlap
        assert copy.n_k == plan.n_rows * plan.k_slots


def test_every_token_is_in_one_row() -> None:
    for axes in ((axis(7, 3, 2), axis(5, 4, 1)), (axis(3, 2, 1), axis(4, 3, 0), axis(5, 7, 3))):
        plan = window_plan(axes)
        for keys in (False, True):
            tokens = box_tokens(plan, keys).flatten()
            assert torch.equal(tokens[tokens >= 0].sort().values, torch.arange(plan.n_k))


def test_pooled_queries_have_their_own_grid() -> None:
    axes = (AxisWindows(7, 4, 0, 0, 4, 2), AxisWindows(6, 3, 0, 0, 2, 1))
    plan = window_plan(axes)
    assert torch.equal(
        box_tokens(plan), reference.window_ids((4, 2), (2, 1), (0, 0), "block", "pad_roll", "end")
    )
    assert torch.equal(
        box_tokens(plan, keys=True), reference.window_ids((7, 6), (4, 3), (0, 0), "block", "pad_roll", "end")
    )
    assert plan.flags & ROW_KEY_PADS
    assert not plan.flags & ROW_QUERY_PADS


WINDOW_PAIRS = [
    ((3,), (3,)),
    ((2,), (5,)),
    ((2, 3), (2, 3)),
    ((4, 3), (6, 5)),
    ((1, 2, 3), (2, 3, 3)),
    ((2, 2, 2), (2, 2, 2)),
]


@pytest.mark.parametrize("kind", ["q-k", "k-q", "dense"])
@pytest.mark.parametrize(("q_window", "k_window"), WINDOW_PAIRS, ids=str)
def test_codes_add_up_to_the_index_of_the_reference(
    q_window: tuple[int, ...], k_window: tuple[int, ...], kind: str
) -> None:
    axes = tuple(AxisWindows(m, m, 0, 0, n, n) for n, m in zip(q_window, k_window))
    plan = window_plan(axes, kind)
    got = pattern.bias_index(fields(plan, 2, False)[0][:, None], fields(plan, 2, True)[0])
    n, m = prod(q_window), prod(k_window)
    if kind == "dense":
        expected = torch.arange(n * m).view(n, m)
    else:
        expected = reference.relative_index(q_window, k_window, kind)
    assert torch.equal(got, expected)
    assert bias_size(axes, kind) == expected.max() + 1
    assert expected.min() == 0


def test_a_slot_with_pads_is_negative_on_any_number_of_axes() -> None:
    largest = MAX_TOKENS - 1  # token
    for pads in (1, 2, 3):
        assert pads * PAD >= -(2**31)  # no overflow
        assert pads * PAD + largest < 0  # the other axes add less than the number of tokens
    plan = window_plan((axis(1, 3, 1), axis(1, 2), axis(1, 4, 2)))
    tokens = fields(plan, 0, True)
    assert int((tokens >= 0).sum()) == 1
    assert int(tokens.min()) == 3 * PAD


def test_the_number_of_tokens_is_limited() -> None:
    def call(*space: int) -> None:
        q = torch.zeros(1).expand(1, *space, 1, 1)
        prepare(q, q, q, Windows(2), *[None] * 10, "softmax", 0.0)

    call(2**29 - 1)
    call(2**15, 2**14 - 1)
    with pytest.raises(ValueError, match=f"536870912 tokens; a sample may have {MAX_TOKENS}"):
        call(2**15, 2**14)


def test_pattern_of_python() -> None:
    codes = range(-3, 4)
    for a, b in itertools.product(codes, codes):
        assert pattern.bias_index(a, b) == a + b
        assert pattern.crosses(a, b) == (a != b)


@pytest.mark.skipif(_backends._C is None, reason=f"cpu: {_backends.have_cpu('cpu')}")
def test_pattern_of_cpp_is_that_of_python() -> None:
    codes = [*range(-9, 10), 2**29, -(2**29)]
    for a, b in itertools.product(codes, codes):
        assert _backends._C.bias_index(a, b) == pattern.bias_index(a, b)
        assert _backends._C.crosses(a, b) == pattern.crosses(a, b)


@pytest.mark.skipif(_backends._C is None, reason=f"cpu: {_backends.have_cpu('cpu')}")
def test_slots_of_cpp_are_those_of_python() -> None:
    axes = (axis(3, 2, 1), axis(5, 4, 1), axis(2, 3, 2))
    for plan in (
        window_plan(axes, "q-k"),
        window_plan(axes[1:], "k-q"),
        window_plan((axis(5, 4, 0, 6),), "dense"),
    ):
        expected = [[fields(plan, f, keys) for f in range(4)] for keys in (False, True)]
        for r, row in enumerate(plan.rows.tolist()):
            for keys, base in ((False, 0), (True, 6)):
                entries = _backends._C.slot_entries(
                    plan.axes.data_ptr(), row[base : base + 3], row[base + 3 : base + 6]
                )
                assert entries == [tuple(column) for column in zip(*[f[r].tolist() for f in expected[keys]])]


def test_pattern_of_triton_is_that_of_python() -> None:
    pytest.importorskip("triton")
    script = Path(__file__).with_name("triton_pattern.py")
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["equal", "361"]
