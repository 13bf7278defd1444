"""Factorised attention on grids in plain PyTorch: kernels of single axes, no softmax (Li et al., FactFormer,
arXiv:2305.17560; IFactFormer applies the axes in parallel).

An axis of n points gets its queries and keys from the field averaged over the other axes; q k^T [n, n] then
integrates the values along it. Everything is a batched matrix product, so there is nothing to accelerate.
The parameters' names are our own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["FactorizedAttention"]

LETTERS = "xyzw"


class FactorizedAttention(nn.Module):
    """v integrated along every axis with kernels q k^T / n: [B, *space, C] -> [B, *space, C].

    Args:
        dim: C. num_heads: h, dividing `dim`. axes: of the grid, 1 to 4. parallel: every axis integrates v and
            a projection joins the results; otherwise one axis after the other. head_dim: of queries and keys.
    """

    def __init__(
        self, dim: int, num_heads: int, axes: int, *, parallel: bool = True, head_dim: int = 64
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim is {dim}, which num_heads = {num_heads} does not divide")
        if not 1 <= axes <= len(LETTERS):
            raise ValueError(f"axes is {axes}; it must be 1 to {len(LETTERS)}")
        self.num_heads, self.parallel = num_heads, parallel
        self.value = nn.Linear(dim, dim, bias=False)
        self.pools = nn.ModuleList(nn.Linear(dim, dim) for _ in range(axes))
        self.to_qk = nn.ModuleList(nn.Linear(dim, 2 * num_heads * head_dim, bias=False) for _ in range(axes))
        self.proj = nn.Linear(dim * (axes if parallel else 1), dim)

    def forward(self, x: Tensor) -> Tensor:
        axes = len(self.pools)
        if x.dim() != axes + 2:
            raise ValueError(
                f"x has shape {list(x.shape)}; it must be [B, *space, C] with {axes} axes of space"
            )
        v = self.value(x).unflatten(-1, (self.num_heads, -1))
        outs = []
        for axis in range(axes):
            out = self.integrate(v, self.kernel(x, axis), axis)
            outs.append(out.flatten(-2))
            v = v if self.parallel else out
        return self.proj(torch.cat(outs, -1) if self.parallel else outs[-1])

    def kernel(self, x: Tensor, axis: int) -> Tensor:
        """q k^T / n of an axis: [B, h, n, n]."""
        others = [a + 1 for a in range(len(self.pools)) if a != axis]
        y = F.gelu(self.pools[axis](x.mean(others) if others else x))  # [B, n, C]
        q, k = self.to_qk[axis](y).unflatten(-1, (2, self.num_heads, -1)).unbind(2)
        return torch.einsum("bihd,bjhd->bhij", q, k) / y.shape[1]

    def integrate(self, v: Tensor, kernel: Tensor, axis: int) -> Tensor:
        """sum_j kernel[i, j] v[.., j, ..] along an axis: [B, *space, h, d] -> same."""
        space = LETTERS[: len(self.pools)]
        inner = space.replace(space[axis], "j")
        return torch.einsum(f"bh{space[axis]}j,b{inner}hd->b{space}hd", kernel, v)
