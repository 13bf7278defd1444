"""A backend "emulated" of linear attention for tests: its CUDA kernels, compiled for a CPU."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from vicinal import _linear_launch, _linear_op
from vicinal._backends import Row
from vicinal._family import define
from vicinal._linear_op import LinearCall, LinearGrads, LinearResults

from .conftest import CSRC, HERE, HostBuild
from .emulated import Emulation, emulation, only_here, running

# The members of csrc/linear.h as struct codes: i int32, q int64, d double, P pointer.
STRIDED = "Pqqqq"
LINEAR = f"iiiiddqqqqiiiiiidddqq{STRIDED * 5}PqqqPPPP"
LAYOUTS = {
    "fwd": f"{LINEAR}{STRIDED}PPP",
    "bwd": f"{LINEAR}{STRIDED * 2}PPPPP{STRIDED * 5}PPP",
    "step": f"{LINEAR}{STRIDED}PP",
}
SOURCES = [HERE / "linear_driver.cpp", *sorted((CSRC / "cuda").glob("linear*.cu"))]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def tensors_of(*records: Any) -> list[Tensor]:
    values = [getattr(r, f.name) for r in records for f in fields(r)]
    return [v for v in values if isinstance(v, Tensor)]


def forward(call: LinearCall, results: LinearResults) -> None:
    emulation[-1].launch("fwd", _linear_launch.forward_arguments(call, results), tensors_of(call, results))


def backward(call: LinearCall, results: LinearResults, grads: LinearGrads) -> None:
    arguments = _linear_launch.backward_arguments(call, results, grads)
    emulation[-1].launch("bwd", arguments, tensors_of(call, results, grads))


def step(call: LinearCall, results: LinearResults) -> None:
    emulation[-1].launch("step", _linear_launch.step_arguments(call, results), tensors_of(call, results))


CUDA = next(r.capability for r in _linear_launch.ROWS if r.capability.backend == "cuda")
ROW = Row("emulated", "linear", ("cpu",), CUDA.dtypes, only_here, missing=CUDA.missing)
define(_linear_op.LINEAR, "emulated", _linear_op._forward(forward), _linear_op._backward(backward))
_linear_op._define_step("emulated", step)


def emulated(build: HostBuild, flavor: str = "plain", **schedule: int) -> AbstractContextManager[Emulation]:
    """Within it, backend="emulated" runs the CUDA kernels of this build under this schedule."""
    return running(Emulation(build(SOURCES, flavor), flavor, LAYOUTS, **schedule), [ROW])
