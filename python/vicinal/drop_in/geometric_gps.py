"""The global attention of GPS, in torch_geometric: softmax attention of each graph, or Performer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.nn import GPSConv
from torch_geometric.nn.attention import PerformerAttention

from vicinal import segments
from vicinal.drop_in.adapter import Adapter
from vicinal.drop_in.swin_attention import changed_parts
from vicinal.linear import FeatureMap, linear_attention
from vicinal.voxel import voxel_attention


class FusedGPSConv(GPSConv):
    """torch_geometric's layer whose nodes attend to their graph where they lie: no padded batch, no mask.

    Dropout of attention weights has no kernel on graphs: training with it runs as it was."""

    def forward(self, x: Tensor, edge_index: Any, batch: Tensor | None = None, **kwargs: Any) -> Tensor:
        """[N, C] -> [N, C]"""
        if self.training and self.attn.dropout:
            out: Tensor = super().forward(x, edge_index, batch, **kwargs)
            return out
        parts = []
        if self.conv is not None:
            parts.append(self._added(self.conv(x, edge_index, **kwargs), x, self.norm1, batch))
        parts.append(self._added(self._global(x, batch), x, self.norm2, batch))
        found = parts[0] if len(parts) == 1 else parts[0] + parts[1]
        return self._normed(self.norm3, found + self.mlp(found), batch)

    def _added(self, found: Tensor, x: Tensor, norm: Any, batch: Tensor | None) -> Tensor:
        return self._normed(norm, F.dropout(found, self.dropout, self.training) + x, batch)

    def _normed(self, norm: Any, x: Tensor, batch: Tensor | None) -> Tensor:
        if norm is None:
            return x
        return norm(x, batch=batch) if self.norm_with_batch else norm(x)

    def _global(self, x: Tensor, batch: Tensor | None) -> Tensor:
        """Multi-head attention of every node to the nodes of its graph."""
        attn = self.attn
        qkv = F.linear(x, attn.in_proj_weight, attn.in_proj_bias)
        q, k, v = qkv.unflatten(-1, (3, attn.num_heads, attn.head_dim)).unbind(-3)
        if batch is None:
            lengths = torch.tensor([len(x)], device=x.device)
        else:
            lengths = torch.bincount(batch)
        out = voxel_attention(q, k, v, segments.from_lengths(lengths))
        assert isinstance(out, Tensor)
        return attn.out_proj(out.flatten(-2))


class FusedPerformerAttention(PerformerAttention):
    """torch_geometric's module with its attention in one operation.

    As in the original, the values of padding count nothing but its keys stay in the denominator."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, N, C] -> [B, N, C]; mask [B, N] bool, True = a node."""
        projection = self.fast_attn.projection_matrix
        heads = (self.heads, self.head_channels)
        q, k, v = (project(x).unflatten(-1, heads) for project in (self.q, self.k, self.v))
        if mask is not None:
            v = v.masked_fill(~mask[..., None, None], 0.0)
        relu = FeatureMap("relu", param=1e-3)
        out = linear_attention(q @ projection.T, k @ projection.T, v, feature_map=relu, eps=0.0)
        assert isinstance(out, Tensor)
        return self.dropout(self.attn_out(out.flatten(-2)))


def _against_gps(layer: Any) -> str | None:
    attn = layer.attn
    if type(attn) is not nn.MultiheadAttention:
        return f"its attention is a {type(attn).__qualname__}, not a MultiheadAttention"
    odd = {
        "separate projections": attn.in_proj_weight is None,
        "bias_k": attn.bias_k is not None,
        "add_zero_attn": attn.add_zero_attn,
    }
    if found := [name for name, there in odd.items() if there]:
        return f"its MultiheadAttention has {', '.join(found)}"
    return None


def _against_performer(attn: Any) -> str | None:
    if type(attn.kernel) is not nn.ReLU or attn.fast_attn.kernel is not attn.kernel:
        return "its feature map is not a ReLU"
    return changed_parts(attn, PerformerAttention, ("q", "k", "v", "attn_out"))


def _softmax(layer: Any) -> bool:
    return not isinstance(layer.attn, PerformerAttention)


ADAPTERS = (
    Adapter(
        "voxel",
        GPSConv,
        FusedGPSConv,
        "voxel_attention",
        _against_gps,
        applies=_softmax,
        covers=lambda layer: (layer, *layer.attn.modules()),
    ),
    Adapter(
        "linear", PerformerAttention, FusedPerformerAttention, "linear_attention, relu", _against_performer
    ),
)
