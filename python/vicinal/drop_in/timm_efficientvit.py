"""EfficientViT (the cascaded one) of timm.

Windows stay partitioned: queries pass a convolution inside each window, and the result of a head is the input
of the next, pads included. What is partitioned stays channels last, so that nothing is copied between the
projections and the attention of a head."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.models import efficientvit_msra
from torch import Tensor

from vicinal.drop_in.absolute_bias import attend_whole_map, signed_tables
from vicinal.drop_in.adapter import Adapter


class FusedLocalWindowAttention(efficientvit_msra.LocalWindowAttention):
    """timm's attention inside windows, one fused call for each head."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]"""
        side, (_, _, H, W) = self.attn.resolution, x.shape
        if (side, side) == (H, W):
            return _cascade(self.attn, x.contiguous(memory_format=torch.channels_last))
        x = F.pad(x.permute(0, 2, 3, 1), (0, 0, 0, -W % side, 0, -H % side))
        windows = x.unflatten(2, (-1, side)).unflatten(1, (-1, side)).transpose(2, 3)
        out = _cascade(self.attn, windows.flatten(0, 2).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        out = out.unflatten(0, windows.shape[:3]).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return out[:, :H, :W].permute(0, 3, 1, 2)


def _cascade(attn: Any, x: Tensor) -> Tensor:
    """[B windows, C, w, w] -> [B windows, C, w, w], channels last in memory"""
    space = (x.shape[2], x.shape[3])
    sizes = [attn.key_dim, attn.key_dim, attn.val_dim]
    tables = signed_tables(attn.attention_biases, space)
    shares = x.chunk(attn.num_heads, dim=1)
    feature, outs = shares[0], []
    for i, (project, convolve) in enumerate(zip(attn.qkvs, attn.dws)):
        feature = feature + shares[i] if i else feature
        q, k, v = project(feature).split(sizes, dim=1)
        q, k, v = (part.flatten(2).transpose(1, 2).unsqueeze(2) for part in (convolve(q), k, v))
        out = attend_whole_map(q, k, v, space, tables[i : i + 1], attn.scale)
        feature = out.transpose(1, 2).unflatten(2, space)
        outs.append(feature)
    return attn.proj(torch.cat(outs, 1))


def _reason_against(module: Any) -> str | None:
    if type(module.attn) is efficientvit_msra.CascadedGroupAttention:
        return None
    return f"its attention is a {type(module.attn).__qualname__}, not a CascadedGroupAttention"


ADAPTERS = (
    Adapter(
        "windowed",
        efficientvit_msra.LocalWindowAttention,
        FusedLocalWindowAttention,
        "windowed_attention, one call for each head",
        _reason_against,
    ),
)
