"""Swin3D (Video Swin) of torchvision."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torchvision.models.video.swin_transformer import ShiftedWindowAttention3d

from vicinal.drop_in.adapter import Adapter
from vicinal.drop_in.swin_attention import changed_parts, windows_on
from vicinal.nn import packed_windowed_attention
from vicinal.windowed import RelativeBias


class FusedShiftedWindowAttention3d(ShiftedWindowAttention3d):
    """torchvision's window attention on volumes, in place.

    Along an axis that one window covers the window shrinks to the axis and does not shift; the bias of a
    shrunken window is read as torchvision reads it, from the first rows and columns of the full index."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, H, W, C] -> [B, T, H, W, C]"""
        space, full = x.shape[1:4], tuple(self.window_size)
        size = tuple(min(w, L) for w, L in zip(full, space))
        shift = tuple(0 if w >= L else s for w, L, s in zip(full, space, self.shift_size))
        table = self.relative_position_bias_table
        out = packed_windowed_attention(
            self.qkv(x),
            self.qkv.bias,
            windows_on(space, size, shift=shift),
            self.num_heads,
            bias=table if size == full else RelativeBias(table, window=full),
            dropout_p=self.attention_dropout if self.training else 0.0,
        )
        return F.dropout(self.proj(out), self.dropout, self.training)


def _reason_against(attn: Any) -> str | None:
    return changed_parts(attn, ShiftedWindowAttention3d, ("qkv", "proj"))


ADAPTERS = (
    Adapter(
        "windowed",
        ShiftedWindowAttention3d,
        FusedShiftedWindowAttention3d,
        "windowed_attention",
        _reason_against,
    ),
)
