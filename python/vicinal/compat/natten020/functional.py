"""`natten.functional` from 0.20 on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vicinal.compat._common import fused, ignore_tuning
from vicinal.neighborhood import neighborhood_attention

__all__ = ["attention", "merge_attentions", "na1d", "na2d", "na3d", "neighborhood_attention_generic"]

_TUNING = frozenset(
    {
        "attention_kwargs",
        "backend",
        "q_tile_shape",
        "kv_tile_shape",
        "q_tile_size",
        "kv_tile_size",
        "backward_q_tile_shape",
        "backward_kv_tile_shape",
        "backward_q_tile_size",
        "backward_kv_tile_size",
        "backward_kv_splits",
        "backward_use_pt_reduction",
        "run_persistent_kernel",
        "kernel_schedule",
        "torch_compile",
        "try_token_permute",
    }
)


def neighborhood_attention_generic(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Any,
    stride: Any = 1,
    dilation: Any = 1,
    is_causal: Any = False,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    return_lse: bool = False,
    **tuning: Any,
) -> Any:
    """query, key, value [B, *space, h, D], additional_* [B, E, h, D] -> [B, *space, h, D], and lse [B,
    *space, h] with return_lse; `tuning` (backends, tile shapes) is ignored."""
    ignore_tuning(tuning, _TUNING, "neighborhood_attention_generic")
    return fused(
        query.dim() - 3,
        query,
        key,
        value,
        kernel_size,
        stride=stride,
        dilation=dilation,
        is_causal=is_causal,
        scale=scale,
        additional_keys=additional_keys,
        additional_values=additional_values,
        return_lse=return_lse,
    )


def na1d(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    """`neighborhood_attention_generic` of [B, L, h, D]."""
    return _of_rank(1, query, key, value, *args, **kwargs)


def na2d(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    """`neighborhood_attention_generic` of [B, H, W, h, D]."""
    return _of_rank(2, query, key, value, *args, **kwargs)


def na3d(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    """`neighborhood_attention_generic` of [B, X, Y, Z, h, D]."""
    return _of_rank(3, query, key, value, *args, **kwargs)


def _of_rank(rank: int, query: Tensor, *args: Any, **kwargs: Any) -> Any:
    if query.dim() != rank + 3:
        raise ValueError(f"query has {query.dim()} dimensions; na{rank}d takes [B, {rank} axes, heads, dim]")
    return neighborhood_attention_generic(query, *args, **kwargs)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool = False,
    scale: float | None = None,
    seqlens_Q: Tensor | None = None,
    seqlens_KV: Tensor | None = None,
    cumulative_seqlen_Q: Tensor | None = None,
    cumulative_seqlen_KV: Tensor | None = None,
    max_seqlen_Q: int | None = None,
    max_seqlen_KV: int | None = None,
    return_lse: bool = False,
    **tuning: Any,
) -> Any:
    """Every query with every key: query [B, Lq, h, D], key and value [B, Lk, hkv, D] -> [B, Lq, h, D], and
    lse [B, Lq, h] with return_lse. Causal attention needs Lq = Lk; `tuning` is ignored.

    Raises:
        NotImplementedError: packed sequences.
    """
    ignore_tuning(tuning, _TUNING, "attention")
    packed = (seqlens_Q, seqlens_KV, cumulative_seqlen_Q, cumulative_seqlen_KV, max_seqlen_Q, max_seqlen_KV)
    if any(option is not None for option in packed):
        raise NotImplementedError("attention of packed sequences (seqlens_*) is not here")
    lengths = query.shape[1], key.shape[1]
    if is_causal and lengths[0] != lengths[1]:
        raise NotImplementedError(
            f"causal attention of {lengths[0]} queries and {lengths[1]} keys is not here"
        )
    missing = max(0, lengths[0] - lengths[1])
    ignored = None
    if missing:  # a grid has no more queries than keys: append keys that nobody sees
        key, value = (F.pad(x, (0, 0, 0, 0, 0, missing)) for x in (key, value))
        ignored = torch.arange(lengths[0], device=query.device).expand(query.shape[0], -1) >= lengths[1]
    return neighborhood_attention(
        query,
        key,
        value,
        (-1, 0 if is_causal else -1),
        is_causal=is_causal,
        border="truncate",
        scale=scale or None,
        key_padding_mask=ignored,
        return_lse=return_lse,
    )


def merge_attentions(
    outputs: Sequence[Tensor],
    lse_tensors: Sequence[Tensor],
    torch_compile: bool = True,
    use_autograd_fix: bool = True,
) -> tuple[Tensor, Tensor]:
    """Join attentions of the same queries to disjoint sets of keys.

    Plain PyTorch and differentiable in outputs and lse, which in vicinal are differentiable too.

    Args:
        outputs: two or more [B, L, h, D].
        lse_tensors: as many [B, L, h].
        torch_compile, use_autograd_fix: ignored.

    Returns:
        What attention to all the keys gives: [B, L, h, D] and [B, L, h].
    """
    if len(outputs) < 2 or len(outputs) != len(lse_tensors):
        raise ValueError(
            f"outputs and lse_tensors must be two or more each, got {len(outputs)} and {len(lse_tensors)}"
        )
    stacked = torch.stack(list(lse_tensors))
    seen = ~torch.isneginf(stacked).all(0)
    lse = torch.logsumexp(stacked.where(seen, 0.0), 0)
    shares = (stacked - lse).exp().where(seen, 0.0).to(outputs[0].dtype)
    out = sum((share[..., None] * x for share, x in zip(shares, outputs)), torch.zeros_like(outputs[0]))
    return out, lse.where(seen, -torch.inf)
