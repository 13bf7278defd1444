"""How many queries and keys the tiles of a neighborhood take, by rule, per backend."""

from __future__ import annotations

from functools import lru_cache
from itertools import product
from math import prod

from ._neighborhood_plan import AxisNeighborhood

QUERIES = {"cpu": 48}  # of a tile, at most
LANES = {"cpu": 16}  # a tile costs as if its queries were a multiple of this
OTHERS = 64  # both, on a GPU
EXACT = 1024  # slots, at most, of a tile whose queries all read the same keys

Tile = tuple[int, ...]


@lru_cache(maxsize=1024)
def choose_tiles(backend: str, axes: tuple[AxisNeighborhood, ...]) -> tuple[Tile, Tile]:
    """(queries per axis of a row of the plan, keys per axis of a row of its key_plan)."""
    exact = tuple(_exact(axis) for axis in axes)
    if all(exact) and prod(exact) <= EXACT:
        return exact, exact
    queries, lanes = QUERIES.get(backend, OTHERS), LANES.get(backend, OTHERS)
    tile = _cheapest(axes, queries, lanes)
    return tile, _cheapest(tuple(axis._replace(stride=1) for axis in axes), queries, lanes)


def _group(axis: AxisNeighborhood) -> int:
    """Tokens of the longest dilation group."""
    return -(-axis.length // min(axis.dilation, axis.length))


def _exact(axis: AxisNeighborhood) -> int:
    """The size of pieces of the axis inside which every query reads every key and no other; 0: there are
    none."""
    n = _group(axis)
    if axis.causal or axis.q_length != axis.length:
        return 0
    if axis.left < 0 and axis.right < 0:
        return n
    if axis.left < 0 or axis.right < 0:
        return 0
    if axis.shift and axis.length == axis.kernel * axis.dilation:
        return n
    whole = axis.length % (axis.dilation * axis.kernel) == 0
    return axis.stride if axis.stride == axis.kernel and (whole or not axis.shift) else 0


def _span(axis: AxisNeighborhood, n: int, size: int) -> int:
    """About how many keys `size` neighbours of a group of n read."""
    if axis.left < 0 or axis.right < 0:
        return n
    return min(n, axis.kernel + (-(-size // axis.stride) - 1) * axis.stride)


def _cheapest(axes: tuple[AxisNeighborhood, ...], most: int, lanes: int) -> Tile:
    """The tile of at most `most` slots whose rows read the fewest pairs; a row's slots count in multiples of
    `lanes`."""
    per_axis = []
    for axis in axes:
        n, found = _group(axis), {}
        for size in range(1, min(n, most) + 1):
            pieces = -(-n // size)
            found[pieces] = (-(-n // pieces), pieces, _span(axis, n, -(-n // pieces)))
        per_axis.append(list(found.values()))
    best: tuple[float, Tile] = (float("inf"), (1,) * len(axes))
    for choice in product(*per_axis):
        slots = prod(size for size, _, _ in choice)
        if slots > most:
            continue
        pairs = prod(pieces * span for _, pieces, span in choice) * (-(-slots // lanes) * lanes)
        best = min(best, (pairs, tuple(size for size, _, _ in choice)))
    return best[1]
