"""The attentions of vicinal's own reference text classifier."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vicinal.drop_in.adapter import Adapter
from vicinal.drop_in.swin_attention import changed_parts
from vicinal.hash import hash_attention
from vicinal.linear import FeatureMap, linear_attention
from vicinal.models import lra
from vicinal.neighborhood import Neighborhood, neighborhood_attention
from vicinal.windowed import Windows, windowed_attention


class FusedEluAttention(lra.EluAttention):
    """Linear attention in one operation."""

    def attention(self, q: Tensor, k: Tensor, v: Tensor, ignored: Tensor | None) -> Tensor:
        """[B, N, h, d] -> [B, N, h, d]"""
        out = linear_attention(q, k, v, key_padding_mask=ignored)
        assert isinstance(out, Tensor)
        return out


class FusedFavorAttention(lra.FavorAttention):
    """Linear attention in one operation, after the random features."""

    def attention(self, q: Tensor, k: Tensor, v: Tensor, ignored: Tensor | None) -> Tensor:
        """[B, N, h, d] -> [B, N, h, d]"""
        favor = FeatureMap("favor", projection=self.projection)
        out = linear_attention(q, k, v, feature_map=favor, eps=0.0, key_padding_mask=ignored)
        assert isinstance(out, Tensor)
        return out


class FusedLinformerClassifierAttention(lra.LinformerClassifierAttention):
    """PyTorch's fused softmax attention to the projected keys: there are few, and it has no better kernel."""

    def attention(self, q: Tensor, k: Tensor, v: Tensor, ignored: Tensor | None) -> Tensor:
        """[B, N, h, d] -> [B, N, h, d]"""
        k, v = self.projected(k, v, ignored)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


class FusedLocalAttention(lra.LocalAttention):
    """Windows of a line of tokens, in place."""

    def attention(self, q: Tensor, k: Tensor, v: Tensor, ignored: Tensor | None) -> Tensor:
        """[B, N, h, d] -> [B, N, h, d]"""
        out = windowed_attention(q, k, v, Windows((self.window,), edge="mask"), key_padding_mask=ignored)
        assert isinstance(out, Tensor)
        return out


class FusedLongformerAttention(lra.LongformerAttention):
    """A sliding window with the first token as an extra key; the first token's row by PyTorch's attention."""

    def attention(self, q: Tensor, k: Tensor, v: Tensor, ignored: Tensor | None) -> Tensor:
        """[B, N, h, d] -> [B, N, h, d]; the first token is not in the window, but an extra key of all."""
        hidden = q.new_zeros(q.shape[:2], dtype=torch.bool) if ignored is None else ignored.clone()
        hidden[:, 0] = True
        window = Neighborhood((self.window, self.window), border="truncate")
        out = neighborhood_attention(
            q, k, v, window, extra_k=k[:, :1], extra_v=v[:, :1], key_padding_mask=hidden
        )
        assert isinstance(out, Tensor)
        return out

    def of_first(self, q: Tensor, k: Tensor, v: Tensor, ignored: Tensor | None) -> Tensor:
        """[B, 1, h, d]"""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        seen = None if ignored is None else ~ignored[:, None, None]
        return F.scaled_dot_product_attention(q, k, v, seen).transpose(1, 2)


class FusedHashAttention(lra.HashAttention):
    """Codes and linear attention in one operation."""

    def hashed(self, k: Tensor, v: Tensor) -> Tensor:
        """[B, N, h, d] -> [B, N, h, d]"""
        return hash_attention(k, v, self.hash.anchor[0], self.hash.A, self.hash.mvec[0, :, 0])


def _reason_against(attn: Any) -> str | None:
    parts = ("k", "v", "out") if isinstance(attn, lra.HashAttention) else ("q", "k", "v", "out")
    return changed_parts(attn, type(attn), parts)


ADAPTERS = tuple(
    Adapter(family, original, fused, what, _reason_against)
    for family, original, fused, what in (
        ("linear", lra.EluAttention, FusedEluAttention, "linear_attention, elu1"),
        ("linear", lra.FavorAttention, FusedFavorAttention, "linear_attention, favor"),
        (
            "linear",
            lra.LinformerClassifierAttention,
            FusedLinformerClassifierAttention,
            "PyTorch's attention to projected keys",
        ),
        ("windowed", lra.LocalAttention, FusedLocalAttention, "windowed_attention"),
        (
            "neighborhood",
            lra.LongformerAttention,
            FusedLongformerAttention,
            "neighborhood_attention, extra key",
        ),
        ("linear", lra.HashAttention, FusedHashAttention, "hash_attention"),
    )
)
