"""Published sizes of the reference models, and small ones with the same structure for tests.

Every function takes the fields to change: `swin_tiny(num_classes=10, image_size=256)`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vicinal.models.cswin import CSWinConfig
from vicinal.models.swin import SwinConfig

__all__ = [
    "cswin_base",
    "cswin_small",
    "cswin_test",
    "cswin_tiny",
    "swin_base",
    "swin_small",
    "swin_test",
    "swin_tiny",
    "swin_v2_base",
    "swin_v2_small",
    "swin_v2_test",
    "swin_v2_tiny",
]

_SWIN_V2 = SwinConfig(image_size=256, window_size=8, version=2)


def swin_tiny(**changes: Any) -> SwinConfig:
    """Swin-T: 96 channels, depths 2 2 6 2, window 7, 224 pixels."""
    return replace(SwinConfig(), **changes)


def swin_small(**changes: Any) -> SwinConfig:
    """Swin-S: Swin-T with depths 2 2 18 2."""
    return replace(SwinConfig(depths=(2, 2, 18, 2)), **changes)


def swin_base(**changes: Any) -> SwinConfig:
    """Swin-B: 128 channels, depths 2 2 18 2."""
    return replace(SwinConfig(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32)), **changes)


def swin_test(**changes: Any) -> SwinConfig:
    """56 pixels, 32 channels, two stages of two blocks, window 7."""
    small = SwinConfig(image_size=56, num_classes=10, embed_dim=32, depths=(2, 2), num_heads=(2, 4))
    return replace(small, **changes)


def swin_v2_tiny(**changes: Any) -> SwinConfig:
    """SwinV2-T: 96 channels, depths 2 2 6 2, window 8, 256 pixels."""
    return replace(_SWIN_V2, **changes)


def swin_v2_small(**changes: Any) -> SwinConfig:
    """SwinV2-S: SwinV2-T with depths 2 2 18 2."""
    return replace(replace(_SWIN_V2, depths=(2, 2, 18, 2)), **changes)


def swin_v2_base(**changes: Any) -> SwinConfig:
    """SwinV2-B: 128 channels, depths 2 2 18 2."""
    base = replace(_SWIN_V2, embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32))
    return replace(base, **changes)


def swin_v2_test(**changes: Any) -> SwinConfig:
    """64 pixels, 32 channels, two stages of two blocks, window 8."""
    small = replace(_SWIN_V2, image_size=64, num_classes=10, embed_dim=32, depths=(2, 2), num_heads=(2, 4))
    return replace(small, **changes)


def cswin_tiny(**changes: Any) -> CSWinConfig:
    """CSWin-T: 64 channels, depths 1 2 21 1, stripes 1 2 7 7, 224 pixels."""
    return replace(CSWinConfig(), **changes)


def cswin_small(**changes: Any) -> CSWinConfig:
    """CSWin-S: CSWin-T with depths 2 4 32 2."""
    return replace(CSWinConfig(depths=(2, 4, 32, 2)), **changes)


def cswin_base(**changes: Any) -> CSWinConfig:
    """CSWin-B: 96 channels, depths 2 4 32 2."""
    return replace(CSWinConfig(embed_dim=96, depths=(2, 4, 32, 2), num_heads=(4, 8, 16, 32)), **changes)


def cswin_test(**changes: Any) -> CSWinConfig:
    """64 pixels, 16 channels, four stages of one block, stripes 1 2 2 2."""
    small = CSWinConfig(
        image_size=64,
        num_classes=10,
        embed_dim=16,
        depths=(1, 1, 1, 1),
        num_heads=(2, 4, 8, 16),
        split_sizes=(1, 2, 2, 2),
    )
    return replace(small, **changes)
