"""Swin Transformer, versions 1 and 2, in plain PyTorch: the model as its papers write it.

Attention runs inside w x w windows; every second block shifts the windows by w // 2 with a cyclic roll, and a
mask of -100 keeps apart the tokens that only the roll made neighbours. Version 1 (Liu et al., 2021,
arXiv:2103.14030) adds a learned bias per relative position to scaled dot products; version 2 (Liu et al.,
2022, arXiv:2111.09883) compares directions (cosine attention with a learned temperature), computes the bias
with a small network and normalises after the sublayers.

Parameters and buffers carry the names of the official release, so its checkpoints load strictly; other
libraries' names are translated by `vicinal.models.swin_keys`.

Sizes: any height and width. Images are padded with zeros at the bottom and right to a multiple of the patch;
the token map is padded the same way to a multiple of the window after the first normalisation and before the
roll, so a padded token is a zero input whose key and value are the bias of the projection, and it takes part
in the attention. An odd map is padded by one row or column before patch merging. Along an axis that holds one
window nothing is shifted."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["SwinConfig", "SwinTransformer", "SwinTransformerBlock", "WindowAttention", "WindowAttentionV2"]


@dataclass(frozen=True)
class SwinConfig:
    """Sizes of a Swin Transformer; `version` is 1 or 2, sizes are pixels, patches and tokens."""

    image_size: int | tuple[int, int] = 224
    patch_size: int = 4
    in_channels: int = 3
    num_classes: int = 1000
    embed_dim: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    window_size: int = 7
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    drop_path: float = 0.0
    version: int = 1
    pretrained_window_sizes: tuple[int, ...] = (0, 0, 0, 0)


def window_partition(x: Tensor, window: int) -> Tensor:
    """[B, H, W, C] -> [B * nW, window**2, C], windows row-major within an image."""
    B, H, W, C = x.shape
    x = x.view(B, H // window, window, W // window, window, C)
    return x.transpose(2, 3).reshape(-1, window * window, C)


def window_reverse(windows: Tensor, window: int, H: int, W: int) -> Tensor:
    """[B * nW, window**2, C] -> [B, H, W, C], the inverse of `window_partition`."""
    C = windows.shape[-1]
    x = windows.view(-1, H // window, W // window, window, window, C)
    return x.transpose(2, 3).reshape(-1, H, W, C)


def relative_position_index(window: int) -> Tensor:
    """[N, N] row of the bias table for (query, key): (dy + w - 1) * (2w - 1) + dx + w - 1."""
    tokens = torch.arange(window * window)
    row, col = tokens // window, tokens % window
    dy = row[:, None] - row[None, :]
    dx = col[:, None] - col[None, :]
    return (dy + window - 1) * (2 * window - 1) + dx + window - 1


def shift_mask(H: int, W: int, window: int, shift: tuple[int, int]) -> Tensor:
    """[nW, N, N] 0 where two tokens of a rolled window were neighbours before the roll, -100 elsewhere."""
    # the last `shift` rows of the rolled map came from the top of the image, the last columns from its left
    row_wrapped = torch.arange(H) >= H - shift[0]
    col_wrapped = torch.arange(W) >= W - shift[1]
    region = 2 * row_wrapped[:, None] + 1 * col_wrapped[None, :]
    region = window_partition(region.view(1, H, W, 1), window).squeeze(-1)
    apart = region[:, :, None] != region[:, None, :]
    return torch.zeros(apart.shape).masked_fill(apart, -100.0)


def drop_path(x: Tensor, p: float, training: bool) -> Tensor:
    """Zero whole samples of a residual branch with probability p (stochastic depth), scaling the others."""
    if p == 0.0 or not training:
        return x
    keep = x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(1 - p)
    return x * keep / (1 - p)


def drop_path_rates(last: float, blocks: int) -> list[float]:
    """Rates that grow linearly from 0 at the first block to `last` at the last one."""
    return [last * i / max(blocks - 1, 1) for i in range(blocks)]


def softmax_attention(logits: Tensor, mask: Tensor | None, v: Tensor) -> Tensor:
    """softmax(logits + mask) v: [B * nW, h, N, N], [nW, N, N], [B * nW, h, N, d] -> [B * nW, N, h * d]."""
    if mask is not None:
        logits = (logits.unflatten(0, (-1, mask.shape[0])) + mask[:, None]).flatten(0, 1)
    return (logits.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)


class WindowAttention(nn.Module):
    """softmax(q k^T / sqrt(d) + bias + mask) v inside each window; [B * nW, N, C] -> [B * nW, N, C]."""

    relative_position_index: Tensor

    def __init__(self, dim: int, window_size: int, num_heads: int, qkv_bias: bool = True) -> None:
        super().__init__()
        self.window_size = window_size
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window_size - 1) ** 2, num_heads))
        self.register_buffer("relative_position_index", relative_position_index(window_size))
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def bias(self) -> Tensor:
        """[h, N, N] bias of every (head, query, key)."""
        return self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B * nW, h, N, d] each
        logits = self.scale * q @ k.transpose(-2, -1) + self.bias()
        return self.proj(softmax_attention(logits, mask, v))


def relative_coords_table(window: int, pretrained_window: int) -> Tensor:
    """[1, 2w-1, 2w-1, 2] offsets (dy, dx) as sign(c) log2(1 + |c|) / 3 with c = 8 offset / (w - 1)."""
    largest = max((pretrained_window or window) - 1, 1)
    c = 8.0 * torch.arange(1 - window, window, dtype=torch.float32) / largest
    c = c.sign() * torch.log2(1 + c.abs()) / 3
    return torch.stack(torch.meshgrid(c, c, indexing="ij"), dim=-1).unsqueeze(0)


class WindowAttentionV2(nn.Module):
    """softmax(tau cos(q, k) + bias + mask) v inside each window; [B * nW, N, C] -> [B * nW, N, C].

    tau = exp(logit_scale) <= 100 per head, bias = 16 sigmoid(cpb_mlp(log-spaced offset)); keys have no bias.
    """

    relative_position_index: Tensor
    relative_coords_table: Tensor

    def __init__(
        self,
        dim: int,
        window_size: int,
        num_heads: int,
        qkv_bias: bool = True,
        pretrained_window_size: int = 0,
    ) -> None:
        super().__init__()
        self.window_size = window_size
        self.num_heads = num_heads
        self.logit_scale = nn.Parameter(torch.full((num_heads, 1, 1), math.log(10.0)))
        self.cpb_mlp = nn.Sequential(nn.Linear(2, 512), nn.ReLU(), nn.Linear(512, num_heads, bias=False))
        self.register_buffer(
            "relative_coords_table", relative_coords_table(window_size, pretrained_window_size)
        )
        self.register_buffer("relative_position_index", relative_position_index(window_size))
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        self.proj = nn.Linear(dim, dim)

    def bias_table(self) -> Tensor:
        """[(2w-1)**2, h] bias of every relative position."""
        return 16 * torch.sigmoid(self.cpb_mlp(self.relative_coords_table)).flatten(0, 2)

    def bias(self) -> Tensor:
        """[h, N, N] bias of every (head, query, key)."""
        return self.bias_table()[self.relative_position_index].permute(2, 0, 1)

    def qkv_bias(self) -> Tensor | None:
        """[3 C] bias of the packed projection, zero for the keys."""
        if self.q_bias is None or self.v_bias is None:
            return None
        return torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        qkv = F.linear(x, self.qkv.weight, self.qkv_bias()).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B * nW, h, N, d] each
        cosine = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        tau = self.logit_scale.clamp(max=math.log(100.0)).exp()
        return self.proj(softmax_attention(tau * cosine + self.bias(), mask, v))


class Mlp(nn.Module):
    """fc2(gelu(fc1(x))) on the last axis."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class SwinTransformerBlock(nn.Module):
    """(Shifted) window attention and an MLP with residuals; [B, H, W, C] -> [B, H, W, C]."""

    attn_mask: Tensor | None

    def __init__(
        self,
        dim: int,
        resolution: tuple[int, int],
        num_heads: int,
        window_size: int,
        shift_size: int,
        *,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path: float = 0.0,
        version: int = 1,
        pretrained_window_size: int = 0,
    ) -> None:
        super().__init__()
        if min(resolution) <= window_size:  # a small map is one window; it needs no shift
            window_size, shift_size = min(resolution), 0
        self.window_size = window_size
        self.shift_size = shift_size
        self.drop_path = drop_path
        self.post_norm = version == 2
        self.norm1 = nn.LayerNorm(dim)
        self.attn: WindowAttention | WindowAttentionV2
        if version == 1:
            self.attn = WindowAttention(dim, window_size, num_heads, qkv_bias)
        else:
            self.attn = WindowAttentionV2(dim, window_size, num_heads, qkv_bias, pretrained_window_size)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        H, W = (L + -L % window_size for L in resolution)
        self.mask_resolution = (H, W)
        shift = self.shift(H, W)
        self.register_buffer("attn_mask", shift_mask(H, W, window_size, shift) if any(shift) else None)

    def shift(self, H: int, W: int) -> tuple[int, int]:
        """Shift along each axis: none where the axis holds one window."""
        w, s = self.window_size, self.shift_size
        return (s if w < H else 0, s if w < W else 0)

    def mask(self, H: int, W: int, x: Tensor) -> Tensor | None:
        """[nW, N, N] shift mask of an H x W map in the type and place of x, or None without a shift."""
        if not any(self.shift(H, W)):
            return None
        if self.mask_resolution == (H, W) and self.attn_mask is not None:
            return self.attn_mask.to(x.dtype)
        return shift_mask(H, W, self.window_size, self.shift(H, W)).to(x)

    def window_attention(self, x: Tensor) -> Tensor:
        """Pad, roll, attend inside windows, roll back, crop: [B, H, W, C] -> [B, H, W, C]."""
        _, H, W, _ = x.shape
        w = self.window_size
        x = F.pad(x, (0, 0, 0, -W % w, 0, -H % w))
        _, padded_H, padded_W, _ = x.shape
        dy, dx = self.shift(padded_H, padded_W)
        x = x.roll((-dy, -dx), dims=(1, 2))
        windows = self.attn(window_partition(x, w), self.mask(padded_H, padded_W, x))
        x = window_reverse(windows, w, padded_H, padded_W)
        return x.roll((dy, dx), dims=(1, 2))[:, :H, :W]

    def forward(self, x: Tensor) -> Tensor:
        p, train = self.drop_path, self.training
        if self.post_norm:
            x = x + drop_path(self.norm1(self.window_attention(x)), p, train)
            return x + drop_path(self.norm2(self.mlp(x)), p, train)
        x = x + drop_path(self.window_attention(self.norm1(x)), p, train)
        return x + drop_path(self.mlp(self.norm2(x)), p, train)


class PatchMerging(nn.Module):
    """Join 2 x 2 neighbours to 2C channels; [B, H, W, C] -> [B, ceil(H/2), ceil(W/2), 2C]."""

    def __init__(self, dim: int, version: int = 1) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(2 * dim if version == 2 else 4 * dim)
        self.post_norm = version == 2

    def forward(self, x: Tensor) -> Tensor:
        _, H, W, _ = x.shape
        x = F.pad(x, (0, 0, 0, W % 2, 0, H % 2))
        corners = [x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]]
        x = torch.cat(corners, dim=-1)
        return self.norm(self.reduction(x)) if self.post_norm else self.reduction(self.norm(x))


class PatchEmbed(nn.Module):
    """Project p x p patches to tokens; [B, channels, height, width] -> [B, H, W, C]."""

    def __init__(self, in_channels: int, dim: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_channels, dim, patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(dim)

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        images = F.pad(images, (0, -width % self.patch_size, 0, -height % self.patch_size))
        return self.norm(self.proj(images).permute(0, 2, 3, 1))


class Stage(nn.Module):
    """Blocks at one resolution, every second one shifted, then patch merging unless it is the last stage."""

    def __init__(
        self, config: SwinConfig, i: int, resolution: tuple[int, int], drop_paths: list[float]
    ) -> None:
        super().__init__()
        dim = config.embed_dim * 2**i
        self.blocks = nn.ModuleList(
            SwinTransformerBlock(
                dim,
                resolution,
                config.num_heads[i],
                config.window_size,
                0 if j % 2 == 0 else config.window_size // 2,
                mlp_ratio=config.mlp_ratio,
                qkv_bias=config.qkv_bias,
                drop_path=p,
                version=config.version,
                pretrained_window_size=config.pretrained_window_sizes[i],
            )
            for j, p in enumerate(drop_paths)
        )
        last = i == len(config.depths) - 1
        self.downsample = None if last else PatchMerging(dim, config.version)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x if self.downsample is None else self.downsample(x)


class SwinTransformer(nn.Module):
    """Image classifier; [B, channels, height, width] -> [B, num_classes]."""

    def __init__(self, config: SwinConfig) -> None:
        super().__init__()
        self.config = config
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        resolution = (math.ceil(height / config.patch_size), math.ceil(width / config.patch_size))
        rates = drop_path_rates(config.drop_path, sum(config.depths))
        self.patch_embed = PatchEmbed(config.in_channels, config.embed_dim, config.patch_size)
        self.layers = nn.ModuleList()
        for i, depth in enumerate(config.depths):
            self.layers.append(Stage(config, i, resolution, [rates.pop(0) for _ in range(depth)]))
            resolution = (math.ceil(resolution[0] / 2), math.ceil(resolution[1] / 2))
        dim = config.embed_dim * 2 ** (len(config.depths) - 1)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, config.num_classes)
        self.apply(init_linear)

    def forward_features(self, images: Tensor) -> Tensor:
        """[B, channels, height, width] -> [B, H, W, C] the normalised last map."""
        x = self.patch_embed(images)
        for stage in self.layers:
            x = stage(x)
        return self.norm(x)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.forward_features(images).mean(dim=(1, 2)))


def init_linear(module: nn.Module) -> None:
    """Weights from a truncated normal of deviation 0.02, biases zero."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
