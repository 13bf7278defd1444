"""Registers, stack and shared memory of every CUDA kernel stay within budgets.json.

`python tests/cuda_host/test_budgets.py` measures the installed library and writes the file anew.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from vicinal import _backends

BUDGETS = Path(__file__).parent / "budgets.json"
Usage = dict[
    str, dict[str, list[int]]
]  # kernel -> architecture -> [registers, bytes of stack, of static shared memory]


def cuobjdump() -> str | None:
    """The toolkit's, or the one that Triton ships."""
    found = shutil.which("cuobjdump") or shutil.which("cuobjdump", path="/usr/local/cuda/bin")
    triton = importlib.util.find_spec("triton")
    if found or triton is None or triton.origin is None:
        return found
    shipped = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"
    return str(shipped) if shipped.exists() else None


def missing() -> str:
    """Why nothing can be measured here, or ""."""
    if _backends._C is None or not _backends._C.build_info()["with_cuda"]:
        return "vicinal was built without nvcc"
    return "" if cuobjdump() else "no cuobjdump"


def measure() -> Usage:
    command = [str(cuobjdump()), "--dump-resource-usage", _backends._C.__file__]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    plain = subprocess.run(
        ["c++filt"], input=text.replace(":\n", " :\n"), capture_output=True, text=True
    ).stdout
    usage: Usage = {}
    arch = name = ""
    for line in plain.splitlines():
        if found := re.match(r"\s*arch = (\S+)", line):
            arch = found[1]
        elif found := re.search(r"Function .*?(\w+_kernel(?:<[^>]*>)?)", line):
            name = found[1].replace("__nv_bfloat16", "bf16").replace("__half", "half")
        elif found := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", line):
            usage.setdefault(name, {})[arch] = [int(x) for x in found.groups()]
    return usage


def test_kernels_stay_within_their_budgets() -> None:
    if reason := missing():
        pytest.skip(reason)
    usage, budgets = measure(), json.loads(BUDGETS.read_text())
    archs = {f"sm_{arch}" for arch in _backends._C.build_info()["cuda_archs"]}
    assert usage.keys() == budgets.keys(), "run this file as a program after adding or removing a kernel"
    for name, by_arch in budgets.items():
        for arch in archs & by_arch.keys():
            used = usage[name][arch]
            assert all(u <= b for u, b in zip(used, by_arch[arch], strict=True)), (
                f"{name} on {arch}: registers, stack, shared memory {used}, budget {by_arch[arch]}"
            )


def budget(used: list[int]) -> list[int]:
    """Registers are allocated by eights; another release of nvcc may need a few more."""
    return [min(255, -(-used[0] // 8) * 8), *used[1:]]


if __name__ == "__main__":
    budgets = {
        name: {a: budget(u) for a, u in by_arch.items()} for name, by_arch in sorted(measure().items())
    }
    lines = (f"{json.dumps(name)}: {json.dumps(by_arch)}" for name, by_arch in budgets.items())
    BUDGETS.write_text("{\n" + ",\n".join(lines) + "\n}\n")
