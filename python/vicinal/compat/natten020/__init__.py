"""natten from 0.20 on: stride before dilation; fused functions only; no bias, no dropout of weights."""

from __future__ import annotations

from typing import Any

from vicinal import nn
from vicinal.compat._common import plain
from vicinal.compat._toggles import memory_usage_preference, no, no_op, yes
from vicinal.compat.natten020.functional import attention, merge_attentions, na1d, na2d, na3d

__all__ = [
    "HAS_LIBNATTEN",
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
    "__version__",
    "allow_flex_compile",
    "allow_flex_compile_backprop",
    "are_deterministic_algorithms_enabled",
    "attention",
    "disable_flex_compile",
    "disable_flex_compile_backprop",
    "get_memory_usage_preference",
    "is_flex_compile_allowed",
    "is_flex_compile_backprop_allowed",
    "is_kv_parallelism_in_fused_na_enabled",
    "is_memory_usage_default",
    "is_memory_usage_strict",
    "is_memory_usage_unrestricted",
    "merge_attentions",
    "na1d",
    "na2d",
    "na3d",
    "set_memory_usage_preference",
    "use_deterministic_algorithms",
    "use_kv_parallelism_in_fused_na",
]
__version__ = "0.20.1"
HAS_LIBNATTEN = True

allow_flex_compile = allow_flex_compile_backprop = no_op
disable_flex_compile = disable_flex_compile_backprop = no_op
set_memory_usage_preference = use_deterministic_algorithms = use_kv_parallelism_in_fused_na = no_op
get_memory_usage_preference = memory_usage_preference
are_deterministic_algorithms_enabled = is_memory_usage_default = yes
is_flex_compile_allowed = is_flex_compile_backprop_allowed = no
is_kv_parallelism_in_fused_na_enabled = is_memory_usage_strict = is_memory_usage_unrestricted = no


class _Legacy:
    """The constructor of these versions, before a module of vicinal.nn."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        kernel_size: Any,
        stride: Any = 1,
        dilation: Any = 1,
        is_causal: Any = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__(  # type: ignore[call-arg]
            embed_dim,
            num_heads,
            plain(kernel_size, None),
            stride=plain(stride, 1),
            dilation=plain(dilation, 1),
            is_causal=plain(is_causal, False),
            qkv_bias=qkv_bias,
            qk_scale=qk_scale or None,
            proj_drop=proj_drop,
        )


class NeighborhoodAttention1D(_Legacy, nn.NeighborhoodAttention1D):
    """[B, L, C] -> [B, L, C]"""


class NeighborhoodAttention2D(_Legacy, nn.NeighborhoodAttention2D):
    """[B, H, W, C] -> [B, H, W, C]"""


class NeighborhoodAttention3D(_Legacy, nn.NeighborhoodAttention3D):
    """[B, X, Y, Z, C] -> [B, X, Y, Z, C]"""
