"""Every argument of hash_attention, checked before anything runs."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ._joint_check import MAX_TOKENS, number, tensor
from ._launch import FLOATS

NUMERATORS = ("sum", "self")


def check_types(qk: Any, v: Any) -> None:
    """What a cast under autocast relies on."""
    for name, x, width in (("qk", qk, "D"), ("v", v, "dv")):
        if tensor(name, x).dim() != 4:
            raise ValueError(f"{name} has shape {list(x.shape)}; it must be [B, N, H, {width}]")


def check_call(
    qk: Tensor, v: Tensor, anchors: Any, weight: Any, mean: Any, numerator: Any, offset: Any
) -> None:
    """All arguments of a call against each other."""
    if qk.dtype not in FLOATS:
        names = ", ".join(str(d).removeprefix("torch.") for d in FLOATS)
        raise TypeError(f"qk is {qk.dtype}; it must be one of {names}")
    if v.dtype != qk.dtype:
        raise TypeError(f"v is {v.dtype}; it must be {qk.dtype} as qk")
    if v.device != qk.device:
        raise ValueError(f"v is on {v.device}; it must be on {qk.device} as qk")
    if v.shape[:3] != qk.shape[:3]:
        raise ValueError(
            f"v has shape {list(v.shape)}; it must be [B, N, H, dv] = {[*qk.shape[:3], v.shape[-1]]}"
        )
    if min(qk.shape[1:]) < 1 or v.shape[-1] < 1:
        raise ValueError(
            f"qk and v have shapes {list(qk.shape)} and {list(v.shape)}; N, H, D and dv must be at least 1"
        )
    if qk.shape[1] > MAX_TOKENS:
        raise ValueError(f"qk has {qk.shape[1]} tokens; a sample may have {MAX_TOKENS}")
    bits = _check_tables(qk, anchors, weight, mean)
    if not isinstance(numerator, str):
        raise TypeError(f"numerator is {numerator!r}; it must be one of {', '.join(NUMERATORS)}")
    if numerator not in NUMERATORS:
        raise ValueError(f"numerator is {numerator!r}; it must be one of {', '.join(NUMERATORS)}")
    number("offset", offset, True)
    if offset is not None and offset <= bits:
        raise ValueError(
            f"offset is {offset!r}; it must be above {bits}, the bits of a code: weights must be positive"
        )


def _check_tables(qk: Tensor, anchors: Any, weight: Any, mean: Any) -> int:
    """Shapes, types and devices of the tables; returns the number of bits."""
    heads, dim = qk.shape[2:]
    for name, x, rank in (("anchors", anchors, 3), ("weight", weight, 3), ("mean", mean, 2)):
        if not tensor(name, x).is_floating_point():
            raise TypeError(f"{name} is {x.dtype}; it must be a float tensor")
        if x.device != qk.device:
            raise ValueError(f"{name} is on {x.device}; it must be on {qk.device} as qk")
        if x.requires_grad:
            raise ValueError(f"{name} requires grad; it gets none")
        if x.dim() not in (rank - 1, rank):
            wanted = {"anchors": "[H, m, D] or [m, D]", "weight": "[H, bits, m] or [bits, m]"}
            raise ValueError(
                f"{name} has shape {list(x.shape)}; it must be {wanted.get(name, '[H, m] or [m]')}"
            )
        if x.dim() == rank and x.shape[0] != heads:
            raise ValueError(f"{name} has shape {list(x.shape)}; it must have {heads} heads as qk, or none")
    if anchors.shape[-1] != dim or anchors.shape[-2] < 1:
        raise ValueError(
            f"anchors has shape {list(anchors.shape)}; it must be [H, m, D] or [m, D] with D = {dim} as qk"
        )
    count = anchors.shape[-2]
    if weight.shape[-1] != count or weight.shape[-2] < 1:
        raise ValueError(
            f"weight has shape {list(weight.shape)}; it must be [H, bits, m] or [bits, m] "
            f"with m = {count} anchors"
        )
    if mean.shape[-1] != count:
        raise ValueError(
            f"mean has shape {list(mean.shape)}; it must be [H, m] or [m] with m = {count} anchors"
        )
    return int(weight.shape[-2])
