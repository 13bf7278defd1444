"""Set up for all tests: deterministic algorithms, seeds, and published models that import on CPU builds of
torch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from benchmarks import torchvision_operators


@pytest.fixture(autouse=True)
def reproducible() -> Iterator[None]:
    """Fixed seeds, and torch's deterministic mode, in which new memory, also that of our outputs, is NaN
    until written."""
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


torchvision_operators.declare()
