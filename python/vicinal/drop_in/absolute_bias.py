"""Attention over a whole map with a bias by absolute offset (LeViT, EfficientFormer, EfficientViT)."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from vicinal.drop_in.swin_attention import windows_on
from vicinal.windowed import windowed_attention


def signed_tables(biases: Tensor, resolution: tuple[int, int]) -> Tensor:
    """[h, H W] biases of |dy| W + |dx| -> [h, (2H - 1) (2W - 1)] tables of (dy, dx), in Swin's order.

    Gathered from the parameter in every call: the libraries keep an expanded copy in evaluation mode, which
    goes stale when weights are loaded."""
    if torch.compiler.is_compiling():
        return biases[:, _offsets(resolution, biases.device)]
    with torch.inference_mode(False):  # what is remembered serves training too
        offsets = _cached_offsets(resolution, biases.device)
    return biases[:, offsets]


def _offsets(resolution: tuple[int, int], device: torch.device) -> Tensor:
    dy, dx = (torch.arange(1 - L, L, device=device).abs() for L in resolution)
    return (dy[:, None] * resolution[1] + dx).flatten()


_cached_offsets = lru_cache(maxsize=64)(_offsets)


def attend_whole_map(
    q: Tensor, k: Tensor, v: Tensor, resolution: tuple[int, int], tables: Tensor, scale: float
) -> Tensor:
    """q, k, v [B, H W, h, d], tables [h, (2H - 1) (2W - 1)] -> [B, H W, h dv]"""
    q, k, v = (x.unflatten(1, resolution) for x in (q, k, v))
    windows = windows_on(resolution, resolution)
    out = windowed_attention(q, k, v, windows, bias=tables.t(), scale=scale)
    assert isinstance(out, Tensor)
    return out.flatten(1, 2).flatten(-2)
