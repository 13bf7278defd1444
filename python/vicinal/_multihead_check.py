"""Arguments of multi-head attention: torch's contract and exceptions; messages name the argument."""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from . import _check as checks

_disabled = torch._C._disabled_torch_function_impl
_plain: Any = Tensor.__torch_function__


@dataclass(slots=True)
class Request:
    """Checked arguments of one call. `query`, `key` and `value` are [L, N, C] or [N, L, C] by `batch_dim`;
    `keys` [N, S] is bool (True = ignored) or float (added); `pairs` [1 or N, 1 or h, L, S] is added."""

    query: Tensor
    key: Tensor
    value: Tensor
    keys: Tensor | None
    pairs: Tensor | None
    batch_dim: int
    batched: bool
    causal: bool


def request(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    is_causal: bool,
    module: Any,
) -> Request:
    """Check a call of `module` and bring it to three dimensions and additive masks."""
    batched = _check_ranks(query, key, value)
    if is_causal and attn_mask is None:
        raise RuntimeError(
            "is_causal is True and attn_mask is None; is_causal is a hint, which needs the causal attn_mask"
        )
    _check_mask_types(key_padding_mask, attn_mask)
    if not batched:
        query, key, value = _with_batches(query, key, value)
        key_padding_mask = _with_batch("key_padding_mask", key_padding_mask)
    batch_dim = 0 if module.batch_first or not batched else 1
    _check_sizes(query, key, value, batch_dim, module)
    n, n_q, n_k = query.shape[batch_dim], query.shape[1 - batch_dim], key.shape[1 - batch_dim]
    if key_padding_mask is not None and tuple(key_padding_mask.shape) != (n, n_k):
        raise AssertionError(
            f"key_padding_mask has shape {list(key_padding_mask.shape)}; it must be [N, S] = {[n, n_k]}"
        )
    pairs = None if attn_mask is None else _pairs(attn_mask, n, module.num_heads, n_q, n_k, batched)
    return Request(query, key, value, key_padding_mask, pairs, batch_dim, batched, is_causal)


def _check_ranks(query: Tensor, key: Tensor, value: Tensor) -> bool:
    if query.dim() not in (2, 3):
        raise AssertionError(f"query has {query.dim()} dimensions; it must have 3, or 2 without a batch")
    for name, x in (("key", key), ("value", value)):
        if x.dim() != query.dim():
            raise AssertionError(f"{name} has {x.dim()} dimensions; it must have {query.dim()} as query")
    return query.dim() == 3


def _check_mask_types(key_padding_mask: Tensor | None, attn_mask: Tensor | None) -> None:
    for name, mask in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
        if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
            raise AssertionError(f"{name} is {mask.dtype}; it must be bool (True = ignored) or float (added)")
    if key_padding_mask is not None and attn_mask is not None and key_padding_mask.dtype != attn_mask.dtype:
        warnings.warn(
            f"key_padding_mask is {key_padding_mask.dtype} and attn_mask is {attn_mask.dtype}; torch has "
            "deprecated masks of two types. Both are applied.",
            stacklevel=4,
        )


def _with_batches(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """With a batch of one; what was one tensor stays one, because one projection then does for it."""
    q = query[None]
    k = q if key is query else key[None]
    v = q if value is query else k if value is key else value[None]
    return q, k, v


def _with_batch(name: str, mask: Tensor | None) -> Tensor | None:
    if mask is None:
        return None
    if mask.dim() != 1:
        raise AssertionError(f"{name} has shape {list(mask.shape)}; without a batch it must be [S]")
    return mask[None]


def _check_sizes(query: Tensor, key: Tensor, value: Tensor, batch_dim: int, module: Any) -> None:
    widths = (("query", query, module.embed_dim), ("key", key, module.kdim), ("value", value, module.vdim))
    for name, x, width in widths:
        if x.shape[-1] != width:
            raise AssertionError(f"{name} has {x.shape[-1]} channels; it must have {width}")
    if key.shape[:2] != value.shape[:2]:
        raise AssertionError(
            f"key has shape {list(key.shape)} and value {list(value.shape)}; they must agree"
        )
    batches = query.shape[batch_dim], key.shape[batch_dim]
    if batches[0] != batches[1]:
        raise AssertionError(f"query has a batch of {batches[0]} and key of {batches[1]}; they must agree")


def _pairs(mask: Tensor, n: int, heads: int, n_q: int, n_k: int, batched: bool) -> Tensor:
    """attn_mask as [1 or N, 1 or h, L, S]."""
    if mask.dim() == 2:
        if tuple(mask.shape) != (n_q, n_k):
            raise RuntimeError(
                f"attn_mask has shape {list(mask.shape)}; it must be [L, S] = {[n_q, n_k]} "
                f"or [N heads, L, S] = {[n * heads, n_q, n_k]}"
            )
        return mask[None, None]
    if mask.dim() != 3:
        raise AssertionError(f"attn_mask has {mask.dim()} dimensions; it must have 2 or 3")
    if tuple(mask.shape) != (n * heads, n_q, n_k):
        error = RuntimeError if batched else AssertionError
        raise error(
            f"attn_mask has shape {list(mask.shape)}; it must be [N heads, L, S] = {[n * heads, n_q, n_k]}"
        )
    return mask.unflatten(0, (n, heads))


def added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as what it adds to the scores."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, -torch.inf)


def readable(mask: Tensor) -> bool:
    """Whether the values of a mask may decide what runs: they are in memory, and nothing is being traced."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return mask.device.type == "cpu" and type(mask) in (Tensor, torch.nn.Parameter, torch.nn.Buffer)


def only_hidden(mask: Tensor | None, what: str) -> Tensor | None:
    """bool [N, S] of a key mask, for `what`, which can only hide keys."""
    if mask is None or mask.dtype == torch.bool:
        return mask
    hidden = torch.isneginf(mask)
    if mask.requires_grad or (readable(mask) and not bool(((mask == 0) | hidden).all())):
        raise NotImplementedError(
            f"key_padding_mask adds numbers to scores; {what} takes bool, or float with 0 and -inf alone"
        )
    return hidden


def hidden_keys(mask: Tensor | None) -> Tensor | None:
    """bool [N, S] of a mask that only hides keys; None where it does more, or may not be read."""
    if mask is None or mask.requires_grad or not readable(mask):
        return None
    if mask.dtype == torch.bool:
        return mask
    hidden = torch.isneginf(mask)
    return hidden if bool(((mask == 0) | hidden).all()) else None


def why_upstream(query: Tensor, key: Tensor, value: Tensor) -> str:
    """Why torch's own implementation has to take a call; "" if ours can."""
    if torch.jit.is_tracing():
        return "torch.jit.trace"
    if torch.compiler.is_exporting() or _proxies():
        return "torch.export"
    for x in (query, key, value):
        if type(x) is not Tensor and _has_torch_function(type(x)):
            return f"a {type(x).__name__} with __torch_function__"
    if query.device.type not in ("cpu", "cuda"):
        return f"tensors on {query.device.type}"
    if query.dtype not in checks.DTYPES:
        return f"{query.dtype}"
    return ""


def _has_torch_function(kind: Any) -> bool:
    """As torch.overrides.has_torch_function, which also says yes under a mode such as torch.device."""
    override = kind.__torch_function__
    return override is not _disabled and getattr(override, "__func__", None) is not _plain.__func__


def _proxies() -> bool:
    """make_fx is recording."""
    if torch.compiler.is_compiling():
        return False
    tensors = sys.modules.get("torch.fx.experimental.proxy_tensor")
    return tensors is not None and tensors.get_proxy_mode() is not None


@lru_cache(maxsize=64)
def warn_once(reason: str) -> None:
    warnings.warn(f"vicinal's MultiheadAttention runs as torch's own: {reason}", stacklevel=4)
