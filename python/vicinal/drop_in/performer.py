"""vicinal's own reference Performer attention."""

from __future__ import annotations

from torch import Tensor

from vicinal.drop_in.adapter import Adapter
from vicinal.linear import FeatureMap, linear_attention
from vicinal.models.performer import PerformerAttention


class FusedPerformerAttention(PerformerAttention):
    """The layer of the reference model with all graphs in one operation, packed as they are."""

    def attention(self, q: Tensor, k: Tensor, v: Tensor, ends: Tensor) -> Tensor:
        """[T, h, d] -> [T, h, d]"""
        favor = FeatureMap("favor", projection=self.fast_attention.projection_matrix)
        out = linear_attention(q[None], k[None], v[None], feature_map=favor, eps=0.0, cu_seqlens=ends)
        assert isinstance(out, Tensor)
        return out[0]


ADAPTERS = (Adapter("linear", PerformerAttention, FusedPerformerAttention, "linear_attention, favor"),)
