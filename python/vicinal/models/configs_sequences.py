"""Published sizes of the reference models of sequences, and small ones for tests.

Every function takes the fields to change: `lra_text(attention="favor")`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vicinal.models.hnet import HNetConfig
from vicinal.models.lra import LRAConfig

__all__ = ["hnet_test", "hnet_two_stage", "lra_test", "lra_text"]


def hnet_two_stage(**changes: Any) -> HNetConfig:
    """H-Net with two stages of chunks around 26 attention layers: 1024 and 1536 channels."""
    return replace(HNetConfig(), **changes)


def hnet_test(**changes: Any) -> HNetConfig:
    """H-Net's two stages with one or two layers each, 64 and 96 channels, windows of 16 keys."""
    small = HNetConfig(
        layout=("m1", ("T1m1", ("T2",), "m1T1"), "m1"),
        dims=(64, 64, 96),
        hidden=(0, 96, 128),
        num_heads=(4, 4, 4),
        rotary_dims=(8, 8, 12),
        windows=(15, 15, None),
        state=16,
        head_dim=16,
        chunk=16,
    )
    return replace(small, **changes)


def lra_text(**changes: Any) -> LRAConfig:
    """Texts of up to 4,096 bytes: 256 channels, 4 layers, 4 heads."""
    return replace(LRAConfig(), **changes)


def lra_test(**changes: Any) -> LRAConfig:
    """Texts of up to 256 bytes: 64 channels, 2 layers, 4 heads."""
    small = LRAConfig(dim=64, depth=2, mlp_ratio=2, max_len=256, window=24, projected=32)
    return replace(small, **changes)
