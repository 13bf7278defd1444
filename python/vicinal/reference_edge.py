"""Edge attention in plain PyTorch: gathered rows, and sums over edges by index."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._edge_graph import Graph

PIECE = 128  # edges that are summed one after another


class Index(NamedTuple):
    """Which node each slot belongs to: slots belong to pieces, at most PIECE to each, pieces to nodes."""

    piece: Tensor
    node: Tensor
    nodes: int


class Edges(NamedTuple):
    """The edge tensors [E, H, D], and bias [E, H], in the caller's order."""

    k: Tensor | None = None
    v: Tensor | None = None
    mul: Tensor | None = None
    gate: Tensor | None = None
    bias: Tensor | None = None


def edge_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    graph: Graph,
    edges: Edges,
    mode: str,
    clamp: float,
    eps: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """out [Nd, H, Dv] and edge [E, H, D] in q's dtype, lse [Nd, H] (empty with gate)."""
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    n_slots = int(graph.rowptr[-1]) if not graph.whole else len(graph.col)
    src, row = (x[:n_slots].long() for x in (graph.col, graph.edge_id))
    dst = _index(graph, n_slots)
    n, heads, dim = q.shape
    key, value = k.double()[src].to(acc), v.double()[src].to(acc)
    if edges.k is not None:
        key = key + edges.k.to(acc)[row]
    if edges.v is not None:
        value = value + edges.v.to(acc)[row]
    if edges.gate is not None:
        value = value * edges.gate.to(acc)[row]
    t = _gathered(q, dst, acc) * scale * key
    if edges.mul is not None:
        t = t * edges.mul.to(acc)[row]
    edge = torch.zeros(graph.n_edges, heads, dim, dtype=acc, device=q.device).index_copy(0, row, t)
    x = t if mode == "gate" else t.sum(-1)
    if edges.bias is not None:
        bias = edges.bias.to(acc)[row]
        x = x + (bias[..., None] if mode == "gate" else bias)
    if clamp >= 0:
        x = x.clamp(-clamp, clamp)
    if mode == "gate":
        out = _summed(x.exp() * value, dst)
        return out.to(q.dtype), q.new_empty(0, dtype=acc), edge.to(q.dtype)
    top = torch.zeros(n, heads, dtype=acc, device=q.device)
    of_slot = dst.node[dst.piece]
    if mode == "softmax":
        most = torch.full_like(top, -torch.inf)
        most = most.scatter_reduce(0, of_slot[:, None].expand_as(x), x.detach(), "amax")
        top = torch.where(most > -torch.inf, most, 0)
    weight = (x - top[of_slot]).exp()
    total = _summed(weight, dst) + (eps if mode == "exp" else 0.0)
    some = total > 0
    safe = torch.where(some, total, 1)
    out = _summed((weight / _gathered(safe, dst, acc))[..., None] * value, dst)
    lse = torch.where(some, top + safe.log(), -torch.inf)
    return out.to(q.dtype), lse, edge.to(q.dtype)


def _index(graph: Graph, n_slots: int) -> Index:
    ptr, dst = graph.rowptr.long(), graph.dst()[:n_slots].long()
    if torch.compiler.is_compiling():  # the number of pieces is not known then
        return Index(dst, torch.arange(graph.n_dst, device=dst.device), graph.n_dst)
    count = (ptr[1:] - ptr[:-1] + PIECE - 1) // PIECE
    first = torch.cumsum(count, 0) - count
    place = torch.arange(n_slots, device=dst.device) - ptr[dst]
    owner = torch.repeat_interleave(torch.arange(graph.n_dst, device=dst.device), count)
    return Index(first[dst] + place // PIECE, owner, graph.n_dst)


def _gathered(x: Tensor, index: Index, dtype: torch.dtype) -> Tensor:
    """The row of x of each slot; its gradient, a sum over as many edges as a node has, is accumulated in
    float64, piece by piece."""
    return x.double()[index.node][index.piece].to(dtype)


def _summed(x: Tensor, index: Index) -> Tensor:
    """The sums of the rows of x over the slots of each node, in float64, piece by piece."""
    sums = torch.zeros(len(index.node), *x.shape[1:], dtype=torch.float64, device=x.device)
    sums = sums.index_add(0, index.piece, x.double())
    total = torch.zeros(index.nodes, *x.shape[1:], dtype=torch.float64, device=x.device)
    return total.index_add(0, index.node, sums).to(x.dtype)
