"""Neighborhood attention: every query of a 1-, 2- or 3-D grid reads the keys of a window around it.

Dilation, stride, causality and two rules for borders; a trainable bias; extra keys in the same softmax.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _backends
from . import _check as checks
from ._choice import problem_of
from ._neighborhood_run import as_neighborhood, prepare, problem_key, run
from ._neighborhood_types import Kernel, Neighborhood, Size

__all__ = ["Neighborhood", "neighborhood_attention", "neighborhood_attention_qkvpacked"]


def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: Neighborhood | Kernel,
    *,
    dilation: Size = 1,
    stride: Size = 1,
    is_causal: bool | tuple[bool, ...] = False,
    border: str = "shift",
    bias: Tensor | None = None,
    rel_pos: tuple[Tensor, ...] | None = None,
    scale: float | None = None,
    extra_k: Tensor | None = None,
    extra_v: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of every query to the keys of a window around it, on a 1-, 2- or 3-D grid.

    For the query i, the keys j of its window, and the extra keys::

        s[i, j] = scale * q[i].k[j] + bias[h, places from i to j + K - 1]
                  + sum_a q[i].rel_pos[a][places from i to j on axis a + K_a - 1]
        p = softmax(s)
        out[i] = sum_j dropout(p)[i, j] v[j]        lse[i] = log sum_j exp s[i, j]

    Args:
        q: [B, *Sq, h, D], float32, float64, bfloat16 or float16; the grid *Sq has 1 to 3 axes. Any strides;
            views with a contiguous last dimension (`unbind` of a packed qkv) are not copied.
        k: [B, *S, hkv, D]; S = Sq. On one axis with border "truncate" there may be more keys than queries;
            the queries then stand at the end.
        v: [B, *S, hkv, Dv]. hkv divides h; query head i reads head i // (h / hkv) of k and v.
        kernel_size: keys per axis, or a `Neighborhood`, which holds this and the next four arguments.
        dilation, stride, is_causal, border: see `Neighborhood`.
        bias: [h, 2 K - 1 per axis] table of relative positions, K the kernel size (left + right + 1). Added
            to the scaled logits; trainable, any float dtype.
        rel_pos: contextual relative position, a table [2 K - 1, D] (or [h, 2 K - 1, D]) per axis, indexed as
            the bias is and multiplied by q as it is, without scale. Trainable, any float dtype. Makes heads
            longer by K channels per axis (docs/neighborhood.md).
        scale: factor of q.k. Default D ** -0.5.
        extra_k: [B, E, hkv, D], keys that every query sees besides its window, in the same softmax, without
            bias, never masked.
        extra_v: [B, E, hkv, Dv]. Comes with extra_k.
        key_padding_mask: [B, *S] bool, True = ignored; ignored keys and values may hold anything.
        dropout_p: probability that a weight is dropped, 0 <= dropout_p <= 1; the others are scaled by 1 / (1
            - dropout_p).
        return_lse: also return lse. Differentiable.
        backend: "cpu", "cuda", "triton" or "reference". Default None: the fastest that can.

    Returns:
        out [B, *Sq, h, Dv] in q's dtype; with return_lse also lse [B, *Sq, h], float32 (float64 for float64).
        A query that sees no key has out 0, lse -inf and zero gradients.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or value; the message names it.
        NotImplementedError: no backend (or not the forced one) takes the problem; lists every reason.

    Example:
        >>> q = k = v = torch.randn(2, 14, 14, 3, 32)
        >>> table = torch.randn(3, 13, 13)
        >>> neighborhood_attention(q, k, v, 7, dilation=2, bias=table).shape
        torch.Size([2, 14, 14, 3, 32])

    Source: Hassani et al., Neighborhood Attention Transformer (arXiv 2204.07143), DiNAT (arXiv 2209.15001)
    and Generalized Neighborhood Attention (arXiv 2504.16922).
    """
    checks.flag("return_lse", return_lse)
    geometry = (kernel_size, dilation, stride, is_causal, border)
    options = (bias, scale, extra_k, extra_v, key_padding_mask, dropout_p, rel_pos)
    out, lse = run(q, k, v, None, geometry, options, backend)
    return (out, lse) if return_lse else out


def neighborhood_attention_qkvpacked(
    qkv: Tensor,
    kernel_size: Neighborhood | Kernel,
    *,
    dilation: Size = 1,
    stride: Size = 1,
    is_causal: bool | tuple[bool, ...] = False,
    border: str = "shift",
    bias: Tensor | None = None,
    rel_pos: tuple[Tensor, ...] | None = None,
    scale: float | None = None,
    extra_k: Tensor | None = None,
    extra_v: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`neighborhood_attention` of a packed projection: q, k, v = qkv.unbind(-3), and one gradient of qkv's
    shape.

    The backward writes straight into the packed gradient, which autograd would otherwise assemble by a copy.

    Args:
        qkv: [B, *S, 3, h, d], the output of a qkv projection, viewed.
        Others, Returns, Raises: as `neighborhood_attention`.

    Example:
        >>> qkv = torch.randn(2, 14, 14, 3, 4, 32)
        >>> neighborhood_attention_qkvpacked(qkv, 7, dilation=2).shape
        torch.Size([2, 14, 14, 4, 32])
    """
    checks.packed(qkv)
    checks.flag("return_lse", return_lse)
    if torch.is_autocast_enabled(qkv.device.type):
        qkv = qkv.to(torch.get_autocast_dtype(qkv.device.type))
    q, k, v = qkv.unbind(-3)
    geometry = (kernel_size, dilation, stride, is_causal, border)
    options = (bias, scale, extra_k, extra_v, key_padding_mask, dropout_p, rel_pos)
    out, lse = run(q, k, v, qkv, geometry, options, backend)
    return (out, lse) if return_lse else out


def _explained(*args: Any, **kwargs: Any) -> Any:
    """The problem and the forced backend of neighborhood_attention(*args, **kwargs)."""
    values = _bound(neighborhood_attention, args, kwargs)
    q, k, v = values.pop("q"), values.pop("k"), values.pop("v")
    return _problem(q, k, v, values)


def _explained_packed(*args: Any, **kwargs: Any) -> Any:
    values = _bound(neighborhood_attention_qkvpacked, args, kwargs)
    qkv = values.pop("qkv")
    checks.packed(qkv)
    q, k, v = qkv.unbind(-3)
    return _problem(q, k, v, values)


def _problem(q: Tensor, k: Tensor, v: Tensor, values: dict[str, Any]) -> Any:
    backend = values.pop("backend")
    names = ("kernel_size", "dilation", "stride", "is_causal", "border")
    neighborhood = as_neighborhood(*[values.pop(name) for name in names])
    return problem_of(problem_key(prepare(q, k, v, neighborhood, **values))), backend


def _bound(function: Callable[..., Any], args: Any, kwargs: Any) -> dict[str, Any]:
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    del bound.arguments["return_lse"]
    return bound.arguments


_backends.explains(neighborhood_attention, _explained)
_backends.explains(neighborhood_attention_qkvpacked, _explained_packed)
