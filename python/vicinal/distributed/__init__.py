"""Attention of grids, sequences and rows that are split over the ranks of torch.distributed.

Functions with the names of the local ones: every rank passes its part and gets the output of its part, equal
to what one process would compute of the whole, and so are the gradients. Every rank of the group has to take
part in each call and in its backward.
"""

from ._dtensor import register_dtensor
from ._linear import linear_attention
from ._neighborhood import neighborhood_attention
from ._voxel import SegmentPartition, partition_segments, voxel_attention
from ._windowed import windowed_attention

__all__ = [
    "SegmentPartition",
    "linear_attention",
    "neighborhood_attention",
    "partition_segments",
    "register_dtensor",
    "voxel_attention",
    "windowed_attention",
]
