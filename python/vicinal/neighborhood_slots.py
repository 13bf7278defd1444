"""The two halves of neighborhood attention, for code that handles the weights itself: scores in slot order,
and sums of values with given weights.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from . import _backends, _choice
from . import _check as checks
from . import _neighborhood_check as check
from ._attend import flat
from ._launch import FLOATS
from ._neighborhood_run import as_neighborhood, geometry_of
from ._neighborhood_slots import Axes, Gather, Scores, encode
from ._neighborhood_types import Kernel, Neighborhood, Size
from .reference_neighborhood import bias_rows, grid_slots

__all__ = ["neighborhood_aggregate", "neighborhood_scores"]

FAMILY = "neighborhood slots"
_backends.register(_backends.Row("reference", FAMILY, ("any",), FLOATS, _backends.have_reference))


def neighborhood_scores(
    q: Tensor,
    k: Tensor,
    kernel_size: Neighborhood | Kernel,
    *,
    dilation: Size = 1,
    stride: Size = 1,
    is_causal: bool | tuple[bool, ...] = False,
    border: str = "shift",
    bias: Tensor | None = None,
    scale: float = 1.0,
    extra_k: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The scores of every query with the keys of its window, in the order of their slots.

    Slots count from the start of the window, with border "truncate" from where it would start if nothing were
    cut off; axes combine row-major, the extra keys come last.

    Args:
        q: [B, *Sq, h, D]. k: [B, *S, hkv, D]. bias, extra_k: as in `neighborhood_attention`.
        kernel_size, dilation, stride, is_causal, border: as there; no axis may be unlimited.
        scale: factor of q.k. Default 1.0: callers of such functions have scaled q.
        backend: None or "reference"; there are no kernels for it, it is plain PyTorch.

    Returns:
        [B, *Sq, h, S + E] in q's dtype, S the product of the kernel size; -inf in slots without a key.
        Differentiable any number of times; no copy of k for every slot is made.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or value; the message names it.

    Example:
        >>> q = k = torch.randn(2, 8, 8, 3, 16)
        >>> neighborhood_scores(q, k, 3).shape
        torch.Size([2, 8, 8, 3, 9])
    """
    checks.tokens(q=q, k=k)
    checks.finite_or_none("scale", scale)
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k = q.to(dtype), k.to(dtype)
        extra_k = None if extra_k is None else extra_k.to(dtype)
    checks.like_q(q, ValueError, k=k)
    neighborhood = as_neighborhood(kernel_size, dilation, stride, is_causal, border)
    axes = _axes("neighborhood_scores", neighborhood, q, k)
    checks.shape("k", k, (q.shape[0], *k.shape[1:-1], q.shape[-1]), "[B, *S, kv heads, D]")
    _check_extra("extra_k", extra_k, k)
    if bias is not None:
        check.check_bias(bias, q, axes)
    _choose(q, k, backend)
    s = Scores.apply(flat(q), flat(k), encode(axes))
    s = s if scale is None or scale == 1 else s * float(scale)
    if bias is not None:
        table = bias.flatten(1).to(s.dtype)
        s = s + table[:, bias_rows(axes).to(s.device)].transpose(0, 1)
    if any(axis.causal or not axis.shift for axis in axes):  # there are holes
        s = s.masked_fill((grid_slots(axes) < 0).to(s.device)[:, None], -torch.inf)
    if extra_k is not None:
        grouped = flat(q).unflatten(2, (k.shape[-2], -1))
        extra = torch.einsum("bnkgd,bekd->bnkge", grouped, extra_k).flatten(2, 3)
        s = torch.cat([s, extra if scale is None or scale == 1 else extra * float(scale)], -1)
    return s.view(*q.shape[:-1], s.shape[-1])


def neighborhood_aggregate(
    weights: Tensor,
    v: Tensor,
    kernel_size: Neighborhood | Kernel,
    *,
    dilation: Size = 1,
    stride: Size = 1,
    is_causal: bool | tuple[bool, ...] = False,
    border: str = "shift",
    extra_v: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Sums of the values of every query's window with given weights.

    out[i] = sum_r weights[i, r] v[key(i, r)] over the slots r that have a key. The weights are what they are:
    without a softmax, and with border "truncate", this is a convolution with zero padding whose kernel
    differs at every token.

    Args:
        weights: [B, *Sq, h, S (+ E)] in the slot order of `neighborhood_scores`; those of slots without a key
            do not matter and get no gradient.
        v: [B, *S, hkv, Dv] of weights' dtype; hkv divides h. extra_v: [B, E, hkv, Dv].
        kernel_size, dilation, stride, is_causal, border: as in `neighborhood_attention`; no axis may be
            unlimited.
        backend: None or "reference"; there are no kernels for it, it is plain PyTorch.

    Returns:
        [B, *Sq, h, Dv]. Differentiable any number of times; no copy of v for every slot is made.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or value; the message names it.

    Example:
        >>> weights, v = torch.rand(2, 8, 8, 4, 49), torch.randn(2, 8, 8, 4, 6)
        >>> neighborhood_aggregate(weights, v, 7, border="truncate").shape
        torch.Size([2, 8, 8, 4, 6])
    """
    checks.tokens(weights=weights, v=v)
    if torch.is_autocast_enabled(v.device.type):
        dtype = torch.get_autocast_dtype(v.device.type)
        weights, v = weights.to(dtype), v.to(dtype)
        extra_v = None if extra_v is None else extra_v.to(dtype)
    checks.like_q(weights, ValueError, v=v)
    neighborhood = as_neighborhood(kernel_size, dilation, stride, is_causal, border)
    axes = _axes("neighborhood_aggregate", neighborhood, weights, v, "weights")
    _check_extra("extra_v", extra_v, v)
    slots, extra = prod([axis.kernel for axis in axes]), 0 if extra_v is None else extra_v.shape[1]
    expected = (v.shape[0], *weights.shape[1:-1], slots + extra)
    checks.shape("weights", weights, expected, "[B, *S, heads, slots + extra keys]")
    _choose(weights, v, backend)
    rows = weights.flatten(1, -3)
    out = Gather.apply(rows[..., :slots], flat(v), encode(axes))
    if extra_v is not None:
        grouped = rows[..., slots:].unflatten(2, (v.shape[-2], -1))
        out = out + torch.einsum("bnkge,bekd->bnkgd", grouped, extra_v).flatten(2, 3)
    return out.view(*weights.shape[:-1], v.shape[-1])


def _axes(name: str, neighborhood: Neighborhood, q: Tensor, k: Tensor, rows: str = "q") -> Axes:
    """The axes of a call of `name` whose queries have the grid and heads of q, called `rows`."""
    geometry, _ = geometry_of(neighborhood, q.dim() - 3, False)
    check.check_lengths(neighborhood, q, k, "k" if rows == "q" else "v", rows)
    check.check_heads(rows, q.shape[-2], k)
    checks.head_dims(q, k)
    axes = geometry.on(tuple(q.shape[1:-2]), tuple(k.shape[1:-2]))
    check.check_axes(axes)
    check.check_limited(name, axes)
    return axes


def _check_extra(name: str, extra: Tensor | None, like: Tensor) -> None:
    """extra [B, E, kv heads, D] beside like [B, *S, kv heads, D]."""
    if extra is None:
        return
    checks.floating(name, extra)
    checks.on_device_of_q(name, extra, like)
    if extra.dtype != like.dtype:
        raise ValueError(f"{name} is {extra.dtype}; it must be {like.dtype} as q")
    count = extra.shape[1] if extra.dim() == 4 else 0
    checks.shape(name, extra, (like.shape[0], count, *like.shape[-2:]), "[B, E, kv heads, head_dim]")


def _choose(q: Tensor, v: Tensor, backend: Any) -> None:
    _choice.choose(_choice.problem_key(FAMILY, q, v, ()), backend)
