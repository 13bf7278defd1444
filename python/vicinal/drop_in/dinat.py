"""vicinal's own reference DiNAT."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from vicinal.drop_in.adapter import Adapter
from vicinal.drop_in.swin_attention import changed_parts
from vicinal.models.dinat import NeighborhoodAttention
from vicinal.neighborhood import neighborhood_attention_qkvpacked


class FusedNeighborhoodAttention(NeighborhoodAttention):
    """The attention of the reference model without gathering a key twice."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]"""
        _, height, width, _ = x.shape
        least = self.kernel_size * self.dilation
        if height < least or width < least:
            x = F.pad(x, (0, 0, 0, max(0, least - width), 0, max(0, least - height)))
        out = neighborhood_attention_qkvpacked(
            self.qkv(x).unflatten(-1, (3, self.num_heads, -1)),
            self.kernel_size,
            dilation=self.dilation,
            bias=self.rpb,
            scale=self.scale,
        )
        assert isinstance(out, Tensor)
        return self.proj(out[:, :height, :width].flatten(-2))


def _reason_against(attn: Any) -> str | None:
    return changed_parts(attn, NeighborhoodAttention, ("qkv", "proj"))


ADAPTERS = (
    Adapter(
        "neighborhood",
        NeighborhoodAttention,
        FusedNeighborhoodAttention,
        "neighborhood_attention",
        _reason_against,
    ),
)
