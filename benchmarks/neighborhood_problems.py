"""The neighborhood problems that are timed: layers of published models, and larger grids."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from vicinal import Neighborhood
from vicinal._neighborhood_plan import AxisNeighborhood, axis_table
from vicinal._neighborhood_types import resolve


@dataclass(frozen=True)
class Problem:
    """One attention core, batch 1: q, k, v [1, *space, heads, head_dim] in, out. `bias`: with a table of
    relative positions."""

    name: str
    space: tuple[int, ...]
    where: Neighborhood
    heads: int = 4
    head_dim: int = 32
    bias: bool = False
    core: bool = False  # part of every run; the others need --full
    quick: bool = False

    @property
    def axes(self) -> tuple[AxisNeighborhood, ...]:
        return resolve(self.where, len(self.space), self.bias).on(self.space, self.space)

    @property
    def plain(self) -> bool:
        return self.where.border == "shift" and not any(a.causal for a in self.axes)

    @property
    def table(self) -> tuple[int, ...]:
        """Shape of a head's table."""
        return tuple(2 * a.kernel - 1 for a in self.axes)

    def keys(self) -> tuple[Tensor, Tensor]:
        """int64 [N, S]: the tokens that each query reads, and bool [N, S]: whether the slot is one."""
        index, there = torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1, dtype=torch.bool)
        for axis in self.axes:
            t = axis_table(axis)
            order = t.i.argsort()
            a, b = t.a[order], t.b[order]
            places = a[:, None] + torch.arange(int((b - a).max()))
            d = min(axis.dilation, axis.length)
            tokens = (torch.arange(axis.length) % d)[:, None] + d * places
            valid = places < b[:, None]
            tokens = tokens.where(valid, 0)
            index = (
                (index[:, None, :, None] * axis.length + tokens[None, :, None, :]).flatten(2).flatten(0, 1)
            )
            there = (there[:, None, :, None] & valid[None, :, None, :]).flatten(2).flatten(0, 1)
        return index, there

    def bias_index(self, index: Tensor) -> Tensor:
        """int64 [N, S]: the entry of the flat table for every slot."""
        total = torch.zeros_like(index)
        query = torch.arange(len(index))[:, None]
        size = prod(self.space)
        for axis in self.axes:
            size //= axis.length
            d = min(axis.dilation, axis.length)
            places = (index // size % axis.length) // d - (query // size % axis.length) // d
            total = total * (2 * axis.kernel - 1) + (places + axis.kernel - 1).clamp(0, 2 * axis.kernel - 2)
        return total

    def pairs(self) -> int:
        """Query-key pairs of a head."""
        return prod(int((t.b - t.a).sum()) for t in map(axis_table, self.axes))

    def flops(self, backward: bool) -> float:
        """Useful flops: two products forward, five backward."""
        return 4.0 * self.pairs() * self.heads * self.head_dim * (3.5 if backward else 1.0)

    def bytes(self, dtype: torch.dtype, backward: bool) -> int:
        """Least traffic: q, k, v and out once, in the backward three times."""
        elements = 4 * prod(self.space) * self.heads * self.head_dim
        return dtype.itemsize * elements * (3 if backward else 1)


N = Neighborhood
PROBLEMS = (
    Problem("nat-56-k7", (56, 56), N(7), core=True, quick=True),
    Problem("nat-56-k7-bias", (56, 56), N(7), bias=True, core=True),
    Problem("dinat-56-k7-d8", (56, 56), N(7, dilation=8), core=True, quick=True),
    Problem("dinat-56-k7-d8-bias", (56, 56), N(7, dilation=8), bias=True),
    Problem("nat-56-k7-dim64", (56, 56), N(7), head_dim=64),
    Problem("dinat-28-k7-d4", (28, 28), N(7, dilation=4)),
    Problem("dinat-14-k7-d2", (14, 14), N(7, dilation=2), heads=8),
    Problem("grid-112-k7", (112, 112), N(7), core=True),
    Problem("grid-112-k13", (112, 112), N(13), core=True),
    Problem("grid-448-k7", (448, 448), N(7)),
    Problem("volume-16-k5", (16, 16, 16), N(5), core=True),
    Problem("video-8x28x28-k3x7x7", (8, 28, 28), N((3, 7, 7))),
    Problem("sequence-4096-k127", (4096,), N(127), core=True),
    Problem("sequence-16384-causal-512", (16384,), N((511, 0), is_causal=True, border="truncate"), core=True),
)
