"""Custom attention kernels for local, sparse and linear attention in PyTorch."""

from vicinal import nn
from vicinal._backends import Explanation, explain
from vicinal._version import __version__
from vicinal.drop_in import accelerate, restore
from vicinal.neighborhood import Neighborhood, neighborhood_attention, neighborhood_attention_qkvpacked
from vicinal.windowed import RelativeBias, Windows, windowed_attention, windowed_attention_qkvpacked

__all__ = [
    "Explanation",
    "Neighborhood",
    "RelativeBias",
    "Windows",
    "__version__",
    "accelerate",
    "explain",
    "neighborhood_attention",
    "neighborhood_attention_qkvpacked",
    "nn",
    "restore",
    "windowed_attention",
    "windowed_attention_qkvpacked",
]
