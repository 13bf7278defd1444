"""SReT's sliced recursive attention in plain PyTorch (Shen et al., Sliced Recursive Transformer,
arXiv:2111.05297).

A block runs several times with the same weights. Every time its attention stays inside contiguous slices of
the tokens, after a permutation that mixes them. The release draws permutations anew in every call, also at
inference; here the caller gives them. The parameters' names are our own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["RecursiveBlock", "SlicedAttention"]


class SlicedAttention(nn.Module):
    """Multi-head softmax attention inside `slices` equal slices of the tokens: [B, N, C] -> [B, N, C].

    Args:
        dim: C. num_heads: h, dividing `dim`. slices: dividing N.
    """

    def __init__(self, dim: int, num_heads: int, slices: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim is {dim}, which num_heads = {num_heads} does not divide")
        self.num_heads, self.slices = num_heads, slices
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, order: Tensor | None = None) -> Tensor:
        """order: a permutation [N] of the tokens before they are sliced, which is taken back; None: as they
        are."""
        if x.shape[1] % self.slices:
            raise ValueError(f"x has {x.shape[1]} tokens, which slices = {self.slices} does not divide")
        return self.proj(self.attention(self.qkv(x).unflatten(-1, (3, self.num_heads, -1)), order))

    def attention(self, qkv: Tensor, order: Tensor | None) -> Tensor:
        """[B, N, 3, h, d] -> [B, N, C]"""
        packed = qkv if order is None else qkv[:, order]
        q, k, v = packed.unflatten(1, (self.slices, -1)).unbind(3)  # [B, slices, n, h, d]
        scores = torch.einsum("bsihd,bsjhd->bshij", q, k) * q.shape[-1] ** -0.5
        out = torch.einsum("bshij,bsjhd->bsihd", scores.softmax(-1), v).flatten(1, 2).flatten(-2)
        return out if order is None else torch.zeros_like(out).index_copy(1, order, out)


class RecursiveBlock(nn.Module):
    """Attention and an MLP, as often as there are `scales`, with weights shared by all: [B, N, C] -> same.

    Args:
        dim: C. num_heads: h. slices: of each time. mlp_ratio: width of the MLP over C.
    """

    def __init__(self, dim: int, num_heads: int, slices: Sequence[int], mlp_ratio: float = 3.6) -> None:
        super().__init__()
        self.slices = tuple(slices)
        self.norm1 = nn.LayerNorm(dim)
        self.attn = SlicedAttention(dim, num_heads, self.slices[0])
        self.norm2 = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, int(mlp_ratio * dim))
        self.fc2 = nn.Linear(int(mlp_ratio * dim), dim)
        self.scales = nn.Parameter(torch.ones(len(self.slices), 4))  # of both branches and what they join

    def forward(self, x: Tensor, orders: Sequence[Tensor | None] | None = None) -> Tensor:
        """orders: a permutation [N] or None for each time."""
        for slices, order, scale in zip(self.slices, orders or [None] * len(self.slices), self.scales):
            self.attn.slices = slices
            x = scale[0] * x + scale[1] * self.attn(self.norm1(x), order)
            x = scale[2] * x + scale[3] * self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return x
