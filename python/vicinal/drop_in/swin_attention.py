"""Window attention of modules with the names of Swin's parameters (official, timm, vicinal)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vicinal.nn import packed_windowed_attention
from vicinal.windowed import RelativeBias, Windows


def changed_parts(attn: Any, original: type[nn.Module], linears: tuple[str, ...]) -> str | None:
    """Why an attention module is not what its library builds: another class, a wrapped projection (LoRA)."""
    if type(attn) is not original:
        return f"its attention is a {type(attn).__qualname__}, not a {original.__qualname__}"
    for name in linears:
        part = getattr(attn, name)
        if type(part) is not nn.Linear:
            return f"its attention's {name} is a {type(part).__qualname__}, not a Linear"
    return None


def attend_v1(attn: Any, x: Tensor, windows: Windows, dropout_p: float = 0.0) -> Tensor:
    """proj(softmax(scale q k^T + table) v); `attn` holds qkv, proj, scale, relative_position_bias_table."""
    out = packed_windowed_attention(
        attn.qkv(x),
        attn.qkv.bias,
        windows,
        attn.num_heads,
        bias=RelativeBias(attn.relative_position_bias_table),
        scale=attn.scale,
        dropout_p=dropout_p,
    )
    return attn.proj(out)


def attend_v2(attn: Any, x: Tensor, windows: Windows, dropout_p: float = 0.0) -> Tensor:
    """proj(softmax(tau cos(q, k) + 16 sigmoid(cpb_mlp)) v); `attn` holds qkv, q_bias, v_bias, cpb_mlp, ..."""
    bias = None
    if attn.q_bias is not None:
        bias = torch.cat([attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias])
    table = 16 * torch.sigmoid(attn.cpb_mlp(attn.relative_coords_table)).flatten(0, -2)
    out = packed_windowed_attention(
        F.linear(x, attn.qkv.weight, bias),
        bias,
        windows,
        attn.num_heads,
        bias=RelativeBias(table),
        logit_scale=attn.logit_scale,
        dropout_p=dropout_p,
    )
    return attn.proj(out)
