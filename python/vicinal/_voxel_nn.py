"""Segment attention as a module, with the parameters of torch.nn.MultiheadAttention."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._segments_type import SegmentGroups, Segments
from .voxel import voxel_attention

__all__ = ["SegmentMultiheadAttention"]


class SegmentMultiheadAttention(nn.Module):
    """Multi-head attention inside segments of rows; [N, C] -> [N, C].

    It has the parameters of `torch.nn.MultiheadAttention(embed_dim, num_heads)`, so state dicts load strictly
    both ways. Where that one attends over gathered, padded sets with a key mask, this one projects and
    attends to the rows there are.

    Args:
        embed_dim: C. num_heads: divides C. bias: give the projections a bias. Default True.
        dropout: of attention weights; there is none yet, so a module in training mode raises unless it is 0.
        backend: None for the fastest that can run, or its name.

    Example:
        >>> from vicinal import segments
        >>> attend = SegmentMultiheadAttention(192, 8)
        >>> x = torch.randn(5, 192)
        >>> attend(x, x, x, segments.from_lengths(torch.tensor([3, 2])))[0].shape
        torch.Size([5, 192])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or embed_dim % num_heads:
            raise ValueError(f"embed_dim is {embed_dim}, which num_heads = {num_heads} does not divide")
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.dropout = dropout
        self.backend = backend
        self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * embed_dim)) if bias else None
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias)
        nn.init.xavier_uniform_(self.in_proj_weight)
        if bias:
            nn.init.zeros_(self.out_proj.bias)

    def project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """q, k, v [N, heads, head_dim]: one product for each tensor that differs."""
        c, heads = self.embed_dim, (self.num_heads, self.head_dim)
        inputs = (query, key, value)
        found: list[Tensor] = []
        while len(found) < 3:
            first = len(found)
            last = first + 1
            while last < 3 and inputs[last] is inputs[first]:
                last += 1
            bias = None if self.in_proj_bias is None else self.in_proj_bias[first * c : last * c]
            made = F.linear(inputs[first], self.in_proj_weight[first * c : last * c], bias)
            found += made.unflatten(-1, (last - first, *heads)).unbind(1)
        return found

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        segments: Segments | SegmentGroups,
        **options: Any,
    ) -> tuple[Tensor, None]:
        """Attend.

        Args:
            query: [Nq, C]. key: [Nk, C]. value: [Nk, C].
            segments: which rows attend to which.
            **options: `bias` and `scale` of `voxel_attention`.

        Returns:
            [Nq, C], and None in the place of the weights.
        """
        if self.dropout > 0 and self.training:
            raise NotImplementedError(f"dropout is {self.dropout}; attention weights are not dropped yet")
        q, k, v = self.project(query, key, value)
        out = voxel_attention(q, k, v, segments, backend=self.backend, **options)
        assert isinstance(out, Tensor)
        return self.out_proj(out.flatten(1)), None

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, num_heads={self.num_heads}"
