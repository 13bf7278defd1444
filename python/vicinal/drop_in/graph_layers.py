"""vicinal's own reference layers of graph transformers."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from vicinal import segments
from vicinal.drop_in.adapter import Adapter
from vicinal.edge import Graph, edge_attention
from vicinal.models.graph_layers import EdgeAttention, GraphWiseAttention, HCMTEdgeLayer
from vicinal.voxel import voxel_attention


class FusedEdgeAttention(EdgeAttention):
    """The attention of the Graph Transformer in one operation."""

    def attention(self, q: Tensor, k: Tensor, v: Tensor, e: Tensor, graph: Graph) -> tuple[Tensor, Tensor]:
        options: Any = {"mode": "exp", "clamp": 5.0, "eps": 1e-6, "return_edge": True}
        out, edge = edge_attention(q, k, v, graph, edge_mul=e, **options)
        return out, edge


class FusedHCMTEdgeLayer(HCMTEdgeLayer):
    """The edge layer of HCMT with one operation for each set of edges."""

    def attention(self, q: Tensor, k: Tensor, v: Tensor, p: Tensor, g: Tensor, graph: Graph) -> Tensor:
        out = edge_attention(q, k, v, graph, edge_mul=p, edge_gate=g, mode="gate", clamp=2.0)
        assert isinstance(out, Tensor)
        return out


class FusedGraphWiseAttention(GraphWiseAttention):
    """Attention inside each graph without the dense batch."""

    def forward(self, h: Tensor, batch: Tensor) -> Tensor:  # type: ignore[override]
        made = segments.from_batch(batch, int(batch.max()) + 1 if len(batch) else 0)
        qkv = F.linear(h, self.in_proj_weight, self.in_proj_bias).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.unbind(1)
        out = voxel_attention(q, k, v, made)
        assert isinstance(out, Tensor)
        return self.out_proj(out.flatten(1))


def _reason_against(attn: Any) -> str | None:
    return "it has attention dropout" if attn.dropout else None


ADAPTERS = (
    Adapter("edge", EdgeAttention, FusedEdgeAttention, "edge_attention"),
    Adapter("edge", HCMTEdgeLayer, FusedHCMTEdgeLayer, "edge_attention"),
    Adapter("voxel", GraphWiseAttention, FusedGraphWiseAttention, "voxel_attention", _reason_against),
)
