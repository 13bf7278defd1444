"""The CUDA kernels of linear attention on the emulator."""

from __future__ import annotations

import pytest
import torch
from linear_problems import BY_NAME, PROBLEMS, Problem, compare, exact, make, plain_errors, solve

from .conftest import HostBuild
from .emulated import Emulation
from .emulated_linear import DTYPES, emulated
from .test_attend import SCHEDULES


def emulate(
    problem: Problem, dtype: torch.dtype, build: HostBuild, flavor: str, schedule: str
) -> Emulation:
    """Checks outputs and all gradients by the rule of linear_problems.py."""
    tensors = make(problem, dtype)
    truth = exact(problem, tensors)
    plain = plain_errors(problem, tensors, truth)
    order, copies, seed = SCHEDULES[schedule]
    with emulated(build, flavor, order=order, copies=copies, seed=seed) as emulation:
        assert not compare(solve(problem, tensors, "emulated"), truth, plain, dtype)
    return emulation


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_problem(problem: Problem, host_build: HostBuild) -> None:
    """Types and schedules take turns."""
    turn = PROBLEMS.index(problem)
    dtype, schedule = DTYPES[turn % 3], list(SCHEDULES)[turn % 5]
    assert emulate(problem, dtype, host_build, "plain", schedule).conflicts == 0
