"""Swin V2 of timm in the implementation of Christoph Reich ("swinv2_cr")."""

from __future__ import annotations

from typing import Any

import torch
from timm.models import swin_transformer_v2_cr
from torch import Tensor

from vicinal.drop_in.adapter import Adapter
from vicinal.drop_in.swin_attention import changed_parts
from vicinal.drop_in.timm_swin import windows_of
from vicinal.nn import packed_windowed_attention


class FusedSwinTransformerV2CrBlock(swin_transformer_v2_cr.SwinTransformerV2CrBlock):
    """timm's block with window attention in place on the map."""

    def _shifted_window_attn(self, x: Tensor) -> Tensor:
        attn = self.attn
        out = packed_windowed_attention(
            attn.qkv(x),
            attn.qkv.bias,
            windows_of(self, x),
            attn.num_heads,
            bias=_bias(attn),
            logit_scale=attn.logit_scale,
            dropout_p=attn.attn_drop.p if self.training else 0.0,
        )
        return attn.proj_drop(attn.proj(out))


def _bias(attn: Any) -> Tensor:
    """The network's bias of every pair while its dropout tells pairs apart, else of every offset."""
    if attn.training and attn.meta_mlp.drop1.p + attn.meta_mlp.drop2.p > 0:
        bias: Tensor = attn._relative_positional_encodings()
        return bias
    # a pair for each offset: query max(d, 0) and key max(-d, 0) along each axis
    height, width = attn.window_size
    device = attn.relative_coordinates_log.device
    dy = torch.arange(1 - height, height, device=device)[:, None]
    dx = torch.arange(1 - width, width, device=device)
    query = dy.clamp_min(0) * width + dx.clamp_min(0)
    key = (-dy).clamp_min(0) * width + (-dx).clamp_min(0)
    pairs = (query * (height * width) + key).flatten()
    table: Tensor = attn.meta_mlp(attn.relative_coordinates_log[pairs])
    return table


def _reason_against(block: Any) -> str | None:
    return changed_parts(block.attn, swin_transformer_v2_cr.WindowMultiHeadAttention, ("qkv", "proj"))


ADAPTERS = (
    Adapter(
        "windowed",
        swin_transformer_v2_cr.SwinTransformerV2CrBlock,
        FusedSwinTransformerV2CrBlock,
        "windowed_attention",
        _reason_against,
    ),
)
