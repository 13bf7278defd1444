"""Let torchvision import beside a CPU build of torch; timm imports it. For benchmarks and tests."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path

import torch


@cache
def declare() -> torch.library.Library | None:
    """Declare the operators whose meta functions torchvision registers, where its own library cannot load.

    That is the CUDA wheel, the one that package indexes carry, beside a CPU build of torch: the import fails
    at the first of these operators. No attention model calls them. Definitions last as long as their
    library, which the cache keeps.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or torch.version.cuda is not None:
        return None
    if "+cu" not in (Path(spec.origin).parent / "version.py").read_text():
        return None
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library
