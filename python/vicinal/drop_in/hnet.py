"""vicinal's own reference H-Net; its Mamba-2 mixers are in `mamba2`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vicinal.drop_in.adapter import Adapter
from vicinal.drop_in.swin_attention import changed_parts
from vicinal.linear import ema_scan
from vicinal.models.hnet import DeChunkLayer, HNetAttention
from vicinal.models.mamba2 import Packing
from vicinal.neighborhood import Neighborhood, neighborhood_attention


class FusedHNetAttention(HNetAttention):
    """The attention of the reference model without a mask.

    Packed sequences of different lengths are laid out as a batch: what pads hold comes after every real token
    and is not seen."""

    def attention(self, q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
        """[T, h, d] -> [T, h, d]"""
        if packing.count == 1:
            return self.batched(q[None], k[None], v[None])[0]
        longest = int(packing.position.max()) + 1
        place = (packing.sequence, packing.position)
        q, k, v = (x.new_zeros(packing.count, longest, *x.shape[1:]).index_put(place, x) for x in (q, k, v))
        return self.batched(q, k, v)[place]

    def batched(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[S, N, h, d] -> [S, N, h, d]"""
        left = -1 if self.window is None else self.window
        past = Neighborhood((left, 0), is_causal=True, border="truncate")
        out = neighborhood_attention(q, k, v, past, scale=self.head_dim**-0.5)
        assert isinstance(out, Tensor)
        return out


class FusedDeChunkLayer(DeChunkLayer):
    """The moving average of the reference model in one operation."""

    def smooth(self, x: Tensor, p: Tensor, packing: Packing) -> Tensor:
        """x [M, C], p [M] -> [M, C]"""
        out = ema_scan(x[None], p[None], cu_seqlens=packing.ends)
        assert isinstance(out, torch.Tensor)
        return out[0]


def _reason_against(attn: Any) -> str | None:
    return changed_parts(attn, HNetAttention, ("Wqkv", "out_proj"))


ADAPTERS = (
    Adapter("neighborhood", HNetAttention, FusedHNetAttention, "neighborhood_attention", _reason_against),
    Adapter("linear", DeChunkLayer, FusedDeChunkLayer, "ema_scan"),
)
