"""LeViT of timm: attention over whole maps, and the attention that halves a map."""

from __future__ import annotations

from timm.models import levit
from torch import Tensor

from vicinal.drop_in.absolute_bias import attend_whole_map, signed_tables
from vicinal.drop_in.adapter import Adapter
from vicinal.windowed import Windows, windowed_attention


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """[B, N, h d] or, of a convolution, [B, h d, H, W] -> [B, N, h, d]"""
    x = x.flatten(2).transpose(1, 2) if x.dim() == 4 else x
    return x.unflatten(-1, (num_heads, -1))


def _unfold(x: Tensor, use_conv: bool, resolution: tuple[int, int]) -> Tensor:
    """[B, N, C], or [B, C, H, W] for a convolution"""
    return x.transpose(1, 2).unflatten(2, resolution) if use_conv else x


class FusedAttention(levit.Attention):
    """timm's attention over a whole map, on the tokens where they lie."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, N, C], or [B, C, H, W] -> [B, C, H, W]"""
        qkv = _heads(self.qkv(x), self.num_heads)
        q, k, v = qkv.split([self.key_dim, self.key_dim, self.val_dim], dim=-1)
        tables = signed_tables(self.attention_biases, self.resolution)
        out = attend_whole_map(q, k, v, self.resolution, tables, self.scale)
        return self.proj(_unfold(out, self.use_conv, self.resolution))


class FusedAttentionDownsample(levit.AttentionDownsample):
    """timm's attention of every second token to a whole map."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, N', C'], or [B, C, H, W] -> [B, C', H', W']"""
        k, v = _heads(self.kv(x), self.num_heads).split([self.key_dim, self.val_dim], dim=-1)
        q = _heads(self.q(x), self.num_heads)
        out = windowed_attention(
            q,
            k,
            v,
            Windows(k.shape[1], q_size=q.shape[1]),
            bias=self.attention_biases[:, self.attention_bias_idxs],
            scale=self.scale,
        )
        assert isinstance(out, Tensor)
        pooled = tuple(-(-L // self.stride) for L in self.resolution)
        return self.proj(_unfold(out.flatten(-2), self.use_conv, pooled))


ADAPTERS = (
    Adapter("windowed", levit.Attention, FusedAttention, "windowed_attention, one window"),
    Adapter(
        "windowed", levit.AttentionDownsample, FusedAttentionDownsample, "windowed_attention, fewer queries"
    ),
)
