"""The Triton kernels in Triton's interpreter, against float64. Run by test_triton_interpreter.py in processes
of their own: TRITON_INTERPRET=1 must be set before triton is imported, and the compile-only tests need it
unset.

bfloat16 is left out: the interpreter's arithmetic on it is wrong.
"""

from __future__ import annotations

import pytest
import torch
from problems import BY_NAME, PROBLEMS, Problem, violations

from vicinal import Windows

QUICK = (
    "2d-shift-overhang", "3d-overhang", "one-token-window", "grid-overhang", "overlap-overhang", "pooled-2d",
    "edge-const-extra", "bias-dense", "padding-float", "mask-extra", "cosine-const", "relu2-padding-extra",
    "none", "dropout-extra", "qkvpacked-stripes", "crop-3d", "dim-1-5",
)  # fmt: skip
TILED = Problem(
    "tiled-everything", (11, 14), Windows((10, 9), shift=(4, 5), edge="const"), batch=1, dim=5, dim_v=3,
    bias="q-k", edge_k=True, edge_v=True, extra=5, extra_bias=True, padding="float", mask="windows",
    dropout_p=0.3,
)  # fmt: skip
TILED_RELU2 = Problem(
    "tiled-relu2", (130,), Windows(130), batch=1, heads=1, dim=5, bias="q-k", activation="relu2"
)


def check(problem: Problem, dtype: torch.dtype) -> None:
    assert not violations(problem, dtype, "triton")


@pytest.mark.parametrize("problem", [*(BY_NAME[name] for name in QUICK), TILED, TILED_RELU2], ids=str)
def test_quick_float32(problem: Problem) -> None:
    check(problem, torch.float32)


@pytest.mark.parametrize("problem", [*(BY_NAME[name] for name in QUICK[:4]), TILED], ids=str)
def test_quick_float16(problem: Problem) -> None:
    check(problem, torch.float16)


@pytest.mark.parametrize("problem", [*(BY_NAME[name] for name in QUICK[6:8]), TILED, TILED_RELU2], ids=str)
def test_quick_float64(problem: Problem) -> None:
    check(problem, torch.float64)


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_every_problem(problem: Problem, dtype: torch.dtype) -> None:
    check(problem, dtype)
