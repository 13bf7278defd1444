"""Layers of graph transformers in plain PyTorch.

The Graph Transformer layer with edge features (Dwivedi and Bresson, arXiv 2012.09699), the GPS layer
(Rampasek et al., arXiv 2205.12454) and the edge layer of HCMT (Yu et al., 2024). Nodes are rows [N, C], edges
rows [E, C] in the order in which the `Graph` was given them. Parameters have the names of the published code,
but those of HCMT, which are our own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vicinal.edge import Graph

__all__ = ["EdgeAttention", "GPSLayer", "GatedGCN", "GraphTransformerLayer", "HCMTEdgeLayer"]


def by_edge(graph: Graph) -> tuple[Tensor, Tensor]:
    """src and dst int64 [E], in the order of the edge tensors."""
    if not graph.whole:
        raise ValueError(f"graph has {graph.n_edges} rows of edge tensors, not all of which are edges")
    place = torch.empty_like(graph.edge_id, dtype=torch.long)
    place[graph.edge_id.long()] = torch.arange(graph.n_edges, device=place.device)
    return graph.col[place].long(), graph.dst()[place].long()


def summed(x: Tensor, dst: Tensor, rows: int) -> Tensor:
    return torch.zeros(rows, *x.shape[1:], dtype=x.dtype, device=x.device).index_add(0, dst, x)


class EdgeAttention(nn.Module):
    """h'_i = sum_e w_e V_j / (sum_e w_e + 1e-6) with t_e = K_j Q_i E_e / sqrt(d) per channel and w_e =
    exp(clamp(sum t_e, -5, 5)); also returns t. [N, C], [E, C] -> [N, h, d], [E, h, d]."""

    def __init__(self, dim: int, out_dim: int, num_heads: int, bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.Q, self.K, self.V, self.proj_e = (
            nn.Linear(dim, num_heads * out_dim, bias=bias) for _ in range(4)
        )

    def forward(self, h: Tensor, e: Tensor, graph: Graph) -> tuple[Tensor, Tensor]:
        rows = (self.Q(h), self.K(h), self.V(h), self.proj_e(e))
        q, k, v, edge = (x.unflatten(-1, (self.num_heads, -1)) for x in rows)
        return self.attention(q, k, v, edge, graph)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, e: Tensor, graph: Graph) -> tuple[Tensor, Tensor]:
        src, dst = by_edge(graph)
        t = k[src] * q[dst] * q.shape[-1] ** -0.5 * e
        w = t.sum(-1, keepdim=True).clamp(-5, 5).exp()
        return summed(w * v[src], dst, len(q)) / (summed(w, dst, len(q)) + 1e-6), t


class GraphTransformerLayer(nn.Module):
    """Attention along edges and an MLP, for nodes and edges alike; h [N, C], e [E, C] -> the same."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        dropout: float = 0.0,
        layer_norm: bool = False,
        batch_norm: bool = True,
        residual: bool = True,
        use_bias: bool = False,
    ) -> None:
        super().__init__()
        self.dropout, self.residual = dropout, residual
        self.attention = EdgeAttention(dim, dim // num_heads, num_heads, use_bias)
        self.O_h, self.O_e = nn.Linear(dim, dim), nn.Linear(dim, dim)
        norms: tuple[tuple[bool, str, Callable[..., nn.Module]], ...] = (
            (layer_norm, "layer_norm", nn.LayerNorm),
            (batch_norm, "batch_norm", nn.BatchNorm1d),
        )
        self.norms = tuple(name for wanted, name, _ in norms if wanted)
        for place in ("1_h", "1_e"):
            for wanted, name, kind in norms:
                if wanted:
                    setattr(self, name + place, kind(dim))
        for x in "he":
            setattr(self, f"FFN_{x}_layer1", nn.Linear(dim, 2 * dim))
            setattr(self, f"FFN_{x}_layer2", nn.Linear(2 * dim, dim))
        for place in ("2_h", "2_e"):
            for wanted, name, kind in norms:
                if wanted:
                    setattr(self, name + place, kind(dim))

    def forward(self, h: Tensor, e: Tensor, graph: Graph) -> tuple[Tensor, Tensor]:
        of_nodes, of_edges = self.attention(h, e, graph)
        return self.rest(of_nodes, h, "h"), self.rest(of_edges, e, "e")

    def rest(self, x: Tensor, before: Tensor, kind: str) -> Tensor:
        """Projection, residual, norm, MLP, residual, norm; [.., h, d] -> [.., C]."""
        x = F.dropout(x.flatten(1), self.dropout, self.training)
        x = self.normed(getattr(self, f"O_{kind}")(x), before, f"1_{kind}")
        y = F.relu(getattr(self, f"FFN_{kind}_layer1")(x))
        y = getattr(self, f"FFN_{kind}_layer2")(F.dropout(y, self.dropout, self.training))
        return self.normed(y, x, f"2_{kind}")

    def normed(self, x: Tensor, before: Tensor, place: str) -> Tensor:
        x = before + x if self.residual else x
        for name in self.norms:
            x = getattr(self, name + place)(x)
        return x


class HCMTEdgeLayer(nn.Module):
    """h'_i = sum_e w_e V_j G_e with w_e = exp(clamp(K_j Q_i P_e / sqrt(d), -2, 2)), all per channel.

    h [N, C] and several sets of edges, each of a graph and features [E, C], with one set of weights; the
    results of the sets are added. Returns [N, C].
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.Q, self.K, self.V, self.P, self.G = (nn.Linear(dim, dim) for _ in range(5))
        self.O_h = nn.Linear(dim, dim)

    def forward(self, h: Tensor, *sets: tuple[Graph, Tensor]) -> Tensor:
        q, k, v = (f(h).unflatten(-1, (self.num_heads, -1)) for f in (self.Q, self.K, self.V))
        total = torch.zeros_like(q)
        for graph, e in sets:
            p, g = (f(e).unflatten(-1, (self.num_heads, -1)) for f in (self.P, self.G))
            total = total + self.attention(q, k, v, p, g, graph)
        return self.O_h(total.flatten(1))

    def attention(self, q: Tensor, k: Tensor, v: Tensor, p: Tensor, g: Tensor, graph: Graph) -> Tensor:
        """[N, h, d] and [E, h, d] -> [N, h, d]"""
        src, dst = by_edge(graph)
        w = (k[src] * q[dst] * q.shape[-1] ** -0.5 * p).clamp(-2, 2).exp()
        return summed(w * v[src] * g, dst, len(q))


class GatedGCN(nn.Module):
    """e'_e = D h_i + E h_j + C e_e; h'_i = A h_i + sum_e s_e B h_j / (sum_e s_e + 1e-6), s = sigmoid(e').
    Batch norm, ReLU and a residual for both."""

    def __init__(self, dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        self.A, self.B, self.C, self.D, self.E = (nn.Linear(dim, dim) for _ in range(5))
        self.bn_node_x, self.bn_edge_e = nn.BatchNorm1d(dim), nn.BatchNorm1d(dim)

    def forward(self, h: Tensor, e: Tensor, graph: Graph) -> tuple[Tensor, Tensor]:
        src, dst = by_edge(graph)
        edge = self.D(h)[dst] + self.E(h)[src] + self.C(e)
        gate = edge.sigmoid()
        sums = summed(gate * self.B(h)[src], dst, len(h))
        node = self.A(h) + sums / (summed(gate, dst, len(h)) + 1e-6)
        node, edge = F.relu(self.bn_node_x(node)), F.relu(self.bn_edge_e(edge))
        node, edge = (F.dropout(x, self.dropout, self.training) for x in (node, edge))
        return h + node, e + edge


class GPSLayer(nn.Module):
    """Message passing along edges and attention between all nodes of a graph, added, then an MLP; h [N, C], e
    [E, C] -> the same.

    `global_attention` (default: full attention inside each graph, from `self_attn`) may be any module that
    takes (h [N, C], batch int [N]) and returns [N, C], a Performer say.
    """

    def __init__(
        self, dim: int, num_heads: int, dropout: float = 0.0, global_attention: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.local_model = GatedGCN(dim, dropout)
        if global_attention is None:
            self.self_attn: Any = GraphWiseAttention(dim, num_heads, batch_first=True)
        else:
            self.self_attn = global_attention
        self.norm1_local, self.norm1_attn = nn.BatchNorm1d(dim), nn.BatchNorm1d(dim)
        self.ff_linear1, self.ff_linear2 = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)
        self.norm2 = nn.BatchNorm1d(dim)

    def forward(self, h: Tensor, e: Tensor, graph: Graph, batch: Tensor) -> tuple[Tensor, Tensor]:
        """batch: int [N], the graph that each node belongs to."""
        local, e = self.local_model(h, e, graph)
        attended = F.dropout(self.self_attn(h, batch), self.dropout, self.training)
        x = self.norm1_local(local) + self.norm1_attn(h + attended)
        y = F.dropout(F.relu(self.ff_linear1(x)), self.dropout, self.training)
        return self.norm2(x + F.dropout(self.ff_linear2(y), self.dropout, self.training)), e


class GraphWiseAttention(nn.MultiheadAttention):
    """torch.nn.MultiheadAttention inside each graph, through a dense batch [B, most nodes, C] and a key mask;
    rows [N, C] and their graph [N] -> [N, C]."""

    def forward(self, h: Tensor, batch: Tensor) -> Tensor:  # type: ignore[override]
        order = torch.sort(batch, stable=True)[1]
        counts = torch.bincount(batch)
        first = torch.cumsum(counts, 0) - counts
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=h.device) - first[batch[order]]
        most = int(counts.max()) if len(counts) else 0
        dense = h.new_zeros(len(counts), most, h.shape[1]).index_put((batch, place), h)
        empty = torch.ones(dense.shape[:2], dtype=torch.bool, device=h.device).index_put(
            (batch, place), torch.zeros((), dtype=torch.bool, device=h.device)
        )
        attended = super().forward(dense, dense, dense, key_padding_mask=empty, need_weights=False)[0]
        return attended[batch, place]
