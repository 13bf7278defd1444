"""EfficientFormer of timm. Version 2 mixes heads inside the softmax (talking heads) and is left alone."""

from __future__ import annotations

from math import isqrt

from timm.models import efficientformer
from torch import Tensor

from vicinal.drop_in.absolute_bias import attend_whole_map, signed_tables
from vicinal.drop_in.adapter import Adapter


class FusedAttention(efficientformer.Attention):
    """timm's attention over a whole map, on the tokens where they lie."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, N, C]"""
        qkv = self.qkv(x).unflatten(-1, (self.num_heads, -1))
        q, k, v = qkv.split([self.key_dim, self.key_dim, self.val_dim], dim=-1)
        side = isqrt(self.attention_biases.shape[1])
        tables = signed_tables(self.attention_biases, (side, side))
        return self.proj(attend_whole_map(q, k, v, (side, side), tables, self.scale))


def _reason_against(attn: efficientformer.Attention) -> str | None:
    tokens = attn.attention_biases.shape[1]
    return None if isqrt(tokens) ** 2 == tokens else f"its map of {tokens} tokens is not square"


ADAPTERS = (
    Adapter(
        "windowed",
        efficientformer.Attention,
        FusedAttention,
        "windowed_attention, one window",
        _reason_against,
    ),
)
