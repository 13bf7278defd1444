"""Which backends run on this machine, for parametrised tests; a skip names the backend's own reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vicinal import _backends

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def device_of(backend: str) -> str:
    """Where a backend's tensors live in the tests."""
    return "cuda" if backend in ("cuda", "triton") and torch.cuda.is_available() else "cpu"


def reason_against(backend: str, dtype: torch.dtype = torch.float32, family: str = "windowed") -> str:
    """Why a backend does not run here; empty if it does."""
    row = next((r for r in _backends.rows(family) if r.backend == backend), None)
    if row is None:
        return f"{backend} has no kernels for {family} in this build"
    device = device_of(backend)
    arch = None
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        arch = 10 * major + minor
    problem = _backends.Problem(family, device, dtype, 8, 8, frozenset(), arch)
    return "; ".join(_backends.reasons(row, problem))


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def op_backends(family: str = "windowed") -> list[Any]:
    """A pytest parameter per backend with kernels, skipped with its reason where it cannot run."""
    names = [name for name in _backends.ORDER if name != "reference"]
    return [_param(name, reason=reason_against(name, family=family), name=name) for name in names]


def op_backends_and_dtypes(family: str = "windowed") -> list[Any]:
    """A pytest parameter (backend, dtype) for all pairs, skipped with the reason of the pair."""
    names = [name for name in _backends.ORDER if name != "reference"]
    return [
        _param(name, dtype, reason=reason_against(name, dtype, family), name=f"{name}-{short(dtype)}")
        for name in names
        for dtype in DTYPES
    ]


def _param(*values: Any, reason: str, name: str) -> Any:
    marks = [pytest.mark.skip(reason=f"{values[0]}: {reason}")] if reason else []
    return pytest.param(*values, marks=marks, id=name)
