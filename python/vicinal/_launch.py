"""The launchers of the attend kernels on each backend, and what each backend can do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from . import _backends
from ._attend import AttendCall, AttendGrads
from ._backends import Row

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _triton_forward(call: AttendCall) -> None:
    from vicinal.kernels.attend import attend_fwd

    attend_fwd(call)


def _triton_backward(call: AttendCall, grads: AttendGrads) -> None:
    from vicinal.kernels.attend import attend_bwd

    attend_bwd(call, grads)


@dataclass(frozen=True)
class Launchers:
    """One backend: its launchers (None: the reference, which is no op) and its capabilities for any softmax family."""

    backend: str
    forward: Callable[[AttendCall], None] | None
    backward: Callable[[AttendCall, AttendGrads], None] | None
    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    available: Callable[[str], str]
    max_head_dim: int | None = None
    min_arch: int | None = None
    missing: frozenset[str] = frozenset()

    def capability(self, family: str) -> Row:
        limits = (self.max_head_dim, self.min_arch, self.missing)
        return Row(self.backend, family, self.devices, self.dtypes, self.available, *limits)


ROWS = (
    Launchers(
        "triton",
        _triton_forward,
        _triton_backward,
        devices=("cuda", "cpu"),
        dtypes=(torch.float32, torch.bfloat16, torch.float16),
        available=_backends.have_triton,
        max_head_dim=256,
        min_arch=80,
    ),
    Launchers("reference", None, None, ("any",), FLOATS, _backends.have_reference),
)
