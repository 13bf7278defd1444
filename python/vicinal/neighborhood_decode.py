"""Sliding windows token by token: a ring of the last keys and values, and attention of new queries to it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _check as checks
from .windowed import Windows, windowed_attention

__all__ = ["RingKVCache", "sliding_window_decode"]


class RingKVCache:
    """The keys and values of the last `capacity` positions of a sequence; position x lies in slot x mod
    capacity.

    Nothing changes its shape or place, so decoding with it can be captured in a CUDA graph. It holds values:
    no gradient flows into it.

    Args:
        batch: B. capacity: C, at least left * dilation + T to decode T tokens at once. kv_heads: hkv.
        head_dim: D. head_dim_v: Dv, default head_dim. dtype, device: of keys and values.

    Attributes:
        k: [B, C, hkv, D]. v: [B, C, hkv, Dv]. length: int64 [], the number of positions so far.

    Example:
        >>> cache = RingKVCache(1, 16, 2, 8, dtype=torch.float32, device="cpu")
        >>> cache.append(torch.randn(1, 3, 2, 8), torch.randn(1, 3, 2, 8))
        >>> int(cache.length)
        3
    """

    def __init__(
        self,
        batch: int,
        capacity: int,
        kv_heads: int,
        head_dim: int,
        head_dim_v: int | None = None,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        wide = head_dim if head_dim_v is None else head_dim_v
        sizes = {"batch": batch, "capacity": capacity, "kv_heads": kv_heads, "head_dim": head_dim}
        for name, value in {**sizes, "head_dim_v": wide}.items():
            least = 0 if name == "batch" else 1
            if not checks.is_int(value):
                raise TypeError(f"{name} is {value!r}; it must be an int >= {least}")
            if value < least:
                raise ValueError(f"{name} is {value}; it must be an int >= {least}")
        self.k = torch.zeros(batch, capacity, kv_heads, head_dim, dtype=dtype, device=device)
        self.v = torch.zeros(batch, capacity, kv_heads, wide, dtype=dtype, device=device)
        self.length = torch.zeros((), dtype=torch.int64, device=device)

    @property
    def capacity(self) -> int:
        """C: how many positions it holds."""
        return self.k.shape[1]

    @torch.no_grad()
    def append(self, k_new: Tensor, v_new: Tensor) -> None:
        """Write the next T <= C positions, over the oldest.

        Args:
            k_new: [B, T, hkv, D]. v_new: [B, T, hkv, Dv].
        """
        for name, x, like in (("k_new", k_new, self.k), ("v_new", v_new, self.v)):
            checks.tensor(name, x)
            tokens = k_new.shape[1] if k_new.dim() == 4 else 0
            checks.shape(name, x, (like.shape[0], tokens, *like.shape[2:]), "[B, T, kv heads, head_dim]")
            if x.dtype != like.dtype or x.device != like.device:
                raise ValueError(
                    f"{name} is {x.dtype} on {x.device}; it must be {like.dtype} on {like.device}, "
                    "as the cache"
                )
        if k_new.shape[1] > self.capacity:
            raise ValueError(f"k_new has {k_new.shape[1]} tokens; the cache holds {self.capacity}")
        new = torch.arange(k_new.shape[1], device=self.length.device)
        slots = (self.length + new) % self.capacity
        self.k.index_copy_(1, slots, k_new)
        self.v.index_copy_(1, slots, v_new)
        self.length += k_new.shape[1]

    def reset(self) -> None:
        """Forget all positions."""
        self.length.zero_()

    def positions(self) -> Tensor:
        """int64 [C]: the position that each slot holds, negative where it holds none."""
        last = self.length - 1
        slots = torch.arange(self.capacity, device=self.length.device)
        return last - (last - slots) % self.capacity


def sliding_window_decode(
    q: Tensor,
    cache: RingKVCache,
    *,
    left: int,
    dilation: int = 1,
    scale: float | None = None,
    extra_k: Tensor | None = None,
    extra_v: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal sliding window attention of the newest T positions to a ring cache: the last T rows of
    `neighborhood_attention(q, k, v, (left, 0), border="truncate", dilation=dilation)`.

    The query at position P reads the positions x with 0 <= P - x <= left * dilation and (P - x) % dilation ==
    0. It runs as one window of the windowed kernels: T * h / hkv queries and the whole cache as keys.

    Args:
        q: [B, T, h, D], queries of the T positions that were appended last; hkv divides h.
        cache: a `RingKVCache` with capacity >= left * dilation + T, after `append`.
        left: keys before the query, in steps of `dilation`.
        scale: factor of q.k, default D ** -0.5.
        extra_k, extra_v: [B, E, hkv, D or Dv], keys that every query sees besides (sinks, prefixes).
        return_lse: also return lse.
        backend: of `windowed_attention`. Default None: the fastest that can.

    Returns:
        out [B, T, h, Dv]; with return_lse also lse [B, T, h].

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or value; the message names it.

    Example:
        >>> cache = RingKVCache(1, 16, 2, 8, dtype=torch.float32, device="cpu")
        >>> cache.append(torch.randn(1, 1, 2, 8), torch.randn(1, 1, 2, 8))
        >>> sliding_window_decode(torch.randn(1, 1, 4, 8), cache, left=7).shape
        torch.Size([1, 1, 4, 8])
    """
    _check(q, cache, left, dilation)
    checks.flag("return_lse", return_lse)
    batch, tokens, heads, dim = q.shape
    kv_heads = cache.k.shape[2]
    group = heads // kv_heads
    folded = q.unflatten(2, (kv_heads, group)).transpose(2, 3).reshape(batch, tokens * group, kv_heads, dim)
    query = (cache.length - tokens + torch.arange(tokens, device=q.device)).repeat_interleave(group)
    position = cache.positions()
    distance = query[:, None] - position
    read = (position >= 0) & (distance >= 0) & (distance <= left * dilation) & (distance % dilation == 0)
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    mask = torch.zeros(read.shape, dtype=acc, device=q.device).masked_fill(~read, -torch.inf)
    options: dict[str, Any] = {"scale": scale, "extra_k": extra_k, "extra_v": extra_v, "backend": backend}
    windows = Windows(cache.capacity, q_size=tokens * group)
    result = windowed_attention(
        folded, cache.k, cache.v, windows, attn_mask=mask[None], return_lse=True, **options
    )
    assert isinstance(result, tuple)
    out, lse = (x.unflatten(1, (tokens, group)).transpose(2, 3).flatten(2, 3) for x in result)
    return (out, lse) if return_lse else out


def _check(q: Any, cache: Any, left: Any, dilation: Any) -> None:
    checks.tensor("q", q)
    if not isinstance(cache, RingKVCache):
        raise TypeError(f"cache is a {type(cache).__name__}; it must be a RingKVCache")
    for name, value, least in (("left", left, 0), ("dilation", dilation, 1)):
        if not checks.is_int(value):
            raise TypeError(f"{name} is {value!r}; it must be an int >= {least}")
        if value < least:
            raise ValueError(f"{name} is {value}; it must be an int >= {least}")
    batch, capacity, kv_heads, dim = cache.k.shape
    if q.dim() != 4 or q.shape[1] < 1:
        raise ValueError(f"q has shape {list(q.shape)}; it must be [B, T, heads, head_dim] with T >= 1")
    checks.shape("q", q, (batch, q.shape[1], q.shape[2], dim), "[B, T, heads, head_dim]")
    if q.shape[2] < 1 or q.shape[2] % kv_heads:
        raise ValueError(f"q has {q.shape[2]} heads; it must be a multiple of the {kv_heads} of the cache")
    if q.dtype != cache.k.dtype or q.device != cache.k.device:
        raise ValueError(
            f"q is {q.dtype} on {q.device}; it must be {cache.k.dtype} on {cache.k.device} as the cache"
        )
    needed = left * dilation + q.shape[1]
    if capacity < needed:
        raise ValueError(
            f"cache has a capacity of {capacity}; left * dilation + T = {left} * {dilation} + {q.shape[1]} "
            f"needs at least {needed}"
        )
