"""Windowed attention: exact attention inside windows of a 1-, 2- or 3-D token grid, in place.

Shift by coordinates instead of roll; no pad, no partition, no mask or expanded bias in memory.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _backends
from . import _check as checks
from . import _windowed_check as check
from ._choice import problem_of
from ._windowed_run import prepare, problem_key, run
from ._windowed_types import RelativeBias, Size, Windows

__all__ = [
    "RelativeBias",
    "Windows",
    "transformer_xl",
    "windowed_attention",
    "windowed_attention_qkvpacked",
]


def windowed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    windows: Windows | Size,
    *,
    bias: Tensor | RelativeBias | None = None,
    rel_pos: tuple[Tensor, ...] | None = None,
    scale: float | None = None,
    logit_scale: Tensor | None = None,
    edge_k: Tensor | None = None,
    edge_v: Tensor | None = None,
    extra_k: Tensor | None = None,
    extra_v: Tensor | None = None,
    extra_bias: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    activation: str = "softmax",
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention inside windows of a token grid, in place.

    Per window, for its query n and its keys m (and the extra keys)::

        s[n, m] = scale * q[n].k[m] + bias[h, n, m] + sum_a q[n].rel_pos[a][r_a(n) - r_a(m) + w_a - 1]
                  + key_padding_mask[m] + attn_mask[n, m] + mask_value * [other region]
        p = softmax(s), relu(s)^2, relu(s) or s
        out[n] = sum_m dropout(p)[n, m] v[m]        lse[n] = log sum_m exp s[n, m]

    Args:
        q: [B, *Sq, h, dk], float32, float64, bfloat16 or float16; the grid *Sq has 1 to 3 axes. Any strides;
            views with a contiguous last dimension (`unbind` of a packed qkv) are not copied. Pre-split
            windows: [B * windows, N, h, dk] with windows = N.
        k: [B, *S, h, dk]; S = Sq unless windows.q_size.
        v: [B, *S, h, dv].
        windows: `Windows`, or its size alone (int or one per axis).
        bias: [T, h] table (as RelativeBias(table)), `RelativeBias`, or dense [h, Nq, Nk]. Trainable, any
            float dtype.
        rel_pos: contextual relative position, a table [2 w - 1, dk] (or [h, 2 w - 1, dk]) per axis, whose
            row for the offset of query and key is multiplied by q as it is, without scale (SAM, ViTDet,
            DiT-3D; `transformer_xl` for Squeezeformer). With q_size or kv_size tables have as many rows as
            there are offsets, slots of the query window + slots of the key window - 1. Trainable, any float
            dtype. Makes heads longer by one channel per slot and axis (docs/windowed.md).
        scale: factor of q.k. Default dk ** -0.5.
        logit_scale: [h] or [h, 1, 1]: cosine attention (Swin V2), s = exp(min(logit_scale, log 100)) * cos(q,
            k); scale must then be None.
        edge_k: [h, dk], the key of pads under edge "const". Default None: zeros. Gets a gradient.
        edge_v: [h, dv], their value.
        extra_k: [B, M, h, dk], keys that every window sees besides its own, in the same softmax.
        extra_v: [B, M, h, dv]. Comes with extra_k.
        extra_bias: [h, M], added to their logits.
        key_padding_mask: [B, *S], bool (True = ignored) or float (added to the logits, no gradient).
        attn_mask: float, added: [windows, Nq, Nk] (window = row of the plan mod windows) or [B * windows, 1
            or h, Nq, Nk].
        activation: "softmax", "relu2", "relu" or "none"; the last three are not normalised and masked weights
            are 0.
        dropout_p: probability that a weight is dropped, 0 <= dropout_p < 1; the others are scaled by 1 / (1 -
            dropout_p).
        return_lse: also return lse, under activation "softmax" only. Differentiable.
        backend: "cuda", "triton", "cpu" or "reference". Default None: the fastest that can.

    Returns:
        out [B, *Sq, h, dv] in q's dtype; with return_lse also lse [B, *Sq, h], float32 (float64 for float64).
        A query that sees no key has out 0, lse -inf and zero gradients.

    Raises:
        TypeError: an argument has the wrong type or dtype. ValueError: a wrong shape or value.
        NotImplementedError: no backend (or not the forced one) takes the problem; lists every reason.

    Example:
        >>> q = k = v = torch.randn(2, 14, 14, 3, 32)
        >>> table = torch.randn(13 * 13, 3)
        >>> windowed_attention(q, k, v, Windows(7, shift=3), bias=table).shape
        torch.Size([2, 14, 14, 3, 32])

    Source: Liu et al., Swin Transformer (arXiv 2103.14030) and Swin Transformer V2 (arXiv 2111.09883).
    """
    options = (bias, scale, logit_scale, edge_k, edge_v, extra_k, extra_v, extra_bias)
    more = (key_padding_mask, attn_mask, activation, dropout_p, rel_pos)
    check.check_lse(return_lse, activation)
    out, lse = run(q, k, v, None, windows, (*options, *more), backend)
    return (out, lse) if return_lse else out


def windowed_attention_qkvpacked(
    qkv: Tensor,
    windows: Windows | Size,
    *,
    bias: Tensor | RelativeBias | None = None,
    rel_pos: tuple[Tensor, ...] | None = None,
    scale: float | None = None,
    logit_scale: Tensor | None = None,
    edge_k: Tensor | None = None,
    edge_v: Tensor | None = None,
    extra_k: Tensor | None = None,
    extra_v: Tensor | None = None,
    extra_bias: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    activation: str = "softmax",
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`windowed_attention` of a packed projection: q, k, v = qkv.unbind(-3), and one gradient of qkv's shape.

    The backward writes straight into the packed gradient, which autograd would otherwise assemble by a copy.

    Args:
        qkv: [B, *S, 3, h, d], the output of a qkv projection, viewed.
        Others, Returns, Raises: as `windowed_attention`; windows.q_size must be None.

    Example:
        >>> qkv = torch.randn(2, 14, 14, 3, 4, 32)
        >>> windowed_attention_qkvpacked(qkv, 7).shape
        torch.Size([2, 14, 14, 4, 32])
    """
    checks.packed(qkv)
    options = (bias, scale, logit_scale, edge_k, edge_v, extra_k, extra_v, extra_bias)
    more = (key_padding_mask, attn_mask, activation, dropout_p, rel_pos)
    if torch.is_autocast_enabled(qkv.device.type):
        qkv = qkv.to(torch.get_autocast_dtype(qkv.device.type))
    q, k, v = qkv.unbind(-3)
    check.check_lse(return_lse, activation)
    out, lse = run(q, k, v, qkv, windows, (*options, *more), backend)
    return (out, lse) if return_lse else out


def transformer_xl(
    q: Tensor, u: Tensor, w: Tensor, positions: Tensor, scale: float | None = None
) -> tuple[Tensor, tuple[Tensor], Tensor]:
    """The score of Transformer-XL (Squeezeformer, Conformer) as arguments of `windowed_attention`.

    scale * ((q_i + u).k_j + (q_i + w).p[i - j]), whose second product is published as a padded and reshaped
    ("shifted") matrix. With q + u as the query, the rest is a `rel_pos` of p * scale and a `bias` of
    scale * (w - u).p; one window holds the whole sequence.

    Args:
        q: [B, N, h, dk], any float dtype.
        u: [h, dk], the bias of the content term. w: [h, dk], that of the position term.
        positions: [2 N - 1, h, dk], p of the offsets i - j from -(N - 1) to N - 1 in this order: the
            projected sinusoids of descending positions, published as N - 1, .., -(N - 1), flipped.
        scale: default dk ** -0.5.

    Returns:
        The query q + u, rel_pos, and the table of the bias [2 N - 1, h].

    Raises:
        ValueError: a shape does not fit q's.

    Example:
        >>> q = k = v = torch.randn(2, 20, 4, 9)
        >>> u, w, p = torch.randn(4, 9), torch.randn(4, 9), torch.randn(39, 4, 9)
        >>> query, rel_pos, bias = transformer_xl(q, u, w, p)
        >>> windowed_attention(query, k, v, -1, rel_pos=rel_pos, bias=RelativeBias(bias)).shape
        torch.Size([2, 20, 4, 9])

    Source: Dai et al., Transformer-XL (arXiv 1901.02860); Kim et al., Squeezeformer (arXiv 2206.00888).
    """
    checks.tensor("q", q)
    if q.dim() != 4:
        raise ValueError(f"q has shape {list(q.shape)}; it must be [B, N, heads, dk]")
    n, heads, dim = q.shape[1:]
    for name, x, shape in (("u", u, (heads, dim)), ("w", w, (heads, dim))):
        checks.floating(name, x)
        checks.shape(name, x, shape, "[heads, dk]")
    checks.floating("positions", positions)
    checks.shape("positions", positions, (2 * n - 1, heads, dim), "[2 N - 1, heads, dk]")
    checks.finite_or_none("scale", scale)
    scaled = positions * (dim**-0.5 if scale is None else scale)
    return q + u, (scaled.transpose(0, 1),), (scaled * (w - u)).sum(-1)


def _explained(*args: Any, **kwargs: Any) -> Any:
    """The problem and the forced backend of windowed_attention(*args, **kwargs)."""
    values = _bound(windowed_attention, args, kwargs)
    backend = values.pop("backend")
    return problem_of(problem_key(prepare(**values))), backend


def _explained_packed(*args: Any, **kwargs: Any) -> Any:
    values = _bound(windowed_attention_qkvpacked, args, kwargs)
    backend, qkv = values.pop("backend"), values.pop("qkv")
    checks.packed(qkv)
    q, k, v = qkv.unbind(-3)
    return problem_of(problem_key(prepare(q, k, v, **values))), backend


def _bound(function: Callable[..., Any], args: Any, kwargs: Any) -> dict[str, Any]:
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    del bound.arguments["return_lse"]
    return bound.arguments


_backends.explains(windowed_attention, _explained)
_backends.explains(windowed_attention_qkvpacked, _explained_packed)
