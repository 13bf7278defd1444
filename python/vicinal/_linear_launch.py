"""The launchers of the linear kernels on each backend, and what each backend can do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import _backends, _cuda
from ._backends import _C, Row
from ._launch import DTYPE_CODES, FLOATS

if TYPE_CHECKING:
    from ._linear_op import LinearCall, LinearGrads, LinearResults

MAP_CODES = {"identity": 0, "elu1": 1, "relu": 2, "relu2": 3, "exp": 4}
MASK_CODES = {"full": 0, "causal": 1, "previous": 2, "inclusive": 3}
Arguments = tuple[int | float, ...]


def _strided(x: Tensor | None) -> tuple[int, ...]:
    """struct Strided of a tensor [B, N, H, D]."""
    return (0, 0, 0, 0, 0) if x is None else (x.data_ptr(), *x.stride())


def _pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _problem(call: LinearCall) -> Arguments:
    """struct Linear of csrc/linear.h, flat, in the order of csrc/linear_args.h."""
    q, k, v, decay = call.q, call.k, call.v, call.decay
    batch, n_k, heads, dim_v = v.shape
    strides: tuple[int, ...] = (0, 0, 0)
    if decay is not None:
        strides = (0, 0, decay.stride(0)) if decay.dim() == 1 else decay.stride()
    return (
        *(DTYPE_CODES[v.dtype], MASK_CODES[call.mask], MAP_CODES[call.map_q], MAP_CODES[call.map_k]),
        *(call.param_q, call.param_k, batch, call.sequences, q.shape[1], n_k),
        *(heads, q.shape[2], q.shape[3], dim_v, 0 if call.q_den is None else call.q_den.shape[3]),
        *(int(call.normalize), call.scale, call.eps, call.constant, call.block_size, call.chunk_size),
        *(*_strided(q), *_strided(k), *_strided(v), *_strided(call.q_den), *_strided(call.k_den)),
        *(_pointer(decay), *strides, _pointer(call.key_mask), _pointer(call.cu_seqlens)),
        *(_pointer(call.initial_s), _pointer(call.initial_z)),
    )


def forward_arguments(call: LinearCall, results: LinearResults) -> Arguments:
    written = (_pointer(results.den), _pointer(results.final_s), _pointer(results.final_z))
    return (*_problem(call), *_strided(results.out), *written)


def backward_arguments(call: LinearCall, results: LinearResults, grads: LinearGrads) -> Arguments:
    return (
        *(*_problem(call), *_strided(results.out), *_strided(grads.dout)),
        *(_pointer(results.den), _pointer(results.final_s), _pointer(results.final_z)),
        *(_pointer(grads.dfinal_s), _pointer(grads.dfinal_z)),
        *(*_strided(grads.dq), *_strided(grads.dk), *_strided(grads.dv)),
        *(*_strided(grads.dq_den), *_strided(grads.dk_den)),
        *(_pointer(grads.ddecay), _pointer(grads.dinitial_s), _pointer(grads.dinitial_z)),
    )


def step_arguments(call: LinearCall, results: LinearResults) -> Arguments:
    return (*_problem(call), *_strided(results.out), _pointer(results.final_s), _pointer(results.final_z))


def _cpu_forward(call: LinearCall, results: LinearResults) -> None:
    _C.linear_fwd((*forward_arguments(call, results), torch.get_num_threads()))


def _cpu_backward(call: LinearCall, results: LinearResults, grads: LinearGrads) -> None:
    _C.linear_bwd((*backward_arguments(call, results, grads), torch.get_num_threads()))


def _cpu_step(call: LinearCall, results: LinearResults) -> None:
    _C.linear_step((*step_arguments(call, results), torch.get_num_threads()))


def _cuda_forward(call: LinearCall, results: LinearResults) -> None:
    _cuda.launch("linear_fwd", forward_arguments(call, results), call.v.device)


def _cuda_backward(call: LinearCall, results: LinearResults, grads: LinearGrads) -> None:
    _cuda.launch("linear_bwd", backward_arguments(call, results, grads), call.v.device)


def _cuda_step(call: LinearCall, results: LinearResults) -> None:
    _cuda.launch("linear_step", step_arguments(call, results), call.v.device, workspace=False)


@dataclass(frozen=True)
class LinearLaunchers:
    """One backend: its capabilities and its launchers (None: the reference, which is no op). `step` takes one
    token and updates the states of the results in place."""

    capability: Row
    forward: Callable[[LinearCall, LinearResults], None] | None = None
    backward: Callable[[LinearCall, LinearResults, LinearGrads], None] | None = None
    step: Callable[[LinearCall, LinearResults], None] | None = None


_MISSING = frozenset({"decay per channel"})

ROWS = (
    LinearLaunchers(
        Row("cpu", "linear", ("cpu",), FLOATS, _backends.have_cpu, missing=_MISSING),
        _cpu_forward,
        _cpu_backward,
        _cpu_step,
    ),
    LinearLaunchers(
        Row(
            "cuda",
            "linear",
            ("cuda",),
            (torch.float32, torch.bfloat16, torch.float16),
            _backends.have_cuda,
            min_arch=80,
            missing=_MISSING,
        ),
        _cuda_forward,
        _cuda_backward,
        _cuda_step,
    ),
    LinearLaunchers(Row("reference", "linear", ("any",), FLOATS, _backends.have_reference)),
)
