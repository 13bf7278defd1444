"""The Triton kernels against float64 without a GPU: runs triton_interpreted.py under Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
TESTS = Path(__file__).with_name("triton_interpreted.py")


def run_interpreted(select: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", select, str(TESTS)]
    done = subprocess.run(
        command,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=TESTS.parent.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
def test_kernels_quick(dtype: str) -> None:
    run_interpreted(f"quick and {dtype}")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
def test_neighborhoods(dtype: str) -> None:
    run_interpreted(f"test_neighborhood and {dtype}")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
def test_segments(dtype: str) -> None:
    run_interpreted(f"test_voxel and {dtype}")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("test", ["every_problem", "all_neighborhoods"])
def test_kernels_on_every_problem(test: str, dtype: str) -> None:
    run_interpreted(f"{test} and {dtype}")
