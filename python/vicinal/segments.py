"""Segments: which rows attend to which, for `voxel_attention`, and their builders.

Every builder makes a canonical order by one stable sort of an injective key, cuts it at integer places, and
returns an immutable `Segments` on the device of its coordinates. Build once per (coordinates, window, shift,
order) and pass the result to every layer.
"""

from __future__ import annotations

from ._segments_curves import (
    Serialization,
    flatformer_groups,
    octree_groups,
    pool,
    serialize,
    trellis_serialized,
)
from ._segments_lists import (
    chunks,
    from_batch,
    from_cu_seqlens,
    from_knn,
    from_lengths,
    neighbour_table,
    ranges,
)
from ._segments_type import SegmentGroups, Segments, from_arrays
from ._segments_windows import Buckets, cells, condaformer_planes, dsvt_sets, sst_buckets, windows

__all__ = [
    "Buckets",
    "SegmentGroups",
    "Segments",
    "Serialization",
    "cells",
    "chunks",
    "condaformer_planes",
    "dsvt_sets",
    "flatformer_groups",
    "from_arrays",
    "from_batch",
    "from_cu_seqlens",
    "from_knn",
    "from_lengths",
    "neighbour_table",
    "octree_groups",
    "pool",
    "ranges",
    "serialize",
    "sst_buckets",
    "trellis_serialized",
    "windows",
]
