"""Hiera of timm: attention inside mask units, whose tokens lie at a stride in the unrolled order."""

from __future__ import annotations

from typing import Any

from timm.models import hiera
from torch import Tensor

from vicinal.drop_in.adapter import Adapter
from vicinal.drop_in.swin_attention import changed_parts
from vicinal.windowed import Windows, windowed_attention, windowed_attention_qkvpacked


class FusedMaskUnitAttention(hiera.MaskUnitAttention):
    """timm's attention inside mask units, on the tokens where they lie."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, N / q_stride, C']"""
        units = x.shape[1] // (self.q_stride * self.window_size)
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, self.head_dim))
        size = x.shape[1] // units
        if self.q_stride == 1:
            out = windowed_attention_qkvpacked(qkv, Windows(size, partition="grid"), scale=self.scale)
        else:
            q, k, v = qkv.unbind(-3)
            q = q.unflatten(1, (self.q_stride, -1)).amax(1)  # the members of a pool lead the order
            windows = Windows(size, partition="grid", q_size=size // self.q_stride)
            out = windowed_attention(q, k, v, windows, scale=self.scale)
        assert isinstance(out, Tensor)
        return self.proj(out.flatten(-2))


def _reason_against(attn: Any) -> str | None:
    if not attn.use_mask_unit_attn:
        return "attention over all tokens: scaled_dot_product_attention computes it already"
    return changed_parts(attn, hiera.MaskUnitAttention, ("qkv", "proj"))


ADAPTERS = (
    Adapter(
        "windowed", hiera.MaskUnitAttention, FusedMaskUnitAttention, "windowed_attention", _reason_against
    ),
)
