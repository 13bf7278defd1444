"""vicinal's own reference SReT."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vicinal import segments
from vicinal.drop_in.adapter import Adapter
from vicinal.drop_in.swin_attention import changed_parts
from vicinal.models.sret import SlicedAttention
from vicinal.voxel import voxel_attention
from vicinal.windowed import Windows, windowed_attention_qkvpacked


class FusedSlicedAttention(SlicedAttention):
    """The attention of the reference model on tokens where they lie: slices are windows of a line, permuted
    ones segments."""

    def attention(self, qkv: Tensor, order: Tensor | None) -> Tensor:
        """[B, N, 3, h, d] -> [B, N, C]"""
        B, n = qkv.shape[:2]
        size = n // self.slices
        if order is None:
            out = windowed_attention_qkvpacked(qkv, Windows((size,)))
        else:
            offsets = n * torch.arange(B, device=order.device)
            parts = segments.chunks(B * n, size, permutation=(offsets[:, None] + order).flatten())
            q, k, v = qkv.flatten(0, 1).unbind(1)
            out = voxel_attention(q, k, v, parts)
        assert isinstance(out, Tensor)
        return out.flatten(-2).view(B, n, -1)


def _reason_against(attn: Any) -> str | None:
    return changed_parts(attn, SlicedAttention, ("qkv", "proj"))


ADAPTERS = (
    Adapter(
        "windowed",
        SlicedAttention,
        FusedSlicedAttention,
        "windowed_attention, or voxel_attention of permuted tokens",
        _reason_against,
    ),
)
