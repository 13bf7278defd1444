"""How many queries and keys the tiles of a neighborhood take, by rule, per backend."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import product
from math import prod
from typing import NamedTuple

from ._neighborhood_plan import AxisNeighborhood


class Rule(NamedTuple):
    """What the tiles of a GPU's backend cost. `slots`: of a tile, at most. `unit`: consecutive slots that are
    computed together; a tile costs as if its slots were a multiple of it. `load`: cost of bringing one slot
    of the other side to a tile, in pairs. `block`: slots of the other side count in multiples of this, 0: no
    rounding. `skips`: a unit passes over what none of its own slots sees."""

    slots: int
    unit: int
    load: int = 0
    block: int = 0
    skips: bool = False


# On a GPU, per multiprocessor and cycle, the cache brings about 30 bytes (at head dim 32, a quarter of a key
# and its value), and pairs cost mostly their exponential and its surroundings: 16 queries of a key about as
# much as the key's way to them. An estimate, not a measurement.
RULES = {
    "triton": Rule(64, 16, load=16, block=64),
    "cuda": Rule(64, 16, load=16, skips=True),
}
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
    keys = tuple(axis._replace(stride=1) for axis in axes)
    if backend == "cpu":
        return _cheapest_on_cpu(axes), _cheapest_on_cpu(keys)
    rule = RULES.get(backend, RULES["cuda"])
    return _cheapest_on_gpu(axes, rule), _cheapest_on_gpu(keys, rule)


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


def _cheapest(axes: tuple[AxisNeighborhood, ...], most: int, cost: Callable[[Tile, int, int], float]) -> Tile:
    """The tile of at most `most` slots with the least cost(tile, tiles of the grid, keys that they read
    together)."""
    per_axis = []
    for axis in axes:
        n, found = _group(axis), {}
        for size in range(1, min(n, most) + 1):
            pieces = -(-n // size)
            found[pieces] = (-(-n // pieces), pieces)
        per_axis.append(list(found.values()))
    best: tuple[float, Tile] = (float("inf"), (1,) * len(axes))
    for choice in product(*per_axis):
        tile, tiles = tuple(size for size, _ in choice), prod(pieces for _, pieces in choice)
        if prod(tile) <= most:
            best = min(best, (cost(tile, tiles, tiles * _box(axes, tile)), tile))
    return best[1]


def _cheapest_on_gpu(axes: tuple[AxisNeighborhood, ...], rule: Rule) -> Tile:
    def cost(tile: Tile, tiles: int, read: int) -> int:
        slots = -(-prod(tile) // rule.unit) * rule.unit
        computed = read // tiles
        if rule.block:
            computed = -(-computed // rule.block) * rule.block
        if rule.skips:
            left, unit = rule.unit, []
            for size in reversed(tile):
                unit.append(min(size, left))
                left = -(-left // size)
            computed = _box(axes, tuple(reversed(unit)))
        return tiles * slots * computed + rule.load * read

    return _cheapest(axes, rule.slots, cost)


def _cheapest_on_cpu(axes: tuple[AxisNeighborhood, ...]) -> Tile:
    """By the cycles that it costs besides the pairs themselves."""
    pairs = prod(_group(axis) * _span(axis, _group(axis), 1) for axis in axes)

    def cost(tile: Tile, tiles: int, read: int) -> float:
        if len(tile) > 1 and tile[-1] > CPU_WIDTH:
            return float("inf")
        alone = tile[-1] % 4 / tile[-1]  # the kernel takes four neighbours together
        return 12 * read + 0.7 * alone * pairs + 500 * tiles

    return _cheapest(axes, CPU_QUERIES, cost)


def _box(axes: tuple[AxisNeighborhood, ...], tile: Tile) -> int:
    """Keys that a tile reads."""
    return prod(_span(axis, _group(axis), size) for axis, size in zip(axes, tile, strict=True))
