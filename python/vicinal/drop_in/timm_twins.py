"""Twins of timm: its locally grouped attention. The sub-sampled global one reads all keys and is left
alone."""

from __future__ import annotations

from typing import Any

from timm.models import twins
from torch import Tensor

from vicinal.drop_in.adapter import Adapter
from vicinal.drop_in.swin_attention import changed_parts, windows_on
from vicinal.nn import packed_windowed_attention


class FusedLocallyGroupedAttn(twins.LocallyGroupedAttn):
    """timm's attention inside windows, in place on the map."""

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """[B, H W, C] and (H, W) -> [B, H W, C]"""
        out = packed_windowed_attention(
            self.qkv(x).unflatten(1, size),
            self.qkv.bias,
            windows_on(size, (self.ws, self.ws)),
            self.num_heads,
            scale=self.scale,
            dropout_p=self.attn_drop.p if self.training else 0.0,
        )
        return self.proj_drop(self.proj(out.flatten(1, 2)))


def _reason_against(attn: Any) -> str | None:
    return changed_parts(attn, twins.LocallyGroupedAttn, ("qkv", "proj"))


ADAPTERS = (
    Adapter(
        "windowed", twins.LocallyGroupedAttn, FusedLocallyGroupedAttn, "windowed_attention", _reason_against
    ),
)
