"""The CUDA attend kernels on the emulator with neighborhoods: the problems of all backends, and those that
tiles, tables and key plans make hard."""

from __future__ import annotations

import neighborhood_solutions as solutions
import pytest
import torch
from neighborhood_problems import BY_NAME, PROBLEMS, Problem
from rule import compare

from vicinal import Neighborhood

from .conftest import HostBuild
from .emulated import Emulation, emulated
from .test_attend import DTYPES, SCHEDULES

N = Neighborhood
TILES = (
    Problem("tiles-2d", (19, 21), N(7), dim=32, heads=1, batch=1, bias=True),
    Problem("tiles-dilated", (20, 18), N((5, 3), dilation=(2, 3)), dim=20, dim_v=33, batch=1, bias=True),
    Problem("tiles-long", (150,), N((70, 30), border="truncate"), dim=64, batch=1, bias=True, extra=3),
    Problem("tiles-grouped", (90,), N(40), heads=6, kv_heads=2, batch=1, extra=20, dropout_p=0.3),
    Problem("tiles-wide", (60,), N(33), heads=2, kv_heads=1, dim=130, dim_v=200, batch=1, bias=True),
    Problem("tiles-odd", (9, 11), N(5), dim=53, dim_v=21, bias=True, layout="crop", padding="bool"),
    Problem("tiles-3d", (6, 7, 9), N((3, 4, 5)), dim=16, heads=2, kv_heads=1, batch=1, bias=True, extra=1),
    Problem("tiles-large-table", (10, 9, 9), N((9, 7, 7)), dim=16, heads=1, batch=1, bias=True),
)
NAMED = BY_NAME | {p.name: p for p in TILES}
HARD = (
    *(p.name for p in TILES), "2d-strips", "3d-dilated", "2d-stride", "grouped-one", "extra-grouped",
    "more-keys-unread", "more-keys-dilated", "padding-sample-extra", "dropout-grouped", "crop",
)  # fmt: skip


def emulate(
    problem: Problem, dtype: torch.dtype, build: HostBuild, flavor: str, schedule: str, shared: int = 227
) -> Emulation:
    """Checks the outputs and all gradients by the one rule of rule.py; `shared`: KiB of a block."""
    tensors = solutions.make(problem, dtype)
    truth = solutions.exact(problem, tensors)
    errors = solutions.dense_errors(problem, tensors, truth)
    order, copies, seed = SCHEDULES[schedule]
    with emulated(
        build, flavor, order=order, copies=copies, seed=seed, shared_memory=shared * 1024
    ) as emulation:
        assert not compare(solutions.solve(problem, tensors, "emulated"), truth, errors, dtype)
    return emulation


@pytest.mark.parametrize("problem", [*PROBLEMS, *TILES], ids=str)
def test_problem(problem: Problem, host_build: HostBuild) -> None:
    """Types and schedules take turns."""
    turn = (*PROBLEMS, *TILES).index(problem)
    dtype, schedule = DTYPES[turn % 3], list(SCHEDULES)[turn % 5]
    assert emulate(problem, dtype, host_build, "plain", schedule).conflicts == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", TILES, ids=str)
def test_little_shared_memory(problem: Problem, dtype: torch.dtype, host_build: HostBuild) -> None:
    """Smaller tiles, one buffer, tables of the bias gradient outside shared memory."""
    limit = {2: 56, 4: 99}[dtype.itemsize]
    used = emulate(problem, dtype, host_build, "plain", "reverse_lazy", limit)
    assert used.largest_block <= limit * 1024


@pytest.mark.parametrize("name", ["tiles-2d", "tiles-grouped", "tiles-3d", "tiles-large-table"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_results_do_not_depend_on_the_schedule(name: str, dtype: torch.dtype, host_build: HostBuild) -> None:
    results = []
    for order, copies, seed in SCHEDULES.values():
        with emulated(host_build, "plain", order=order, copies=copies, seed=seed):
            results.append(solutions.solve(NAMED[name], solutions.make(NAMED[name], dtype), "emulated"))
    for result in results[1:]:
        assert all(torch.equal(result[n], x) for n, x in results[0].items())


@pytest.mark.slow
@pytest.mark.parametrize("name", HARD)
def test_address_sanitizer(name: str, host_build: HostBuild) -> None:
    emulate(NAMED[name], DTYPES[HARD.index(name) % 3], host_build, "asan", "forward_eager")


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["forward_eager", "random_1"])
@pytest.mark.parametrize("name", HARD[:7])
def test_race_detector(name: str, schedule: str, host_build: HostBuild) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        emulate(NAMED[name], dtype, host_build, "tsan", schedule)
