"""Custom attention kernels for local, sparse and linear attention in PyTorch."""

from vicinal import nn, segments
from vicinal._backends import Explanation, explain
from vicinal._version import __version__
from vicinal.delta import delta_rule_attention, delta_rule_step
from vicinal.drop_in import accelerate, restore
from vicinal.edge import Graph, edge_attention
from vicinal.edge_lists import gather_attention, segment_softmax, topk_attention, vector_attention
from vicinal.hash import hash_attention
from vicinal.joint import joint_attention
from vicinal.linear import (
    FeatureMap,
    LinearState,
    ema_scan,
    favor_projection,
    lightning_decay,
    linear_attention,
    linear_attention_step,
    retnet_decay,
)
from vicinal.neighborhood import Neighborhood, neighborhood_attention, neighborhood_attention_qkvpacked
from vicinal.neighborhood_decode import RingKVCache, sliding_window_decode
from vicinal.neighborhood_slots import neighborhood_aggregate, neighborhood_scores
from vicinal.segments import SegmentGroups, Segments
from vicinal.voxel import ContextTable, KeyBias, RelTable, Rope3D, voxel_attention
from vicinal.windowed import (
    RelativeBias,
    Windows,
    transformer_xl,
    windowed_attention,
    windowed_attention_qkvpacked,
)

__all__ = [
    "ContextTable",
    "Explanation",
    "FeatureMap",
    "Graph",
    "KeyBias",
    "LinearState",
    "Neighborhood",
    "RelTable",
    "RelativeBias",
    "RingKVCache",
    "Rope3D",
    "SegmentGroups",
    "Segments",
    "Windows",
    "__version__",
    "accelerate",
    "delta_rule_attention",
    "delta_rule_step",
    "edge_attention",
    "ema_scan",
    "explain",
    "favor_projection",
    "gather_attention",
    "hash_attention",
    "joint_attention",
    "lightning_decay",
    "linear_attention",
    "linear_attention_step",
    "neighborhood_aggregate",
    "neighborhood_attention",
    "neighborhood_attention_qkvpacked",
    "neighborhood_scores",
    "nn",
    "restore",
    "retnet_decay",
    "segment_softmax",
    "segments",
    "sliding_window_decode",
    "topk_attention",
    "transformer_xl",
    "vector_attention",
    "voxel_attention",
    "windowed_attention",
    "windowed_attention_qkvpacked",
]
