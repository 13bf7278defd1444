"""The ops vicinal::linear_fwd, linear_bwd and linear_step: tensors -> launches of csrc/linear.h."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import _backends, _linear_launch
from ._attend import accumulator
from ._family import LIBRARY, Family, autograd_function, define, empty_gradient

TENSORS = (
    "q",
    "k",
    "v",
    "q_den?",
    "k_den?",
    "decay?",
    "key_mask?",
    "cu_seqlens?",
    "initial_s?",
    "initial_z?",
)
OPTIONS = (
    "str map_q",
    "float param_q",
    "str map_k",
    "float param_k",
    "str mask",
    "int block_size",
    "int chunk_size",
    "bool normalize",
    "float scale",
    "float eps",
    "float constant",
)
STEP_OPTIONS = (
    "str map_q",
    "float param_q",
    "str map_k",
    "float param_k",
    "float scale",
    "float eps",
    "float constant",
)


@dataclass(slots=True)
class LinearCall:
    """The fields of csrc/linear.h as tensors: q, k, v, q_den, k_den, out of any strides; decay [H] or [B, N,
    H]; key_mask bool [B, M]; cu_seqlens int32; states, den [B, H, N] contiguous."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_den: Tensor | None
    k_den: Tensor | None
    decay: Tensor | None
    key_mask: Tensor | None
    cu_seqlens: Tensor | None
    initial_s: Tensor | None
    initial_z: Tensor | None
    map_q: str
    param_q: float
    map_k: str
    param_k: float
    mask: str
    block_size: int
    chunk_size: int
    normalize: bool
    scale: float
    eps: float
    constant: float

    @property
    def sequences(self) -> int:
        return int(self.v.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1)


@dataclass(slots=True)
class LinearResults:
    """What a forward writes: out like v, den acc [B, H, N], final_s, final_z; den and final_z None where not
    normalised."""

    out: Tensor
    den: Tensor | None
    final_s: Tensor
    final_z: Tensor | None


@dataclass(slots=True)
class LinearGrads:
    """What a backward reads (dout, dfinal_s, dfinal_z) and writes (the rest; ddecay acc [B, M, H])."""

    dout: Tensor
    dfinal_s: Tensor | None
    dfinal_z: Tensor | None
    dq: Tensor
    dk: Tensor
    dv: Tensor
    dq_den: Tensor | None
    dk_den: Tensor | None
    ddecay: Tensor | None
    dinitial_s: Tensor | None
    dinitial_z: Tensor | None


def dense_like(x: Tensor, shape: Sequence[int]) -> Tensor:
    """New memory of this shape, without gaps, its dimensions in the order of x's strides."""
    strides = x.stride()
    order = sorted(range(len(shape)), key=lambda d: -strides[d])
    made = torch.empty([shape[d] for d in order], dtype=x.dtype, device=x.device)
    return made.permute([order.index(d) for d in range(len(shape))])


def _fake_forward(tensors: tuple[Any, ...], options: tuple[Any, ...]) -> tuple[Tensor, ...]:
    q, k, v, q_den = tensors[:4]
    cu_seqlens, normalize, constant = tensors[7], options[7], options[10]
    acc, extra = accumulator(v.dtype), int(constant != 0)
    batch, n, heads, dim_v = v.shape[0], q.shape[1], v.shape[2], v.shape[3]
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    out = dense_like(v, (batch, n, heads, dim_v))
    s = v.new_empty((sequences, heads, k.shape[-1] + extra, dim_v), dtype=acc)
    if not normalize:
        return out, v.new_empty(0, dtype=acc), s, v.new_empty(0, dtype=acc)
    width = (k if q_den is None else q_den).shape[-1] + extra
    z = v.new_empty((sequences, heads, width), dtype=acc)
    return out, v.new_empty((batch, heads, n), dtype=acc), s, z


def _fake_backward(
    outputs: tuple[Any, ...], tensors: tuple[Any, ...], options: tuple[Any, ...], packed: bool
) -> tuple[Tensor, ...]:
    q, k, v, q_den, k_den, decay, _, _, s, z = tensors
    found = [dense_like(x, x.shape) for x in (q, k, v)]
    found += [empty_gradient(q) if x is None else dense_like(x, x.shape) for x in (q_den, k_den)]
    found += [
        empty_gradient(q) if x is None else x.new_empty(x.shape, dtype=accumulator(v.dtype))
        for x in (decay, s, z)
    ]
    return tuple(found)


LINEAR = Family(
    name="linear",
    tensors=TENSORS,
    options=OPTIONS,
    outputs=("out", "den", "final_s", "final_z"),
    gradients=("q", "k", "v", "q_den", "k_den", "decay", "initial_s", "initial_z"),
    fake_fwd=_fake_forward,
    fake_bwd=_fake_backward,
)


def _call(tensors: tuple[Any, ...], options: tuple[Any, ...]) -> LinearCall:
    *first, key_mask, cu_seqlens, s, z = tensors
    small = [None if x is None else x.contiguous() for x in (key_mask, cu_seqlens, s, z)]
    return LinearCall(*first, *small, *options)


def _results(outputs: tuple[Any, ...], normalize: bool) -> LinearResults:
    out, den, s, z = outputs
    den, s, z = den.contiguous(), s.contiguous(), z.contiguous()
    return LinearResults(out, den, s, z) if normalize else LinearResults(out, None, s, None)


def _forward(launch: Callable[[LinearCall, LinearResults], None]) -> Callable[..., tuple[Tensor, ...]]:
    n = len(TENSORS)

    def linear_fwd(*args: Any) -> tuple[Tensor, ...]:
        outputs = _fake_forward(args[:n], args[n:])
        call = _call(args[:n], args[n:])
        launch(call, _results(outputs, call.normalize))
        return outputs

    return linear_fwd


def _backward(
    launch: Callable[[LinearCall, LinearResults, LinearGrads], None],
) -> Callable[..., tuple[Tensor, ...]]:
    n = len(TENSORS)

    def linear_bwd(*args: Any) -> tuple[Tensor, ...]:
        dout, _, dfinal_s, dfinal_z = args[:4]
        tensors, options = args[8 : 8 + n], args[8 + n : -1]
        call = _call(tensors, options)
        written: Any = _fake_backward(args[4:8], tensors, options, False)
        wanted: Any = [None if x is None else r for x, r in zip((*tensors[3:6], *tensors[8:]), written[3:])]
        dq_den, dk_den, ddecay, ds, dz = wanted
        per_token = ddecay
        if ddecay is not None and ddecay.dim() == 1:
            per_token = ddecay.new_empty(call.v.shape[:3])
        us = None if dfinal_s is None else dfinal_s.contiguous()
        uz = None if dfinal_z is None or not call.normalize else dfinal_z.contiguous()
        dq, dk, dv = written[:3]
        grads = LinearGrads(dout, us, uz, dq, dk, dv, dq_den, dk_den, per_token, ds, dz)
        launch(call, _results(args[4:8], call.normalize), grads)
        if per_token is not None and per_token is not ddecay:
            torch.sum(per_token, (0, 1), out=written[5])
        return written

    return linear_bwd


def _step(launch: Callable[[LinearCall, LinearResults], None]) -> Callable[..., Tensor]:
    def linear_step(
        q: Tensor, k: Tensor, v: Tensor, s: Tensor, z: Tensor | None, decay: Tensor | None, *options: Any
    ) -> Tensor:
        out = dense_like(v, v.shape)
        map_q, param_q, map_k, param_k, *numbers = options
        blank = (None, None, decay, None, None, None, None)
        call = LinearCall(
            q, k, v, *blank, map_q, param_q, map_k, param_k, "causal", 0, 0, z is not None, *numbers
        )
        launch(call, LinearResults(out, None, s, z))
        return out

    return linear_step


def _fake_step(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    return dense_like(v, v.shape)


def _define_step(backend: str, launch: Callable[[LinearCall, LinearResults], None]) -> None:
    name = f"linear_step.{backend}"
    tensors = "Tensor q, Tensor k, Tensor v, Tensor(a!) s, Tensor(b!)? z, Tensor? decay"
    LIBRARY.define(f"{name}({tensors}, {', '.join(STEP_OPTIONS)}) -> Tensor")
    for device in ("CPU", "CUDA"):
        LIBRARY.impl(name, _step(launch), device)
    torch.library.register_fake(f"vicinal::{name}", _fake_step, lib=LIBRARY)


for _row in _linear_launch.ROWS:
    _backends.register(_row.capability)
    if _row.forward is not None and _row.backward is not None and _row.step is not None:
        define(LINEAR, _row.capability.backend, _forward(_row.forward), _backward(_row.backward))
        _define_step(_row.capability.backend, _row.step)


def _finish(grads: list[Tensor | None], tensors: tuple[Any, ...], packed: bool) -> list[Tensor | None]:
    """Gradients of all tensors: none of the mask and of the ends of the sequences."""
    return [*grads[:6], None, None, *grads[6:]]


linear_op = autograd_function(LINEAR, _finish)
