"""`natten.functional` of 0.17."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vicinal.compat._common import av, fused, ignore_tuning, qk
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
    "na1d",
    "na1d_av",
    "na1d_qk",
    "na2d",
    "na2d_av",
    "na2d_qk",
    "na3d",
    "na3d_av",
    "na3d_qk",
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

_TUNING = frozenset({"tiling_config_forward", "tiling_config_backward", "xformers_kwargs"})


def _qk(
    query: Tensor,
    key: Tensor,
    kernel_size: Any,
    dilation: Any = 1,
    additional_keys: Tensor | None = None,
    is_causal: Any = False,
    rpb: Tensor | None = None,
) -> Tensor:
    """query, key [B, h, *space, D], additional_keys [B, h, E, D], rpb [h, 2k - 1, ...] -> scores [B, h,
    *space, S + E]; in causal windows the last slots are -inf where keys are missing."""
    return qk(
        query,
        key,
        kernel_size,
        dilation,
        is_causal=is_causal,
        rpb=rpb,
        additional_keys=additional_keys,
    )


def _av(
    attn: Tensor,
    value: Tensor,
    kernel_size: Any,
    dilation: Any = 1,
    additional_values: Tensor | None = None,
    is_causal: Any = False,
) -> Tensor:
    """attn [B, h, *space, S + E], value [B, h, *space, D], additional_values [B, h, E, D] -> [B, h, *space,
    D]."""
    return av(attn, value, kernel_size, dilation, is_causal=is_causal, additional_values=additional_values)


na1d_qk = na2d_qk = na3d_qk = _qk
na1d_av = na2d_av = na3d_av = _av


def na1d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Any,
    dilation: Any = 1,
    is_causal: Any = False,
    rpb: Tensor | None = None,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    **tuning: Any,
) -> Tensor:
    """query, key, value [B, L, h, D], additional_* [B, E, h, D] -> [B, L, h, D]; `tuning` is ignored."""
    ignore_tuning(tuning, _TUNING, "na1d")
    out: Tensor = fused(
        1,
        query,
        key,
        value,
        kernel_size,
        dilation=dilation,
        is_causal=is_causal,
        rpb=rpb,
        scale=scale,
        additional_keys=additional_keys,
        additional_values=additional_values,
    )
    return out


def na2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Any,
    dilation: Any = 1,
    is_causal: Any = False,
    rpb: Tensor | None = None,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    **tuning: Any,
) -> Tensor:
    """query, key, value [B, H, W, h, D], additional_* [B, E, h, D] -> [B, H, W, h, D]; `tuning` is
    ignored."""
    ignore_tuning(tuning, _TUNING, "na2d")
    out: Tensor = fused(
        2,
        query,
        key,
        value,
        kernel_size,
        dilation=dilation,
        is_causal=is_causal,
        rpb=rpb,
        scale=scale,
        additional_keys=additional_keys,
        additional_values=additional_values,
    )
    return out


def na3d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Any,
    dilation: Any = 1,
    is_causal: Any = False,
    rpb: Tensor | None = None,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    **tuning: Any,
) -> Tensor:
    """query, key, value [B, X, Y, Z, h, D], additional_* [B, E, h, D] -> [B, X, Y, Z, h, D]; `tuning` is
    ignored."""
    ignore_tuning(tuning, _TUNING, "na3d")
    out: Tensor = fused(
        3,
        query,
        key,
        value,
        kernel_size,
        dilation=dilation,
        is_causal=is_causal,
        rpb=rpb,
        scale=scale,
        additional_keys=additional_keys,
        additional_values=additional_values,
    )
    return out
