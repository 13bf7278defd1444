"""Published sizes of the reference models, and small ones with the same structure for tests.

Every function takes the fields to change: `swin_tiny(num_classes=10, image_size=256)`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vicinal.models.cswin import CSWinConfig
from vicinal.models.ecoformer import EcoFormerConfig
from vicinal.models.mossformer2 import MossFormer2Config
from vicinal.models.swin import SwinConfig

__all__ = [
    "cswin_base",
    "cswin_small",
    "cswin_test",
    "cswin_tiny",
    "ecoformer_pvt_v2_b0",
    "ecoformer_test",
    "mossformer2",
    "mossformer2_test",
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


def mossformer2(**changes: Any) -> MossFormer2Config:
    """MossFormer2 for separation: 512 channels, 24 layers, groups of 256, queries and keys of 128."""
    return replace(MossFormer2Config(), **changes)


def mossformer2_test(**changes: Any) -> MossFormer2Config:
    """32 channels, two layers, groups of 64, queries and keys of 16, no dropout."""
    small = MossFormer2Config(dim=32, depth=2, group_size=64, query_key_dim=16, memory_dim=16, dropout=0.0)
    return replace(small, **changes)


def ecoformer_pvt_v2_b0(**changes: Any) -> EcoFormerConfig:
    """EcoFormer on PVTv2-B0: 32 64 160 256 channels, two blocks a stage, codes of 16 bits, 25 anchors."""
    return replace(EcoFormerConfig(), **changes)


def ecoformer_test(**changes: Any) -> EcoFormerConfig:
    """Two hashed stages of one block, 32 and 64 channels."""
    small = EcoFormerConfig(
        num_classes=10,
        embed_dims=(32, 64),
        num_heads=(1, 2),
        mlp_ratios=(2, 2),
        depths=(1, 1),
        hashed_stages=2,
    )
    return replace(small, **changes)
