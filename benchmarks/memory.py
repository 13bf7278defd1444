"""Peak memory of one call, in a process of its own.

PyTorch's profiler does not see what a native kernel allocates for itself, so on CPUs the resident set is
measured: a child process, told to give large blocks back to the system at once, warms up on a small problem,
resets the kernel's high-water mark (/proc/self/clear_refs), makes one call and reads the mark. On GPUs
PyTorch's allocator keeps the mark.

Reported: what the call added to its inputs at its peak, outputs and gradients included; and the sum of both
over inputs, outputs and gradients, which is the least that any implementation holds at the end.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .check import Run
from .windowed_problems import PROBLEMS, Inputs, Problem, make_inputs

Peaks = dict[str, dict[str, dict[str, float]]]  # by implementation and direction

ROOT = Path(__file__).resolve().parents[1]
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}


def status(field: str) -> int:
    """Bytes of a field of /proc/self/status, such as VmRSS."""
    text = Path("/proc/self/status").read_text()
    line = next(line for line in text.splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def added_peak(call: Callable[[], Any], device: str) -> int:
    """Bytes above the present use that `call` reaches while its result is kept."""
    gc.collect()
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
        kept = call()
        torch.cuda.synchronize()
        del kept
        return torch.cuda.max_memory_allocated() - base
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    base = status("VmRSS")
    kept = call()
    peak = status("VmHWM")
    del kept
    return peak - base


def smaller(problem: Problem) -> Problem:
    """One sample, of two windows an axis where windows do not depend on the grid: loads code, not memory."""
    if problem.windows.head_groups or problem.q_space:
        return replace(problem, batch=1)
    return replace(problem, batch=1, space=tuple(2 * w for w in problem.groups[0].window))


def held(run: Run, inputs: Inputs, backward: bool) -> Any:
    """One call; everything that its caller would keep: the output, and with `backward` the gradients."""
    if not backward:
        with torch.no_grad():
            return run(inputs.tensors, inputs.table)
    out = run(inputs.tensors, inputs.table)
    return out, torch.autograd.grad(out, inputs.leaves, inputs.dout)


def measured(name: str, dtype: str, device: str, backend: str | None) -> Peaks:
    """{implementation: {direction: bytes}} of one problem, in this process."""
    from . import windowed

    problem = next(p for p in PROBLEMS if p.name == name)
    cases = [windowed.Case(p, windowed.DTYPES[dtype], False, 1, device) for p in (smaller(problem), problem)]
    prepared = [make_inputs(c.problem, c.dtype, device) for c in cases]
    found: Peaks = {}
    for impl in (windowed.OURS, "eager", "sdpa"):
        if impl == windowed.OURS:
            runs = [windowed.ours(c.problem, backend) for c in cases]
        else:
            runs = [windowed.baseline(impl, c) for c in cases]
        found[impl] = {}
        for direction, backward in (("fwd", False), ("fwd+bwd", True)):
            warm, inputs = (x.requires_grad_(backward) for x in prepared)
            held(runs[0], warm, backward)
            extra = added_peak(partial(held, runs[1], inputs, backward), device)
            found[impl][direction] = summary(extra, inputs, backward)
    return found


def summary(extra: int, inputs: Inputs, backward: bool) -> dict[str, float]:
    given = sum(leaf.nbytes for leaf in inputs.leaves)
    least = given + inputs.dout.nbytes  # the output is as large as its gradient
    if backward:
        given += inputs.dout.nbytes
        least = 2 * given
    return {"peak_extra_bytes": extra, "least_bytes": least, "peak_over_least": (given + extra) / least}


def peaks(name: str, dtype: str, device: str, backend: str | None) -> Peaks:
    """`measured` in a child process."""
    arguments = [name, dtype, device, backend or "", str(torch.get_num_threads())]
    command = [sys.executable, "-m", "benchmarks.memory", *arguments]
    result = subprocess.run(command, cwd=ROOT, env={**os.environ, **MALLOC}, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"measuring memory failed:\n{result.stderr}")
    found = json.loads(result.stdout)
    assert isinstance(found, dict)
    return found


def main() -> None:
    name, dtype, device, backend, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    print(json.dumps(measured(name, dtype, device, backend or None)))


if __name__ == "__main__":
    main()
