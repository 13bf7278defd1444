"""vicinal's own DSVT."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from vicinal import segments
from vicinal._multihead import project
from vicinal.drop_in.adapter import Adapter
from vicinal.models.dsvt import DSVT, Size
from vicinal.segments import SegmentGroups, Segments
from vicinal.voxel import voxel_attention


def attend_rows(attention: Any, x: Tensor, position: Tensor, groups: Segments | SegmentGroups) -> Tensor:
    """The context [N, C] of an nn.MultiheadAttention whose queries and keys have a position, on segments."""
    at = x + position
    q, k, v, _ = project(attention, at, at, x)
    out = voxel_attention(q, k, v, groups)
    assert isinstance(out, Tensor)
    return F.linear(out.flatten(1), attention.out_proj.weight, attention.out_proj.bias)


class FusedDSVT(DSVT):
    """The reference model on segments: no set is padded, nothing is gathered, masked or scattered."""

    def sets(
        self, coords: Tensor, grid: Size, batch_size: int, window: Size, shift: Size, size: int
    ) -> tuple[Segments, Segments]:
        """The sets of both orientations."""
        return segments.dsvt_sets(coords, grid, batch_size, window, shift, size, order="bzyx", validate=False)

    def attend(self, attention: nn.MultiheadAttention, x: Tensor, position: Tensor, sets: Any) -> Tensor:
        """Attention of every voxel to its set."""
        return attend_rows(attention, x, position, sets)


def plain_attention(model: Any) -> str | None:
    """Why the attention of a model is not torch's, if it is not."""
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention) and type(module) is not nn.MultiheadAttention:
            return f"its {name} is a {type(module).__name__}, not a MultiheadAttention"
        if isinstance(module, nn.MultiheadAttention) and module.dropout:
            return f"its {name} has dropout {module.dropout}; segments have none"
    return None


ADAPTERS = (Adapter("voxel", DSVT, FusedDSVT, "voxel_attention", plain_attention),)
