"""The backend of a call, as a constant to torch.compile."""

from __future__ import annotations

from collections.abc import Collection
from operator import index

import torch
from torch import Tensor

from . import _backends

# family, device, dtype, head_dim, head_dim_v, features, arch: torch.compile makes no Problem
Key = tuple[str, str, torch.dtype, int, int, tuple[str, ...], int | None]


def problem_key(
    family: str, q: Tensor, v: Tensor, features: Collection[str], more: int = 0, more_v: int = 0
) -> Key:
    """What decides the backend: head dims are the last ones of q and v, and the channels that q and k, and v,
    get."""
    arch = None
    if q.device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(q.device)
        arch = major * 10 + minor
    return (
        family,
        q.device.type,
        q.dtype,
        index(q.shape[-1]) + more,
        index(v.shape[-1]) + more_v,
        tuple(features),
        arch,
    )


def problem_of(key: Key) -> _backends.Problem:
    family, device, dtype, head_dim, head_dim_v, features, arch = key
    return _backends.Problem(family, device, dtype, head_dim, head_dim_v, frozenset(features), arch)


def choose(key: Key, backend: str | None) -> str:
    return _backends.select(problem_of(key), backend)


# As torch.compiler.assume_constant_result does, which imports the whole compiler for it: a second and more.
choose._dynamo_marked_constant = True  # type: ignore[attr-defined]
