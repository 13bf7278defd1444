"""State-space layers on point clouds in plain PyTorch: Mamba-2 scans along several orders of the points.

Points have no order of their own. A layer scans them along each of K orders that the caller gives (curves
through space, sorted coordinates), puts the results back and averages them; with `both_ways` every order is
scanned backwards, too. After the Mamba-2 variant of point-cloud Mamba models (Liang et al., PointMamba,
arXiv:2402.10739; Dao and Gu, arXiv:2405.21060). The parameters' names are our own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vicinal.models.mamba2 import Mamba2Config, Mamba2Mixer, Packing

__all__ = ["PointSSM", "PointSSMLayer"]


class PointSSMLayer(nn.Module):
    """x + the mean over the orders of a scan along each: [T, C] -> [T, C].

    Args:
        config: sizes of the mixers. orders: K, a mixer each. both_ways: a second mixer for each order, which
            scans it backwards.
    """

    def __init__(self, config: Mamba2Config, orders: int, both_ways: bool = False) -> None:
        super().__init__()
        self.both_ways = both_ways
        self.norm = nn.LayerNorm(config.dim)
        self.mixers = nn.ModuleList(Mamba2Mixer(config) for _ in range(orders * (1 + both_ways)))

    def forward(self, x: Tensor, orders: Sequence[Tensor], packing: Packing) -> Tensor:
        """orders: K permutations [T] of the points, int64, each inside its sample."""
        if self.both_ways:
            orders = [*orders, *(backwards(order, packing) for order in orders)]
        if len(orders) != len(self.mixers):
            raise ValueError(
                f"orders has {len(orders)} permutations; the layer has {len(self.mixers)} mixers"
            )
        y = self.norm(x)
        found = [mixer(y[order], packing)[inverse(order)] for mixer, order in zip(self.mixers, orders)]
        return x + torch.stack(found).mean(0)


class PointSSM(nn.Module):
    """Layers of scans and a norm on packed point clouds: [T, C] -> [T, C].

    Args:
        config: sizes of the mixers. depth: layers. orders, both_ways: see `PointSSMLayer`.
    """

    def __init__(self, config: Mamba2Config, depth: int, orders: int = 1, both_ways: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(PointSSMLayer(config, orders, both_ways) for _ in range(depth))
        self.norm = nn.LayerNorm(config.dim)

    def forward(self, x: Tensor, orders: Sequence[Tensor], ends: Tensor) -> Tensor:
        """orders: K permutations [T] of the points, int64, each inside its sample. ends: int32 [S + 1], the
        bounds of the samples."""
        packing = Packing.of(ends, len(x))
        for layer in self.layers:
            x = layer(x, orders, packing)
        return self.norm(x)


def inverse(order: Tensor) -> Tensor:
    """The permutation that takes back `order`."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


def backwards(order: Tensor, packing: Packing) -> Tensor:
    """`order` from the last point of every sample to its first."""
    begin, end = packing.ends[packing.sequence], packing.ends[packing.sequence + 1]
    return order[begin + end - 1 - torch.arange(len(order), device=order.device)]
