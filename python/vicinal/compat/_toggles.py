"""Switches and questions of natten about its own kernels; here they change nothing and have one answer."""

from __future__ import annotations

from typing import Any

import torch


def no_op(*args: Any, **kwargs: Any) -> None:
    """Accepted for compatibility: vicinal chooses its kernels itself, see `vicinal.explain`."""


def yes(*args: Any, **kwargs: Any) -> bool:
    """True: vicinal always can, or always does."""
    return True


def no(*args: Any, **kwargs: Any) -> bool:
    """False: vicinal has no such mode."""
    return False


def has_cuda() -> bool:
    """Whether torch sees a GPU."""
    return torch.cuda.is_available()


def memory_usage_preference(*args: Any, **kwargs: Any) -> str:
    """ "default": there is no other."""
    return "default"
