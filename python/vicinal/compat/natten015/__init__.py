"""natten 0.14.5 to 0.15.1: num_heads before kernel_size, dilation before the rest, small inputs padded."""

from __future__ import annotations

from vicinal import nn
from vicinal.compat._common import volume
from vicinal.compat._toggles import has_cuda, no, no_op, yes

__all__ = [
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
    "__version__",
    "disable_gemm_na",
    "disable_tf32",
    "disable_tiled_na",
    "enable_gemm_na",
    "enable_tf32",
    "enable_tiled_na",
    "has_bfloat",
    "has_cuda",
    "has_fp32_gemm",
    "has_fp64_gemm",
    "has_gemm",
    "has_half",
    "has_tf32_gemm",
]
__version__ = "0.15.1"

disable_gemm_na = disable_tf32 = disable_tiled_na = no_op
enable_gemm_na = enable_tf32 = enable_tiled_na = no_op
has_bfloat = has_half = yes
has_gemm = has_fp32_gemm = has_fp64_gemm = has_tf32_gemm = no


class _Legacy:
    """The constructor of these versions on one and two axes, before a module of vicinal.nn."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int,
        dilation: int | None = 1,
        bias: bool = True,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__(  # type: ignore[call-arg]
            dim,
            num_heads,
            kernel_size,
            dilation=dilation or 1,
            rel_pos_bias=bias,
            qkv_bias=qkv_bias,
            qk_scale=qk_scale or None,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            pad_small_inputs=True,
        )


class NeighborhoodAttention1D(_Legacy, nn.NeighborhoodAttention1D):
    """[B, L, C] -> [B, L, C]"""


class NeighborhoodAttention2D(_Legacy, nn.NeighborhoodAttention2D):
    """[B, H, W, C] -> [B, H, W, C]"""


class NeighborhoodAttention3D(nn.NeighborhoodAttention3D):
    """[B, X, Y, Z, C] -> [B, X, Y, Z, C]; the first axis has sizes of its own. All short axes are padded."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int,
        kernel_size_d: int,
        dilation: int | None = 1,
        dilation_d: int | None = 1,
        bias: bool = True,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__(
            dim,
            num_heads,
            volume(kernel_size_d, kernel_size),
            dilation=volume(dilation_d or 1, dilation or 1),
            rel_pos_bias=bias,
            qkv_bias=qkv_bias,
            qk_scale=qk_scale or None,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            pad_small_inputs=True,
        )
