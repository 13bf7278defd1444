"""natten 0.17: is_causal and rel_pos_bias before qkv_bias; heads-last fused functions; no padding."""

from __future__ import annotations

from typing import Any

from vicinal import nn
from vicinal.compat._common import plain
from vicinal.compat._toggles import has_cuda, memory_usage_preference, no, no_op, yes
from vicinal.compat.natten017.functional import na1d, na2d, na3d

__all__ = [
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
    "__version__",
    "are_deterministic_algorithms_enabled",
    "disable_autotuner",
    "disable_gemm_na",
    "disable_tf32",
    "disable_tiled_na",
    "enable_gemm_na",
    "enable_tf32",
    "enable_tiled_na",
    "get_memory_usage_preference",
    "has_bfloat",
    "has_cuda",
    "has_fna",
    "has_fp32_gemm",
    "has_fp64_gemm",
    "has_fused_na",
    "has_gemm",
    "has_half",
    "has_tf32_gemm",
    "is_autotuner_enabled",
    "is_autotuner_enabled_for_backward",
    "is_autotuner_enabled_for_forward",
    "is_autotuner_thorough_for_backward",
    "is_autotuner_thorough_for_forward",
    "is_fna_enabled",
    "is_fused_na_enabled",
    "is_gemm_na_enabled",
    "is_kv_parallelism_in_fused_na_enabled",
    "is_memory_usage_default",
    "is_memory_usage_strict",
    "is_memory_usage_unrestricted",
    "is_tf32_in_gemm_na_enabled",
    "is_tiled_na_enabled",
    "na1d",
    "na2d",
    "na3d",
    "set_memory_usage_preference",
    "use_autotuner",
    "use_deterministic_algorithms",
    "use_flex_attention",
    "use_fna",
    "use_fused_na",
    "use_gemm_na",
    "use_kv_parallelism_in_fused_na",
    "use_tf32_in_gemm_na",
    "use_tiled_na",
]
__version__ = "0.17.5"

disable_autotuner = disable_gemm_na = disable_tf32 = disable_tiled_na = no_op
enable_gemm_na = enable_tf32 = enable_tiled_na = no_op
set_memory_usage_preference = use_autotuner = use_deterministic_algorithms = no_op
use_flex_attention = use_fna = use_fused_na = use_gemm_na = no_op
use_kv_parallelism_in_fused_na = use_tf32_in_gemm_na = use_tiled_na = no_op
get_memory_usage_preference = memory_usage_preference
are_deterministic_algorithms_enabled = is_memory_usage_default = yes
has_bfloat = has_fna = has_fused_na = has_half = is_fna_enabled = is_fused_na_enabled = yes
has_fp32_gemm = has_fp64_gemm = has_gemm = has_tf32_gemm = no
is_autotuner_enabled = is_autotuner_enabled_for_backward = is_autotuner_enabled_for_forward = no
is_autotuner_thorough_for_backward = is_autotuner_thorough_for_forward = no
is_gemm_na_enabled = is_tf32_in_gemm_na_enabled = is_tiled_na_enabled = no
is_kv_parallelism_in_fused_na_enabled = is_memory_usage_strict = is_memory_usage_unrestricted = no


class _Legacy:
    """The constructor of these versions, before a module of vicinal.nn."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: Any,
        dilation: Any = 1,
        is_causal: Any = False,
        rel_pos_bias: bool = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        use_experimental_ops: bool = False,
    ) -> None:
        super().__init__(  # type: ignore[call-arg]
            dim,
            num_heads,
            plain(kernel_size, None),
            dilation=plain(dilation, 1),
            is_causal=plain(is_causal, False),
            rel_pos_bias=rel_pos_bias,
            qkv_bias=qkv_bias,
            qk_scale=qk_scale or None,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
        )


class NeighborhoodAttention1D(_Legacy, nn.NeighborhoodAttention1D):
    """[B, L, C] -> [B, L, C]"""


class NeighborhoodAttention2D(_Legacy, nn.NeighborhoodAttention2D):
    """[B, H, W, C] -> [B, H, W, C]"""


class NeighborhoodAttention3D(_Legacy, nn.NeighborhoodAttention3D):
    """[B, X, Y, Z, C] -> [B, X, Y, Z, C]"""
