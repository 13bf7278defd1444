"""The modules of natten from 0.20 on."""

from __future__ import annotations

from typing import Any

from natten.modules import NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D
from torch import Tensor

from vicinal.drop_in.adapter import Adapter
from vicinal.drop_in.swin_attention import changed_parts
from vicinal.neighborhood import neighborhood_attention_qkvpacked


def _attend(attn: Any, x: Tensor) -> Tensor:
    """[B, *space, C] -> [B, *space, C]"""
    out = neighborhood_attention_qkvpacked(
        attn.qkv(x).unflatten(-1, (3, attn.num_heads, attn.head_dim)),
        attn.kernel_size,
        dilation=attn.dilation,
        stride=attn.stride,
        is_causal=attn.is_causal,
        scale=attn.scale,
    )
    assert isinstance(out, Tensor)
    return attn.proj_drop(attn.proj(out.flatten(-2)))


class FusedNeighborhoodAttention1D(NeighborhoodAttention1D):
    """natten's module on sequences, on vicinal's kernels."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, C] -> [B, L, C]"""
        return _attend(self, x)


class FusedNeighborhoodAttention2D(NeighborhoodAttention2D):
    """natten's module on maps, on vicinal's kernels."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]"""
        return _attend(self, x)


class FusedNeighborhoodAttention3D(NeighborhoodAttention3D):
    """natten's module on volumes, on vicinal's kernels."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, X, Y, Z, C] -> [B, X, Y, Z, C]"""
        return _attend(self, x)


def _reason_against(attn: Any) -> str | None:
    return changed_parts(attn, type(attn), ("qkv", "proj"))


_PAIRS = (
    (NeighborhoodAttention1D, FusedNeighborhoodAttention1D),
    (NeighborhoodAttention2D, FusedNeighborhoodAttention2D),
    (NeighborhoodAttention3D, FusedNeighborhoodAttention3D),
)
_INSTALLED = NeighborhoodAttention1D.__module__.startswith("natten.")  # else vicinal stands in for it
ADAPTERS = tuple(
    Adapter("neighborhood", original, fused, "neighborhood_attention", _reason_against)
    for original, fused in _PAIRS
    if _INSTALLED
)
