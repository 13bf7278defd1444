"""DiT-3D: a diffusion transformer over voxels, some of whose blocks attend in windows with tables per axis.

From the formulas, in the form of the paper: windows are padded and partitioned as in ViTDet, and a softmax
spans one window. (The released code reshapes the partition back to the whole volume before the softmax.)

Source: Mo et al., DiT-3D: Exploring Plain Diffusion Transformers for 3D Shape Generation (arXiv 2307.01831).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vicinal.models.vitdet import Mlp, RelPosAttention

__all__ = ["DiT3D", "DiT3DConfig"]


@dataclass(frozen=True)
class DiT3DConfig:
    """The sizes of a model.

    Args:
        input_size: voxels per axis. patch_size: of an axis of a token, dividing input_size. in_channels: of a
            voxel. dim, depth, num_heads: of the transformer. window_size: tokens of a window per axis.
        window_blocks: blocks that attend in windows. num_classes: of the label, without the one for none.
    """

    input_size: int = 32
    patch_size: int = 4
    in_channels: int = 3
    dim: int = 384
    depth: int = 12
    num_heads: int = 6
    window_size: int = 4
    window_blocks: tuple[int, ...] = (0, 3, 6, 9)
    num_classes: int = 1
    mlp_ratio: float = 4.0

    def __post_init__(self) -> None:
        if self.input_size % self.patch_size:
            raise ValueError(
                f"patch_size is {self.patch_size}, which does not divide input_size = {self.input_size}"
            )
        if self.dim % self.num_heads or self.dim % 6:
            raise ValueError(f"dim is {self.dim}; num_heads = {self.num_heads} and 6 must divide it")

    @property
    def tokens(self) -> int:
        """Per axis."""
        return self.input_size // self.patch_size


class GlobalAttention(nn.Module):
    """Attention over all tokens; [B, X, Y, Z, C] -> [B, X, Y, Z, C]."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).flatten(1, 3).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(*qkv.unbind(0))
        return self.proj(out.transpose(1, 2).flatten(2).view(x.shape))


class Block(nn.Module):
    """x + gate * attn(modulated norm), x + gate * mlp(modulated norm), all six modulations from c."""

    def __init__(self, config: DiT3DConfig, index: int) -> None:
        super().__init__()
        c = config
        self.norm1 = nn.LayerNorm(c.dim, elementwise_affine=False, eps=1e-6)
        windowed = index in c.window_blocks
        names = ("rel_pos_x", "rel_pos_y", "rel_pos_z")
        self.attn = (
            RelPosAttention(c.dim, c.num_heads, (c.window_size,) * 3, names)
            if windowed
            else GlobalAttention(c.dim, c.num_heads)
        )
        self.norm2 = nn.LayerNorm(c.dim, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(c.dim, int(c.mlp_ratio * c.dim), "tanh")
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(c.dim, 6 * c.dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = modulations(self.adaLN_modulation, c, 6)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


def modulations(layer: nn.Module, c: Tensor, parts: int) -> tuple[Tensor, ...]:
    """[B, 1, 1, 1, C] each."""
    return layer(c)[:, None, None, None].chunk(parts, -1)


class FinalLayer(nn.Module):
    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(dim, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = modulations(self.adaLN_modulation, c, 2)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class PatchEmbed(nn.Module):
    def __init__(self, config: DiT3DConfig) -> None:
        super().__init__()
        p = config.patch_size
        self.proj = nn.Conv3d(config.in_channels, config.dim, p, stride=p)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).movedim(1, -1)


class TimestepEmbed(nn.Module):
    """MLP of the sines and cosines of a timestep, [B] -> [B, C]."""

    def __init__(self, dim: int, frequencies: int = 128) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(nn.Linear(2 * frequencies, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        f = torch.arange(self.frequencies, dtype=torch.float32, device=t.device) / self.frequencies
        angle = t[:, None].float() * torch.exp(-math.log(10000.0) * f)
        return self.mlp(torch.cat([angle.cos(), angle.sin()], -1).to(self.dtype()))

    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype


class LabelEmbed(nn.Module):
    def __init__(self, classes: int, dim: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, dim)

    def forward(self, label: Tensor) -> Tensor:
        return self.embedding_table(label)


def sin_cos(tokens: Sequence[int], dim: int) -> Tensor:
    """[1, X, Y, Z, C]: a third of the channels for each axis, sines then cosines of its coordinate."""
    each = dim // 6
    f = 10000.0 ** -(torch.arange(each, dtype=torch.float64) / each)
    parts = []
    for a, n in enumerate(tokens):
        angle = torch.arange(n, dtype=torch.float64)[:, None] * f
        shape = [1, 1, 1, 2 * each]
        shape[a] = n
        parts.append(torch.cat([angle.sin(), angle.cos()], -1).view(shape).expand(*tokens, -1))
    return torch.cat(parts, -1).float()[None]


class DiT3D(nn.Module):
    """Noise of a voxel grid [B, C, V, V, V] at timesteps [B] under labels [B], of the same shape.

    Args:
        config: `DiT3DConfig`.

    Example:
        >>> model = DiT3D(DiT3DConfig(input_size=8, patch_size=2, dim=48, depth=2, num_heads=3))
        >>> model(torch.randn(1, 3, 8, 8, 8), torch.tensor([7]), torch.tensor([0])).shape
        torch.Size([1, 3, 8, 8, 8])
    """

    pos_embed: Tensor

    def __init__(self, config: DiT3DConfig) -> None:
        super().__init__()
        self.config = config
        self.x_embedder = PatchEmbed(config)
        self.t_embedder = TimestepEmbed(config.dim)
        self.y_embedder = LabelEmbed(config.num_classes, config.dim)
        self.register_buffer("pos_embed", sin_cos((config.tokens,) * 3, config.dim), persistent=False)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.depth))
        self.final_layer = FinalLayer(config.dim, config.patch_size**3 * config.in_channels)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """x [B, C, V, V, V], t [B], y int [B] -> [B, C, V, V, V]"""
        tokens = self.x_embedder(x)
        tokens = tokens + self.pos_embed.to(tokens.dtype)
        c = self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            tokens = block(tokens, c)
        p = self.config.patch_size
        out = self.final_layer(tokens, c).unflatten(-1, (p, p, p, self.config.in_channels))
        return out.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)
