"""Backends "emulated" of hash and joint attention for tests: their CUDA kernels, compiled for a CPU."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vicinal import _hash_op, _joint_op
from vicinal._family import define

from .conftest import CSRC, HERE, HostBuild
from .emulated import Emulation, emulation, only_here, running

# The members of csrc/hash.h and joint.h as struct codes: i int32, q int64, d double, P pointer.
ROWS, MATRIX = "Pqqq", "Pqq"
HASH = f"iqqiiiiiid{ROWS * 2}PPP"
JOINT = f"iiqqqiiii{MATRIX * 6}dddPPP"
LAYOUTS = {
    "hash": {"fwd": f"{HASH}{ROWS}PP", "bwd": f"{HASH}{ROWS * 3}PP"},
    "joint": {"fwd": f"{JOINT}{MATRIX * 4}P", "bwd": f"{JOINT}{MATRIX * 4}PP{MATRIX * 6}P"},
}
CUDA = CSRC / "cuda"
SOURCES = {
    "hash": [HERE / "hash_driver.cpp", *sorted(CUDA.glob("hash*.cu"))],
    "joint": [HERE / "joint_driver.cpp", *sorted(CUDA.glob("joint*.cu")), CUDA / "linear_sums.cu"],
}
ROWS_OF = {"hash": _hash_op.CUDA, "joint": _joint_op.CUDA}


def tensors_of(args: Any) -> list[Tensor]:
    if isinstance(args, Tensor):
        return [args]
    return [t for x in args for t in tensors_of(x)] if isinstance(args, (tuple, list)) else []


def hash_forward(*args: Any) -> None:
    emulation[-1].launch("fwd", _hash_op.forward_arguments(*args), tensors_of(args))


def hash_backward(*args: Any) -> None:
    emulation[-1].launch("bwd", _hash_op.backward_arguments(*args), tensors_of(args))


def joint_forward(*args: Any) -> None:
    emulation[-1].launch("fwd", _joint_op.forward_arguments(*args), tensors_of(args))


def joint_backward(*args: Any) -> None:
    scratch = torch.empty_like(args[1][2])
    arguments = _joint_op.backward_arguments(*args, scratch=scratch)
    emulation[-1].launch("bwd", arguments, tensors_of([*args, scratch]))


define(_hash_op.HASH, "emulated", _hash_op._forward(hash_forward), _hash_op._backward(hash_backward))
define(_joint_op.JOINT, "emulated", _joint_op._forward(joint_forward), _joint_op._backward(joint_backward))


def emulated(
    family: str, build: HostBuild, flavor: str = "plain", **schedule: int
) -> AbstractContextManager[Emulation]:
    """Within it, backend="emulated" runs the CUDA kernels of this build under this schedule."""
    row = replace(ROWS_OF[family], backend="emulated", devices=("cpu",), available=only_here, min_arch=None)
    return running(Emulation(build(SOURCES[family], flavor), flavor, LAYOUTS[family], **schedule), [row])
