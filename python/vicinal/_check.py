"""Checks of arguments that all families share: every message names the argument, what it is and what it may
be.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def one_of(name: str, value: Any, accepted: tuple[str, ...]) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, accepted))}")
    if value not in accepted:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, accepted))}")


def tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; it must be a tensor")


def floating(name: str, x: Any) -> None:
    tensor(name, x)
    if not x.is_floating_point():
        raise TypeError(f"{name} is {x.dtype}; it must be a float tensor")


def shape(name: str, x: Tensor, expected: tuple[int, ...], meaning: str) -> None:
    if tuple(x.shape) != tuple(expected):
        raise ValueError(f"{name} has shape {list(x.shape)}; it must be {meaning} = {list(expected)}")


def on_device_of_q(name: str, x: Tensor, q: Tensor) -> None:
    if x.device != q.device:
        raise ValueError(f"{name} is on {x.device}; it must be on {q.device} as q")


def packed(qkv: Any) -> None:
    tensor("qkv", qkv)
    if not 5 <= qkv.dim() <= 7:
        raise ValueError(f"qkv has shape {list(qkv.shape)}; it must be [B, *S, 3, h, d] with 1 to 3 axes S")
    if qkv.shape[-3] != 3:
        raise ValueError(f"qkv has shape {list(qkv.shape)}; the third dimension from the end must be 3")


def tokens(**given: Any) -> None:
    """Tensors [B, *S, heads, head_dim] by name."""
    for name, x in given.items():
        tensor(name, x)
        if not 4 <= x.dim() <= 6:
            raise ValueError(
                f"{name} has shape {list(x.shape)}; it must be [B, *S, heads, head_dim] with 1 to 3 axes S"
            )


def like_q(q: Tensor, error: type[Exception] = TypeError, **others: Tensor) -> None:
    """q has a dtype that there are kernels for, and the others have its dtype (else `error`), device and
    rank."""
    if q.dtype not in DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise TypeError(f"q is {q.dtype}; it must be one of {names}")
    for name, x in others.items():
        if x.dtype != q.dtype:
            raise error(f"{name} is {x.dtype}; it must be {q.dtype} as q")
        on_device_of_q(name, x, q)
        if x.dim() != q.dim():
            raise ValueError(f"{name} has {x.dim()} dimensions; it must have {q.dim()} as q")


def head_dims(q: Tensor, v: Tensor) -> None:
    if q.shape[-1] < 1 or v.shape[-1] < 1:
        raise ValueError(f"q and v have head dims {q.shape[-1]} and {v.shape[-1]}; they must be at least 1")


def probability(name: str, value: Any, one: bool) -> None:
    """one: whether 1 is accepted."""
    accepted = f"0 <= {name} <{'=' * one} 1"
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}; it must be a float, {accepted}")
    if not (0 <= value < 1 or (one and value == 1)):
        raise ValueError(f"{name} is {value!r}; it must be {accepted}")


def finite_or_none(name: str, value: Any) -> None:
    if value is None:
        return
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}; it must be a finite float or None")
    if not -float("inf") < value < float("inf"):
        raise ValueError(f"{name} is {value!r}; it must be a finite float or None")


def flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}; it must be True or False")


def extras(
    extra_k: Tensor | None, extra_v: Tensor | None, batch: int, heads: int, dim: int, dim_v: int
) -> None:
    """extra_k [B, E, heads, dk] and extra_v [B, E, heads, dv] come together."""
    if (extra_k is None) != (extra_v is None):
        raise ValueError("extra_k and extra_v must be given together")
    if extra_k is None or extra_v is None:
        return
    for name, x, width in (("extra_k", extra_k, dim), ("extra_v", extra_v, dim_v)):
        floating(name, x)
        count = x.shape[1] if x.dim() == 4 else 0
        shape(name, x, (batch, count, heads, width), "[B, M, heads, head_dim]")
    if extra_k.shape[1] != extra_v.shape[1]:
        raise ValueError(f"extra_k has {extra_k.shape[1]} keys, extra_v has {extra_v.shape[1]}")


def axis_tables(rel_pos: Any, q: Tensor, rows: list[int]) -> None:
    """rel_pos is a tuple of one table [rows, dk] or [heads, rows, dk] per axis of the grid."""
    if not isinstance(rel_pos, tuple):
        raise TypeError(f"rel_pos is a {type(rel_pos).__name__}; it must be a tuple of one table per axis")
    if len(rel_pos) != len(rows):
        raise ValueError(f"rel_pos has {len(rel_pos)} tables; the grid has {len(rows)} axes")
    heads, dim = q.shape[-2:]
    for a, (table, n) in enumerate(zip(rel_pos, rows, strict=True)):
        floating(f"rel_pos[{a}]", table)
        on_device_of_q(f"rel_pos[{a}]", table, q)
        if tuple(table.shape) not in ((n, dim), (heads, n, dim)):
            raise ValueError(
                f"rel_pos[{a}] has shape {list(table.shape)}; it must be [{n}, {dim}] or "
                f"[{heads}, {n}, {dim}]"
            )
