"""vicinal's own reference of ViTDet's windows, and with it DiT-3D."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vicinal.drop_in.adapter import Adapter
from vicinal.drop_in.swin_attention import changed_parts, windows_on
from vicinal.models.vitdet import RelPosAttention
from vicinal.nn import packed_windowed_attention


class FusedRelPosAttention(RelPosAttention):
    """The attention of the reference model in place on the grid."""

    def forward(self, x: Tensor) -> Tensor:
        windows = windows_on(x.shape[1:-1], self.window)
        qkv, tables = self.qkv(x), self.tables()
        return self.proj(
            packed_windowed_attention(qkv, self.qkv.bias, windows, self.num_heads, rel_pos=tables)
        )


def _reason_against(attn: Any) -> str | None:
    return changed_parts(attn, RelPosAttention, ("qkv", "proj"))


ADAPTERS = (
    Adapter("windowed", RelPosAttention, FusedRelPosAttention, "windowed_attention", _reason_against),
)
