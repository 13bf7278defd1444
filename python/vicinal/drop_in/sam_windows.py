"""The windows of Segment Anything in timm and of ViTDet in transformers share this call: decomposed relative
positions that queries meet without scale, and pads that are zero inputs of the projection."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vicinal.drop_in.swin_attention import windows_on
from vicinal.nn import packed_windowed_attention


def attend_in_windows(attn: Any, x: Tensor, side: int, relative: bool, dropout_p: float = 0.0) -> Tensor:
    """[B, H, W, C] -> [B, H, W, C]; `attn` holds qkv, proj, num_heads, scale, and with `relative` the tables
    rel_pos_h and rel_pos_w [2 side - 1, d]."""
    out = packed_windowed_attention(
        attn.qkv(x),
        attn.qkv.bias,
        windows_on(x.shape[1:3], (side, side)),
        attn.num_heads,
        rel_pos=(attn.rel_pos_h, attn.rel_pos_w) if relative else None,
        scale=attn.scale,
        dropout_p=dropout_p,
    )
    return attn.proj(out)


def against_windows(side: int) -> str | None:
    """Why a block without windows is left alone."""
    return None if side > 0 else "attention over the whole map: it has no windows"
