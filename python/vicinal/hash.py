"""Hash attention: codes of signs instead of features, so that sums over tokens need only additions.

The attention of EcoFormer: one projection serves queries and keys; cost is linear in the number of tokens.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from . import _backends
from . import _hash_check as check
from ._attend import accumulator
from ._choice import Key, choose, problem_key, problem_of
from ._hash_op import MOST_ANCHORS, hash_op
from ._hash_reference import BITS
from ._hash_reference import hash_ as reference

__all__ = ["hash_attention"]


def hash_attention(
    qk: Tensor,
    v: Tensor,
    anchors: Tensor,
    weight: Tensor,
    mean: Tensor,
    *,
    numerator: str = "sum",
    offset: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Linear attention between binary codes of normalised tokens.

    Per sample and head::

        x = qk / |qk|        d[i, j] = 1 - 2 x[i].anchors[j] + |anchors[j]|^2        sigma = mean of d
        y = (exp(-d / (2 sigma)) - mean) @ weight.T        code = sign(y), +1 at 0
        out[i] = (code[i] @ S + offset X) / (code[i].z + N offset)
        S = sum_j outer(code[j], v[j])        z = sum_j code[j]        X = sum_j v[j], or v[i]

    The weight of a pair is code[i].code[j] + offset, which is positive. Gradients of qk (straight through
    the signs where |y| < 1, and through sigma) and of v; the tables get none.

    Args:
        qk: [B, N, H, D], float32, float64, bfloat16 or float16, any strides. A zero vector has x = 0.
        v: [B, N, H, dv].
        anchors: [H, m, D] or [m, D]. EcoFormer has m = 25.
        weight: [H, bits, m] or [bits, m]. Kernels take up to 16 bits.
        mean: [H, m] or [m], the mean of exp(-d / (2 sigma)) at calibration.
        numerator: "sum" for X = sum_j v[j], which is the attention with the stated weights, or "self" for X =
            v[i], what EcoFormer's released code computes and its checkpoints were trained with.
        offset: default bits + 1; above bits.
        backend: "cpu", "triton" or "reference". Default None: the fastest that can.

    Returns:
        [B, N, H, dv] in v's dtype.

    Raises:
        TypeError: an argument has the wrong type or dtype. ValueError: a wrong shape or value.
        NotImplementedError: the forced backend does not take the problem; lists every reason.

    Example:
        >>> qk, v = torch.randn(2, 8, 3136, 1, 32).unbind(0)
        >>> anchors = torch.nn.functional.normalize(torch.randn(25, 32), dim=-1)
        >>> hash_attention(qk, v, anchors, torch.randn(16, 25), torch.full((25,), 0.6)).shape
        torch.Size([8, 3136, 1, 32])

    Source: Liu et al., EcoFormer (arXiv 2209.09004).
    """
    qk, v, itself, offset = _prepare(qk, v, anchors, weight, mean, numerator, offset)
    heads, acc = qk.shape[2], accumulator(qk.dtype)
    ranked = zip((anchors.to(acc), weight.to(acc), mean.to(acc)), (3, 3, 2), strict=True)
    tables = [(x if x.dim() == rank else x.expand(heads, *x.shape)).contiguous() for x, rank in ranked]
    chosen = choose(_key(qk, v, weight), backend)
    if chosen == "reference":
        with torch.autocast(qk.device.type, enabled=False):
            return reference(qk, v, *tables, itself=itself, offset=offset)
    return hash_op(chosen, False, (itself, offset), qk, v, *tables)[0]


def _prepare(
    qk: Any, v: Any, anchors: Any, weight: Any, mean: Any, numerator: Any, offset: Any
) -> tuple[Tensor, Tensor, bool, float]:
    """Checked arguments, cast under autocast."""
    check.check_types(qk, v)
    device = qk.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        qk, v = qk.to(dtype), v.to(dtype)
    check.check_call(qk, v, anchors, weight, mean, numerator, offset)
    return qk, v, numerator == "self", float(weight.shape[-2] + 1 if offset is None else offset)


def _key(qk: Tensor, v: Tensor, weight: Tensor) -> Key:
    many = f"anchors above {MOST_ANCHORS}"
    features = [("long codes", weight.shape[-2] > BITS), (many, weight.shape[-1] > MOST_ANCHORS)]
    return problem_key("hash", qk, v, [name for name, there in features if there])


def _explained(*args: Any, **kwargs: Any) -> Any:
    """The problem and the forced backend of hash_attention(*args, **kwargs)."""
    bound = inspect.signature(hash_attention).bind(*args, **kwargs)
    bound.apply_defaults()
    backend = bound.arguments.pop("backend")
    qk, v, _, _ = _prepare(**bound.arguments)
    return problem_of(_key(qk, v, bound.arguments["weight"])), backend


_backends.explains(hash_attention, _explained)
