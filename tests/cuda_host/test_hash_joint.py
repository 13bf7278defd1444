"""The CUDA kernels of hash and joint attention on the emulator."""

from __future__ import annotations

import hash_problems
import joint_problems
import pytest
import torch

from .conftest import HostBuild
from .emulated import Emulation
from .emulated_hash_joint import emulated
from .test_attend import SCHEDULES

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HASHES = (
    *("ecoformer-stage3", "self", "offset-self", "one-token", "tokens-513", "bits-1", "bits-8", "one-anchor"),
    *("anchors-64", "dim-1-1", "dim-17-5", "dim-64-40", "heads-first", "channels"),
    *("shared-tables", "zero-tokens"),
)  # fmt: skip
JOINTS = (
    *("plain", "gate", "without-u", "no-linear-part", "short-group", "group-above-n", "whole"),
    *("group-1", "causal"),
    *("causal-gate", "causal-long-group", "mask-gate", "mask-sample", "laplace-mask-causal", "bias-laplace"),
    *("bias-causal", "dropout-causal-gate", "dropout-laplace", "chunks", "dim-1", "dim-17-53", "dim-32-130"),
    *("dim-64-7", "wide-without-u"),
)  # fmt: skip
CASES = [*(("hash", name) for name in HASHES), *(("joint", name) for name in JOINTS)]
HARD = (
    ("hash", "dim-17-5"),
    ("hash", "self"),
    ("joint", "dim-17-53"),
    ("joint", "bias-laplace"),
    ("joint", "causal-gate"),
)


def emulate(
    family: str, name: str, dtype: torch.dtype, build: HostBuild, flavor: str, schedule: str
) -> Emulation:
    order, copies, seed = SCHEDULES[schedule]
    with emulated(family, build, flavor, order=order, copies=copies, seed=seed) as emulation:
        if family == "hash":
            assert hash_problems.violations(hash_problems.BY_NAME[name], dtype, "emulated") == []
        else:
            assert joint_problems.violations(joint_problems.BY_NAME[name], dtype, "emulated") == []
    return emulation


@pytest.mark.parametrize(("family", "name"), CASES)
def test_problem(family: str, name: str, host_build: HostBuild) -> None:
    """Types and schedules take turns."""
    turn = CASES.index((family, name))
    dtype, schedule = DTYPES[turn % 3], list(SCHEDULES)[turn % 5]
    found = emulate(family, name, dtype, host_build, "plain", schedule)
    assert found.conflicts == 0
    assert found.largest_block <= 99 * 1024


@pytest.mark.slow
@pytest.mark.parametrize(("family", "name"), HARD)
def test_address_sanitizer(family: str, name: str, host_build: HostBuild) -> None:
    emulate(family, name, DTYPES[HARD.index((family, name)) % 3], host_build, "asan", "forward_eager")


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["forward_eager", "random_1"])
@pytest.mark.parametrize(("family", "name"), HARD)
def test_race_detector(family: str, name: str, schedule: str, host_build: HostBuild) -> None:
    emulate(family, name, torch.bfloat16, host_build, "tsan", schedule)
