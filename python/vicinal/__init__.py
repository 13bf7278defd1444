"""Custom attention kernels for local, sparse and linear attention in PyTorch."""

from vicinal import nn
from vicinal._backends import Explanation, explain
from vicinal._version import __version__
from vicinal.drop_in import accelerate, restore
from vicinal.hash import hash_attention
from vicinal.joint import joint_attention
from vicinal.windowed import RelativeBias, Windows, windowed_attention, windowed_attention_qkvpacked

__all__ = [
    "Explanation",
    "RelativeBias",
    "Windows",
    "__version__",
    "accelerate",
    "explain",
    "hash_attention",
    "joint_attention",
    "nn",
    "restore",
    "windowed_attention",
    "windowed_attention_qkvpacked",
]
