"""Window attention of modules with the names of Swin's parameters (official, timm, vicinal), and the
geometry that adapters of windowed modules share."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vicinal.nn import packed_windowed_attention
from vicinal.windowed import Windows, windowed_attention


def changed_parts(attn: Any, original: type[nn.Module], linears: tuple[str, ...]) -> str | None:
    """Why an attention module is not what its library builds: another class, a wrapped projection (LoRA)."""
    if type(attn) is not original:
        return f"its attention is a {type(attn).__qualname__}, not a {original.__qualname__}"
    for name in linears:
        part = getattr(attn, name)
        if type(part) is not nn.Linear:
            return f"its attention's {name} is a {type(part).__qualname__}, not a Linear"
    return None


def windows_on(space: Sequence[int], size: Sequence[int], **options: Any) -> Windows:
    """Windows whose pads are zero inputs of the projection (edge "const"), or that say that there are none.

    Without pads no edge row goes to the kernel, and the call is remembered by its signature.

    Args:
        space: extents of the grid. size: of the windows, per axis. options: further fields of `Windows`.
    """
    overhang = any(L % w for L, w in zip(space, size, strict=True))
    names = tuple(options.items())
    make = _make_windows if torch.compiler.is_compiling() else _cached_windows
    return make(tuple(size), "const" if overhang else "mask", names)


def _make_windows(size: tuple[int, ...], edge: str, options: tuple[tuple[str, Any], ...]) -> Windows:
    return Windows(size, edge=edge, **dict(options))


_cached_windows = lru_cache(maxsize=1024)(_make_windows)


def attend_v1(attn: Any, x: Tensor, windows: Windows, dropout_p: float = 0.0) -> Tensor:
    """proj(softmax(scale q k^T + table) v); `attn` holds qkv, proj, scale, relative_position_bias_table."""
    out = packed_windowed_attention(
        attn.qkv(x),
        attn.qkv.bias,
        windows,
        attn.num_heads,
        bias=attn.relative_position_bias_table,
        scale=attn.scale,
        dropout_p=dropout_p,
    )
    return attn.proj(out)


def attend_v2(attn: Any, x: Tensor, windows: Windows, dropout_p: float = 0.0) -> Tensor:
    """proj(softmax(tau cos(q, k) + 16 sigmoid(cpb_mlp)) v); `attn` holds qkv, q_bias, v_bias, cpb_mlp, ..."""
    bias = None
    if attn.q_bias is not None:
        bias = torch.cat([attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias])
    out = packed_windowed_attention(
        F.linear(x, attn.qkv.weight, bias),
        bias,
        windows,
        attn.num_heads,
        bias=cosine_table(attn.cpb_mlp, attn.relative_coords_table),
        logit_scale=attn.logit_scale,
        dropout_p=dropout_p,
    )
    return attn.proj(out)


def cosine_table(network: nn.Module, coordinates: Tensor) -> Tensor:
    """[T, h] the continuous position bias of Swin V2: 16 sigmoid(network(offsets)) over [1, .., .., 2]."""
    return 16 * torch.sigmoid(network(coordinates)).flatten(0, -2)


def attend_projected(
    x: Tensor, q: nn.Linear, k: nn.Linear, v: nn.Linear, windows: Windows, head_dim: int, **options: Any
) -> Tensor:
    """Window attention behind three projections, as transformers has them: [B, H, W, C] -> [B, H, W, C]."""
    query, key, value = (project(x).unflatten(-1, (-1, head_dim)) for project in (q, k, v))
    if windows.edge == "const":
        edges = {"edge_k": k.bias, "edge_v": v.bias}
        options |= {name: b.unflatten(0, (-1, head_dim)) for name, b in edges.items() if b is not None}
    out = windowed_attention(query, key, value, windows, **options)
    assert isinstance(out, Tensor)
    return out.flatten(-2)
