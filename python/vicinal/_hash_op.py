"""The ops vicinal::hash_fwd and hash_bwd, and their launches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _backends, _cuda
from ._attend import accumulator
from ._backends import _C, Row
from ._family import Family, autograd_function, define
from ._launch import DTYPE_CODES, FLOATS

# anchors [H, m, D], weight [H, bits, m], mean [H, m], in the accumulation type, contiguous
TENSORS = ("qk", "v", "anchors", "weight", "mean")
OPTIONS = ("bool itself", "float offset")


def _fake_forward(tensors: Sequence[Any], options: Sequence[Any]) -> tuple[Tensor, ...]:
    """out [B, N, H, dv], packed codes int32 [B, H, N], state [B, H, *] (csrc/hash.h)."""
    v, bits = tensors[1], tensors[3].shape[1]
    batch, tokens, heads, width = v.shape
    out = torch.empty((batch, tokens, heads, width), dtype=v.dtype, device=v.device)
    size = (bits + 1) * width + bits + 1
    codes = v.new_empty((batch, heads, tokens), dtype=torch.int32)
    return out, codes, v.new_empty((batch, heads, size), dtype=accumulator(v.dtype))


def _fake_backward(
    outputs: Sequence[Any], tensors: Sequence[Any], options: Sequence[Any], packed: bool
) -> tuple[Tensor, ...]:
    qk, v = tensors[:2]
    return tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (qk, v))


HASH = Family(
    name="hash",
    tensors=TENSORS,
    options=OPTIONS,
    outputs=("out", "codes", "state"),
    gradients=("qk", "v"),
    fake_fwd=_fake_forward,
    fake_bwd=_fake_backward,
    reads=("codes", "state"),
)


def rows(x: Tensor) -> Tensor:
    """[B, N, H, D] with D contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _rows(x: Tensor) -> tuple[int, int, int, int]:
    return x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)


def _problem(tensors: Sequence[Tensor], itself: bool, offset: float) -> tuple[int | float, ...]:
    """struct Hash of csrc/hash.h, flat."""
    qk, v, anchors, weight, mean = tensors
    batch, tokens, heads, dim = qk.shape
    return (
        *(DTYPE_CODES[qk.dtype], batch, tokens, heads, dim, v.shape[-1]),
        *(anchors.shape[1], weight.shape[1], int(itself), offset),
        *(*_rows(qk), *_rows(v), anchors.data_ptr(), weight.data_ptr(), mean.data_ptr()),
    )


def forward_arguments(
    tensors: Sequence[Tensor], options: Sequence[Any], outputs: Sequence[Tensor]
) -> tuple[int | float, ...]:
    out, codes, state = outputs
    return (*_problem(tensors, *options), *_rows(out), codes.data_ptr(), state.data_ptr())


def backward_arguments(
    dout: Tensor,
    saved: Sequence[Tensor],
    tensors: Sequence[Tensor],
    options: Sequence[Any],
    results: Sequence[Tensor],
) -> tuple[int | float, ...]:
    codes, state = saved
    moved = (*_rows(dout), *_rows(results[0]), *_rows(results[1]), codes.data_ptr(), state.data_ptr())
    return (*_problem(tensors, *options), *moved)


def _cpu_forward(*args: Any) -> None:
    _C.hash_fwd((*forward_arguments(*args), torch.get_num_threads()))


def _cpu_backward(*args: Any) -> None:
    _C.hash_bwd((*backward_arguments(*args), torch.get_num_threads()))


def _cuda_forward(*args: Any) -> None:
    _cuda.launch("hash_fwd", forward_arguments(*args), args[0][0].device)


def _cuda_backward(*args: Any) -> None:
    _cuda.launch("hash_bwd", backward_arguments(*args), args[0].device)


def _forward(launch: Callable[..., None]) -> Callable[..., tuple[Tensor, ...]]:
    def hash_fwd(qk: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        tensors, options = (rows(qk), rows(v), *rest[:3]), rest[3:]
        outputs = _fake_forward(tensors, options)
        if v.shape[0]:
            launch(tensors, options, outputs)
        return outputs

    return hash_fwd


def _backward(launch: Callable[..., None]) -> Callable[..., tuple[Tensor, ...]]:
    def hash_bwd(
        dout: Tensor | None, dcodes: None, dstate: None, codes: Tensor, state: Tensor, *rest: Any
    ) -> tuple[Tensor, ...]:
        tensors, options = (rows(rest[0]), rows(rest[1]), *rest[2:5]), rest[5:-1]
        results = _fake_backward((codes, state), tensors, options, rest[-1])
        if dout is None or not tensors[1].shape[0]:
            return tuple(r.zero_() for r in results)
        launch(rows(dout), (codes, state), tensors, options, results)
        return results

    return hash_bwd


def _triton_forward(*args: Any) -> None:
    from vicinal.kernels.hash import forward

    forward(*args)


def _triton_backward(*args: Any) -> None:
    from vicinal.kernels.hash import backward

    backward(*args)


MISSING = frozenset({"long codes"})
MOST_ANCHORS = 96  # of the CUDA kernels: 99 KiB of shared memory hold no more
_backends.register(Row("cpu", "hash", ("cpu",), FLOATS, _backends.have_cpu, missing=MISSING))
_backends.register(
    Row(
        "triton",
        "hash",
        ("cuda", "cpu"),
        FLOATS,
        _backends.have_triton,
        max_head_dim=256,
        min_arch=80,
        missing=MISSING,
        wrong=frozenset({("cpu", torch.bfloat16)}),  # Triton's interpreter
    )
)
CUDA = Row(
    "cuda",
    "hash",
    ("cuda",),
    (torch.float32, torch.bfloat16, torch.float16),
    _backends.have_cuda,
    max_head_dim=256,
    min_arch=80,
    missing=MISSING | {"anchors above 96"},
)
_backends.register(CUDA)
_backends.register(Row("reference", "hash", ("any",), FLOATS, _backends.have_reference))
define(HASH, "cpu", _forward(_cpu_forward), _backward(_cpu_backward))
define(HASH, "cuda", _forward(_cuda_forward), _backward(_cuda_backward))
define(HASH, "triton", _forward(_triton_forward), _backward(_triton_backward))


def _finish(grads: list[Tensor | None], tensors: tuple[Any, ...], packed: bool) -> list[Tensor | None]:
    return [*grads, None, None, None]


hash_op = autograd_function(HASH, _finish)
