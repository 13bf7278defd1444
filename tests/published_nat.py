"""A classifier with the layers, names and calls of the published NAT and DiNAT files, for any natten.

The process that imports this must have made `natten` importable.
"""

from __future__ import annotations

from typing import Any

import natten
import torch
from natten import NeighborhoodAttention2D as NeighborhoodAttention
from torch import Tensor, nn

from vicinal.models import DiNATConfig
from vicinal.models.dinat import ConvDownsampler, ConvTokenizer
from vicinal.models.swin import Mlp

VERSION = tuple(int(part) for part in natten.__version__.split(".")[:3])


def make_attention(dim: int, num_heads: int, kernel_size: int, dilation: int) -> nn.Module:
    """As nat.py calls it; files for 0.17 ask for the bias, those for 0.20 have none."""
    sizes: dict[str, Any] = {"kernel_size": kernel_size, "dilation": dilation, "num_heads": num_heads}
    if VERSION >= (0, 20):
        return NeighborhoodAttention(dim, qkv_bias=True, qk_scale=None, proj_drop=0.0, **sizes)
    if VERSION >= (0, 17):
        sizes["rel_pos_bias"] = True
    return NeighborhoodAttention(dim, qkv_bias=True, qk_scale=None, attn_drop=0.0, proj_drop=0.0, **sizes)


class UnfusedAttention(nn.Module):
    """The attention of files that call the functions; by position, as every version counts them."""

    def __init__(self, dim: int, num_heads: int, kernel_size: int, dilation: int) -> None:
        super().__init__()
        self.num_heads, self.kernel_size, self.dilation = num_heads, kernel_size, dilation
        self.scale = (dim // num_heads) ** -0.5
        self.rpb = nn.Parameter(torch.zeros(num_heads, 2 * kernel_size - 1, 2 * kernel_size - 1))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        from natten.functional import natten2dav, natten2dqkrpb

        B, H, W, C = x.shape
        qkv = self.qkv(x).reshape(B, H, W, 3, self.num_heads, -1).permute(3, 0, 4, 1, 2, 5)
        q, k, v = qkv[0] * self.scale, qkv[1], qkv[2]
        sizes = (self.dilation,) if VERSION <= (0, 14, 4) else (self.kernel_size, self.dilation)
        attn = natten2dqkrpb(q, k, self.rpb, *sizes).softmax(-1)
        return self.proj(natten2dav(attn, v, *sizes).permute(0, 2, 3, 1, 4).reshape(B, H, W, C))


class NATLayer(nn.Module):
    def __init__(self, attention: Any, dim: int, num_heads: int, config: DiNATConfig, dilation: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = attention(dim, num_heads, config.kernel_size, dilation)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * config.mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class NATBlock(nn.Module):
    def __init__(self, attention: Any, config: DiNATConfig, i: int) -> None:
        super().__init__()
        dim, dilations = config.embed_dim * 2**i, config.dilations[i]
        self.blocks = nn.ModuleList(
            NATLayer(attention, dim, config.num_heads[i], config, dilations[j % len(dilations)])
            for j in range(config.depths[i])
        )
        self.downsample = ConvDownsampler(dim) if i < len(config.depths) - 1 else None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x if self.downsample is None else self.downsample(x)


class NAT(nn.Module):
    def __init__(self, attention: Any, config: DiNATConfig) -> None:
        super().__init__()
        self.patch_embed = ConvTokenizer(3, config.embed_dim)
        self.levels = nn.ModuleList(NATBlock(attention, config, i) for i in range(len(config.depths)))
        dim = config.embed_dim * 2 ** (len(config.depths) - 1)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, config.num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        for level in self.levels:
            x = level(x)
        return self.head(self.norm(x).flatten(1, 2).mean(1))
