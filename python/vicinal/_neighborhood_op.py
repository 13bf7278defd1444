"""The ops vicinal::neighborhood_fwd and neighborhood_bwd: plans of their geometry text."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ._attend_op import AttendOps
from ._neighborhood_plan import AxisNeighborhood, neighborhood_plan
from ._neighborhood_tiles import choose_tiles
from ._neighborhood_types import Geometry
from .plan import Plan

PLACE_BITS = 30  # of the ranges of a plan
LARGE_GRID = f"grid places of over {PLACE_BITS} bits"


def place_bits(axes: tuple[AxisNeighborhood, ...]) -> int:
    """Bits that the ranges of the axes' plan take: a field per axis, and a guard bit between two."""
    groups = [-(-a.length // min(a.dilation, a.length)) for a in axes]
    return sum(n.bit_length() for n in groups) + len(axes) - 1


@lru_cache(maxsize=1024)
def plans(
    text: str,
    q_space: tuple[int, ...],
    k_space: tuple[int, ...],
    heads: int,
    grouped: bool,
    backend: str,
    device: torch.device,
) -> tuple[tuple[int, int, Plan]]:
    """The plan of all heads."""
    geometry = Geometry.decode(text)
    axes = geometry.on(q_space, k_space)
    tile, key_tile = choose_tiles(backend, axes)
    return ((0, heads, neighborhood_plan(axes, geometry.biased, tile, key_tile, grouped, device)),)


def _plans(text: str, q: Tensor, k: Tensor, backend: str) -> tuple[tuple[int, int, Plan]]:
    heads = q.shape[-2]
    spaces = tuple(q.shape[1:-2]), tuple(k.shape[1:-2])
    return plans(text, *spaces, heads, heads != k.shape[-2], backend, q.device)


NEIGHBORHOOD = AttendOps("neighborhood", _plans, drop_by_token=True, missing=frozenset({LARGE_GRID}))
