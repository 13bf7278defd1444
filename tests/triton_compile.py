"""What the compiler makes of the Triton kernels, without a GPU: registers, stack and shared memory per
configuration.

The launchers run on CPU tensors with `launch.run` replaced by a recorder, so the arguments, and with them the
specialisation, are those of a real launch; each recorded launch is then compiled for a named architecture
and its binary read with the cuobjdump that Triton ships.

    python tests/triton_compile.py [half|tf32|fp32|fp64 ..]     # rewrites tests/triton_budgets.json
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from vicinal._attend import AttendCall, AttendGrads
from vicinal._neighborhood_plan import AxisNeighborhood, neighborhood_plan
from vicinal.kernels import attend, launch, tiles
from vicinal.plan import AxisWindows, Plan, bias_size, window_plan

BUDGETS = Path(__file__).with_name("triton_budgets.json")
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
ARCHS = (80, 90, 100)
RANGED_DIM = 64  # of the launches with ranges whose resources are kept
DTYPES = {"half": torch.bfloat16, "tf32": torch.float32, "fp32": torch.float32, "fp64": torch.float64}


class OfflineDriver:
    """Names a target and nothing else: enough to specialise and compile, not to launch."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


def launches(
    call: AttendCall, grads: AttendGrads
) -> list[tuple[Any, tuple[int, ...], dict[str, Any], dict[str, int]]]:
    """What forward and backward of this call launch: (kernel, grid, arguments, options)."""
    recorded: list[Any] = []

    def record(kernel: Any, grid: tuple[int, ...], args: dict[str, Any], warps: int, stages: int = 1) -> None:
        recorded.append((kernel, grid, args, {"num_warps": warps, "num_stages": stages}))

    original, launch.run = launch.run, record
    try:
        attend.attend_fwd(call)
        attend.attend_bwd(call, grads)
    finally:
        launch.run = original
    return recorded


def compile_launch(kernel: Any, args: dict[str, Any], options: dict[str, int], arch: int) -> Any:
    driver.set_active(OfflineDriver(arch))
    try:
        return kernel.run(**args, **options, grid=(1,), warmup=True)
    finally:
        if torch.cuda.is_available():  # without a GPU there is no driver to go back to
            driver.reset_active()


def resources(binary: Any) -> dict[str, int]:
    """Registers per thread, stack bytes per thread (spills live there), shared bytes per program."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        )
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text.stdout))
    stack = int(found["STACK"]) + int(found["LOCAL"])
    return {"registers": int(found["REG"]), "stack": stack, "shared": binary.metadata.shared}


def shifted_problem(dtype: torch.dtype, dim: int, window: int) -> tuple[AttendCall, AttendGrads]:
    """Shifted windows with a trained table: what Swin's blocks run."""
    axes = (AxisWindows(3 * window, window, window // 2, 0, 3 * window, window),) * 2
    return empty_call(dtype, dim, window_plan(axes, "q-k"), 9 * window * window, bias_size(axes, "q-k"))


def neighborhood_problem(
    dtype: torch.dtype, dim: int, grouped: bool = False
) -> tuple[AttendCall, AttendGrads]:
    """7 x 7 neighborhoods with a trained table, in tiles of 64 queries; `grouped`: two heads share keys."""
    axes = (AxisNeighborhood(21, 3, 3, 1, 1, False, True, 21),) * 2
    return empty_call(dtype, dim, neighborhood_plan(axes, True, (8, 8), (8, 8), grouped), 21 * 21, 13 * 13)


def empty_call(
    dtype: torch.dtype, dim: int, plan: Plan, tokens: int, entries: int
) -> tuple[AttendCall, AttendGrads]:
    """Two samples of two heads, all zero."""
    acc = torch.float64 if dtype == torch.float64 else torch.float32

    def rows(d: int = dim) -> torch.Tensor:
        return torch.zeros(2, tokens, 2, d, dtype=dtype)

    table = torch.zeros(2, entries, dtype=acc)
    lse = torch.zeros(2, tokens, 2, dtype=acc)
    call = AttendCall(
        plan=plan, q=rows(), k=rows(), v=rows(), bias=table, q_scale=None, k_scale=None, extra_k=None,
        extra_v=None, key_bias=None, mask=None, seed=None, scale=dim**-0.5, mask_value=-100.0, edge_row=0,
        activation="softmax", dropout_p=0.0, head_offset=0, head_total=2, out=rows(), lse=lse,
    )  # fmt: skip
    return call, AttendGrads(rows(), None, rows(), rows(), rows(), table.clone(), None, None)


def configurations(dtype_class: str) -> Iterator[tuple[str, Any, dict[str, Any], dict[str, int]]]:
    """Every entry of the tile table once, at its full tile: ("kernel, dtype class, dim", kernel, arguments,
    options)."""
    original = attend.dtype_class
    for dim in tiles.HEAD_DIMS:
        tile = tiles.Tile(*tiles.TABLE[dtype_class]["tile"][dim])
        one_tile = next(w for w in range(8, 3, -1) if w * w <= min(tile.block_q, tile.block_k))
        attend.dtype_class = lambda dtype: dtype_class
        try:
            small = launches(*shifted_problem(DTYPES[dtype_class], dim, one_tile))
            large = launches(*shifted_problem(DTYPES[dtype_class], dim, 12))
            ranged = launches(*neighborhood_problem(DTYPES[dtype_class], dim)) if dim == RANGED_DIM else []
        finally:
            attend.dtype_class = original
        for kernel, _, args, options in ranged:
            if "BLOCK_Q" in args:
                yield f"{kernel.fn.__name__}+ranges {dtype_class} {dim}", kernel, args, options
        for kernel, _, args, options in [*(x for x in small if "_tile_" in x[0].fn.__name__), *large]:
            if dim == tiles.HEAD_DIMS[0] or "BLOCK_Q" in args:  # the small kernels of a class once
                yield f"{kernel.fn.__name__} {dtype_class} {dim}", kernel, args, options


def measure(dtype_class: str, archs: Sequence[int] = ARCHS) -> dict[str, dict[str, int]]:
    """Resources of every configuration of a dtype class: {"kernel, dtype class, dim, sm_NN": {...}}."""
    found = {}
    for name, kernel, args, options in configurations(dtype_class):
        for arch in archs:
            found[f"{name} sm_{arch}"] = resources(compile_launch(kernel, args, options, arch))
    return found


def rounded(values: dict[str, int]) -> dict[str, int]:
    """Registers up to the hardware's unit of 8, stack to one of 64 bytes: what a harmless change may move."""
    registers, stack = values["registers"], values["stack"]
    return values | {"registers": min(-(-registers // 8) * 8, 255), "stack": -(-stack // 64) * 64}


def write_budgets(classes: Sequence[str]) -> None:
    """Measures the kernels of attend anew in these classes and keeps the others."""
    for dtype_class in classes:
        merge_budgets(measure(dtype_class))


def merge_budgets(found: dict[str, dict[str, int]]) -> None:
    """Into the file: new lines behind the old ones, in place of those of the same name."""
    budgets = json.loads(BUDGETS.read_text())["configurations"] if BUDGETS.exists() else {}
    budgets |= {name: rounded(values) for name, values in found.items()}
    lines = [f'    "{name}": {json.dumps(values)}' for name, values in budgets.items()]
    header = f'{{\n  "triton": "{triton.__version__}",\n  "configurations": {{\n'
    BUDGETS.write_text(header + ",\n".join(lines) + "\n  }\n}\n")


if __name__ == "__main__":
    write_budgets(sys.argv[1:] or tiles.CLASSES)
