"""From a call of edge attention to a backend: cast, check, choose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import _check as checks
from . import _choice
from . import reference_edge as reference
from ._attend import accumulator
from ._edge_graph import Graph
from ._edge_op import EDGES, MODES, edge_op
from .reference_edge import Edges


@dataclass(slots=True)
class Call:
    """Checked arguments."""

    q: Tensor
    k: Tensor
    v: Tensor
    graph: Graph
    edges: Edges
    mode: str
    clamp: float  # negative: none
    eps: float
    scale: float


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    graph: Any,
    edges: Edges,
    mode: Any = "softmax",
    clamp: Any = None,
    eps: Any = 0.0,
    scale: Any = None,
) -> Call:
    """Cast under autocast, check, and name the arguments."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        checks.tensor(name, x)
        if x.dim() != 3:
            raise ValueError(f"{name} has shape {list(x.shape)}; it must be [N, heads, head_dim]")
    for name, given in zip(("edge_k", "edge_v", "edge_mul", "edge_gate", "edge_bias"), edges):
        if given is not None:
            checks.floating(name, given)
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        edges = _cast(edges, dtype)
    checks.like_q(q, k=k, v=v)
    checks.shape("k", k, (k.shape[0], *q.shape[1:]), "[Ns, heads, D]")
    checks.shape("v", v, (*k.shape[:2], v.shape[-1]), "[Ns, heads, Dv]")
    checks.head_dims(q, v)
    checks.one_of("mode", mode, MODES)
    _check_graph(q, k, graph)
    _check_edges(q, v, graph, edges, mode)
    clamp, eps = _check_numbers(mode, clamp, eps, scale)
    return Call(
        q, k, v, graph, edges, mode, clamp, eps, q.shape[-1] ** -0.5 if scale is None else float(scale)
    )


def _cast(edges: Edges, dtype: torch.dtype) -> Edges:
    """One tensor at two places stays one."""
    k = None if edges.k is None else edges.k.to(dtype)
    v = k if edges.v is edges.k else edges.v if edges.v is None else edges.v.to(dtype)
    mul, gate = (x if x is None else x.to(dtype) for x in (edges.mul, edges.gate))
    return Edges(k, v, mul, gate, edges.bias)


def _check_graph(q: Tensor, k: Tensor, graph: Any) -> None:
    if not isinstance(graph, Graph):
        raise TypeError(f"graph is a {type(graph).__name__}; it must be a Graph")
    for name, x, rows, what in (("q", q, graph.n_dst, "destinations"), ("k", k, graph.n_src, "sources")):
        if x.shape[0] != rows:
            raise ValueError(f"{name} has {x.shape[0]} rows; graph has {rows} {what}")
    if graph.device != q.device:
        raise ValueError(f"graph is on {graph.device}; it must be on {q.device} as q")


def _check_edges(q: Tensor, v: Tensor, graph: Graph, edges: Edges, mode: str) -> None:
    heads, dim, dim_v, n = *q.shape[1:], v.shape[-1], graph.n_edges
    widths = {"edge_k": dim, "edge_v": dim_v, "edge_mul": dim, "edge_gate": dim_v}
    for (name, width), x in zip(widths.items(), edges):
        if x is None:
            continue
        if x.dtype != q.dtype:
            raise TypeError(f"{name} is {x.dtype}; it must be {q.dtype} as q")
        checks.on_device_of_q(name, x, q)
        checks.shape(name, x, (n, heads, width), "[E, heads, head_dim]")
    if edges.bias is not None:
        checks.on_device_of_q("edge_bias", edges.bias, q)
        checks.shape("edge_bias", edges.bias, (n, heads), "[E, heads]")
    if mode == "gate" and dim != dim_v:
        raise ValueError(f"q and v have head dims {dim} and {dim_v}; with mode 'gate' they must be equal")


def _check_numbers(mode: str, clamp: Any, eps: Any, scale: Any) -> tuple[float, float]:
    for name, value in (("clamp", clamp), ("eps", eps), ("scale", scale)):
        checks.finite_or_none(name, value)
    if clamp is not None and clamp < 0:
        raise ValueError(f"clamp is {clamp!r}; it must be at least 0, or None")
    if eps is None or eps < 0:
        raise ValueError(f"eps is {eps!r}; it must be at least 0")
    if eps and mode != "exp":
        raise ValueError(f"eps is {eps!r}; with mode {mode!r} it must be 0")
    return -1.0 if clamp is None else float(clamp), float(eps)


def problem_key(call: Call) -> _choice.Key:
    return _choice.problem_key("edge", call.q, call.v, ())


def run(call: Call, keep_edge: bool, backend: str | None) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse and edge."""
    chosen = _choice.choose(problem_key(call), backend)
    return run_reference(call) if chosen == "reference" else _run_op(call, keep_edge, chosen)


def run_reference(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Plain PyTorch."""
    c = call
    with torch.autocast(c.q.device.type, enabled=False):  # prepare cast what is to be cast
        return reference.edge_attention(c.q, c.k, c.v, c.graph, c.edges, c.mode, c.clamp, c.eps, c.scale)


def _run_op(call: Call, keep_edge: bool, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    graph, edges = call.graph, call.edges
    tied = edges.k is not None and edges.v is edges.k
    bias = None if edges.bias is None else edges.bias.to(accumulator(call.q.dtype)).contiguous()
    given = (edges.k, None if tied else edges.v, edges.mul, edges.gate, bias)
    assert len(given) == len(EDGES)
    transformed = torch._C._are_functorch_transforms_active()
    wanted = sum(1 << i for i, x in enumerate(given) if x is not None and (x.requires_grad or transformed))
    trained = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (call.q, call.k, call.v, *given)
    )
    reverse = graph.reverse() if trained or transformed else (None, None, None)
    options = (
        *(call.mode, call.clamp, call.eps, call.scale),
        *(tied, keep_edge, graph.n_edges, graph.whole, wanted),
    )
    tables = (graph.rowptr, graph.col, graph.edge_id, *reverse)
    return edge_op(backend, False, options, call.q, call.k, call.v, *given, *tables)  # type: ignore[return-value]
