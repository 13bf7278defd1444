"""The ops vicinal::edge_fwd and edge_bwd, and their launches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import _backends
from ._attend import accumulator
from ._backends import _C, Row
from ._family import Family, autograd_function, define, empty_gradient
from ._launch import DTYPE_CODES, FLOATS

EDGES = ("edge_k", "edge_v", "edge_mul", "edge_gate", "edge_bias")  # the last one: acc [E, heads], contiguous
GRAPH = ("rowptr", "col", "edge_id", "colptr?", "rev?", "rev_dst?")  # the last three: for the backward
TENSORS = ("q", "k", "v", *(f"{name}?" for name in EDGES), *GRAPH)
OPTIONS = (
    "str mode",
    "float clamp",  # negative: none
    "float eps",
    "float scale",
    "bool tied",  # edge_v is edge_k, and not passed
    "bool keep_edge",
    "int edges",  # rows of the edge tensors
    "bool whole",  # all of them have a slot
    "int wanted",  # bit i: the gradient of EDGES[i] is wanted
)
MODES = ("softmax", "exp", "gate")


@dataclass(frozen=True)
class Options:
    """The ops' options, by name."""

    mode: str
    clamp: float
    eps: float
    scale: float
    tied: bool
    keep_edge: bool
    edges: int
    whole: bool
    wanted: int


def _fake_forward(tensors: Sequence[Any], options: Sequence[Any]) -> tuple[Tensor, ...]:
    """out, lse (empty with gate), edge (empty if it is not kept)."""
    q, v, o = tensors[0], tensors[2], Options(*options)
    out = q.new_empty((*q.shape[:2], v.shape[-1]))
    lse = q.new_empty((0,) if o.mode == "gate" else q.shape[:2], dtype=accumulator(q.dtype))
    edge = (o.edges, *q.shape[1:]) if o.keep_edge else (0,)
    return out, lse, q.new_empty(edge) if o.whole else q.new_zeros(edge)


def _fake_backward(
    outputs: Sequence[Any], tensors: Sequence[Any], options: Sequence[Any], packed: bool
) -> tuple[Tensor, ...]:
    o = Options(*options)
    found = [t.new_empty(t.shape) for t in tensors[:3]]
    for place, x in enumerate(tensors[3:8]):
        if x is None or not o.wanted >> place & 1:
            found.append(empty_gradient(tensors[0]))
        else:
            found.append(x.new_empty(x.shape) if o.whole else x.new_zeros(x.shape))
    return tuple(found)


EDGE = Family(
    name="edge",
    tensors=TENSORS,
    options=OPTIONS,
    outputs=("out", "lse", "edge"),
    gradients=("q", "k", "v", *EDGES),
    fake_fwd=_fake_forward,
    fake_bwd=_fake_backward,
    reads=(),
)


def rows(x: Tensor | None) -> Tensor | None:
    """[N, heads, D] with D contiguous."""
    return x if x is None or x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _rows(x: Tensor | None) -> tuple[int, int, int, int]:
    """struct Rows: (pointer, batch stride, row stride, head stride); an empty tensor stands for none."""
    if x is None or x.dim() != 3:
        return 0, 0, 0, 0
    return x.data_ptr(), 0, x.stride(0), x.stride(1)


def _pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _problem(tensors: Sequence[Any], o: Options) -> tuple[int | float, ...]:
    """struct Edge of csrc/edge.h, flat."""
    q, k, v, edge_k, edge_v, edge_mul, edge_gate, bias, rowptr = tensors[:9]
    heads, dim = q.shape[1:]
    return (
        *(DTYPE_CODES[q.dtype], MODES.index(o.mode), heads, dim, v.shape[-1], o.edges, int(o.tied)),
        *(o.scale, o.eps, o.clamp),
        *(q.shape[0], k.shape[0], int(rowptr.dtype == torch.int64)),
        *(_pointer(x) for x in tensors[8:]),
        *(number for x in (q, k, v, edge_k, edge_v, edge_mul, edge_gate) for number in _rows(x)),
        _pointer(bias),
    )


def forward_arguments(
    tensors: Sequence[Any], o: Options, outputs: Sequence[Tensor]
) -> tuple[int | float, ...]:
    """struct EdgeFwd, flat."""
    out, lse, edge = outputs
    return (*_problem(tensors, o), *_rows(out), 0 if lse.dim() == 1 else lse.data_ptr(), *_rows(edge))


def backward_arguments(
    grads: Sequence[Any], tensors: Sequence[Any], o: Options, results: Sequence[Tensor], weights: Tensor
) -> tuple[int | float, ...]:
    """struct EdgeBwd, flat."""
    dout, dlse, dedge = grads
    dbias = results[7]
    return (
        *_problem(tensors, o),
        *(*_rows(dout), _pointer(dlse), *_rows(dedge)),
        *(number for x in results[:7] for number in _rows(x)),
        *(dbias.data_ptr() if dbias.dim() == 2 else 0, weights.data_ptr()),
    )


def weights_of(tensors: Sequence[Any], o: Options) -> Tensor:
    """Room for p and dx of every slot and head, between the two passes of the backward."""
    q, col = tensors[0], tensors[9]
    size = (0,) if o.mode == "gate" else (len(col), 2, q.shape[1])
    return torch.empty(size, dtype=accumulator(q.dtype), device=q.device)


def _cpu_forward(tensors: Sequence[Any], o: Options, outputs: Sequence[Tensor]) -> None:
    _C.edge_fwd((*forward_arguments(tensors, o, outputs), torch.get_num_threads()))


def _cpu_backward(
    grads: Sequence[Any], tensors: Sequence[Any], o: Options, results: Sequence[Tensor]
) -> None:
    weights = weights_of(tensors, o)
    _C.edge_bwd((*backward_arguments(grads, tensors, o, results, weights), torch.get_num_threads()))


def _forward(launch: Callable[..., None]) -> Callable[..., tuple[Tensor, ...]]:
    n = len(TENSORS)

    def edge_fwd(*args: Any) -> tuple[Tensor, ...]:
        tensors = (*map(rows, args[:7]), *args[7:n])
        outputs = _fake_forward(tensors, args[n:])
        launch(tensors, Options(*args[n:]), outputs)
        return outputs

    return edge_fwd


def _backward(launch: Callable[..., None]) -> Callable[..., tuple[Tensor, ...]]:
    n = len(TENSORS)

    def edge_bwd(dout: Tensor | None, dlse: Tensor | None, dedge: Tensor | None, *args: Any) -> Any:
        tensors, options = (*map(rows, args[:7]), *args[7:n]), args[n:-1]
        results = _fake_backward((), tensors, options, args[-1])
        q, v = tensors[0], tensors[2]
        if dout is None:
            dout = q.new_zeros((*q.shape[:2], v.shape[-1]))
        grads = (rows(dout), None if dlse is None else dlse.contiguous(), rows(dedge))
        launch(grads, tensors, Options(*options), results)
        return results

    return edge_bwd


def _no_cuda(device: str) -> str:
    return "edge attention has no CUDA C++ kernels yet"


def _no_triton(device: str) -> str:
    return "edge attention has no Triton kernels yet"


_backends.register(Row("cpu", "edge", ("cpu",), FLOATS, _backends.have_cpu))
_backends.register(Row("triton", "edge", ("cuda",), FLOATS, _no_triton, missing=frozenset({"all kernels"})))
_backends.register(Row("cuda", "edge", ("cuda",), FLOATS, _no_cuda, missing=frozenset({"all kernels"})))
_backends.register(Row("reference", "edge", ("any",), FLOATS, _backends.have_reference))
define(EDGE, "cpu", _forward(_cpu_forward), _backward(_cpu_backward))


def _finish(grads: list[Tensor | None], tensors: tuple[Any, ...], packed: bool) -> list[Tensor | None]:
    return [*grads, *[None] * len(GRAPH)]


edge_op = autograd_function(EDGE, _finish)
