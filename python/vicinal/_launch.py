"""The launchers of the attend kernels on each backend, and what each backend can do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import _backends, _cuda
from ._attend import AttendCall, AttendGrads
from ._backends import _C, Row
from .plan import Plan

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
ACTIVATION_CODES = {"softmax": 0, "relu2": 1, "relu": 2, "none": 3}
_NO_ROWS = (0, 0, 0, 0)
_NO_PLAN = (0, 0, 0, 0, 0, 0)


def row_arguments(x: Tensor | None) -> tuple[int, int, int, int]:
    """(pointer, batch stride, token stride, head stride) of [B, N, H, D]."""
    if x is None:
        return _NO_ROWS
    stride_b, stride_n, stride_h, _ = x.stride()
    return x.data_ptr(), stride_b, stride_n, stride_h


def pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def plan_arguments(plan: Plan | None) -> tuple[int, ...]:
    if plan is None:
        return _NO_PLAN
    sizes = (plan.n_rows, plan.q_slots, plan.k_slots, plan.guard)
    return (plan.axes.data_ptr(), plan.rows.data_ptr(), *sizes)


def _problem_arguments(call: AttendCall) -> tuple[int | float, ...]:
    """struct Attend of csrc/attend.h, flat, in the order of csrc/module_args.h."""
    q, v, plan, mask, extra = call.q, call.v, call.plan, call.mask, call.extra_k
    batch, n_q, heads, dim = q.shape
    bias_size = 0 if call.bias is None else call.bias.shape[1]
    scale_stride = 0 if call.q_scale is None else call.q_scale.stride(1)
    masks = (0, 0, 0, 0)
    if mask is not None:
        masks = (mask.data_ptr(), mask.shape[0], mask.stride(0), mask.stride(1) if mask.shape[1] > 1 else 0)
    return (
        *(DTYPE_CODES[q.dtype], ACTIVATION_CODES[call.activation]),
        *(batch, heads, v.shape[2], dim, v.shape[-1], n_q, v.shape[1]),
        *(*row_arguments(q), *row_arguments(call.k), *row_arguments(v)),
        *plan_arguments(plan),
        *(call.scale, call.mask_value, pointer(call.bias), bias_size),
        *(pointer(call.q_scale), pointer(call.k_scale), scale_stride, pointer(call.key_bias), *masks),
        *(
            *row_arguments(extra),
            *row_arguments(call.extra_v),
            0 if extra is None else extra.shape[1],
            call.edge_row,
        ),
        *(call.dropout_p, pointer(call.seed), call.head_offset, call.head_total),
        *(int(call.drop_by_token), pointer(call.q_coords), pointer(call.k_coords)),
        *(pointer(call.rel), 0 if call.rel is None else call.rel.shape[2]),
    )


def _forward_arguments(call: AttendCall) -> tuple[int | float, ...]:
    return (*_problem_arguments(call), *row_arguments(call.out), call.lse.data_ptr(), call.lse.stride(1))


def _backward_arguments(call: AttendCall, grads: AttendGrads) -> tuple[int | float, ...]:
    return (
        *_problem_arguments(call),
        *(*row_arguments(call.out), *row_arguments(grads.dout)),
        *(call.lse.data_ptr(), pointer(grads.dlse), call.lse.stride(1)),
        *(*row_arguments(grads.dq), *row_arguments(grads.dk), *row_arguments(grads.dv)),
        *(pointer(grads.dbias), *row_arguments(grads.dextra_k), *row_arguments(grads.dextra_v)),
        *(*plan_arguments(call.plan.key_plan), pointer(grads.drel)),
    )


def _cpu_forward(call: AttendCall) -> None:
    _C.attend_fwd((*_forward_arguments(call), torch.get_num_threads()))


def _cpu_repeat(call: AttendCall) -> Callable[..., None]:
    remembered, plan = _C.remember_fwd(_forward_arguments(call)), call.plan
    again, threads = _C.attend_fwd_again, torch.get_num_threads

    def launch(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor) -> None:
        assert plan is not None  # keeps the tables that `remembered` points to
        pointers = (q.data_ptr(), k.data_ptr(), v.data_ptr(), 0 if bias is None else bias.data_ptr())
        again(remembered, *pointers, out.data_ptr(), lse.data_ptr(), threads())

    return launch


def _cpu_repeat_backward(call: AttendCall, grads: AttendGrads) -> Callable[..., None]:
    remembered, plan = _C.remember_bwd(_backward_arguments(call, grads)), call.plan
    again, threads, has_bias = _C.attend_bwd_again, torch.get_num_threads, grads.dbias is not None
    dk_offset, dv_offset = (x.data_ptr() - grads.dq.data_ptr() for x in (grads.dk, grads.dv))

    def launch(
        tensors: Sequence[Tensor], dlse: Tensor | None, results: Sequence[Tensor], packed: bool
    ) -> None:
        assert plan is not None
        q, k, v, bias, out, lse, dout = tensors
        dq = results[0].data_ptr()
        dk, dv = (
            (dq + dk_offset, dq + dv_offset) if packed else (results[1].data_ptr(), results[2].data_ptr())
        )
        inputs = (q.data_ptr(), k.data_ptr(), v.data_ptr(), pointer(bias), out.data_ptr(), lse.data_ptr())
        dbias = results[3].data_ptr() if has_bias else 0
        again(remembered, *inputs, dout.data_ptr(), pointer(dlse), dq, dk, dv, dbias, threads())

    return launch


def _cpu_backward(call: AttendCall, grads: AttendGrads) -> None:
    _C.attend_bwd((*_backward_arguments(call, grads), torch.get_num_threads()))


def _cuda_forward(call: AttendCall) -> None:
    _cuda.forward(_forward_arguments(call), call.q.device)


def _cuda_backward(call: AttendCall, grads: AttendGrads) -> None:
    _cuda.backward(_backward_arguments(call, grads), call.q.device)


def _triton_forward(call: AttendCall) -> None:
    from vicinal.kernels.attend import attend_fwd

    attend_fwd(call)


def _triton_backward(call: AttendCall, grads: AttendGrads) -> None:
    from vicinal.kernels.attend import attend_bwd

    attend_bwd(call, grads)


@dataclass(frozen=True)
class Launchers:
    """One backend: its launchers (None: the reference, which is no op) and its capabilities for any softmax
    family. `repeat(call)` and `repeat_backward(call, grads)`: quick launchers for tensors of the same
    shapes and strides.
    """

    backend: str
    forward: Callable[[AttendCall], None] | None
    backward: Callable[[AttendCall, AttendGrads], None] | None
    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    available: Callable[[str], str]
    max_head_dim: int | None = None
    min_arch: int | None = None
    missing: frozenset[str] = frozenset()
    wrong: frozenset[tuple[str, torch.dtype]] = frozenset()
    repeat: Callable[[AttendCall], Callable[..., None]] | None = None
    repeat_backward: Callable[[AttendCall, AttendGrads], Callable[..., None]] | None = None

    def capability(self, family: str) -> Row:
        limits = (self.max_head_dim, self.min_arch, self.missing, self.wrong)
        return Row(self.backend, family, self.devices, self.dtypes, self.available, *limits)


ROWS = (
    Launchers(
        "cuda",
        _cuda_forward,
        _cuda_backward,
        devices=("cuda",),
        dtypes=(torch.float32, torch.bfloat16, torch.float16),
        available=_backends.have_cuda,
        max_head_dim=256,
        min_arch=80,
    ),
    Launchers(
        "triton",
        _triton_forward,
        _triton_backward,
        devices=("cuda", "cpu"),
        dtypes=FLOATS,
        available=_backends.have_triton,
        max_head_dim=256,
        min_arch=80,
        wrong=frozenset({("cpu", torch.bfloat16)}),  # Triton's interpreter
    ),
    Launchers(
        "cpu",
        _cpu_forward,
        _cpu_backward,
        devices=("cpu",),
        dtypes=FLOATS,
        available=_backends.have_cpu,
        repeat=_cpu_repeat,
        repeat_backward=_cpu_repeat_backward,
    ),
    Launchers("reference", None, None, ("any",), FLOATS, _backends.have_reference),
)
