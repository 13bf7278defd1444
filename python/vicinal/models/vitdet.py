"""Window attention with decomposed relative positions (ViTDet, Segment Anything), and its block.

From the formulas: the map is padded with zeros, partitioned, and a table per axis is multiplied by the
queries. Parameter names are those of Segment Anything's image encoder in timm.

Sources: Li et al., Exploring Plain Vision Transformer Backbones for Object Detection (arXiv 2203.16527);
Kirillov et al., Segment Anything (arXiv 2304.02643).
"""

from __future__ import annotations

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["RelPosAttention", "WindowBlock"]


class RelPosAttention(nn.Module):
    """Attention in windows of a grid of 1 to 3 axes; [B, *space, C] -> [B, *space, C].

    softmax(scale q_n.k_m + sum over the axes a of q_n.R_a[r_a(n) - r_a(m) + w_a - 1]) v with r the places in
    the window and q in the second term as it is.

    Args:
        dim: C. num_heads: divides C. window: tokens per axis. names: of the tables, an axis each.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: tuple[int, ...],
        names: tuple[str, ...] = ("rel_pos_h", "rel_pos_w"),
    ) -> None:
        super().__init__()
        if dim % num_heads or len(window) != len(names):
            raise ValueError(
                f"num_heads is {num_heads} of dim {dim}, and window {window} has tables {names}; num_heads "
                "must divide dim, and every axis have a table"
            )
        self.num_heads, self.window, self.names = num_heads, window, names
        self.scale = (dim // num_heads) ** -0.5
        for name, w in zip(names, window):
            self.register_parameter(name, nn.Parameter(torch.zeros(2 * w - 1, dim // num_heads)))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def tables(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, name) for name in self.names)

    def forward(self, x: Tensor) -> Tensor:
        rank, space = len(self.window), tuple(x.shape[1:-1])
        missing = [-n % w for n, w in zip(space, self.window)]
        padded = F.pad(x, [0, 0, *[size for m in reversed(missing) for size in (0, m)]])
        counts = [n // w for n, w in zip(padded.shape[1:-1], self.window)]
        split = [size for pair in zip(counts, self.window) for size in pair]
        order = [0, *range(1, 2 * rank, 2), *range(2, 2 * rank + 1, 2), 2 * rank + 1]
        parts = padded.view(len(x), *split, x.shape[-1]).permute(order)
        parts = self.attend(parts.reshape(-1, prod(self.window), x.shape[-1]))
        whole = parts.view(len(x), *counts, *self.window, x.shape[-1])
        back = [0, *[axis for a in range(rank) for axis in (1 + a, 1 + rank + a)], 2 * rank + 1]
        whole = whole.permute(back).reshape(padded.shape)
        for a, n in enumerate(space):
            whole = whole.narrow(1 + a, 0, n)
        return whole

    def attend(self, x: Tensor) -> Tensor:
        """Windows [B, N, C], all tokens of which see each other."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        s = (q * self.scale) @ k.transpose(-1, -2)
        place = torch.cartesian_prod(*[torch.arange(w, device=x.device) for w in self.window])
        place = place.view(-1, len(self.window))
        for a, (table, w) in enumerate(zip(self.tables(), self.window)):
            rows = place[:, None, a] - place[None, :, a] + w - 1
            s = s + torch.einsum("bhnd,nmd->bhnm", q, table[rows])
        return self.proj((s.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int, approximate: str = "none") -> None:
        super().__init__()
        self.approximate = approximate
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate=self.approximate))


class WindowBlock(nn.Module):
    """A block of Segment Anything's encoder: x + attn(norm1(x)), x + mlp(norm2(x)) on maps [B, H, W, C].

    Args:
        dim: C. num_heads: divides C. window_size: tokens of a window per axis. mlp_ratio: hidden over C.

    Example:
        >>> WindowBlock(32, 2, 7)(torch.randn(1, 10, 12, 32)).shape
        torch.Size([1, 10, 12, 32])
    """

    def __init__(self, dim: int, num_heads: int, window_size: int = 14, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = RelPosAttention(dim, num_heads, (window_size, window_size))
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(mlp_ratio * dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))
