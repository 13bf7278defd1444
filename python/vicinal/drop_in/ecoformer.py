"""vicinal's own reference EcoFormer."""

from __future__ import annotations

from torch import Tensor

from vicinal.drop_in.adapter import Adapter
from vicinal.hash import hash_attention
from vicinal.models.ecoformer import HashAttentionLayer


class FusedHashAttentionLayer(HashAttentionLayer):
    """The layer of the reference model with codes and linear attention in one operation."""

    def attention(self, qk: Tensor, v: Tensor) -> Tensor:
        """[B, N, H, D] -> [B, N, H, D]."""
        features = self.fast_attention
        ksh = features.ksh
        tables = (ksh.anchor[0], ksh.A, ksh.mvec[0, :, 0])
        return hash_attention(qk, v, *tables, numerator=features.numerator, offset=features.offset)


ADAPTERS = (Adapter("linear", HashAttentionLayer, FusedHashAttentionLayer, "hash_attention"),)
