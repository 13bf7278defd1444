"""Segment Anything's image encoder in timm: its blocks with windows."""

from __future__ import annotations

from typing import Any

from timm.models import vision_transformer_sam
from torch import Tensor, nn

from vicinal.drop_in.adapter import Adapter
from vicinal.drop_in.sam_windows import against_windows, attend_in_windows
from vicinal.drop_in.swin_attention import changed_parts


class FusedBlock(vision_transformer_sam.Block):
    """timm's block with window attention in place on the map."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]"""
        attn = self.attn
        dropout_p = attn.attn_drop.p if self.training else 0.0
        out = attend_in_windows(attn, self.norm1(x), self.window_size, attn.use_rel_pos, dropout_p)
        x = x + self.drop_path1(self.ls1(attn.proj_drop(out)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


def _reason_against(block: Any) -> str | None:
    attn = block.attn
    if reason := changed_parts(attn, vision_transformer_sam.Attention, ("qkv", "proj")):
        return reason
    if attn.rope is not None:
        return "its queries and keys are rotated inside windows"
    if not isinstance(attn.q_norm, nn.Identity) or not isinstance(attn.k_norm, nn.Identity):
        return "its queries and keys are normalised, also those of pads"
    return against_windows(block.window_size)


ADAPTERS = (
    Adapter("windowed", vision_transformer_sam.Block, FusedBlock, "windowed_attention", _reason_against),
)
