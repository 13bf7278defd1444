"""vicinal's own reference DLGSANet."""

from __future__ import annotations

from torch import Tensor

from vicinal.drop_in.adapter import Adapter
from vicinal.models.dlgsanet import DynamicLocalAttention
from vicinal.neighborhood_slots import neighborhood_aggregate


class FusedDynamicLocalAttention(DynamicLocalAttention):
    """The sums of the reference model without a copy of the values for every weight."""

    def aggregate(self, weights: Tensor, v: Tensor) -> Tensor:
        """weights [B, groups, K * K, H, W], v [B, C, H, W] -> [B, C, H, W]"""
        values = v.unflatten(1, (self.groups, -1)).permute(0, 3, 4, 1, 2)  # [B, H, W, groups, C / groups]
        slots = weights.permute(0, 3, 4, 1, 2)
        out = neighborhood_aggregate(slots, values, self.kernel_size, border="truncate")
        return out.permute(0, 3, 4, 1, 2).flatten(1, 2)


ADAPTERS = (
    Adapter("neighborhood", DynamicLocalAttention, FusedDynamicLocalAttention, "neighborhood_aggregate"),
)
