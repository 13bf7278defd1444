"""vicinal's own reference D-Former."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vicinal.drop_in.adapter import Adapter
from vicinal.drop_in.swin_attention import changed_parts
from vicinal.models.dformer import GroupAttention
from vicinal.neighborhood import Neighborhood, neighborhood_attention_qkvpacked


class FusedGroupAttention(GroupAttention):
    """The attention of the reference model in place: no padding, no partition, no mask."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, X, Y, Z, C] -> [B, X, Y, Z, C]"""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        out = neighborhood_attention_qkvpacked(qkv, self.neighborhood(x.shape[1:4]), scale=self.scale)
        assert isinstance(out, Tensor)
        return self.proj(out.flatten(-2))

    def neighborhood(self, space: tuple[int, ...]) -> Neighborhood:
        """Blocks of neighbours, or all tokens of a residue class."""
        sizes = self.group_size
        if not self.dilated:
            return Neighborhood(sizes, stride=sizes, border="truncate")
        steps = tuple(-(-L // g) for L, g in zip(space, sizes))
        return Neighborhood(((-1, -1),) * 3, dilation=steps, border="truncate")


def _reason_against(attn: Any) -> str | None:
    return changed_parts(attn, GroupAttention, ("qkv", "proj"))


ADAPTERS = (
    Adapter("neighborhood", GroupAttention, FusedGroupAttention, "neighborhood_attention", _reason_against),
)
