"""vicinal's own reference ConDaFormer."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vicinal.drop_in.adapter import Adapter
from vicinal.drop_in.swin_attention import changed_parts
from vicinal.models.condaformer import PlaneAttention, Planes
from vicinal.voxel import ContextTable, voxel_attention


class FusedPlaneAttention(PlaneAttention):
    """The attention of the reference model without lists of pairs."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, planes: Planes) -> Tensor:
        term = ContextTable(tuple(planes.cells), *self.tables())
        out = voxel_attention(q, k, v, planes.groups, bias=term, scale=self.scale)
        assert isinstance(out, Tensor)
        return out


def _reason_against(attn: Any) -> str | None:
    return changed_parts(attn, PlaneAttention, ("qkv", "proj"))


ADAPTERS = (Adapter("voxel", PlaneAttention, FusedPlaneAttention, "voxel_attention", _reason_against),)
