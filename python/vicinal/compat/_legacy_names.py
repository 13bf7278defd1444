"""The functions of natten that were named natten{1,2,3}d...; heads first, nothing scaled."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vicinal.compat._common import natten_av, natten_qkrpb


def natten1dqkrpb(
    query: Tensor,
    key: Tensor,
    rpb: Tensor | None,
    *sizes: Any,
    kernel_size: int | None = None,
    dilation: int | None = None,
) -> Tensor:
    """query, key [B, h, L, D], rpb [h, 2k - 1] -> scores [B, h, L, k].

    `sizes`: (dilation), or (kernel_size, dilation).
    """
    return natten_qkrpb(query, key, rpb, sizes, kernel_size, dilation)


def natten2dqkrpb(
    query: Tensor,
    key: Tensor,
    rpb: Tensor | None,
    *sizes: Any,
    kernel_size: int | None = None,
    dilation: int | None = None,
) -> Tensor:
    """query, key [B, h, H, W, D], rpb [h, 2k - 1, 2k - 1] -> scores [B, h, H, W, k * k].

    `sizes`: (dilation), or (kernel_size, dilation).
    """
    return natten_qkrpb(query, key, rpb, sizes, kernel_size, dilation)


def natten3dqkrpb(
    query: Tensor,
    key: Tensor,
    rpb: Tensor | None,
    kernel_size_d: int,
    kernel_size: int,
    dilation_d: int = 1,
    dilation: int = 1,
) -> Tensor:
    """query, key [B, h, X, Y, Z, D], rpb [h, 2 kd - 1, 2k - 1, 2k - 1] -> scores [B, h, X, Y, Z, kd * k *
    k]."""
    return natten_qkrpb(query, key, rpb, (kernel_size_d, kernel_size, dilation_d, dilation))


def natten1dqk(query: Tensor, key: Tensor, kernel_size: int, dilation: int = 1) -> Tensor:
    """query, key [B, h, L, D] -> scores [B, h, L, k]."""
    return natten_qkrpb(query, key, None, (kernel_size, dilation))


def natten2dqk(query: Tensor, key: Tensor, kernel_size: int, dilation: int = 1) -> Tensor:
    """query, key [B, h, H, W, D] -> scores [B, h, H, W, k * k]."""
    return natten_qkrpb(query, key, None, (kernel_size, dilation))


def natten3dqk(
    query: Tensor, key: Tensor, kernel_size_d: int, kernel_size: int, dilation_d: int = 1, dilation: int = 1
) -> Tensor:
    """query, key [B, h, X, Y, Z, D] -> scores [B, h, X, Y, Z, kd * k * k]."""
    return natten_qkrpb(query, key, None, (kernel_size_d, kernel_size, dilation_d, dilation))


def natten1dav(
    attn: Tensor, value: Tensor, *sizes: Any, kernel_size: int | None = None, dilation: int | None = None
) -> Tensor:
    """attn [B, h, L, k], value [B, h, L, D] -> [B, h, L, D]. `sizes`: (dilation), or (kernel_size,
    dilation)."""
    return natten_av(attn, value, sizes, kernel_size, dilation)


def natten2dav(
    attn: Tensor, value: Tensor, *sizes: Any, kernel_size: int | None = None, dilation: int | None = None
) -> Tensor:
    """attn [B, h, H, W, k * k], value [B, h, H, W, D] -> [B, h, H, W, D]. `sizes`: (dilation), or
    (kernel_size, dilation)."""
    return natten_av(attn, value, sizes, kernel_size, dilation)


def natten3dav(
    attn: Tensor,
    value: Tensor,
    kernel_size_d: int,
    kernel_size: int,
    dilation_d: int = 1,
    dilation: int = 1,
) -> Tensor:
    """attn [B, h, X, Y, Z, kd * k * k], value [B, h, X, Y, Z, D] -> [B, h, X, Y, Z, D]."""
    return natten_av(attn, value, (kernel_size_d, kernel_size, dilation_d, dilation))
