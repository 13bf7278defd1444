"""A backend "emulated" for tests: the CUDA kernels, compiled for a CPU, each launch in a process of its own.

A launch becomes a case file (case_file.h): the parameter struct of csrc/attend.h and the buffers that
it points to.
"""

from __future__ import annotations

import ctypes
import struct
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from torch import Tensor

from vicinal import _backends, _launch, _neighborhood_op, _windowed_op
from vicinal._attend import AttendCall, AttendGrads

from .conftest import CSRC, HERE, HostBuild, run_program

# The members of csrc/attend.h as struct codes: i int32, q int64, d double, P pointer.
ROWS = "Pqqq"
PLAN = "PPqiii"
ATTEND = f"iiqiiiiqq{ROWS * 3}{PLAN}ddPqPPqPPqqq{ROWS * 2}iidPiii"
LAYOUTS = {"fwd": f"{ATTEND}{ROWS}Pq", "bwd": f"{ATTEND}{ROWS * 2}PPq{ROWS * 3}P{ROWS * 2}{PLAN}"}
SOURCES = [HERE / "attend_driver.cpp", *sorted((CSRC / "cuda").glob("attend_*.cu"))]


@dataclass
class Emulation:
    """Which build runs under which schedule. `conflicts` counts bank conflicts of ldmatrix; `largest_block`:
    the most bytes of shared memory that a block asked for."""

    program: Path
    flavor: str
    layouts: Mapping[str, str] = field(default_factory=lambda: LAYOUTS)
    order: int = 0
    copies: int = 0
    seed: int = 1
    shared_memory: int = 227 * 1024
    conflicts: int = 0
    largest_block: int = 0

    def launch(self, kind: str, arguments: tuple[int | float, ...], tensors: list[Tensor]) -> None:
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        buffers = [(address, size) for address, size in storages.items() if size]
        with tempfile.NamedTemporaryFile() as file:
            file.write(self._case(kind, arguments, buffers))
            file.flush()
            done = run_program(self.program, file.name, flavor=self.flavor)
            assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
            conflicts, largest = map(int, done.stdout.split())
            self.conflicts += conflicts
            self.largest_block = max(self.largest_block, largest)
            result = Path(file.name).read_bytes()
        at = len(result) - sum(size + 16 for _, size in buffers)
        for address, size in buffers:
            ctypes.memmove(address, result[at + 16 : at + 16 + size], size)
            at += 16 + size

    def _case(self, kind: str, arguments: tuple[int | float, ...], buffers: list[tuple[int, int]]) -> bytes:
        layout = self.layouts[kind].replace("P", "q")
        params = struct.pack(f"@{layout}0q", *arguments)
        pointers = [
            struct.calcsize(f"@{layout[: i + 1]}") - 8
            for i, code in enumerate(self.layouts[kind])
            if code == "P"
        ]
        head = struct.pack("@8s4q", kind.encode(), self.order, self.copies, self.seed, self.shared_memory)
        head += struct.pack("@q", len(params)) + params
        head += struct.pack(f"@{len(pointers) + 2}q", len(pointers), *pointers, len(buffers))
        bodies = [struct.pack("@qq", *b) + ctypes.string_at(*b) for b in buffers]
        return head + b"".join(bodies)


emulation: list[Emulation] = []


def tensors_of(call: AttendCall) -> list[Tensor]:
    values = [getattr(call, name) for name in AttendCall.__slots__]
    plans = [call.plan] if call.plan.key_plan is None else [call.plan, call.plan.key_plan]
    tables = [table for plan in plans for table in (plan.axes, plan.rows)]
    return [*tables, *(v for v in values if isinstance(v, Tensor))]


def forward(call: AttendCall) -> None:
    emulation[-1].launch("fwd", _launch._forward_arguments(call), tensors_of(call))


def backward(call: AttendCall, grads: AttendGrads) -> None:
    written = [getattr(grads, f.name) for f in fields(grads)]
    tensors = tensors_of(call) + [t for t in written if t is not None]
    emulation[-1].launch("bwd", _launch._backward_arguments(call, grads), tensors)


def only_here(device: str) -> str:
    return "" if emulation else "it exists in tests alone"


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROW = _launch.Launchers("emulated", forward, backward, ("cpu",), DTYPES, only_here, max_head_dim=256)
_windowed_op.WINDOWED.define(ROW)
_neighborhood_op.NEIGHBORHOOD.define(ROW)


@contextmanager
def running(made: Emulation, rows: Sequence[_backends.Row]) -> Iterator[Emulation]:
    """Within it, the backend "emulated" of these rows is there and runs on `made`."""
    emulation.append(made)
    order, before = _backends.ORDER, list(_backends._rows)
    _backends.ORDER = (*order, "emulated")  # type: ignore[assignment]
    for row in rows:
        _backends.register(row)
    try:
        yield made
    finally:
        emulation.pop()
        _backends.ORDER, _backends._rows[:] = order, before
        _backends._choice.cache_clear()
        for forget in _backends._listeners:
            forget()


def emulated(build: HostBuild, flavor: str = "plain", **schedule: int) -> AbstractContextManager[Emulation]:
    """Within it, backend="emulated" runs the CUDA kernels of this build under this schedule."""
    rows = [ROW.capability(family) for family in ("windowed", "neighborhood")]
    return running(Emulation(build(SOURCES, flavor), flavor, LAYOUTS, **schedule), rows)
