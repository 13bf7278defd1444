"""vicinal's own causal language model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vicinal.drop_in.adapter import Adapter
from vicinal.drop_in.swin_attention import changed_parts
from vicinal.models.causal_lm import CausalAttention
from vicinal.neighborhood import Neighborhood, neighborhood_attention
from vicinal.neighborhood_decode import RingKVCache, sliding_window_decode


class RingCache:
    """The last keys and values of one layer, in a ring that is made when the first ones come.

    Its size is what the layer can still see, or the whole sequence where that is shorter.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self.ring: RingKVCache | None = None

    def append(self, k: Tensor, v: Tensor) -> RingKVCache:
        """Add [B, T, h, d] at the end, over the oldest."""
        if self.ring is None:
            batch, _, heads, dim = k.shape
            self.ring = RingKVCache(batch, self.capacity, heads, dim, dtype=k.dtype, device=k.device)
        for keys, values in zip(k.split(self.capacity, 1), v.split(self.capacity, 1)):
            self.ring.append(keys, values)
        self.length += k.shape[1]
        return self.ring


class FusedCausalAttention(CausalAttention):
    """The attention of the reference model without a mask; decoding reads a ring of its window's size."""

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [B, T, h, d], k and v [B, L, hkv, d], the queries being the last T of L tokens -> [B, T, h, d]"""
        out = neighborhood_attention(q, k, v, self.neighborhood(), scale=self.scale)
        assert isinstance(out, Tensor)
        return out

    def neighborhood(self) -> Neighborhood:
        """The keys to the left of a query, or of the end of its block."""
        window, block = self.scope.window, self.scope.block
        left = -1 if window is None else window - 1
        return Neighborhood((left, 0), stride=block, is_causal=True, border="truncate")

    def make_cache(self, batch: int, length: int) -> RingCache:
        """An empty cache for sequences of at most `length` tokens."""
        return RingCache(min(self.scope.window or length, length))

    def decode(self, q: Tensor, k: Tensor, v: Tensor, cache: Any) -> Tensor:
        """A first piece attends to itself, later tokens to the ring, one by one."""
        if cache.length == 0:
            cache.append(k, v)
            return self.attention(q, k, v)
        outs = []
        for query, key, value in zip(q.split(1, 1), k.split(1, 1), v.split(1, 1)):
            ring = cache.append(key, value)
            left = self.left(cache.length - 1)
            out = sliding_window_decode(query, ring, left=min(left, cache.capacity - 1), scale=self.scale)
            assert isinstance(out, Tensor)
            outs.append(out)
        return torch.cat(outs, 1)

    def left(self, position: int) -> int:
        """How many keys before its own the token at this position sees."""
        window, block = self.scope.window, self.scope.block
        return position if window is None else position % block + window - block


def _reason_against(attn: Any) -> str | None:
    return changed_parts(attn, CausalAttention, ("qkv", "proj"))


ADAPTERS = (
    Adapter("neighborhood", CausalAttention, FusedCausalAttention, "neighborhood_attention", _reason_against),
)
