"""CSWin Transformer in plain PyTorch: the model as its paper writes it (Dong et al., 2022, arXiv:2107.00652).

Half of the heads attend inside vertical stripes of width `sw`, the other half inside horizontal stripes of
height `sw`; the last stage attends over the whole map. There is no position bias: a 3x3 depth-wise
convolution of the values *inside each stripe* is added to the result (LePE). Parameters carry the names of
the official release.

Sizes: any height and width. Where the stripes do not divide the map, the queries, keys and values (not the
input) are padded with zeros on both sides, the smaller half first; padded keys take part in the attention
with logit 0."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vicinal.models.swin import Mlp, drop_path, drop_path_rates, init_linear

__all__ = ["CSWinBlock", "CSWinConfig", "CSWinTransformer", "LePEAttention"]


@dataclass(frozen=True)
class CSWinConfig:
    """Sizes of a CSWin Transformer; `split_sizes` are the stripe widths of the four stages."""

    image_size: int = 224
    in_channels: int = 3
    num_classes: int = 1000
    embed_dim: int = 64
    depths: tuple[int, int, int, int] = (1, 2, 21, 1)
    num_heads: tuple[int, int, int, int] = (2, 4, 8, 16)
    split_sizes: tuple[int, int, int, int] = (1, 2, 7, 7)
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    drop_path: float = 0.0


def stripe_partition(x: Tensor, height: int, width: int) -> Tensor:
    """[..., B, H, W, C] -> [..., B * n, height, width, C], stripes row-major within an image."""
    x = x.unflatten(-3, (-1, height)).unflatten(-2, (-1, width))  # [..., B, nH, height, nW, width, C]
    return x.transpose(-4, -3).flatten(-6, -4)


def stripe_reverse(x: Tensor, H: int, W: int) -> Tensor:
    """[B * n, height, width, C] -> [B, H, W, C], the inverse of `stripe_partition`."""
    _, height, width, _ = x.shape
    x = x.unflatten(0, (-1, H // height, W // width))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


class LePEAttention(nn.Module):
    """softmax(q k^T / sqrt(d)) v + conv(v) inside each stripe; q, k, v as [3, B, H, W, C] -> [B, H, W, C].

    `axis` 0: stripes of the whole height and `split_size` columns; 1: of `split_size` rows and the whole
    width; -1: the whole map."""

    def __init__(self, dim: int, axis: int, split_size: int, num_heads: int) -> None:
        super().__init__()
        self.axis = axis
        self.split_size = split_size
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.get_v = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def stripe(self, H: int, W: int) -> tuple[int, int]:
        """Height and width of a stripe on an H x W map."""
        return (self.split_size if self.axis == 1 else H, self.split_size if self.axis == 0 else W)

    def forward(self, qkv: Tensor) -> Tensor:
        H, W = qkv.shape[2:4]
        height, width = self.stripe(H, W)
        pad_y, pad_x = -H % height, -W % width
        top, left = pad_y // 2, pad_x // 2
        qkv = F.pad(qkv, (0, 0, left, pad_x - left, top, pad_y - top))
        stripes = stripe_partition(qkv, height, width)  # [3, B * n, height, width, C]

        lepe = self.get_v(stripes[2].permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        q, k, v = stripes.flatten(2, 3).unflatten(-1, (self.num_heads, -1)).transpose(2, 3).unbind(0)
        out = (self.scale * q @ k.transpose(-2, -1)).softmax(dim=-1) @ v  # [B * n, h, N, d]
        out = out.transpose(1, 2).flatten(2).view_as(lepe) + lepe
        return stripe_reverse(out, H + pad_y, W + pad_x)[:, top : top + H, left : left + W]


class CSWinBlock(nn.Module):
    """Cross-shaped window attention and an MLP with residuals; [B, H, W, C] -> [B, H, W, C]."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        split_size: int,
        whole_map: bool,
        *,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.norm1 = nn.LayerNorm(dim)
        self.proj = nn.Linear(dim, dim)
        axes = (-1,) if whole_map else (0, 1)
        self.attns = nn.ModuleList(
            LePEAttention(dim // len(axes), axis, split_size, num_heads // len(axes)) for axis in axes
        )
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.norm2 = nn.LayerNorm(dim)

    def attention(self, x: Tensor) -> Tensor:
        """Each branch on its share of the heads, then the joint projection: [B, H, W, C] -> [B, H, W, C]."""
        qkv = self.qkv(x).unflatten(-1, (3, -1)).movedim(-2, 0)  # [3, B, H, W, C]
        shares = qkv.chunk(len(self.attns), dim=-1)
        return self.proj(torch.cat([attn(share) for attn, share in zip(self.attns, shares)], dim=-1))

    def forward(self, x: Tensor) -> Tensor:
        x = x + drop_path(self.attention(self.norm1(x)), self.drop_path, self.training)
        return x + drop_path(self.mlp(self.norm2(x)), self.drop_path, self.training)


class MergeBlock(nn.Module):
    """3x3 convolution with stride 2; [B, H, W, C] -> [B, ceil(H/2), ceil(W/2), 2C]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class ChannelsLast(nn.Module):
    """[B, C, H, W] -> [B, H, W, C]; it holds the place of index 1 in the embedding, so names match."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


class CSWinTransformer(nn.Module):
    """Image classifier; [B, channels, height, width] -> [B, num_classes]."""

    def __init__(self, config: CSWinConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.embed_dim
        rates = drop_path_rates(config.drop_path, sum(config.depths))
        embed = nn.Conv2d(config.in_channels, dim, 7, stride=4, padding=2)
        self.stage1_conv_embed = nn.Sequential(embed, ChannelsLast(), nn.LayerNorm(dim))
        for i, depth in enumerate(config.depths):
            if i > 0:
                setattr(self, f"merge{i}", MergeBlock(dim))
                dim *= 2
            # a stripe as wide as the map of the standard size is the whole map, and one branch does it all
            whole_map = i == 3 or config.image_size // 4 // 2**i == config.split_sizes[i]
            blocks = (
                CSWinBlock(
                    dim,
                    config.num_heads[i],
                    config.split_sizes[i],
                    whole_map,
                    mlp_ratio=config.mlp_ratio,
                    qkv_bias=config.qkv_bias,
                    drop_path=rates.pop(0),
                )
                for _ in range(depth)
            )
            setattr(self, f"stage{i + 1}", nn.ModuleList(blocks))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, config.num_classes)
        self.apply(init_linear)

    def forward_features(self, images: Tensor) -> Tensor:
        """[B, channels, height, width] -> [B, H, W, C] the normalised last map."""
        x = self.stage1_conv_embed(images)
        for i in range(4):
            if i > 0:
                x = getattr(self, f"merge{i}")(x)
            for block in getattr(self, f"stage{i + 1}"):
                x = block(x)
        return self.norm(x)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.forward_features(images).mean(dim=(1, 2)))
