"""FlatFormer (Liu et al., arXiv:2301.08739): attention in groups of equal size along serpentine orders of
pillars.

Every layer sorts the pillars of a sample by windows, alternately along x and along y, unshifted and shifted,
and cuts the order into groups of `group_size`. An incomplete last group attends to the last `group_size`
pillars, and a sample of at most `group_size` is one group. Attention here is torch's nn.MultiheadAttention on
dense groups, sample by sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["FlatFormer", "FlatFormerConfig"]

ORDERS = (("x", False), ("x", True), ("y", False), ("y", True))


@dataclass(frozen=True)
class FlatFormerConfig:
    """Sizes of a FlatFormer.

    Args:
        grid: pillars along x and y. window: size along x and y. group_size: G.
        embed_dim: C, divisible by 4. num_heads: heads. feedforward: hidden channels. blocks: of four layers.
    """

    grid: tuple[int, int] = (468, 468)
    window: tuple[int, int] = (9, 9)
    group_size: int = 69
    embed_dim: int = 128
    num_heads: int = 8
    feedforward: int = 256
    blocks: int = 2

    def __post_init__(self) -> None:
        if self.embed_dim % self.num_heads or self.embed_dim % 4:
            raise ValueError(
                f"embed_dim is {self.embed_dim}; 4 and num_heads = {self.num_heads} must divide it"
            )


class GroupAttention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(dim, heads, batch_first=True)


class Layer(nn.Module):
    def __init__(self, dim: int, heads: int, feedforward: int) -> None:
        super().__init__()
        self.attn = GroupAttention(dim, heads)
        self.fc1 = nn.Linear(dim, feedforward)
        self.fc2 = nn.Linear(feedforward, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = self.norm1(x + context)
        return self.norm2(x + self.fc2(F.relu(self.fc1(x))))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, feedforward: int) -> None:
        super().__init__()
        self.block = nn.ModuleList([Layer(dim, heads, feedforward) for _ in ORDERS])


class FlatFormer(nn.Module):
    """A FlatFormer backbone: [N, C] features of pillars to [N, C].

    Example:
        >>> from vicinal.models import FlatFormer, flatformer_test
        >>> model = FlatFormer(flatformer_test())
        >>> one = torch.tensor([0])
        >>> coords = torch.cartesian_prod(torch.arange(2), one, torch.arange(9), torch.arange(7))
        >>> model(torch.randn(126, 32), coords, 2).shape
        torch.Size([126, 32])
    """

    def __init__(self, config: FlatFormerConfig) -> None:
        super().__init__()
        self.config = config
        sizes = (config.embed_dim, config.num_heads, config.feedforward)
        self.block_list = nn.ModuleList([Block(*sizes) for _ in range(config.blocks)])

    def forward(self, x: Tensor, coords: Tensor, batch_size: int) -> Tensor:
        """x [N, C], coords int64 [N, 4] (sample, 0, y, x) without repeats."""
        groups = [self.groups(coords, batch_size, axis, shifted) for axis, shifted in ORDERS]
        position = embedded(coords, self.config.embed_dim).to(x.dtype)
        for block in self.block_list:
            layers: Any = block.block
            for layer, group in zip(layers, groups):
                x = layer(x, self.attend(layer.attn.attn, x, position, group))
        return x

    def groups(self, coords: Tensor, batch_size: int, axis: str, shifted: bool) -> Any:
        """Per sample, its rows in their order."""
        order = serpentine(coords, self.config.window, axis, shifted)
        bounds = torch.bincount(coords[:, 0], minlength=batch_size).tolist()
        return order.split(bounds)

    def attend(self, attention: nn.MultiheadAttention, x: Tensor, position: Tensor, groups: Any) -> Tensor:
        """Whole groups as a batch, and the last one of each sample by itself."""
        out, size = torch.zeros_like(x), self.config.group_size
        for rows in groups:
            whole = len(rows) // size * size
            parts = []
            if whole:
                inside = rows[:whole].view(-1, size)
                parts.append((inside, inside))
            if whole < len(rows):
                parts.append((rows[None, whole:], rows[None, -size:]))
            for queries, keys in parts:
                at = x + position
                found = attention(at[queries], at[keys], x[keys], need_weights=False)[0]
                out = out.index_copy(0, queries.flatten(), found.flatten(0, 1))
        return out


def serpentine(coords: Tensor, window: tuple[int, int], axis: str, shifted: bool) -> Tensor:
    """int64 [N]: rows by (sample, y1, s x1, s x2, s t y2) with (x1, y1) the window, (x2, y2) the place in it,
    s = (-1)^y1 and t = (-1)^x2; for axis "y" with x and y exchanged."""
    places = [coords[:, 3 - a] + (window[a] // 2 if shifted else 0) for a in (0, 1)]
    along, across = (0, 1) if axis == "x" else (1, 0)
    outer, deep = places[across] // window[across], places[across] % window[across]
    inner, near = places[along] // window[along], places[along] % window[along]
    s, t = 1 - 2 * (outer % 2), 1 - 2 * (near % 2)
    order = torch.arange(len(coords), device=coords.device)
    for field in (s * t * deep, s * near, s * inner, outer, coords[:, 0]):  # the last sort counts most
        order = order[torch.argsort(field[order], stable=True)]
    return order


def embedded(coords: Tensor, dim: int) -> Tensor:
    """float32 [N, C]: sines and cosines in turn, of x in the first half of the channels, then of y."""
    frequency = 10000.0 ** (-torch.arange(0, dim // 2, 2, device=coords.device) / (dim // 2))
    angles = coords[:, [3, 2], None] * frequency
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)
