"""The multi-scale linear attention (LiteMLA) of EfficientViT, in timm."""

from __future__ import annotations

from typing import Any

import torch
from timm.models import efficientvit_mit
from torch import Tensor, nn

from vicinal.drop_in.adapter import Adapter
from vicinal.linear import linear_attention


class FusedLiteMLA(efficientvit_mit.LiteMLA):
    """timm's module with its attention on views of the map: no transposed copy, no column of ones."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C', H, W]"""
        B, _, H, W = x.shape
        qkv = self.qkv(x)
        scales = torch.cat([qkv, *(op(qkv) for op in self.aggreg)], 1)
        tokens = scales.view(B, -1, 3 * self.dim, H * W).permute(0, 3, 1, 2)  # [B, N, heads, 3 D]
        q, k, v = tokens.chunk(3, -1)
        out = linear_attention(q, k, v, feature_map="relu", eps=self.eps)
        assert isinstance(out, Tensor)
        return self.proj(out.permute(0, 2, 3, 1).reshape(B, -1, H, W))


def _reason_against(attn: Any) -> str | None:
    if type(attn.kernel_func) is not nn.ReLU:
        return f"its feature map is a {type(attn.kernel_func).__qualname__}, not a ReLU"
    return None


ADAPTERS = (
    Adapter("linear", efficientvit_mit.LiteMLA, FusedLiteMLA, "linear_attention, relu", _reason_against),
)
