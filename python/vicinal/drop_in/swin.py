"""vicinal's own reference Swin, versions 1 and 2."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vicinal.drop_in.adapter import Adapter
from vicinal.drop_in.swin_attention import attend_v1, attend_v2, changed_parts, windows_on
from vicinal.models.swin import SwinTransformerBlock, WindowAttention, WindowAttentionV2


class FusedSwinTransformerBlock(SwinTransformerBlock):
    """The block of the reference model with window attention in place on the map."""

    def window_attention(self, x: Tensor) -> Tensor:
        """Attend inside windows of the map where it lies: [B, H, W, C] -> [B, H, W, C]."""
        w = self.window_size
        _, H, W, _ = x.shape
        windows = windows_on((H, W), (w, w), shift=self.shift(H, W))
        attend = attend_v1 if isinstance(self.attn, WindowAttention) else attend_v2
        return attend(self.attn, x, windows)


def _reason_against(block: Any) -> str | None:
    original = WindowAttentionV2 if isinstance(block.attn, WindowAttentionV2) else WindowAttention
    return changed_parts(block.attn, original, ("qkv", "proj"))


ADAPTERS = (
    Adapter(
        "windowed", SwinTransformerBlock, FusedSwinTransformerBlock, "windowed_attention", _reason_against
    ),
)
