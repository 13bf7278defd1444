"""Attention of parts against its accelerated form."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models_support import CountOps, assert_same, double, gradients, redraw
from torch import Tensor, nn

import vicinal
from vicinal.models import PartAttention


class With(nn.Module):
    """A layer with its other arguments."""

    def __init__(self, layer: nn.Module, *more: Any) -> None:
        super().__init__()
        self.layer, self.more = layer, more

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, *self.more)


CASES: dict[str, tuple[Callable[[], With], tuple[int, ...]]] = {
    "parts": (lambda: With(PartAttention(32, 4, across=False), (2, 3)), (5, 11, 32)),
    "objects": (lambda: With(PartAttention(32, 4, across=True), (1, 3, 2)), (6, 11, 32)),
}


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_every_gradient(name: str) -> None:
    torch.manual_seed(0)
    model, x = redraw(CASES[name][0]()), torch.randn(CASES[name][1])
    expected = gradients(double(model), x.double())
    fast = copy.deepcopy(model)
    assert [row.name for row in vicinal.accelerate(fast).replaced] == ["layer"]
    with CountOps() as counter:
        actual = gradients(fast, x)
    assert_same(actual, expected, 1e-5)
    assert_same(gradients(double(fast), x.double()), expected, 1e-11)
    groups = vicinal.segments.from_lengths(torch.tensor([4]))
    explanation = vicinal.explain(vicinal.voxel.voxel_attention, *torch.zeros(3, 4, 2, 8).unbind(0), groups)
    if explanation.backend != "reference":
        assert sum(counter.calls.values()) == 2
    fast.load_state_dict(model.state_dict(), strict=True)
    vicinal.restore(fast)
    assert torch.equal(fast(x), model(x))


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match=r"parts is \(1, 2\), together 3; x has 4 parts"):
        PartAttention(8, 2, across=True)(torch.randn(4, 3, 8), (1, 2))
    with pytest.raises(ValueError, match="dim is 9, which num_heads = 2 does not divide"):
        PartAttention(9, 2, across=True)
