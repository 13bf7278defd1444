"""DaViT of timm: its spatial blocks. Its channel attention has channels for tokens and is left alone."""

from __future__ import annotations

from typing import Any

from timm.models import davit
from torch import Tensor

from vicinal.drop_in.adapter import Adapter
from vicinal.drop_in.swin_attention import changed_parts, windows_on
from vicinal.nn import packed_windowed_attention


class FusedSpatialBlock(davit.SpatialBlock):
    """timm's block with window attention in place on the map."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]"""
        attn, space = self.attn, x.shape[2:]
        shortcut = self.cpe1(x).flatten(2).transpose(1, 2)
        out = packed_windowed_attention(
            attn.qkv(self.norm1(shortcut)).unflatten(1, space),
            attn.qkv.bias,
            windows_on(space, attn.window_size),
            attn.num_heads,
            scale=attn.scale,
        )
        x = shortcut + self.drop_path1(attn.proj(out).flatten(1, 2))
        x = self.cpe2(x.transpose(1, 2).unflatten(2, space))
        if self.mlp is None:
            return x
        x = x.flatten(2).transpose(1, 2)
        x = x + self.drop_path2(self.mlp(self.norm2(x)))
        return x.transpose(1, 2).unflatten(2, space)


def _reason_against(block: Any) -> str | None:
    return changed_parts(block.attn, davit.WindowAttention, ("qkv", "proj"))


ADAPTERS = (
    Adapter("windowed", davit.SpatialBlock, FusedSpatialBlock, "windowed_attention", _reason_against),
)
