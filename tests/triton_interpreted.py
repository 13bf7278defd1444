"""The Triton kernels in Triton's interpreter, against float64. Run by test_triton_interpreter.py in processes
of their own: TRITON_INTERPRET=1 must be set before triton is imported, and the compile-only tests need it
unset.

bfloat16 is left out: the interpreter's arithmetic on it is wrong.
"""

from __future__ import annotations

import neighborhood_problems as neighborhoods
import neighborhood_solutions as solutions
import pytest
import torch
import voxel_problems as voxels
import voxel_solutions
from problems import BY_NAME, PROBLEMS, Problem, violations
from rule import compare

from vicinal import Neighborhood, Windows

QUICK = (
    "2d-shift-overhang", "3d-overhang", "one-token-window", "grid-overhang", "overlap-overhang", "pooled-2d",
    "edge-const-extra", "bias-dense", "padding-float", "mask-extra", "cosine-const", "relu2-padding-extra",
    "none", "dropout-extra", "qkvpacked-stripes", "crop-3d", "dim-1-5",
    "rel-pos-zero-center",
)  # fmt: skip
TILED = Problem(
    "tiled-everything", (11, 14), Windows((10, 9), shift=(4, 5), edge="const"), batch=1, dim=5, dim_v=3,
    bias="q-k", edge_k=True, edge_v=True, extra=5, extra_bias=True, padding="float", mask="windows",
    dropout_p=0.3,
)  # fmt: skip
TILED_RELU2 = Problem(
    "tiled-relu2", (130,), Windows(130), batch=1, heads=1, dim=5, bias="q-k", activation="relu2"
)


NEIGHBORHOODS = (
    "1d-stride-dilated", "1d-long", "2d-rectangle", "2d-dilated", "3d", "3d-causal-time", "sliding-causal",
    "truncate-blocks-2d", "unlimited-stride", "more-keys-unread", "grouped-one", "extra-grouped",
    "padding-sample-extra", "dropout-grouped", "crop",
)  # fmt: skip
NEIGHBORHOOD_TILED = neighborhoods.Problem(
    "tiled-neighborhood", (150,), Neighborhood((70, 30), border="truncate"), batch=1, heads=4, kv_heads=2,
    dim=5, dim_v=3, bias=True, extra=3, dropout_p=0.3, padding="bool",
)  # fmt: skip


VOXELS = ("arrays", "ranges-free", "neighbours", "rope-small", "chunks-back", "context-small")


def check_voxels(problem: voxels.Problem, dtype: torch.dtype) -> None:
    tensors = voxel_solutions.make(problem, dtype)
    truth = voxel_solutions.exact(problem, tensors)
    errors = voxel_solutions.dense_errors(problem, tensors, truth)
    assert not compare(voxel_solutions.solve(problem, tensors, "triton"), truth, errors, dtype)


@pytest.mark.parametrize("problem", [voxels.BY_NAME[name] for name in VOXELS], ids=str)
def test_voxel_float32(problem: voxels.Problem) -> None:
    check_voxels(problem, torch.float32)


@pytest.mark.parametrize("problem", [voxels.BY_NAME[name] for name in VOXELS[:2]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=["float16", "float64"])
def test_voxel(problem: voxels.Problem, dtype: torch.dtype) -> None:
    check_voxels(problem, dtype)


def check(problem: Problem, dtype: torch.dtype) -> None:
    assert not violations(problem, dtype, "triton")


def check_neighborhood(problem: neighborhoods.Problem, dtype: torch.dtype) -> None:
    tensors = solutions.make(problem, dtype)
    truth = solutions.exact(problem, tensors)
    errors = solutions.dense_errors(problem, tensors, truth)
    assert not compare(solutions.solve(problem, tensors, "triton"), truth, errors, dtype)


@pytest.mark.parametrize(
    "problem", [*(neighborhoods.BY_NAME[name] for name in NEIGHBORHOODS), NEIGHBORHOOD_TILED], ids=str
)
def test_neighborhood_float32(problem: neighborhoods.Problem) -> None:
    check_neighborhood(problem, torch.float32)


@pytest.mark.parametrize(
    "problem", [*(neighborhoods.BY_NAME[name] for name in NEIGHBORHOODS[2:4]), NEIGHBORHOOD_TILED], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=["float16", "float64"])
def test_neighborhood(problem: neighborhoods.Problem, dtype: torch.dtype) -> None:
    check_neighborhood(problem, dtype)


@pytest.mark.parametrize("problem", neighborhoods.PROBLEMS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_all_neighborhoods(problem: neighborhoods.Problem, dtype: torch.dtype) -> None:
    check_neighborhood(problem, dtype)


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
