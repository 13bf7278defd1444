"""Custom attention kernels for local, sparse and linear attention in PyTorch."""

from vicinal import nn
from vicinal._backends import Explanation, explain
from vicinal._version import __version__
from vicinal.drop_in import accelerate, restore
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
from vicinal.windowed import RelativeBias, Windows, windowed_attention, windowed_attention_qkvpacked

__all__ = [
    "Explanation",
    "FeatureMap",
    "LinearState",
    "Neighborhood",
    "RelativeBias",
    "Windows",
    "__version__",
    "accelerate",
    "ema_scan",
    "explain",
    "favor_projection",
    "hash_attention",
    "joint_attention",
    "lightning_decay",
    "linear_attention",
    "linear_attention_step",
    "neighborhood_attention",
    "neighborhood_attention_qkvpacked",
    "nn",
    "restore",
    "retnet_decay",
    "windowed_attention",
    "windowed_attention_qkvpacked",
]
