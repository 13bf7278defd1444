"""Dilated Neighborhood Attention Transformer in plain PyTorch (Hassani and Shi, 2022, arXiv:2209.15001).

Every token attends to the k x k tokens around it, at a distance of `dilation`; at the ends of an axis the
window moves inward and keeps its size. With dilation 1 everywhere this is NAT (arXiv:2204.07143). Parameters
carry the names of the official release. A map smaller than k * dilation is padded with zeros at its end
before the projection, as the release's detection models do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vicinal.models.swin import Mlp, drop_path, drop_path_rates, init_linear

__all__ = ["DiNAT", "DiNATBlock", "DiNATConfig", "NeighborhoodAttention"]


@dataclass(frozen=True)
class DiNATConfig:
    """Sizes of a DiNAT; `dilations` holds those that the blocks of each level take in turn."""

    in_channels: int = 3
    num_classes: int = 1000
    embed_dim: int = 64
    depths: tuple[int, ...] = (3, 4, 6, 5)
    num_heads: tuple[int, ...] = (2, 4, 8, 16)
    kernel_size: int = 7
    dilations: tuple[tuple[int, ...], ...] = ((1, 8), (1, 4), (1, 2), (1,))
    mlp_ratio: float = 3.0
    qkv_bias: bool = True
    layer_scale: float | None = None
    drop_path: float = 0.0


def window_indices(length: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    """[length, k] the tokens of each token's window on one axis, and their rows of a bias table of 2k - 1."""
    token = torch.arange(length)
    group, place = token % d, token // d
    members = (length - group + d - 1) // d  # tokens of the group: every d-th
    first = (place - k // 2).clamp_min(0).minimum(members - k)
    places = first[:, None] + torch.arange(k)
    return group[:, None] + d * places, places - place[:, None] + k - 1


class NeighborhoodAttention(nn.Module):
    """softmax(scale q k^T + rpb) v over the window of every token; [B, H, W, C] -> [B, H, W, C]."""

    def __init__(
        self, dim: int, num_heads: int, kernel_size: int, dilation: int, qkv_bias: bool = True
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.kernel_size = kernel_size
        self.dilation = dilation
        self.scale = (dim // num_heads) ** -0.5
        self.rpb = nn.Parameter(torch.zeros(num_heads, 2 * kernel_size - 1, 2 * kernel_size - 1))
        nn.init.trunc_normal_(self.rpb, std=0.02)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        _, height, width, _ = x.shape
        least = self.kernel_size * self.dilation
        x = F.pad(x, (0, 0, 0, max(0, least - width), 0, max(0, least - height)))
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(3)  # [B, H, W, h, d]
        out = self.attention(q, k, v)[:, :height, :width]
        return self.proj(out.flatten(-2))

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B, H, W, h, d] each -> [B, H, W, h, d]: gather the keys of every window, k * k of them."""
        _, H, W, _, _ = q.shape
        side = self.kernel_size
        rows, bias_y = (t.to(q.device) for t in window_indices(H, side, self.dilation))
        columns, bias_x = (t.to(q.device) for t in window_indices(W, side, self.dilation))
        window = (rows[:, None, :, None], columns[None, :, None, :])  # [H, W, k, k] together
        bias = self.rpb[:, bias_y[:, None, :, None], bias_x[None, :, None, :]]  # [h, H, W, k, k]
        scores = torch.einsum("byxhd,byxijhd->byxhij", self.scale * q, k[:, window[0], window[1]])
        scores = scores + bias.permute(1, 2, 0, 3, 4)
        weights = scores.flatten(-2).softmax(-1).unflatten(-1, (side, side))
        return torch.einsum("byxhij,byxijhd->byxhd", weights, v[:, window[0], window[1]])


class DiNATBlock(nn.Module):
    """Attention and an MLP with residuals, each scaled per channel where there is a layer scale; [B, H, W, C]
    -> [B, H, W, C]."""

    gamma1: nn.Parameter | None
    gamma2: nn.Parameter | None

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int,
        dilation: int,
        *,
        mlp_ratio: float = 3.0,
        qkv_bias: bool = True,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(dim)
        self.attn = NeighborhoodAttention(dim, num_heads, kernel_size, dilation, qkv_bias)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        for name in ("gamma1", "gamma2"):
            scale = None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale))
            self.register_parameter(name, scale)

    def forward(self, x: Tensor) -> Tensor:
        x = x + drop_path(_scaled(self.attn(self.norm1(x)), self.gamma1), self.drop_path, self.training)
        return x + drop_path(_scaled(self.mlp(self.norm2(x)), self.gamma2), self.drop_path, self.training)


def _scaled(x: Tensor, gamma: Tensor | None) -> Tensor:
    return x if gamma is None else gamma * x


class ConvTokenizer(nn.Module):
    """Two 3x3 convolutions with stride 2; [B, channels, height, width] -> [B, H, W, C]."""

    def __init__(self, in_channels: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.Conv2d(in_channels, dim // 2, 3, stride=2, padding=1),
            nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1),
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(self.proj(images).permute(0, 2, 3, 1))


class ConvDownsampler(nn.Module):
    """3x3 convolution with stride 2; [B, H, W, C] -> [B, ceil(H/2), ceil(W/2), 2C]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1, bias=False)
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.reduction(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class Level(nn.Module):
    """Blocks at one resolution, their dilations in turn, then a downsampler unless it is the last level."""

    def __init__(self, config: DiNATConfig, i: int, drop_paths: Sequence[float]) -> None:
        super().__init__()
        dim, dilations = config.embed_dim * 2**i, config.dilations[i]
        self.blocks = nn.ModuleList(
            DiNATBlock(
                dim,
                config.num_heads[i],
                config.kernel_size,
                dilations[j % len(dilations)],
                mlp_ratio=config.mlp_ratio,
                qkv_bias=config.qkv_bias,
                layer_scale=config.layer_scale,
                drop_path=p,
            )
            for j, p in enumerate(drop_paths)
        )
        self.downsample = None if i == len(config.depths) - 1 else ConvDownsampler(dim)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x if self.downsample is None else self.downsample(x)


class DiNAT(nn.Module):
    """Image classifier; [B, channels, height, width] -> [B, num_classes]."""

    def __init__(self, config: DiNATConfig) -> None:
        super().__init__()
        self.config = config
        rates = drop_path_rates(config.drop_path, sum(config.depths))
        self.patch_embed = ConvTokenizer(config.in_channels, config.embed_dim)
        self.levels = nn.ModuleList(
            Level(config, i, [rates.pop(0) for _ in range(depth)]) for i, depth in enumerate(config.depths)
        )
        dim = config.embed_dim * 2 ** (len(config.depths) - 1)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, config.num_classes)
        self.apply(init_linear)

    def forward_features(self, images: Tensor) -> Tensor:
        """[B, channels, height, width] -> [B, H, W, C] the normalised last map."""
        x = self.patch_embed(images)
        for level in self.levels:
            x = level(x)
        return self.norm(x)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.forward_features(images).mean(dim=(1, 2)))
