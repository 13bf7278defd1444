"""The Triton kernels of joint and hash attention without a GPU: the interpreter's results, compilation."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("nothing is compiled under TRITON_INTERPRET=1", allow_module_level=True)

import triton_compile as offline

from vicinal._hash_op import _fake_forward as hash_outputs
from vicinal._joint_op import Options
from vicinal._joint_op import _fake_forward as joint_outputs
from vicinal.kernels import hash as hash_launch
from vicinal.kernels import joint as joint_launch
from vicinal.kernels import launch

INTERPRETED = Path(__file__).with_name("joint_interpreted.py")
DTYPES = {"half": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes of a program


def run_interpreted(select: str) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-k",
        select,
        str(INTERPRETED),
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    where = INTERPRETED.parent.parent
    done = subprocess.run(command, env=environment, cwd=where, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def test_kernels_quick() -> None:
    run_interpreted("quick")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["joint", "hash"])
def test_kernels_on_every_problem(family: str) -> None:
    run_interpreted(f"every_{family}")


def recorded(run: Any) -> list[tuple[Any, dict[str, Any], dict[str, int]]]:
    """What `run` launches: (kernel, arguments, options)."""
    found: list[Any] = []

    def record(kernel: Any, grid: tuple[int, ...], args: dict[str, Any], warps: int, stages: int = 1) -> None:
        found.append((kernel, args, {"num_warps": warps, "num_stages": stages}))

    original, launch.run = launch.run, record
    try:
        run()
    finally:
        launch.run = original
    return found


def joint_launches(dtype: torch.dtype, every: bool) -> list[Any]:
    """Forward and backward of MossFormer's sizes; with `every` option on."""
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    qk = [torch.zeros(2, 300, 128, dtype=dtype) for _ in range(4)]
    v, u = torch.zeros(2, 300, 256, dtype=dtype).chunk(2, -1)
    bias, ignored = torch.zeros(256, 256, dtype=acc), torch.zeros(2, 300, dtype=torch.bool)
    tensors = [*qk, v, u, bias if every else None, ignored if every else None, None]
    given = (256, every, "laplace" if every else "relu2", 1 / 256, 1 / 300, 0.0, True, True)
    outputs = joint_outputs(tensors, given)
    grads = (torch.zeros_like(v), None)
    results = [torch.empty_like(x) for x in (*qk, v, u, bias)]

    def run() -> None:
        joint_launch.forward(tensors, Options(*given), outputs)
        joint_launch.backward(grads, outputs[2:], tensors, Options(*given), results)

    return recorded(run)


def hash_launches(dtype: torch.dtype, itself: bool) -> list[Any]:
    """Forward and backward of EcoFormer's sizes."""
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    qk, v = torch.zeros(2, 2, 196, 5, 32, dtype=dtype).unbind(0)
    tables = (
        torch.zeros(5, 25, 32, dtype=acc),
        torch.zeros(5, 16, 25, dtype=acc),
        torch.zeros(5, 25, dtype=acc),
    )
    tensors, options = (qk, v, *tables), (itself, 17.0)
    outputs = hash_outputs(tensors, options)

    def run() -> None:
        hash_launch.forward(tensors, options, outputs)
        hash_launch.backward(v, outputs[1:], tensors, options, (qk, v))

    return recorded(run)


def configurations() -> list[Any]:
    """Family, every option or few, dtype class, architecture; all but one are slow."""
    found = []
    for family in ("hash", "joint"):
        for every in (False, True):
            for kind in DTYPES if family == "hash" else ("half", "fp32"):
                for arch in offline.ARCHS:
                    quick = (family, every, kind, arch) == ("hash", True, "half", 90)
                    found.append(
                        pytest.param(family, every, kind, arch, marks=[] if quick else pytest.mark.slow)
                    )
    return found


@pytest.mark.parametrize(("family", "every", "dtype_class", "arch"), configurations())
def test_every_kernel_compiles(family: str, every: bool, dtype_class: str, arch: int) -> None:
    """For each architecture, within its shared memory."""
    record, kernels = (joint_launches, 5) if family == "joint" else (hash_launches, 6)
    launched = record(DTYPES[dtype_class], every)
    assert len({kernel.fn.__name__ for kernel, *_ in launched}) == kernels
    for kernel, args, options in launched:
        found = offline.resources(offline.compile_launch(kernel, args, options, arch))
        assert found["shared"] <= SHARED[arch], f"{kernel.fn.__name__}: {found}"
