"""D-Former: a U-shaped transformer for volumes in plain PyTorch (Wu et al., 2022, arXiv:2201.00462).

Blocks attend in groups of g tokens per axis, in turn in local scope (neighbouring tokens) and in global scope
(tokens as far apart as the volume allows). A depth-wise convolution before every attention tells positions.
Volumes that the groups do not divide are padded at their end; padded keys take no part. The parameters' names
are our own.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vicinal.models.swin import Mlp, drop_path, drop_path_rates, init_linear

__all__ = ["DFormer", "DFormerBlock", "DFormerConfig", "GroupAttention"]

Triple = tuple[int, int, int]


@dataclass(frozen=True)
class DFormerConfig:
    """Sizes of a D-Former; `patch_size` voxels per token, `group_size` tokens per group, on the axes depth,
    height, width."""

    in_channels: int = 1
    num_classes: int = 14
    embed_dim: int = 96
    patch_size: Triple = (2, 4, 4)
    group_size: Triple = (2, 8, 8)
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    mlp_ratio: float = 4.0
    drop_path: float = 0.0


class GroupAttention(nn.Module):
    """softmax(q k^T / sqrt(d)) v inside groups of a volume; [B, X, Y, Z, C] -> [B, X, Y, Z, C].

    Along an axis padded to P = n * g tokens, a local group is g neighbours, a global one every n-th token.
    """

    def __init__(self, dim: int, num_heads: int, group_size: Triple, dilated: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.group_size = group_size
        self.dilated = dilated
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(4)  # [B, X, Y, Z, h, d]
        return self.proj(self.attention(q, k, v).flatten(-2))

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Pad, split into groups, mask padded keys, attend, put back: [B, X, Y, Z, h, d] -> the same."""
        space = q.shape[1:4]
        q, k, v = (self.groups(x) for x in (q, k, v))  # [B, n, g, h, d]
        real = self.groups(torch.ones(1, *space, 1, 1, device=q.device))[..., 0, 0] > 0  # [1, n, g]
        scores = self.scale * torch.einsum("bnqhd,bnkhd->bnhqk", q, k)
        scores = scores.masked_fill(~real[:, :, None, None], -torch.inf)
        return self.ungroup(torch.einsum("bnhqk,bnkhd->bnqhd", scores.softmax(-1), v), space)

    def groups(self, x: Tensor) -> Tensor:
        """[B, X, Y, Z, h, d] -> [B, groups, tokens of a group, h, d], padded with zeros."""
        padding = [n for L, g in zip(reversed(x.shape[1:4]), reversed(self.group_size)) for n in (0, -L % g)]
        x = F.pad(x, (0, 0, 0, 0, *padding))
        for axis, g in zip((1, 3, 5), self.group_size):
            x = x.unflatten(axis, (g, -1) if self.dilated else (-1, g))
        order = (2, 4, 6, 1, 3, 5) if self.dilated else (1, 3, 5, 2, 4, 6)
        return x.permute(0, *order, 7, 8).flatten(4, 6).flatten(1, 3)

    def ungroup(self, x: Tensor, space: torch.Size) -> Tensor:
        """The inverse of `groups`, without the padding."""
        counts = [-(-L // g) for L, g in zip(space, self.group_size)]
        x = x.unflatten(2, self.group_size).unflatten(1, counts)  # [B, n, n, n, g, g, g, h, d]
        order = (4, 1, 5, 2, 6, 3) if self.dilated else (1, 4, 2, 5, 3, 6)
        x = x.permute(0, *order, 7, 8).flatten(5, 6).flatten(3, 4).flatten(1, 2)
        return x[:, : space[0], : space[1], : space[2]]


class DFormerBlock(nn.Module):
    """Position convolution, group attention and an MLP with residuals; [B, X, Y, Z, C] -> [B, X, Y, Z, C]."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        group_size: Triple,
        dilated: bool,
        *,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.position = nn.Conv3d(dim, dim, 3, padding=1, groups=dim)
        self.norm1 = nn.LayerNorm(dim)
        self.attn = GroupAttention(dim, num_heads, group_size, dilated)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.position(x.permute(0, 4, 1, 2, 3)).permute(0, 2, 3, 4, 1)
        x = x + drop_path(self.attn(self.norm1(x)), self.drop_path, self.training)
        return x + drop_path(self.mlp(self.norm2(x)), self.drop_path, self.training)


class Resample(nn.Module):
    """A convolution and a norm on channels-last volumes; [B, X, Y, Z, C] -> [B, X', Y', Z', C']."""

    def __init__(self, conv: nn.Module, dim: int) -> None:
        super().__init__()
        self.conv = conv
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x.permute(0, 4, 1, 2, 3)).permute(0, 2, 3, 4, 1))


class DFormer(nn.Module):
    """Segmentation of volumes: [B, channels, depth, height, width] -> [B, num_classes, depth, height,
    width]."""

    def __init__(self, config: DFormerConfig) -> None:
        super().__init__()
        self.config = config
        dims = [config.embed_dim * 2**i for i in range(len(config.depths))]
        rates = drop_path_rates(config.drop_path, sum(config.depths))
        patch = config.patch_size
        self.embed = Resample(nn.Conv3d(config.in_channels, dims[0], patch, stride=patch), dims[0])
        self.encoder, self.down = nn.ModuleList(), nn.ModuleList()
        self.decoder, self.up, self.join = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for i, dim in enumerate(dims):
            stage = [rates.pop(0) for _ in range(config.depths[i])]
            self.encoder.append(_stage(config, i, stage))
            if i + 1 < len(dims):
                self.down.append(Resample(nn.Conv3d(dim, 2 * dim, 3, stride=2, padding=1), 2 * dim))
                self.up.append(Resample(nn.ConvTranspose3d(2 * dim, dim, 2, stride=2), dim))
                self.join.append(nn.Linear(2 * dim, dim))
                self.decoder.append(_stage(config, i, stage))
        self.norm = nn.LayerNorm(dims[0])
        self.head = nn.Linear(dims[0], config.num_classes * prod(patch))
        self.apply(init_linear)

    def forward(self, volumes: Tensor) -> Tensor:
        size = volumes.shape[2:]
        padding = [n for L, p in zip(reversed(size), reversed(self.config.patch_size)) for n in (0, -L % p)]
        x = self.embed(F.pad(volumes, padding).permute(0, 2, 3, 4, 1))
        skips = []
        for i, stage in enumerate(self.encoder):
            x = stage(x)
            if i < len(self.down):
                skips.append(x)
                x = self.down[i](x)
        for i in reversed(range(len(self.decoder))):
            skip = skips.pop()
            x = self.up[i](x)[:, : skip.shape[1], : skip.shape[2], : skip.shape[3]]
            x = self.decoder[i](self.join[i](torch.cat([skip, x], dim=-1)))
        return self.voxels(self.head(self.norm(x)))[..., : size[0], : size[1], : size[2]]

    def voxels(self, x: Tensor) -> Tensor:
        """[B, X, Y, Z, classes * voxels of a patch] -> [B, classes, depth, height, width]."""
        x = x.unflatten(-1, (-1, *self.config.patch_size)).permute(0, 4, 1, 5, 2, 6, 3, 7)
        return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)


def _stage(config: DFormerConfig, i: int, drop_paths: list[float]) -> nn.Sequential:
    blocks = (
        DFormerBlock(
            config.embed_dim * 2**i,
            config.num_heads[i],
            config.group_size,
            j % 2 == 1,
            mlp_ratio=config.mlp_ratio,
            drop_path=p,
        )
        for j, p in enumerate(drop_paths)
    )
    return nn.Sequential(*blocks)
