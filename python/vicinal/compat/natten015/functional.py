"""`natten.functional` of 0.14.5 to 0.15.1."""

from __future__ import annotations

from torch import Tensor

from vicinal.compat._common import av, qk, volume
from vicinal.compat._legacy_names import (
    natten1dav,
    natten1dqk,
    natten1dqkrpb,
    natten2dav,
    natten2dqk,
    natten2dqkrpb,
    natten3dav,
    natten3dqk,
    natten3dqkrpb,
)

__all__ = [
    "na1d_av",
    "na1d_qk",
    "na1d_qk_with_bias",
    "na2d_av",
    "na2d_qk",
    "na2d_qk_with_bias",
    "na3d_av",
    "na3d_qk",
    "na3d_qk_with_bias",
    "natten1dav",
    "natten1dqk",
    "natten1dqkrpb",
    "natten2dav",
    "natten2dqk",
    "natten2dqkrpb",
    "natten3dav",
    "natten3dqk",
    "natten3dqkrpb",
]


def na1d_qk(
    query: Tensor, key: Tensor, kernel_size: int, dilation: int, additional_keys: Tensor | None = None
) -> Tensor:
    """query, key [B, h, L, D], additional_keys [B, h, E, D] -> scores [B, h, L, k + E]."""
    return qk(query, key, kernel_size, dilation, additional_keys=additional_keys)


def na2d_qk(
    query: Tensor, key: Tensor, kernel_size: int, dilation: int, additional_keys: Tensor | None = None
) -> Tensor:
    """query, key [B, h, H, W, D], additional_keys [B, h, E, D] -> scores [B, h, H, W, k * k + E]."""
    return qk(query, key, kernel_size, dilation, additional_keys=additional_keys)


def na3d_qk(
    query: Tensor,
    key: Tensor,
    kernel_size_d: int,
    kernel_size: int,
    dilation_d: int,
    dilation: int,
    additional_keys: Tensor | None = None,
) -> Tensor:
    """query, key [B, h, X, Y, Z, D], additional_keys [B, h, E, D] -> scores [B, h, X, Y, Z, kd * k * k +
    E]."""
    kernel, spread = volume(kernel_size_d, kernel_size), volume(dilation_d, dilation)
    return qk(query, key, kernel, spread, additional_keys=additional_keys)


def na1d_qk_with_bias(
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    kernel_size: int,
    dilation: int,
    additional_keys: Tensor | None = None,
) -> Tensor:
    """`na1d_qk` plus bias [h, 2k - 1]."""
    return qk(query, key, kernel_size, dilation, rpb=bias, additional_keys=additional_keys)


def na2d_qk_with_bias(
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    kernel_size: int,
    dilation: int,
    additional_keys: Tensor | None = None,
) -> Tensor:
    """`na2d_qk` plus bias [h, 2k - 1, 2k - 1]."""
    return qk(query, key, kernel_size, dilation, rpb=bias, additional_keys=additional_keys)


def na3d_qk_with_bias(
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    kernel_size_d: int,
    kernel_size: int,
    dilation_d: int,
    dilation: int,
    additional_keys: Tensor | None = None,
) -> Tensor:
    """`na3d_qk` plus bias [h, 2 kd - 1, 2k - 1, 2k - 1]."""
    kernel, spread = volume(kernel_size_d, kernel_size), volume(dilation_d, dilation)
    return qk(query, key, kernel, spread, rpb=bias, additional_keys=additional_keys)


def na1d_av(
    attn: Tensor, value: Tensor, kernel_size: int, dilation: int, additional_values: Tensor | None = None
) -> Tensor:
    """attn [B, h, L, k + E], value [B, h, L, D], additional_values [B, h, E, D] -> [B, h, L, D]."""
    return av(attn, value, kernel_size, dilation, additional_values=additional_values)


def na2d_av(
    attn: Tensor, value: Tensor, kernel_size: int, dilation: int, additional_values: Tensor | None = None
) -> Tensor:
    """attn [B, h, H, W, k * k + E], value [B, h, H, W, D], additional_values [B, h, E, D] -> [B, h, H, W,
    D]."""
    return av(attn, value, kernel_size, dilation, additional_values=additional_values)


def na3d_av(
    attn: Tensor,
    value: Tensor,
    kernel_size_d: int,
    kernel_size: int,
    dilation_d: int,
    dilation: int,
    additional_values: Tensor | None = None,
) -> Tensor:
    """attn [B, h, X, Y, Z, kd * k * k + E], value [B, h, X, Y, Z, D], additional_values [B, h, E, D] -> [B,
    h, X, Y, Z, D]."""
    kernel, spread = volume(kernel_size_d, kernel_size), volume(dilation_d, dilation)
    return av(attn, value, kernel, spread, additional_values=additional_values)
