"""The two attentions of DLGSANet in plain PyTorch (Li et al., Lightweight Dynamic Local and Global
Self-Attention Networks, arXiv:2301.02031).

The local one predicts, at every pixel, the 7 x 7 weights of a sum over its neighbours, without a softmax and
with zeros beyond the border. The global one attends between channels: relu(t q k^T) v with q and k normalised
along the pixels. The parameters' names are our own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ChannelAttention", "DLGSABlock", "DynamicLocalAttention"]


class DynamicLocalAttention(nn.Module):
    """out_p = sum_r w[p, group, r] v[p + r]: [B, C, H, W] -> [B, C, H, W].

    Args:
        dim: C. groups: of channels that share their weights. kernel_size: odd. reduction: of the layer that
            predicts the weights.
    """

    def __init__(self, dim: int, groups: int, kernel_size: int = 7, reduction: int = 4) -> None:
        super().__init__()
        if dim % groups:
            raise ValueError(f"dim is {dim}, which groups = {groups} does not divide")
        self.groups, self.kernel_size = groups, kernel_size
        self.value = nn.Conv2d(dim, dim, 1)
        self.reduce = nn.Conv2d(dim, dim // reduction, 1)
        self.span = nn.Conv2d(dim // reduction, groups * kernel_size**2, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.span(F.gelu(self.reduce(x)))  # [B, groups * K * K, H, W]
        return self.proj(self.aggregate(weights.unflatten(1, (self.groups, -1)), self.value(x)))

    def aggregate(self, weights: Tensor, v: Tensor) -> Tensor:
        """weights [B, groups, K * K, H, W], v [B, C, H, W] -> [B, C, H, W]."""
        window = F.unfold(v, self.kernel_size, padding=self.kernel_size // 2)
        window = window.view(*v.shape[:2], -1, *v.shape[2:]).unflatten(1, (self.groups, -1))
        return torch.einsum("bgkyx,bgckyx->bgcyx", weights, window).flatten(1, 2)


class ChannelAttention(nn.Module):
    """relu(t q k^T) v between a head's channels, q and k of length 1 along the pixels: [B, C, H, W] -> same.

    The sum over pixels comes first, so that cost and memory grow with them and not with their square.

    Args:
        dim: C. num_heads: h, dividing `dim`.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim is {dim}, which num_heads = {num_heads} does not divide")
        self.num_heads = num_heads
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1))
        self.qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.dwconv = nn.Conv2d(3 * dim, 3 * dim, 3, padding=1, groups=3 * dim)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.dwconv(self.qkv(x)).flatten(2).unflatten(1, (3, self.num_heads, -1)).unbind(1)
        weights = F.relu(F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * self.temperature)
        return self.proj((weights @ v).flatten(1, 2).view(x.shape))


class DLGSABlock(nn.Module):
    """Local attention, global attention and an MLP, each after a norm and added: [B, C, H, W] -> same."""

    def __init__(self, dim: int, num_heads: int, kernel_size: int = 7) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))
        self.local = DynamicLocalAttention(dim, num_heads, kernel_size)
        self.channels = ChannelAttention(dim, num_heads)
        self.mlp = nn.Sequential(nn.Conv2d(dim, 2 * dim, 1), nn.GELU(), nn.Conv2d(2 * dim, dim, 1))

    def forward(self, x: Tensor) -> Tensor:
        for norm, branch in zip(self.norms, (self.local, self.channels, self.mlp)):
            x = x + branch(norm(x.movedim(1, -1)).movedim(-1, 1))
        return x
