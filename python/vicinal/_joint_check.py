"""Every argument of joint_attention, checked before anything runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._launch import FLOATS

if TYPE_CHECKING:
    from .joint import Call

ACTIVATIONS = ("relu2", "laplace")
MAX_TOKENS = 2**31 - 1


def tensor(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; it must be a tensor")
    return value


def number(name: str, value: Any, optional: bool) -> None:
    wanted = "a finite float or None" if optional else "a finite float"
    if value is None and optional:
        return
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}; it must be {wanted}")
    if not -float("inf") < value < float("inf"):
        raise ValueError(f"{name} is {value!r}; it must be {wanted}")


def flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}; it must be True or False")


def check_call(call: Call) -> None:
    """All arguments of a call against each other."""
    _check_tensors(call)
    _check_options(call)
    _check_extras(call)


def check_types(call: Call) -> None:
    """What a cast under autocast relies on."""
    for name in ("quad_q", "quad_k", "lin_q", "lin_k", "v", "u"):
        x = getattr(call, name)
        if name == "u" and x is None:
            continue
        if tensor(name, x).dim() != 3:
            wanted = "[B, N, V]" if name in "vu" else "[B, N, d]"
            raise ValueError(f"{name} has shape {list(x.shape)}; it must be {wanted}")


def _check_tensors(call: Call) -> None:
    first = call.quad_q
    if first.dtype not in FLOATS:
        names = ", ".join(str(d).removeprefix("torch.") for d in FLOATS)
        raise TypeError(f"quad_q is {first.dtype}; it must be one of {names}")
    batch, tokens, dim = first.shape
    if tokens < 1 or dim < 1:
        raise ValueError(f"quad_q has shape {list(first.shape)}; N and d must be at least 1")
    if tokens > MAX_TOKENS:
        raise ValueError(f"quad_q has {tokens} tokens; a sample may have {MAX_TOKENS}")
    for name in ("quad_k", "lin_q", "lin_k", "v", "u"):
        x = getattr(call, name)
        if x is None:
            continue
        if x.dtype != first.dtype:
            raise TypeError(f"{name} is {x.dtype}; it must be {first.dtype} as quad_q")
        if x.device != first.device:
            raise ValueError(f"{name} is on {x.device}; it must be on {first.device} as quad_q")
        shape = (batch, tokens, call.v.shape[-1] if name in "vu" else dim)
        if tuple(x.shape) != shape:
            meaning = "[B, N, V] as v" if name == "u" else "[B, N, V]" if name == "v" else "[B, N, d]"
            raise ValueError(f"{name} has shape {list(x.shape)}; it must be {meaning} = {list(shape)}")
    if call.v.shape[-1] < 1:
        raise ValueError(f"v has shape {list(call.v.shape)}; V must be at least 1")


def _check_options(call: Call) -> None:
    group = call.group_size
    if group is not None and (not isinstance(group, int) or isinstance(group, bool)):
        raise TypeError(f"group_size is {group!r}; it must be an int >= 1, or None for all tokens")
    if group is not None and group < 1:
        raise ValueError(f"group_size is {group!r}; it must be an int >= 1, or None for all tokens")
    flag("is_causal", call.is_causal)
    flag("gate", call.gate)
    if not isinstance(call.activation, str):
        raise TypeError(f"activation is {call.activation!r}; it must be one of {', '.join(ACTIVATIONS)}")
    if call.activation not in ACTIVATIONS:
        raise ValueError(f"activation is {call.activation!r}; it must be one of {', '.join(ACTIVATIONS)}")
    number("quad_scale", call.quad_scale, True)
    number("lin_scale", call.lin_scale, True)
    number("dropout_p", call.dropout_p, False)
    if not 0 <= call.dropout_p < 1:
        raise ValueError(f"dropout_p is {call.dropout_p!r}; it must be 0 <= dropout_p < 1")
    if call.gate and call.u is None:
        raise ValueError("gate is True, but u is None; a gate needs u")


def _check_extras(call: Call) -> None:
    first, mask, bias = call.quad_q, call.key_padding_mask, call.bias
    if mask is not None:
        if tensor("key_padding_mask", mask).dtype != torch.bool:
            raise TypeError(f"key_padding_mask is {mask.dtype}; it must be bool (True = ignored)")
        if mask.shape != first.shape[:2]:
            raise ValueError(
                f"key_padding_mask has shape {list(mask.shape)}; it must be [B, N] = {list(first.shape[:2])}"
            )
        if mask.device != first.device:
            raise ValueError(f"key_padding_mask is on {mask.device}; it must be on {first.device} as quad_q")
    if bias is not None:
        if not tensor("bias", bias).is_floating_point():
            raise TypeError(f"bias is {bias.dtype}; it must be a float tensor")
        group = first.shape[1] if call.group_size is None else call.group_size
        if tuple(bias.shape) != (group, group):
            raise ValueError(
                f"bias has shape {list(bias.shape)}; it must be [group_size, group_size] = {[group, group]}"
            )
        if bias.device != first.device:
            raise ValueError(f"bias is on {bias.device}; it must be on {first.device} as quad_q")
