"""How many queries and keys the tiles of a neighborhood take, by rule, per backend."""

from __future__ import annotations

from functools import lru_cache
from itertools import product
from math import prod
from typing import NamedTuple

from ._neighborhood_plan import AxisNeighborhood


class Rule(NamedTuple):
    """What the tiles of a backend cost. `slots`: of a tile, at most. `unit`: consecutive slots that are
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
    "cpu": Rule(48, 16),
    "triton": Rule(64, 16, load=16, block=64),
    "cuda": Rule(64, 16, load=16, skips=True),
}
EXACT = 1024  # slots, at most, of a tile whose queries all read the same keys

Tile = tuple[int, ...]


@lru_cache(maxsize=1024)
def choose_tiles(backend: str, axes: tuple[AxisNeighborhood, ...]) -> tuple[Tile, Tile]:
    """(queries per axis of a row of the plan, keys per axis of a row of its key_plan)."""
    exact = tuple(_exact(axis) for axis in axes)
    if all(exact) and prod(exact) <= EXACT:
        return exact, exact
    rule = RULES.get(backend, RULES["cuda"])
    return _cheapest(axes, rule), _cheapest(tuple(axis._replace(stride=1) for axis in axes), rule)


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


def _cheapest(axes: tuple[AxisNeighborhood, ...], rule: Rule) -> Tile:
    """The tile whose rows cost the least together."""
    per_axis = []
    for axis in axes:
        n, found = _group(axis), {}
        for size in range(1, min(n, rule.slots) + 1):
            pieces = -(-n // size)
            found[pieces] = (-(-n // pieces), pieces)
        per_axis.append(list(found.values()))
    best: tuple[float, Tile] = (float("inf"), (1,) * len(axes))
    for choice in product(*per_axis):
        tile = tuple(size for size, _ in choice)
        if prod(tile) <= rule.slots:
            best = min(best, (prod(pieces for _, pieces in choice) * _cost(axes, tile, rule), tile))
    return best[1]


def _cost(axes: tuple[AxisNeighborhood, ...], tile: Tile, rule: Rule) -> int:
    """Of one row."""
    slots = -(-prod(tile) // rule.unit) * rule.unit
    others = computed = _box(axes, tile)
    if rule.block:
        computed = -(-others // rule.block) * rule.block
    if rule.skips:
        left, unit = rule.unit, []
        for size in reversed(tile):
            unit.append(min(size, left))
            left = -(-left // size)
        computed = _box(axes, tuple(reversed(unit)))
    return slots * computed + rule.load * others


def _box(axes: tuple[AxisNeighborhood, ...], tile: Tile) -> int:
    return prod(_span(axis, _group(axis), size) for axis, size in zip(axes, tile, strict=True))
