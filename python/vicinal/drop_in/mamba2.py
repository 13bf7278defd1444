"""vicinal's own reference Mamba-2 mixer."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vicinal.drop_in.adapter import Adapter
from vicinal.linear import LinearState, linear_attention, linear_attention_step
from vicinal.models.mamba2 import Mamba2Mixer, Packing

SSD: dict[str, Any] = {"feature_map": "identity", "normalize": False}


class FusedMamba2Mixer(Mamba2Mixer):
    """The mixer of the reference model with its scan in one operation on the packed sequences."""

    def scan(self, v: Tensor, decay: Tensor, k: Tensor, q: Tensor, packing: Packing) -> Tensor:
        """v [T, H, P], decay [T, H], k and q [T, state] -> [T, H, P]."""
        q, k = q.to(v.dtype)[None, :, None], k.to(v.dtype)[None, :, None]  # one head, which all share
        out = linear_attention(
            q, k, v[None], is_causal=True, decay=decay[None], cu_seqlens=packing.ends, **SSD
        )
        assert isinstance(out, Tensor)
        return out[0]

    def scan_step(
        self, v: Tensor, decay: Tensor, k: Tensor, q: Tensor, sums: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One token, a row per sample; the sums are updated in place."""
        q, k = q.to(v.dtype)[:, None, None], k.to(v.dtype)[:, None, None]
        out = linear_attention_step(q, k, v[:, None], LinearState(sums), decay=decay[:, None], **SSD)
        return out[:, 0], sums


ADAPTERS = (Adapter("linear", Mamba2Mixer, FusedMamba2Mixer, "linear_attention with decay"),)
