"""Scores and weighted sums of neighborhoods apart from each other, by gathering."""

from __future__ import annotations

from math import prod
from typing import Any

from torch import Tensor

from vicinal import reference_neighborhood as reference
from vicinal._neighborhood_check import check_axes, check_rank
from vicinal._neighborhood_plan import AxisNeighborhood
from vicinal._neighborhood_types import Neighborhood, resolve


def _axes(x: Tensor, kernel_size: Any, dilation: Any, is_causal: Any) -> tuple[AxisNeighborhood, ...]:
    """The axes of x [B, *space, h, D]."""
    rank, space = x.dim() - 3, tuple(x.shape[1:-2])
    neighborhood = Neighborhood(kernel_size, dilation=dilation, is_causal=is_causal)
    check_rank(neighborhood, rank)
    axes = resolve(neighborhood, rank, False).on(space, space)
    check_axes(axes)
    return axes


def neighborhood_scores(
    q: Tensor,
    k: Tensor,
    kernel_size: Any,
    *,
    dilation: Any = 1,
    is_causal: Any = False,
    bias: Tensor | None = None,
    extra_k: Tensor | None = None,
) -> Tensor:
    """q, k [B, *space, h, D], extra_k [B, E, h, D] -> [B, *space, h, S + E], -inf in holes."""
    axes = _axes(q, kernel_size, dilation, is_causal)
    table = None if bias is None else bias.flatten(1).to(q.dtype)
    s = reference.scores(q.flatten(1, -3), k.flatten(1, -3), axes, 1.0, table, extra_k)
    return s.unflatten(1, q.shape[1:-2])


def neighborhood_aggregate(
    weights: Tensor,
    v: Tensor,
    kernel_size: Any,
    *,
    dilation: Any = 1,
    is_causal: Any = False,
    extra_v: Tensor | None = None,
) -> Tensor:
    """weights [B, *space, h, S + E], v [B, *space, h, D], extra_v [B, E, h, D] -> [B, *space, h, D]."""
    axes = _axes(v, kernel_size, dilation, is_causal)
    slots = prod(axis.kernel for axis in axes) + (0 if extra_v is None else extra_v.shape[1])
    if weights.shape[-1] != slots:
        raise ValueError(
            f"weights has {weights.shape[-1]} slots; the window and the extra values have {slots}"
        )
    out = reference.aggregate(weights.flatten(1, -3), v.flatten(1, -3), axes, extra_v)
    return out.unflatten(1, v.shape[1:-2])
