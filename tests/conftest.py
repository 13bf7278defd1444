"""Set up for all tests: deterministic algorithms, seeds, and published models that import on CPU builds of
torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def reproducible() -> Iterator[None]:
    """Fixed seeds, and torch's deterministic mode, in which new memory, also that of our outputs, is NaN
    until written."""
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


def declare_torchvision_operators() -> torch.library.Library | None:
    """Let torchvision's CUDA wheel, the one that package indexes carry, import beside a CPU build of torch.

    Its operator library cannot load there, and the import fails at the first operator whose meta function it
    registers. Declaring the two that it registers is enough; no attention model calls them.
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


TORCHVISION = declare_torchvision_operators()
