"""EcoFormer on PVTv2 in plain PyTorch (Liu et al., arXiv:2209.09004; Wang et al., PVTv2, arXiv:2106.13797).

A pyramid of four stages. In the first three, attention compares binary codes of the tokens instead of their
features (`vicinal.hash_attention` has the formula), which makes it linear; the last one is softmax attention.

Parameters and buffers carry the names of the official release. Its checkpoints were trained with
numerator="self"; `projection_matrix` is in them and unused. `KernelHash.calibrate` draws anchors from data
and measures the mean; the weights of the codes stay random, where the release fits them to the data."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vicinal.models.swin import drop_path, drop_path_rates, init_linear

__all__ = ["EcoFormer", "EcoFormerConfig", "HashAttentionLayer", "KernelHash"]


@dataclass(frozen=True)
class EcoFormerConfig:
    """Sizes of a PVTv2 with hash attention; the defaults are EcoFormer-PVTv2-B0."""

    in_channels: int = 3
    num_classes: int = 1000
    embed_dims: tuple[int, ...] = (32, 64, 160, 256)
    num_heads: tuple[int, ...] = (1, 2, 5, 8)
    mlp_ratios: tuple[int, ...] = (8, 8, 4, 4)
    depths: tuple[int, ...] = (2, 2, 2, 2)
    hashed_stages: int = 3
    bits: int = 16
    anchors: int = 25
    numerator: str = "sum"
    drop_path: float = 0.0


class Sign(torch.autograd.Function):
    """sign(y); the gradient passes where |y| < 1."""

    @staticmethod
    def forward(ctx, y: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(y)
        return torch.sign(y)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        return grad * (ctx.saved_tensors[0].abs() < 1)


class KernelHash(nn.Module):
    """Codes of unit vectors: [B, H, N, D] -> [B, H, N, bits] of +1 and -1."""

    A: Tensor
    mvec: Tensor
    anchor: Tensor

    def __init__(self, num_heads: int, head_dim: int, bits: int, anchors: int) -> None:
        super().__init__()
        self.register_buffer("A", torch.randn(num_heads, bits, anchors))
        self.register_buffer("mvec", torch.zeros(1, num_heads, 1, anchors))
        self.register_buffer("anchor", torch.zeros(1, num_heads, anchors, head_dim))

    def kernel(self, x: Tensor) -> Tensor:
        """exp(-d / (2 mean d)) of the squared distances to the anchors: [B, H, N, m]."""
        distance = (x.unsqueeze(3) - self.anchor.unsqueeze(2)).square().sum(-1)
        return torch.exp(-distance / (2 * distance.mean((-2, -1), keepdim=True)))

    def forward(self, x: Tensor) -> Tensor:
        return Sign.apply((self.kernel(x) - self.mvec) @ self.A.mT)

    @torch.no_grad()
    def calibrate(self, x: Tensor, generator: torch.Generator | None = None) -> None:
        """Anchors from the unit vectors x [B, H, N, D] of the first sample, and the mean of their kernel."""
        count = self.anchor.shape[2]
        chosen = torch.randint(x.shape[2], (count,), generator=generator)
        self.anchor.copy_(x[:1, :, chosen.to(x.device)])
        self.mvec.copy_(self.kernel(x).mean((0, 2), keepdim=True))


class HashFeatures(nn.Module):
    """Linear attention between codes: qk and v [B, H, N, D] -> [B, H, N, D]."""

    projection_matrix: Tensor

    def __init__(self, num_heads: int, head_dim: int, config: EcoFormerConfig) -> None:
        super().__init__()
        self.numerator = config.numerator
        self.offset = config.bits + 1
        rows = int(head_dim * math.log(head_dim))
        self.register_buffer("projection_matrix", torch.randn(rows, head_dim))
        self.ksh = KernelHash(num_heads, head_dim, config.bits, config.anchors)

    def forward(self, qk: Tensor, v: Tensor) -> Tensor:
        code = self.ksh(qk / qk.norm(dim=-1, keepdim=True))
        total = v if self.numerator == "self" else v.sum(-2, keepdim=True)
        top = code @ (code.mT @ v) + self.offset * total
        return top / (code @ code.sum(-2).unsqueeze(-1) + v.shape[-2] * self.offset)


class HashAttentionLayer(nn.Module):
    """Hash attention with its projections: [B, N, C] -> [B, N, C]."""

    def __init__(self, dim: int, num_heads: int, config: EcoFormerConfig) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.fast_attention = HashFeatures(num_heads, dim // num_heads, config)
        self.to_qk = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """qk and v, [B, N, H, D]."""
        qk, v = (f(x).unflatten(-1, (self.num_heads, -1)) for f in (self.to_qk, self.to_v))
        return qk, v

    def attention(self, qk: Tensor, v: Tensor) -> Tensor:
        """[B, N, H, D] -> [B, N, H, D]."""
        return self.fast_attention(qk.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.attention(*self.split(x)).flatten(-2))

    def calibrate(self, x: Tensor, generator: torch.Generator | None = None) -> None:
        """Fit the anchors and the mean to inputs [B, N, C]."""
        qk = self.split(x)[0].transpose(1, 2)
        self.fast_attention.ksh.calibrate(F.normalize(qk, dim=-1), generator)


class SoftmaxAttention(nn.Module):
    """Multi-head softmax attention: [B, N, C] -> [B, N, C]."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).movedim(1, -2).unbind(1)
        weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)  # [B, H, N, N]
        return self.proj((weights @ v).transpose(1, 2).flatten(-2))


class DepthwiseConv(nn.Module):
    """3x3 depth-wise convolution of tokens on an H x W map: [B, N, C] -> [B, N, C]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor, H: int, W: int) -> Tensor:
        return self.dwconv(x.mT.unflatten(-1, (H, W))).flatten(2).mT


class ConvMlp(nn.Module):
    """Two linear layers with a depth-wise convolution and GELU between: [B, N, C] -> [B, N, C]."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = DepthwiseConv(hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, H: int, W: int) -> Tensor:
        return self.fc2(F.gelu(self.dwconv(self.fc1(x), H, W)))


class Block(nn.Module):
    def __init__(self, dim: int, attention: nn.Module, hidden: int, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attention
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = ConvMlp(dim, hidden)

    def forward(self, x: Tensor, H: int, W: int) -> Tensor:
        x = x + drop_path(self.attn(self.norm1(x)), self.rate, self.training)
        return x + drop_path(self.mlp(self.norm2(x), H, W), self.rate, self.training)


class OverlapPatchEmbed(nn.Module):
    """[B, C, height, width] -> tokens [B, N, C'], and the map's size."""

    def __init__(self, in_channels: int, dim: int, patch: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, patch, stride, patch // 2)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> tuple[Tensor, int, int]:
        x = self.proj(x)
        return self.norm(x.flatten(2).mT), x.shape[2], x.shape[3]


class EcoFormer(nn.Module):
    """Image classifier; [B, channels, height, width] -> [B, num_classes]."""

    def __init__(self, config: EcoFormerConfig) -> None:
        super().__init__()
        self.config = config
        rates = drop_path_rates(config.drop_path, sum(config.depths))
        channels = config.in_channels
        for i, (dim, heads) in enumerate(zip(config.embed_dims, config.num_heads)):
            embed = OverlapPatchEmbed(channels, dim, 7 if i == 0 else 3, 4 if i == 0 else 2)
            setattr(self, f"patch_embed{i + 1}", embed)
            blocks = []
            for _ in range(config.depths[i]):
                hashed = i < config.hashed_stages
                attention = HashAttentionLayer(dim, heads, config) if hashed else SoftmaxAttention(dim, heads)
                blocks.append(Block(dim, attention, dim * config.mlp_ratios[i], rates.pop(0)))
            setattr(self, f"block{i + 1}", nn.ModuleList(blocks))
            setattr(self, f"norm{i + 1}", nn.LayerNorm(dim, eps=1e-6))
            channels = dim
        self.head = nn.Linear(channels, config.num_classes)
        self.apply(init_linear)

    def forward_features(self, x: Tensor) -> Tensor:
        """[B, channels, height, width] -> [B, N, C], the normalised last tokens."""
        tokens = x
        for i in range(len(self.config.depths)):
            tokens, H, W = getattr(self, f"patch_embed{i + 1}")(x)
            for block in getattr(self, f"block{i + 1}"):
                tokens = block(tokens, H, W)
            tokens = getattr(self, f"norm{i + 1}")(tokens)
            x = tokens.mT.unflatten(-1, (H, W))
        return tokens

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.forward_features(images).mean(1))

    @torch.no_grad()
    def calibrate(self, images: Tensor, generator: torch.Generator | None = None) -> None:
        """Fit the anchors and means of every hash attention to images, first layers first."""
        layers = [m for m in self.modules() if isinstance(m, HashAttentionLayer)]
        hooks = [
            m.register_forward_pre_hook(lambda m, inputs: m.calibrate(inputs[0], generator)) for m in layers
        ]
        try:
            self(images)
        finally:
            for hook in hooks:
                hook.remove()
