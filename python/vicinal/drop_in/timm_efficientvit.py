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
        x = x.permute(0, 2, 3, 1)
        if (side, side) == (H, W):
            return _cascade(self.attn, x).permute(0, 3, 1, 2)
        x = F.pad(x, (0, 0, 0, -W % side, 0, -H % side))
        windows = x.unflatten(2, (-1, side)).unflatten(1, (-1, side)).transpose(2, 3)
        out = _cascade(self.attn, windows.flatten(0, 2)).unflatten(0, windows.shape[:3])
        out = out.transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return out[:, :H, :W].permute(0, 3, 1, 2)


def _cascade(attn: Any, x: Tensor) -> Tensor:
    """[B windows, w, w, C] -> [B windows, w, w, C]"""
    space = (x.shape[1], x.shape[2])
    sizes = [attn.key_dim, attn.key_dim, attn.val_dim]
    tables = signed_tables(attn.attention_biases, space)
    shares = x.chunk(attn.num_heads, dim=-1)
    feature, outs = shares[0], []
    for i, (project, convolve) in enumerate(zip(attn.qkvs, attn.dws)):
        feature = feature + shares[i] if i else feature
        q, k, v = _pointwise(project, feature).split(sizes, dim=-1)
        q = convolve(q.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        q, k, v = (part.flatten(1, 2).unsqueeze(2) for part in (q, k, v))
        feature = attend_whole_map(q, k, v, space, tables[i : i + 1], attn.scale).unflatten(1, space)
        outs.append(feature)
    activation, project = attn.proj
    return _pointwise(project, activation(torch.cat(outs, -1)))


def _pointwise(layer: Any, x: Tensor) -> Tensor:
    """A convolution of one pixel and its batch normalisation, on channels last: [..., C] -> [..., C']

    PyTorch's convolution of so few pixels takes 5 times as long and turns the result to channels first."""
    y = F.linear(x, layer.conv.weight.flatten(1))
    normed: Tensor = layer.bn(y.flatten(0, -2)[:, :, None, None])
    return normed.view(y.shape)


def _reason_against(module: Any) -> str | None:
    attn = module.attn
    if type(attn) is not efficientvit_msra.CascadedGroupAttention:
        return f"its attention is a {type(attn).__qualname__}, not a CascadedGroupAttention"
    for layer in (*attn.qkvs, attn.proj[1]):
        if type(layer) is not efficientvit_msra.ConvNorm:
            return f"a projection is a {type(layer).__qualname__}, not a ConvNorm"
    return None


ADAPTERS = (
    Adapter(
        "windowed",
        efficientvit_msra.LocalWindowAttention,
        FusedLocalWindowAttention,
        "windowed_attention, one call for each head",
        _reason_against,
    ),
)
