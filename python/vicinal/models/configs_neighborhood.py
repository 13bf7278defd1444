"""Published sizes of the reference models of neighborhood attention, and small ones for tests.

Every function takes the fields to change: `dinat_tiny(num_classes=10)`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vicinal.models.causal_lm import CausalLMConfig, Scope
from vicinal.models.dformer import DFormerConfig
from vicinal.models.dinat import DiNATConfig

__all__ = [
    "causal_lm_test",
    "dformer_base",
    "dformer_test",
    "dinat_base",
    "dinat_large",
    "dinat_large_384",
    "dinat_mini",
    "dinat_small",
    "dinat_test",
    "dinat_tiny",
    "masformer",
    "meshtron",
    "nat_base",
    "nat_mini",
    "nat_small",
    "nat_tiny",
]

_ONE = ((1,),) * 4
_DEEP = (3, 4, 18, 5)


def dinat_mini(**changes: Any) -> DiNATConfig:
    """DiNAT-Mini: 64 channels, depths 3 4 6 5, window 7, dilations up to 8 4 2 1."""
    return replace(DiNATConfig(), **changes)


def dinat_tiny(**changes: Any) -> DiNATConfig:
    """DiNAT-Tiny: DiNAT-Mini with depths 3 4 18 5."""
    return replace(DiNATConfig(depths=_DEEP), **changes)


def dinat_small(**changes: Any) -> DiNATConfig:
    """DiNAT-Small: 96 channels, depths 3 4 18 5, MLPs of twice the width."""
    small = DiNATConfig(embed_dim=96, depths=_DEEP, num_heads=(3, 6, 12, 24), mlp_ratio=2.0)
    return replace(small, **changes)


def dinat_base(**changes: Any) -> DiNATConfig:
    """DiNAT-Base: DiNAT-Small with 128 channels and layer scale."""
    return replace(dinat_small(embed_dim=128, num_heads=(4, 8, 16, 32), layer_scale=1e-5), **changes)


def dinat_large(**changes: Any) -> DiNATConfig:
    """DiNAT-Large: DiNAT-Small with 192 channels."""
    return replace(dinat_small(embed_dim=192, num_heads=(6, 12, 24, 48)), **changes)


def dinat_large_384(**changes: Any) -> DiNATConfig:
    """DiNAT-Large for 384 pixels: dilations up to 13 6 3 1."""
    return replace(dinat_large(dilations=((1, 13), (1, 6), (1, 3), (1,))), **changes)


def dinat_test(**changes: Any) -> DiNATConfig:
    """For 64 pixels: 32 channels, depths 2 2 1, window 3, dilations up to 4 2 1."""
    small = DiNATConfig(
        num_classes=10,
        embed_dim=32,
        depths=(2, 2, 1),
        num_heads=(2, 4, 8),
        kernel_size=3,
        dilations=((1, 4), (1, 2), (1,)),
    )
    return replace(small, **changes)


def nat_mini(**changes: Any) -> DiNATConfig:
    """NAT-Mini: DiNAT-Mini without dilation."""
    return replace(dinat_mini(dilations=_ONE), **changes)


def nat_tiny(**changes: Any) -> DiNATConfig:
    """NAT-Tiny: DiNAT-Tiny without dilation."""
    return replace(dinat_tiny(dilations=_ONE), **changes)


def nat_small(**changes: Any) -> DiNATConfig:
    """NAT-Small: DiNAT-Small without dilation, with layer scale."""
    return replace(dinat_small(dilations=_ONE, layer_scale=1e-5), **changes)


def nat_base(**changes: Any) -> DiNATConfig:
    """NAT-Base: DiNAT-Base without dilation."""
    return replace(dinat_base(dilations=_ONE), **changes)


def dformer_base(**changes: Any) -> DFormerConfig:
    """For crops of 64 x 128 x 128 voxels: 96 channels, depths 2 2 6 2, groups of 2 x 8 x 8."""
    return replace(DFormerConfig(), **changes)


def dformer_test(**changes: Any) -> DFormerConfig:
    """For crops of 16 x 32 x 32 voxels: 24 channels, two stages of two blocks, groups of 2 x 4 x 4."""
    small = DFormerConfig(
        num_classes=3, embed_dim=24, group_size=(2, 4, 4), depths=(2, 2), num_heads=(2, 4), mlp_ratio=2.0
    )
    return replace(small, **changes)


def meshtron(**changes: Any) -> CausalLMConfig:
    """Sliding windows of 512 tokens in every layer, 16 heads of 32."""
    return replace(CausalLMConfig(), **changes)


def masformer(**changes: Any) -> CausalLMConfig:
    """Blocks of 1024 tokens that see themselves and the block before; every fourth layer sees everything."""
    local = Scope(2048, block=1024)
    full = CausalLMConfig(dim=2048, depth=24, scopes=(local, local, local, Scope(None)))
    return replace(full, **changes)


def causal_lm_test(**changes: Any) -> CausalLMConfig:
    """32 channels, 4 heads on 2 key heads; a sliding window, blocks, and a layer that sees everything."""
    small = CausalLMConfig(
        vocab_size=17,
        dim=32,
        depth=4,
        num_heads=4,
        num_kv_heads=2,
        scopes=(Scope(5), Scope(8, block=4), Scope(4, block=4), Scope(None)),
    )
    return replace(small, **changes)
