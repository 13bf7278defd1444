"""vicinal's own causal language model."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vicinal.drop_in.adapter import Adapter
from vicinal.drop_in.swin_attention import changed_parts
from vicinal.models.causal_lm import CausalAttention
from vicinal.neighborhood import Neighborhood, neighborhood_attention


class FusedCausalAttention(CausalAttention):
    """The attention of the reference model without a mask."""

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


def _reason_against(attn: Any) -> str | None:
    return changed_parts(attn, CausalAttention, ("qkv", "proj"))


ADAPTERS = (
    Adapter("neighborhood", CausalAttention, FusedCausalAttention, "neighborhood_attention", _reason_against),
)
