"""Published sizes of the reference models of sparse voxels, and small ones for tests.

Every function takes the fields to change: `dsvt_pillar(set_sizes=(48,))`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vicinal.models.dsvt import DSVTConfig
from vicinal.models.flatformer import FlatFormerConfig

__all__ = ["dsvt_pillar", "dsvt_test", "flatformer_test", "flatformer_waymo"]


def dsvt_pillar(**changes: Any) -> DSVTConfig:
    """DSVT-P for Waymo: pillars, windows of 12 and 24, sets of 36."""
    return replace(DSVTConfig(), **changes)


def dsvt_test(**changes: Any) -> DSVTConfig:
    """A small DSVT: 48 channels, sets of 12, two blocks."""
    small = DSVTConfig(
        grid=(60, 60, 1), embed_dim=48, num_heads=4, feedforward=96, set_sizes=(12,), blocks=(2,)
    )
    return replace(small, **changes)


def flatformer_waymo(**changes: Any) -> FlatFormerConfig:
    """FlatFormer for Waymo: windows of 13, groups of 144."""
    return replace(FlatFormerConfig(window=(13, 13), group_size=144), **changes)


def flatformer_test(**changes: Any) -> FlatFormerConfig:
    """A small FlatFormer: 32 channels, groups of 16, one block."""
    small = FlatFormerConfig(
        grid=(60, 60), group_size=16, embed_dim=32, num_heads=4, feedforward=64, blocks=1
    )
    return replace(small, **changes)
