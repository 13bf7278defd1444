"""Named problems of segment attention: every kind of segments, every term, every head dimension."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from benchmarks.scenes import adversarial, batch, scene
from vicinal import SegmentGroups, Segments, segments

Made = Segments | SegmentGroups


@dataclass(frozen=True)
class Problem:
    """make: the segments. terms: any of "rel", "context", "apart" (cells of context for each head group),
    "key", "key-heads", "key-fixed" (no gradient, some -inf), "rope". layout: "contiguous", "packed" (views of
    one tensor), "crop" (views into NaN)."""

    name: str
    make: Callable[[], Made]
    heads: int = 2
    dim: int = 8
    dim_v: int = 0
    scale: float | None = None
    terms: tuple[str, ...] = ()
    layout: str = "contiguous"

    @property
    def value_dim(self) -> int:
        return self.dim_v or self.dim

    def runs_on(self, backend: str) -> bool:
        """Whether the kernels of a backend have its terms."""
        if backend == "cpu":
            return not {"rel", "context"} <= set(self.terms)
        return "rel" not in self.terms

    @property
    def segments(self) -> Made:
        return built(self.name)

    @property
    def rows(self) -> tuple[int, int]:
        s = self.segments
        first = s.groups[0][0] if isinstance(s, SegmentGroups) else s
        return first.n_q, first.n_k

    def __str__(self) -> str:
        return self.name


@lru_cache
def built(name: str) -> Made:
    return BY_NAME[name].make()


@lru_cache
def voxels(name: str, most: int = 150) -> tuple[Tensor, tuple[int, ...], int]:
    """Two samples of a scene, or an adversarial case."""
    if name in ("waymo_pillar", "shell_64"):
        samples = [scene(name, seed) for seed in (0, 1)]
        coords, grid = (
            batch([c[:n] for (c, _), n in zip(samples, (most, most // 3))], shuffle=0),
            samples[0][1],
        )
        return torch.from_numpy(coords), tuple(grid), 2
    coords, size, grid = adversarial(name)
    return torch.from_numpy(coords), tuple(grid), size


def windows(name: str, window: Any = (12, 12, 1), shift: Any = (6, 6, 0)) -> Callable[[], Made]:
    return lambda: segments.windows(*voxels(name), window, shift)


def sets(name: str, orientation: int = 0, size: int = 9) -> Callable[[], Made]:
    return lambda: segments.dsvt_sets(*voxels(name), (24, 24, 8), (6, 6, 0), size)[orientation]


def flat(name: str, size: int) -> Callable[[], Made]:
    return lambda: segments.flatformer_groups(*voxels(name), (9, 9), size)


def curve(name: str, kind: str = "z") -> segments.Serialization:
    return segments.serialize(*voxels(name), kind)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def free_ranges() -> Made:
    """Ranges that step back, overlap, repeat, are empty; keys that nobody reads."""
    begin, end = (20, 3, 0, 10, 10, 8), (28, 17, 5, 10, 11, 9)
    return segments.ranges(ints(4, 0, 3, 2, 17, 1), ints(*begin), ints(*end), n_k=30)


def shuffled_arrays() -> Made:
    """Queries and keys in lists of their own, rows in no segment, a repeated key row, an empty segment."""
    q = ints(7, 2, 9, 0, 5, 1, 3)
    k = ints(4, 4, 11, 0, 8, 2, 11, 6)
    return segments.from_arrays(q, ints(0, 3, 3, 7), k, ints(0, 2, 3), ints(4, 3, 8), n_q=10, n_k=12)


def neighbours() -> Made:
    generator = torch.Generator().manual_seed(3)
    listed = torch.randint(0, 17, (25, 6), generator=generator)
    there = torch.rand(25, 6, generator=generator) < 0.7
    there[4] = False
    return segments.from_knn(listed, there, 17)


def groups() -> Made:
    coords = voxels("shell_64")
    made = [segments.windows(*coords, w) for w in ((8, 8, 1), (8, 1, 8), (1, 8, 8))]
    return SegmentGroups([(s, n) for s, n in zip(made, (1, 2, 1))])


def mixed_groups() -> Made:
    """One group owns its keys, one overlaps, one repeats keys."""
    order = curve("shell_64")
    rows = len(order.order)
    made = (order.patches(16), segments.trellis_serialized(order, 20, 7), segments.chunks(rows, 32))
    return SegmentGroups([(s, 1) for s in made])


SEGMENTS = (
    Problem("windows", windows("waymo_pillar")),
    Problem("windows-cubes", windows("shell_64", (8, 8, 8), (4, 4, 4)), dim=16),
    Problem("windows-one-voxel", windows("one_voxel")),
    Problem("windows-empty", windows("empty")),
    Problem("windows-one", windows("one_window"), dim=24),
    Problem("windows-corners", windows("corner_windows")),
    Problem("sets-y", sets("waymo_pillar", 0)),
    Problem("sets-x", sets("waymo_pillar", 1, 36), heads=8, dim=24),
    Problem("groups", flat("waymo_pillar", 16)),
    Problem("groups-69", flat("waymo_pillar", 69), heads=3, dim=16),
    Problem("groups-tiny-sample", lambda: segments.flatformer_groups(*voxels("tiny_sample"), (9, 9), 40)),
    Problem("patches", lambda: curve("shell_64", "hilbert").patches(33)),
    Problem("patches-above-samples", lambda: curve("shell_64", "z-trans").patches(1024)),
    Problem("trellis", lambda: segments.trellis_serialized(curve("shell_64"), 24, 5)),
    Problem("trellis-narrow", lambda: segments.trellis_serialized(curve("shell_64"), 3, 1)),
    Problem("octree", lambda: segments.octree_groups(curve("shell_64"), 8, 3)),
    Problem("cells", lambda: segments.cells(torch.randint(0, 2, (40, 4)) % 2, (2, 2, 2), 2, empty=True)),
    Problem("lengths", lambda: segments.from_lengths(ints(0, 5, 1, 0, 70, 3))),
    Problem("one-segment", lambda: segments.from_lengths(ints(150))),
    Problem("ones", lambda: segments.from_lengths(torch.ones(9, dtype=torch.int64))),
    Problem("batch", lambda: segments.from_batch(ints(1, 0, 1, 1, 3, 0, 3, 3), 5)),
    Problem("chunks", lambda: segments.chunks(50, 16)),
    Problem("chunks-back", lambda: segments.chunks(70, 16, 2, torch.randperm(70))),
    Problem("ranges", lambda: segments.ranges(ints(6, 20), ints(0, 0), ints(6, 26))),
    Problem("ranges-free", free_ranges),
    Problem("arrays", shuffled_arrays),
    Problem("neighbours", neighbours),
    Problem("head-groups", groups, heads=4),
    Problem("head-groups-mixed", mixed_groups, heads=3),
    Problem("no-segments", lambda: segments.from_arrays(ints(), ints(0), n_q=3, n_k=2)),
)

TERMS = (
    Problem("key-fixed", windows("waymo_pillar"), terms=("key-fixed",)),
    Problem("key", windows("waymo_pillar"), terms=("key",)),
    Problem("key-heads", flat("waymo_pillar", 16), terms=("key-heads",)),
    Problem("key-fixed-overlap", flat("waymo_pillar", 16), terms=("key-fixed",)),
    Problem("key-fixed-groups", mixed_groups, heads=3, terms=("key-fixed",)),
    Problem("key-negative-scale", flat("waymo_pillar", 16), terms=("key-heads",), scale=-0.3),
    Problem("rope", lambda: curve("shell_64").patches(20), dim=18, terms=("rope",)),
    Problem("rope-key", lambda: curve("shell_64").patches(20), dim=12, terms=("rope", "key")),
    Problem("rel", lambda: curve("shell_64").patches(20), terms=("rel",)),
    Problem("rel-long", lambda: segments.from_lengths(ints(79, 71)), dim=16, terms=("rel",)),
    Problem("rel-overlap", lambda: segments.chunks(90, 16, 2, torch.randperm(90)), heads=3, terms=("rel",)),
    Problem("rel-mixed", mixed_groups, heads=3, dim=13, terms=("rel", "key-fixed"), layout="crop"),
    Problem("rel-groups", groups, heads=4, terms=("rel", "key-heads")),
    Problem("context", windows("shell_64", (6, 6, 6), (3, 3, 3)), terms=("context",), dim_v=5),
    Problem("context-groups", groups, heads=4, terms=("context",)),
    Problem("context-apart", groups, heads=4, dim=16, terms=("context", "apart", "key-heads")),
    Problem("context-overlap", lambda: curve("shell_64").patches(20), dim=18, dim_v=33, terms=("context",)),
    Problem("context-mixed", mixed_groups, heads=3, terms=("context", "apart", "key-fixed"), layout="crop"),
    Problem("context-scale-0", windows("shell_64", (8, 8, 8)), dim=16, terms=("context",), scale=0.0),
    Problem("context-rel", windows("shell_64", (8, 8, 8)), terms=("context", "rel", "key")),
    Problem("rel-small", lambda: segments.from_lengths(ints(5, 1, 6)), dim=3, terms=("rel",)),
    Problem("context-small", lambda: segments.from_lengths(ints(5, 1, 6)), dim=3, terms=("context",)),
    Problem("rope-small", lambda: segments.chunks(12, 5, 1), dim=6, terms=("rope", "key-heads")),
    Problem("scale-0", windows("waymo_pillar"), scale=0.0),
    Problem("packed", flat("waymo_pillar", 16), layout="packed"),
    Problem("crop", sets("waymo_pillar", 0), layout="crop", dim_v=5),
)

HEAD_DIMS = tuple(
    Problem(f"dim-{d}-{e}", flat("waymo_pillar", 20), heads=1, dim=d, dim_v=e)
    for d, e in (
        *((1, 1), (4, 4), (8, 3), (10, 10), (12, 12), (13, 13), (16, 16), (18, 18), (24, 24), (32, 32)),
        *((42, 42), (48, 48), (64, 64), (96, 96), (128, 128), (16, 128), (128, 7)),
    )
)

PROBLEMS = (*SEGMENTS, *TERMS, *HEAD_DIMS)
BY_NAME = {p.name: p for p in PROBLEMS}
assert len(BY_NAME) == len(PROBLEMS), "two problems share a name"
