"""vicinal's own layer of parts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vicinal import segments
from vicinal.drop_in.adapter import Adapter
from vicinal.drop_in.swin_attention import changed_parts
from vicinal.models.parts import PartAttention
from vicinal.voxel import voxel_attention


class FusedPartAttention(PartAttention):
    """All objects in one launch."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, parts: tuple[int, ...]) -> Tensor:
        """[P, T, h, d] -> [P, T, h, d]"""
        counts = torch.tensor(parts if self.across else (1,) * len(q), device=q.device)
        longest = (max(parts, default=0) if self.across else 1) * q.shape[1]
        groups = segments.from_lengths(counts * q.shape[1], longest)
        out = voxel_attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), groups)
        assert isinstance(out, Tensor)
        return out.unflatten(0, q.shape[:2])


def _reason_against(layer: Any) -> str | None:
    return changed_parts(layer, type(layer), ("qkv", "proj"))


ADAPTERS = (Adapter("voxel", PartAttention, FusedPartAttention, "voxel_attention", _reason_against),)
