"""Flop formulas against pairs counted one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import vicinal.flops  # noqa: F401  (registers the formulas)
from vicinal import (
    Neighborhood,
    SegmentGroups,
    Windows,
    hash_attention,
    joint_attention,
    linear_attention,
    neighborhood_attention,
    segments,
    voxel_attention,
    windowed_attention,
)
from vicinal.plan import AxisWindows, box_tokens, window_plan

D, DV = 6, 5


def counted(run: Callable[[], Any]) -> tuple[int, int]:
    """Flops of the forward and of the backward."""
    with FlopCounterMode(display=False) as forward:
        out = run()
    out = out[0] if isinstance(out, tuple) else out
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    both = [
        sum(n for op, n in c.get_flop_counts()["Global"].items() if "vicinal" in str(op))
        for c in (forward, backward)
    ]
    return both[0], both[1]


def leaves(*shape: int, dv: int = DV) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(*shape, n) for n in (D, D, dv))
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def attend(pairs: int) -> tuple[int, int]:
    return 2 * pairs * (D + DV), 2 * pairs * (3 * D + 2 * DV)


def pairs_in_plan(axes: tuple[AxisWindows, ...]) -> int:
    plan = window_plan(axes)
    q, k = (box_tokens(plan, keys) >= 0 for keys in (False, True))
    return int((q.sum(1) * k.sum(1)).sum())


@pytest.mark.parametrize(
    ("space", "window", "shift"), [((8, 12), (4, 4), (0, 0)), ((9, 7), (4, 3), (2, 0)), ((11,), (5,), (3,))]
)
def test_windowed(space: tuple[int, ...], window: tuple[int, ...], shift: tuple[int, ...]) -> None:
    axes = tuple(AxisWindows(n, w, s, 0, n, w) for n, w, s in zip(space, window, shift))
    q, k, v = leaves(2, *space, 3)
    assert counted(lambda: windowed_attention(q, k, v, Windows(window, shift=shift))) == attend(
        6 * pairs_in_plan(axes)
    )


def test_windowed_stripes_edges_and_extra_keys() -> None:
    q, k, v = leaves(1, 5, 6, 3)
    stripes = Windows(None, head_groups=((1, (-1, 2)), (2, (1, -1))))
    assert counted(lambda: windowed_attention(q, k, v, stripes)) == attend(30 * 10 + 2 * 30 * 6)
    assert counted(lambda: windowed_attention(q, k, v, Windows(4, edge="zero"))) == attend(3 * 30 * 16)
    extra_k, extra_v = torch.randn(1, 7, 3, D), torch.randn(1, 7, 3, DV)
    run = lambda: windowed_attention(q, k, v, (5, 6), extra_k=extra_k, extra_v=extra_v)  # noqa: E731
    assert counted(run) == attend(3 * 30 * (30 + 7))


def test_neighborhood() -> None:
    q, k, v = leaves(2, 7, 9, 3)
    assert counted(lambda: neighborhood_attention(q, k, v, 3, dilation=2)) == attend(6 * 63 * 9)
    q, k, v = leaves(1, 10, 2)
    sliding = Neighborhood((2, 0), border="truncate")
    assert counted(lambda: neighborhood_attention(q, k, v, sliding)) == attend(2 * (1 + 2 + 8 * 3))
    assert counted(lambda: neighborhood_attention(q[:, 8:], k, v, sliding)) == attend(2 * 2 * 3)


def test_voxel() -> None:
    q, k, v = leaves(9, 3)
    a, b = segments.from_lengths(torch.tensor([4, 5])), segments.from_lengths(torch.tensor([1, 0, 8]))
    assert counted(lambda: voxel_attention(q, k, v, a)) == attend(3 * (16 + 25))
    assert counted(lambda: voxel_attention(q, k, v, SegmentGroups([(a, 1), (b, 2)]))) == attend(
        16 + 25 + 2 * 65
    )


def test_sums() -> None:
    q, k, v = leaves(2, 10, 3)
    state = 2 * 3 * 10 * (D * DV + D)
    assert counted(lambda: linear_attention(q, k, v)) == (2 * 2 * state, 4 * 2 * state)
    unnormalised = 2 * 3 * 10 * D * DV
    run = lambda: linear_attention(q, k, v, normalize=False, is_causal=True)  # noqa: E731
    assert counted(run) == (2 * 2 * unnormalised, 4 * 2 * unnormalised)
    a, c, w = (torch.randn(1, 10, n, requires_grad=True) for n in (D, D, 8))
    pairs, lin = 16 + 16 + 4, 2 * 10 * D * 8
    expected = (2 * (pairs * (D + 8) + lin), 2 * (pairs * (3 * D + 2 * 8) + 2 * lin))
    assert counted(lambda: joint_attention(a, a, c, c, w, group_size=4)) == expected
    qk, hv = torch.randn(1, 7, 2, D, requires_grad=True), torch.randn(1, 7, 2, DV, requires_grad=True)
    anchors, weight, mean = torch.randn(2, 25, D), torch.randn(2, 16, 25), torch.randn(2, 25)
    codes, sums = 14 * 25 * (D + 16), 2 * 14 * 16 * (DV + 1)
    found = counted(lambda: hash_attention(qk, hv, anchors, weight, mean))
    assert found == (2 * (codes + sums), 4 * (codes + sums))


def test_segments_that_are_not_known() -> None:
    """A fake tensor of rows has no numbers to count."""
    with FakeTensorMode(), FlopCounterMode(display=False):
        rows = torch.empty(2, 16, dtype=torch.int32)
        q = torch.empty(4, 1, D)
        table = torch.empty(3, 4, dtype=torch.int32)
        with pytest.raises(NotImplementedError, match="rows is a FakeTensor"):
            torch.ops.vicinal.voxel_fwd.cpu(
                q, q, q, None, table, rows, rows, table[:, 0], 1.0, [1, 2, 2, 0, 4, 4], False, False
            )
