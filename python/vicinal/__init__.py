"""Custom attention kernels for local, sparse and linear attention in PyTorch."""

from vicinal._version import __version__

__all__ = ["__version__"]
