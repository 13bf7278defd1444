"""Swin, versions 1 and 2, of timm.

timm rolls a map before it pads it (`pad_order="roll_pad"`); at sizes that the window divides there is no
difference."""

from __future__ import annotations

from typing import Any

from timm.models import swin_transformer, swin_transformer_v2
from torch import Tensor

from vicinal.drop_in.adapter import Adapter
from vicinal.drop_in.swin_attention import attend_v1, attend_v2, changed_parts, windows_on
from vicinal.windowed import Windows


def windows_of(block: Any, x: Tensor) -> Windows:
    """The windows of a block on a map [B, H, W, C]; read anew in every call, for `set_input_size` of the
    model changes them."""
    shift = tuple(block.shift_size)
    return windows_on(x.shape[1:3], block.window_size, shift=shift, pad_order="roll_pad")


class FusedSwinTransformerBlock(swin_transformer.SwinTransformerBlock):
    """timm's block of version 1 with window attention in place on the map."""

    def _attn(self, x: Tensor) -> Tensor:
        attn = self.attn
        dropout_p = attn.attn_drop.p if self.training else 0.0
        return attn.proj_drop(attend_v1(attn, x, windows_of(self, x), dropout_p))


class FusedSwinTransformerV2Block(swin_transformer_v2.SwinTransformerV2Block):
    """timm's block of version 2 with window attention in place on the map."""

    def _attn(self, x: Tensor) -> Tensor:
        attn = self.attn
        dropout_p = attn.attn_drop.p if self.training else 0.0
        return attn.proj_drop(attend_v2(attn, x, windows_of(self, x), dropout_p))


def _against_v1(block: Any) -> str | None:
    return changed_parts(block.attn, swin_transformer.WindowAttention, ("qkv", "proj"))


def _against_v2(block: Any) -> str | None:
    return changed_parts(block.attn, swin_transformer_v2.WindowAttention, ("qkv", "proj"))


ADAPTERS = (
    Adapter(
        "windowed",
        swin_transformer.SwinTransformerBlock,
        FusedSwinTransformerBlock,
        "windowed_attention",
        _against_v1,
    ),
    Adapter(
        "windowed",
        swin_transformer_v2.SwinTransformerV2Block,
        FusedSwinTransformerV2Block,
        "windowed_attention",
        _against_v2,
    ),
)
