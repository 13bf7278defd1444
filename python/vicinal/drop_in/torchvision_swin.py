"""Swin, versions 1 and 2, of torchvision."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2

from vicinal.drop_in.adapter import Adapter
from vicinal.drop_in.swin_attention import changed_parts, cosine_table, windows_on
from vicinal.nn import packed_windowed_attention


def _attend(
    attn: Any, x: Tensor, qkv_bias: Tensor | None, table: Tensor, logit_scale: Tensor | None
) -> Tensor:
    space = x.shape[1:3]
    # along an axis that one window covers, torchvision does not shift
    shift = tuple(0 if w >= L else s for w, L, s in zip(attn.window_size, space, attn.shift_size))
    out = packed_windowed_attention(
        F.linear(x, attn.qkv.weight, qkv_bias),
        qkv_bias,
        windows_on(space, attn.window_size, shift=shift),
        attn.num_heads,
        bias=table,
        logit_scale=logit_scale,
        dropout_p=attn.attention_dropout if attn.training else 0.0,
    )
    return F.dropout(attn.proj(out), attn.dropout, attn.training)


class FusedShiftedWindowAttention(ShiftedWindowAttention):
    """torchvision's window attention of version 1, in place on the map."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]"""
        return _attend(self, x, self.qkv.bias, self.relative_position_bias_table, None)


class FusedShiftedWindowAttentionV2(ShiftedWindowAttentionV2):
    """torchvision's window attention of version 2, in place on the map."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]"""
        bias = self.qkv.bias
        if bias is not None:
            q_bias, k_bias, v_bias = bias.chunk(3)
            bias = torch.cat(
                [q_bias, torch.zeros_like(k_bias), v_bias]
            )  # the key's third is stored, but never used
        table = cosine_table(self.cpb_mlp, self.relative_coords_table)
        return _attend(self, x, bias, table, self.logit_scale)


def _reason_against(attn: Any) -> str | None:
    return changed_parts(attn, type(attn), ("qkv", "proj"))


ADAPTERS = (
    Adapter(
        "windowed", ShiftedWindowAttention, FusedShiftedWindowAttention, "windowed_attention", _reason_against
    ),
    Adapter(
        "windowed",
        ShiftedWindowAttentionV2,
        FusedShiftedWindowAttentionV2,
        "windowed_attention",
        _reason_against,
    ),
)
