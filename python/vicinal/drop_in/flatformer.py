"""vicinal's own FlatFormer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vicinal import segments
from vicinal.drop_in.adapter import Adapter
from vicinal.drop_in.dsvt import attend_rows, plain_attention
from vicinal.models.flatformer import FlatFormer
from vicinal.segments import Segments


class FusedFlatFormer(FlatFormer):
    """The reference model on segments: one launch for all samples, nothing gathered or scattered."""

    def groups(self, coords: Tensor, batch_size: int, axis: str, shifted: bool) -> Segments:
        """All groups of all samples."""
        config = self.config
        options: dict[str, Any] = {"axis": axis, "shifted": shifted, "order": "bzyx", "validate": False}
        grid = (*config.grid, 1)
        return segments.flatformer_groups(
            coords, grid, batch_size, config.window, config.group_size, **options
        )

    def attend(self, attention: nn.MultiheadAttention, x: Tensor, position: Tensor, groups: Any) -> Tensor:
        """Attention of every pillar to its group."""
        return attend_rows(attention, x, position, groups)


ADAPTERS = (Adapter("voxel", FlatFormer, FusedFlatFormer, "voxel_attention", plain_attention),)
