"""PartCrafter's attention of parts: reshapes and a loop over objects, which `accelerate` runs on segments."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["PartAttention"]


class PartAttention(nn.Module):
    """Attention of the parts of objects, each to itself or to all parts of its object: [P, T, C] -> [P, T,
    C].

    proj(softmax(norm(q) norm(k)^T / sqrt(d)) v) with RMS norms over each head. PartCrafter alternates
    layers of both kinds.

    Args:
        dim: C. num_heads: dividing C. across: attend to all parts of an object.

    Example:
        >>> layer = PartAttention(32, 4, across=True)
        >>> layer(torch.randn(5, 10, 32), (2, 3)).shape
        torch.Size([5, 10, 32])

    Source: Lin et al., PartCrafter (arXiv 2506.05573).
    """

    def __init__(self, dim: int, num_heads: int, *, across: bool) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"dim is {dim}, which num_heads = {num_heads} does not divide")
        self.num_heads, self.across = num_heads, across
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.norm_q = nn.RMSNorm(dim // num_heads, eps=1e-6)
        self.norm_k = nn.RMSNorm(dim // num_heads, eps=1e-6)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, parts: tuple[int, ...]) -> Tensor:
        """x [P, T, C], parts: how many of the P parts each object has, in their order."""
        if sum(parts) != x.shape[0]:
            raise ValueError(f"parts is {parts}, together {sum(parts)}; x has {x.shape[0]} parts")
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        return self.proj(self.attend(self.norm_q(q), self.norm_k(k), v, parts).flatten(-2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, parts: tuple[int, ...]) -> Tensor:
        """[P, T, h, d] -> [P, T, h, d]"""
        if not self.across:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        outs = []
        for each in zip(*(t.split(parts) for t in (q, k, v))):
            one = [t.flatten(0, 1).transpose(0, 1) for t in each]  # [h, parts T, d]
            out = F.scaled_dot_product_attention(*one)
            outs.append(out.transpose(0, 1).unflatten(0, each[0].shape[:2]))
        return torch.cat(outs)
