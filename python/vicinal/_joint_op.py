"""The ops vicinal::joint_fwd and joint_bwd, and their launches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import _backends, _cuda
from ._attend import accumulator
from ._backends import _C, Row
from ._family import Family, autograd_function, define, empty_gradient
from ._launch import DTYPE_CODES, FLOATS

TENSORS = ("quad_q", "quad_k", "lin_q", "lin_k", "v", "u?", "bias?", "ignored?", "seed?")
GRADIENTS = ("quad_q", "quad_k", "lin_q", "lin_k", "v", "u", "bias")
OPTIONS = (
    "int group_size",  # 0: all tokens
    "bool is_causal",
    "str activation",
    "float? quad_scale",  # None: 1 / group_size
    "float? lin_scale",  # None: 1 / tokens, 1 / group_size if causal
    "float dropout_p",
    "bool gate",
    "bool keep",  # with a gate: return what the backward needs besides
)
ACTIVATION_CODES = {"relu2": 0, "laplace": 1}
_NOTHING = (0, 0, 0)


@dataclass(frozen=True)
class Options:
    """The ops' options, by name and resolved for a number of tokens."""

    group: int
    causal: bool
    activation: str
    quad_scale: float
    lin_scale: float
    dropout_p: float
    gate: bool
    keep: bool


def resolve(options: Sequence[Any], tokens: int) -> Options:
    group, causal, activation, quad_scale, lin_scale, dropout_p, gate, keep = options
    group = group or tokens
    if quad_scale is None:
        quad_scale = 1.0 / group
    if lin_scale is None:
        lin_scale = 1.0 / (group if causal else tokens)
    return Options(group, causal, activation, quad_scale, lin_scale, dropout_p, gate, keep)


def _fake_forward(tensors: Sequence[Any], options: Sequence[Any]) -> tuple[Tensor, ...]:
    """out, other, inner_v, inner_u, state: see csrc/joint.h; what is not there is empty."""
    lin_k, v, u = tensors[3], tensors[4], tensors[5]
    group, causal, gate, keep = options[0], options[1], options[6], options[7]
    batch, tokens, width = v.shape

    def empty() -> Tensor:
        return torch.empty((batch, tokens, width), dtype=v.dtype, device=v.device)

    other = empty() if u is not None and not gate else empty_gradient(v)
    inner = (empty(), empty()) if gate and keep else (empty_gradient(v), empty_gradient(v))
    states = -(-tokens // (group or tokens)) if causal else 1
    shape = (batch, states, lin_k.shape[-1], width if u is None else 2 * width)
    return empty(), other, *inner, v.new_empty(shape, dtype=accumulator(v.dtype))


def _fake_backward(
    outputs: Sequence[Any], tensors: Sequence[Any], options: Sequence[Any], packed: bool
) -> tuple[Tensor, ...]:
    *first, u, bias, _, _ = tensors
    like = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in first]
    du = empty_gradient(first[4]) if u is None else torch.empty(u.shape, dtype=u.dtype, device=u.device)
    acc = accumulator(first[4].dtype)
    dbias = empty_gradient(first[4]) if bias is None else bias.new_empty(bias.shape, dtype=acc)
    return (*like, du, dbias)


JOINT = Family(
    name="joint",
    tensors=TENSORS,
    options=OPTIONS,
    outputs=("out", "other", "inner_v", "inner_u", "state"),
    gradients=GRADIENTS,
    fake_fwd=_fake_forward,
    fake_bwd=_fake_backward,
    reads=("inner_v", "inner_u", "state"),
)


def rows(x: Tensor | None) -> Tensor | None:
    """[B, N, D] with D contiguous."""
    return x if x is None or x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _matrix(x: Tensor | None) -> tuple[int, int, int]:
    """(pointer, batch stride, token stride); an empty tensor stands for none."""
    if x is None or x.dim() != 3:
        return _NOTHING
    return x.data_ptr(), x.stride(0), x.stride(1)


def _pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _problem(tensors: Sequence[Any], o: Options) -> tuple[int | float, ...]:
    """struct Joint of csrc/joint.h, flat."""
    v, (bias, ignored, seed) = tensors[4], tensors[6:]
    batch, tokens, width = v.shape
    return (
        *(DTYPE_CODES[v.dtype], ACTIVATION_CODES[o.activation], batch, tokens, o.group),
        *(tensors[0].shape[-1], width, int(o.causal), int(o.gate)),
        *(number for x in tensors[:6] for number in _matrix(x)),
        *(o.quad_scale, o.lin_scale, o.dropout_p, _pointer(bias), _pointer(ignored), _pointer(seed)),
    )


def forward_arguments(
    tensors: Sequence[Any], o: Options, outputs: Sequence[Tensor]
) -> tuple[int | float, ...]:
    matrices = (number for x in outputs[:4] for number in _matrix(x))
    return (*_problem(tensors, o), *matrices, outputs[4].data_ptr())


def backward_arguments(
    grads: Sequence[Any],
    saved: Sequence[Tensor],
    tensors: Sequence[Any],
    o: Options,
    results: Sequence[Tensor],
    *,
    scratch: Tensor,
) -> tuple[int | float, ...]:
    """scratch: memory like the state."""
    inner_v, inner_u, state = saved
    read = (number for x in (inner_v, inner_u, *grads) for number in _matrix(x))
    written = (number for x in results[:6] for number in _matrix(x))
    dbias = 0 if tensors[6] is None else results[6].data_ptr()
    states = (state.data_ptr(), scratch.data_ptr())
    return (*_problem(tensors, o), *read, *states, *written, dbias)


def _cpu_forward(*args: Any) -> None:
    _C.joint_fwd((*forward_arguments(*args), torch.get_num_threads()))


def _cpu_backward(*args: Any) -> None:
    scratch = torch.empty_like(args[1][2])
    _C.joint_bwd((*backward_arguments(*args, scratch=scratch), torch.get_num_threads()))


def _cuda_forward(*args: Any) -> None:
    _cuda.launch("joint_fwd", forward_arguments(*args), args[0][4].device)


def _cuda_backward(*args: Any) -> None:
    scratch = torch.empty_like(args[1][2])
    _cuda.launch("joint_bwd", backward_arguments(*args, scratch=scratch), scratch.device)


def _forward(launch: Callable[..., None]) -> Callable[..., tuple[Tensor, ...]]:
    n = len(TENSORS)

    def joint_fwd(*args: Any) -> tuple[Tensor, ...]:
        tensors, options = [*map(rows, args[:6]), *args[6:n]], args[n:]
        outputs = _fake_forward(tensors, options)
        launch(tensors, resolve(options, tensors[4].shape[1]), outputs)
        return outputs

    return joint_fwd


def _backward(launch: Callable[..., None]) -> Callable[..., tuple[Tensor, ...]]:
    first, last = 8, 8 + len(TENSORS)

    def joint_bwd(*args: Any) -> tuple[Tensor, ...]:
        grads, saved = [rows(x) for x in args[:2]], args[5:8]
        tensors, options = [*map(rows, args[first : first + 6]), *args[first + 6 : last]], args[last:-1]
        results = _fake_backward(saved, tensors, options, args[-1])
        launch(grads, saved, tensors, resolve(options, tensors[4].shape[1]), results)
        return results

    return joint_bwd


def _triton_forward(tensors: Sequence[Any], o: Options, outputs: Sequence[Tensor]) -> None:
    from vicinal.kernels.joint import forward

    forward(tensors, o, outputs)


def _triton_backward(*args: Any) -> None:
    from vicinal.kernels.joint import backward

    backward(*args)


# float16: rounding the gradient of the scores for its products leaves up to 2.3e-3 (RMS); 2e-3 is allowed.
# float64: Triton 3.7 does not compile the kernels with bias, gate and laplace.
TRITON_FLOATS = (torch.float32, torch.bfloat16)
WRONG_IN_INTERPRETER = frozenset({("cpu", torch.bfloat16)})
_backends.register(Row("cpu", "joint", ("cpu",), FLOATS, _backends.have_cpu))
_backends.register(
    Row(
        "triton",
        "joint",
        ("cuda", "cpu"),
        TRITON_FLOATS,
        _backends.have_triton,
        min_arch=80,
        missing=frozenset({"dropout", "keys above 256"}),
        wrong=WRONG_IN_INTERPRETER,
    )
)
CUDA = Row(
    "cuda",
    "joint",
    ("cuda",),
    (torch.float32, torch.bfloat16, torch.float16),
    _backends.have_cuda,
    min_arch=80,
)
_backends.register(CUDA)
_backends.register(Row("reference", "joint", ("any",), FLOATS, _backends.have_reference))
define(JOINT, "cpu", _forward(_cpu_forward), _backward(_cpu_backward))
define(JOINT, "cuda", _forward(_cuda_forward), _backward(_cuda_backward))
define(JOINT, "triton", _forward(_triton_forward), _backward(_triton_backward))


def _finish(grads: list[Tensor | None], tensors: tuple[Any, ...], packed: bool) -> list[Tensor | None]:
    return [*grads, None, None]


joint_op = autograd_function(JOINT, _finish)
