"""What the compiler makes of the Triton kernels of linear attention, without a GPU (see triton_compile.py).

python tests/triton_compile_linear.py [half|tf32|fp32|fp64 ..]     # rewrites their lines of the budgets
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton_compile as offline

from vicinal._linear_op import LinearCall, LinearGrads, _fake_backward, _fake_forward, _results
from vicinal.kernels import launch, linear, linear_step, tiles

DIM = 64
DTYPES = {"half": torch.bfloat16, "tf32": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
KERNELS = (
    "linear_decay_kernel", "linear_state_kernel", "linear_state_kernel+keys", "linear_scan_kernel",
    "linear_values_kernel", "linear_values_kernel+keys", "linear_inner_kernel", "linear_features_kernel",
    "linear_features_kernel+keys", "linear_bwd_decay_kernel", "linear_step_kernel",
)  # fmt: skip


def problem(
    dtype: torch.dtype, mask: str = "causal", decay: str = "step"
) -> tuple[LinearCall, Any, LinearGrads]:
    """Two samples of two heads and 1,000 tokens, normalised, all zero."""
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    q, k, v = (torch.zeros(2, 1000, 2, DIM, dtype=dtype) for _ in range(3))
    decays = {"": None, "head": torch.zeros(2, dtype=acc), "step": torch.zeros(2, 1000, 2, dtype=acc)}
    options: tuple[Any, ...] = ("elu1", 0.0, "elu1", 0.0, mask, 0, 0, True, 1.0, 1e-6, 0.0)
    tensors: tuple[Any, ...] = (q, k, v, None, None, decays[decay], None, None, None, None)
    outputs = _fake_forward(tensors, options)
    call, results = LinearCall(*tensors, *options), _results(outputs, True)
    dq, dk, dv, *_ = _fake_backward(outputs, tensors, options, False)
    ddecay = None if decays[decay] is None else torch.zeros(2, 1000, 2, dtype=acc)
    states = (results.final_s.clone(), results.final_z.clone())  # type: ignore[union-attr]
    return call, results, LinearGrads(v.clone(), *states, dq, dk, dv, None, None, ddecay, None, None)


def launches(dtype: torch.dtype, mask: str = "causal", decay: str = "step") -> list[Any]:
    """(name, kernel, arguments, options) of forward, backward and a step."""
    found: list[Any] = []

    def record(kernel: Any, grid: tuple[int, ...], args: dict[str, Any], warps: int, stages: int = 1) -> None:
        name = kernel.fn.__name__ + ("+keys" if args.get("KEYS") else "")
        found.append((name, kernel, args, {"num_warps": warps, "num_stages": stages}))

    call, results, grads = problem(dtype, mask, decay)
    original, launch.run = launch.run, record
    try:
        linear.forward(call, results)
        linear.backward(call, results, grads)
        call.q, call.k, call.v = (x[:, :1] for x in (call.q, call.k, call.v))
        results.out = results.out[:, :1]
        linear_step.step(call, results)
    finally:
        launch.run = original
    return found


def configurations(dtype_class: str) -> Iterator[tuple[str, Any, dict[str, Any], dict[str, int]]]:
    """Every kernel once, with its most demanding options."""
    seen = set()
    for name, kernel, args, options in launches(DTYPES[dtype_class]):
        if name not in seen:
            seen.add(name)
            yield f"{name} {dtype_class} {DIM}", kernel, args, options


def measure(dtype_class: str, archs: Sequence[int] = offline.ARCHS) -> dict[str, dict[str, int]]:
    return {
        f"{name} sm_{arch}": offline.resources(offline.compile_launch(kernel, args, options, arch))
        for name, kernel, args, options in configurations(dtype_class)
        for arch in archs
    }


def budgets() -> dict[str, dict[str, int]]:
    """The committed lines of these kernels."""
    found = json.loads(offline.BUDGETS.read_text())["configurations"]
    return {name: values for name, values in found.items() if name.startswith("linear_")}


if __name__ == "__main__":
    for dtype_class in sys.argv[1:] or tiles.LINEAR:
        offline.merge_budgets(measure(dtype_class))
