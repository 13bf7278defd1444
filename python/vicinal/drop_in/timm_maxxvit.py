"""MaxViT and CoAtNet of timm: attention in blocks, over grids, and over whole maps.

The relative position bias is a table (as Swin's), a table in the order of TensorFlow (offsets from key to
query, heads first) or a network on offsets; dropout inside the network draws what it draws there."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import RelPosBias, RelPosBiasTf, RelPosMlp
from timm.models import maxxvit
from torch import Tensor, nn

from vicinal.drop_in.adapter import Adapter
from vicinal.drop_in.swin_attention import changed_parts
from vicinal.windowed import RelativeBias, Windows, windowed_attention_qkvpacked


def _bias(rel_pos: Any) -> RelativeBias | Tensor | None:
    if rel_pos is None:
        return None
    if isinstance(rel_pos, RelPosBiasTf):
        return RelativeBias(rel_pos.relative_position_bias_table.flatten(1).t(), "k-q")
    if isinstance(rel_pos, RelPosBias):
        table: Tensor = rel_pos.relative_position_bias_table
        return table
    table = rel_pos.bias_act(rel_pos.mlp(rel_pos.rel_coords_log)).flatten(0, -2)
    return table if rel_pos.bias_gain is None else rel_pos.bias_gain * table


def _attend(attn: Any, qkv: Tensor, windows: Windows) -> Tensor:
    """[B, H, W, 3 C] -> [B, H, W, C]: before the projection."""
    if attn.head_first:  # each head has its own query, key and value side by side
        packed = qkv.unflatten(-1, (attn.num_heads, 3, attn.dim_head)).transpose(-3, -2)
    else:
        packed = qkv.unflatten(-1, (3, attn.num_heads, attn.dim_head))
    out = windowed_attention_qkvpacked(
        packed,
        windows,
        bias=_bias(attn.rel_pos),
        scale=attn.scale,
        dropout_p=attn.attn_drop.p if attn.training else 0.0,
    )
    assert isinstance(out, Tensor)
    return out.flatten(-2)


def _fits(x: Tensor, windows: Windows) -> bool:
    size = windows.size
    assert isinstance(size, tuple)
    return not any(L % w for L, w in zip(x.shape[1:3], size))


def _channels_last(attn: Any, x: Tensor, windows: Windows) -> Tensor:
    return attn.proj_drop(attn.proj(_attend(attn, attn.qkv(x), windows)))


def _windows(block: Any, partition: str) -> Windows:
    return Windows(tuple(block.partition_size), partition=partition)


class FusedPartitionAttentionCl(maxxvit.PartitionAttentionCl):
    """timm's block or grid attention, channels last, in place on the map."""

    def _partition_attn(self, x: Tensor) -> Tensor:
        windows = _windows(self, "block" if self.partition_block else "grid")
        if not _fits(x, windows):  # timm's own error
            return super()._partition_attn(x)
        return _channels_last(self.attn, x, windows)


class FusedParallelPartitionAttention(maxxvit.ParallelPartitionAttention):
    """timm's block and grid attention side by side, in place on the map."""

    def _partition_attn(self, x: Tensor) -> Tensor:
        block, grid = _windows(self, "block"), _windows(self, "grid")
        if not _fits(x, block):
            return super()._partition_attn(x)
        outs = [_channels_last(self.attn_block, x, block), _channels_last(self.attn_grid, x, grid)]
        return torch.cat(outs, dim=-1)


def _channels_first(attn: Any, x: Tensor, windows: Windows) -> Tensor:
    """[B, C, H, W] -> [B, C', H, W]; the projections are convolutions of one pixel."""
    qkv = attn.qkv(x).permute(0, 2, 3, 1)
    out = _attend(attn, qkv.contiguous(), windows).permute(0, 3, 1, 2)
    return attn.proj_drop(attn.proj(out))


class FusedPartitionAttention2d(maxxvit.PartitionAttention2d):
    """timm's block or grid attention, channels first, without partition."""

    def _partition_attn(self, x: Tensor) -> Tensor:
        windows = _windows(self, "block" if self.partition_block else "grid")
        if not _fits(x.permute(0, 2, 3, 1), windows):
            return super()._partition_attn(x)
        return _channels_first(self.attn, x, windows)


class FusedAttention2d(maxxvit.Attention2d):
    """timm's attention over a whole map (CoAtNet), channels first."""

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        """[B, C, H, W] -> [B, C', H, W]"""
        if shared_rel_pos is not None:
            return super().forward(x, shared_rel_pos)
        return _channels_first(self, x, Windows(tuple(x.shape[-2:])))


def _against(attn: Any, original: type[nn.Module], projection: type[nn.Module]) -> str | None:
    if type(attn) is not original:
        return changed_parts(attn, original, ())
    for name in ("qkv", "proj"):
        if type(getattr(attn, name)) is not projection:
            return f"its attention's {name} is a {type(getattr(attn, name)).__qualname__}"
    known = (type(None), RelPosBias, RelPosBiasTf, RelPosMlp)
    if type(attn.rel_pos) not in known:
        return f"its position bias is a {type(attn.rel_pos).__qualname__}"
    return None


def _against_cl(block: Any) -> str | None:
    return _against(block.attn, maxxvit.AttentionCl, nn.Linear)


def _against_parallel(block: Any) -> str | None:
    parts = (block.attn_block, block.attn_grid)
    reasons = [_against(attn, maxxvit.AttentionCl, nn.Linear) for attn in parts]
    return reasons[0] or reasons[1]


def _against_2d(block: Any) -> str | None:
    return _against(block.attn, maxxvit.Attention2d, nn.Conv2d)


def _against_whole(attn: Any) -> str | None:
    return _against(attn, maxxvit.Attention2d, nn.Conv2d)


ADAPTERS = tuple(
    Adapter("windowed", original, fused, "windowed_attention", against)
    for original, fused, against in (
        (maxxvit.PartitionAttentionCl, FusedPartitionAttentionCl, _against_cl),
        (maxxvit.ParallelPartitionAttention, FusedParallelPartitionAttention, _against_parallel),
        (maxxvit.PartitionAttention2d, FusedPartitionAttention2d, _against_2d),
        (maxxvit.Attention2d, FusedAttention2d, _against_whole),
    )
)
