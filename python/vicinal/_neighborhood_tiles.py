"""How many queries and keys the tiles of a neighborhood take, by rule, per backend."""

from __future__ import annotations

from functools import lru_cache
from itertools import product
from math import prod

from ._neighborhood_plan import AxisNeighborhood

QUERIES = 64  # of a tile on a GPU, at most; a tile costs as if it had a multiple of this
CPU_QUERIES = 256  # of a tile, at most
CPU_WIDTH = 8  # of them on the last of several axes: the lines of a window stay in the first-level cache
EXACT = 1024  # slots, at most, of a tile whose queries all read the same keys

Tile = tuple[int, ...]


@lru_cache(maxsize=1024)
def choose_tiles(backend: str, axes: tuple[AxisNeighborhood, ...]) -> tuple[Tile, Tile]:
    """(queries per axis of a row of the plan, keys per axis of a row of its key_plan)."""
    exact = tuple(_exact(axis) for axis in axes)
    if all(exact) and prod(exact) <= EXACT:
        return exact, exact
    chosen = _cheapest_cpu if backend == "cpu" else _cheapest
    return chosen(axes), chosen(tuple(axis._replace(stride=1) for axis in axes))


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


def _pieces(axis: AxisNeighborhood, most: int) -> list[tuple[int, int, int]]:
    """(size, number, keys of one) of the ways to cut a group into even pieces of at most `most` queries."""
    n, found = _group(axis), {}
    for size in range(1, min(n, most) + 1):
        number = -(-n // size)
        found[number] = (-(-n // number), number, _span(axis, n, -(-n // number)))
    return list(found.values())


def _cheapest(axes: tuple[AxisNeighborhood, ...]) -> Tile:
    """The tile of at most QUERIES slots whose rows read the fewest pairs."""
    best: tuple[float, Tile] = (float("inf"), (1,) * len(axes))
    for choice in product(*(_pieces(axis, QUERIES) for axis in axes)):
        slots = prod(size for size, _, _ in choice)
        if slots > QUERIES:
            continue
        pairs = prod(number * span for _, number, span in choice) * (-(-slots // QUERIES) * QUERIES)
        best = min(best, (pairs, tuple(size for size, _, _ in choice)))
    return best[1]


def _cheapest_cpu(axes: tuple[AxisNeighborhood, ...]) -> Tile:
    """The tile of at most CPU_QUERIES queries that costs the fewest cycles besides the pairs themselves."""
    window = prod(_span(axis, _group(axis), 1) for axis in axes)
    queries = prod(_group(axis) for axis in axes)
    best: tuple[float, Tile] = (float("inf"), (1,) * len(axes))
    widest = [*[CPU_QUERIES] * (len(axes) - 1), CPU_QUERIES if len(axes) == 1 else CPU_WIDTH]
    for choice in product(*(_pieces(axis, most) for axis, most in zip(axes, widest, strict=True))):
        size, tiles = prod(c[0] for c in choice), prod(c[1] for c in choice)
        if size > CPU_QUERIES:
            continue
        packed = prod(number * span for _, number, span in choice)
        alone = choice[-1][0] % 4 / choice[-1][0]  # the kernel takes four neighbours together
        cycles = 12 * packed + 0.7 * alone * window * queries + 500 * tiles
        best = min(best, (cycles, tuple(c[0] for c in choice)))
    return best[1]
