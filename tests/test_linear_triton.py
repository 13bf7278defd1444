"""The Triton kernels of linear attention without a GPU: the interpreter's results, what the compiler makes of
every tile of the table, and what torch.compile and explain see."""

from __future__ import annotations

import os
import re
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
import triton_compile_linear as linear_offline
from test_triton_compile import check
from torch._subclasses.fake_tensor import FakeTensorMode

from vicinal import _backends, explain, linear_attention
from vicinal.kernels import linear_kernels, linear_sums, tiles

INTERPRETED = Path(__file__).with_name("linear_interpreted.py")


def run_interpreted(select: str) -> None:
    words = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", select]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [*words, str(INTERPRETED)],
        env=environment,
        cwd=INTERPRETED.parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.parametrize(
    "select", ["quick_float32", "quick_float16 or quick_float64 or one_token or scan or mix"]
)
def test_kernels_quick(select: str) -> None:
    run_interpreted(select)


@pytest.mark.slow
@pytest.mark.parametrize("select", ["more", "long or wide", "ops"])
def test_kernels_on_more_problems(select: str) -> None:
    run_interpreted(select)


def test_half_within_budgets() -> None:
    check(linear_offline.measure("half", [90]))


@pytest.mark.slow
@pytest.mark.parametrize("arch", offline.ARCHS)
@pytest.mark.parametrize("dtype_class", tiles.LINEAR)
def test_all_within_budgets(dtype_class: str, arch: int) -> None:
    check(linear_offline.measure(dtype_class, [arch]))


def test_little_spills_and_small_cards_suffice() -> None:
    """At most 64 bytes of stack but on sm_100, whose compiler keeps less in registers; and within the 99 KB
    of shared memory that consumer cards give a program."""
    found = linear_offline.budgets()
    assert len(found) == len(linear_offline.KERNELS) * len(tiles.LINEAR) * len(offline.ARCHS)
    for name, values in found.items():
        assert values["stack"] <= (384 if name.endswith("sm_100") else 64), name
        assert values["shared"] <= 99 << 10, name


def test_no_result_is_a_left_operand() -> None:
    """Triton 3.4 to 3.7.0 miscompiles one on Hopper; see linear_kernels."""
    for module in (linear_kernels, linear_sums):
        text = Path(module.__file__).read_text()
        results = set(re.findall(r"(\w+) \+?= tl\.dot\(", text))
        left = set(re.findall(r"tl\.dot\((?:as_operand\()?(?:tl\.trans\()?(\w+)", text))
        assert left
        assert not left & results, left & results


def gpu_call(dtype: torch.dtype = torch.bfloat16, **options: Any) -> Any:
    q = torch.empty(2, 100, 2, 16, device="cuda", dtype=dtype)
    return (q, q, q), {"backend": "triton", **options}


def test_fake_tensors_on_a_gpu() -> None:
    """What torch.compile traces of the ops (autograd itself wants a real device)."""
    with FakeTensorMode():
        (q, k, v), _ = gpu_call()
        options = ("elu1", 0.0, "elu1", 0.0, "causal", 0, 0, True, 1.0, 1e-6, 0.0)
        tensors = (q, k, v, *[None] * 7)
        outputs = torch.ops.vicinal.linear_fwd.triton(*tensors, *options)
        out, den, s, _ = outputs
        assert out.shape == v.shape
        assert out.device.type == "cuda"
        assert den.shape == (2, 2, 100)
        assert s.dtype == torch.float32
        grads = torch.ops.vicinal.linear_bwd.triton(v, None, None, None, *outputs, *tensors, *options, False)
        assert all(g.shape == x.shape and g.dtype == x.dtype for g, x in zip(grads, (q, k, v)))


def test_explain_names_triton_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    with FakeTensorMode():
        given, options = gpu_call(is_causal=True)
        found = explain(linear_attention, *given, **options)
        assert found.backend == "triton"
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
        with pytest.raises(NotImplementedError, match="sm_75 is below sm_80"):
            explain(linear_attention, *given, **options)
        decay = torch.empty(2, 100, 2, 16, device="cuda")
        with pytest.raises(NotImplementedError, match="decay per channel is missing"):
            linear_attention(*given, is_causal=True, decay=decay, backend="triton")


def test_the_row_refuses_cpu_tensors_and_names_the_interpreter() -> None:
    (row,) = (r for r in _backends.rows("linear") if r.backend == "triton")
    problem = _backends.Problem("linear", "cpu", torch.bfloat16, 8, 8)
    reasons = _backends.reasons(row, problem)
    assert any("TRITON_INTERPRET" in r for r in reasons)
    assert "bfloat16 on cpu would give wrong numbers" in reasons
