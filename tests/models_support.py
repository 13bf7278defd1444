"""Shared by the tests of models: optional libraries, weights that hide nothing, comparisons of gradients."""

from __future__ import annotations

import copy
import importlib
from collections import Counter
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


def library(name: str) -> ModuleType:
    """Import an optional library, or skip with the reason that Python gives."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"{name} cannot be imported: {error}")


def redraw(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every parameter anew, so that none is zero and every branch shows in the outputs."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            if parameter.dim() <= 1:
                scale, shift = 0.2, float("norm" in name and name.endswith("weight"))
            elif name.endswith("logit_scale"):
                scale, shift = 0.5, 2.0
            elif name.endswith("relative_position_bias_table"):
                scale, shift = 1.0, 0.0
            else:
                scale, shift = 1.5 * parameter[0].numel() ** -0.5, 0.0
            parameter.copy_(noise * scale + shift)
    return model


def gradients(model: nn.Module, x: Tensor, seed: int = 1) -> dict[str, Tensor]:
    """Outputs, and the gradients of a random projection of them to the input and every parameter, by name."""
    model.zero_grad()
    x = x.detach().clone().requires_grad_()
    out = model(x)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(out)
    (out * weights).sum().backward()
    assert x.grad is not None
    results = {"output": out.detach(), "input.grad": x.grad}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        assert parameter.grad is not None, f"{name} got no gradient"
        results[f"{name}.grad"] = parameter.grad
    model.zero_grad()
    return results


def rms_ratio(actual: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference over that of what was expected."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).square().mean().sqrt() / expected.square().mean().sqrt())


def worst(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """The largest RMS ratio of two results of `gradients`, and whose it is."""
    assert actual.keys() == expected.keys()
    return max((rms_ratio(actual[name], expected[name]), name) for name in expected)


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], limit: float) -> None:
    """Every output and gradient agrees within `limit`, none of them being zero."""
    for name, value in expected.items():
        assert value.abs().max() > 0, f"{name} is zero: the comparison would be empty"
        assert torch.isfinite(value).all(), name
    error, name = worst(actual, expected)
    assert error <= limit, f"{name}: RMS ratio {error:.2e} > {limit:.0e}"


def assert_same_in_double_precision(
    actual: dict[str, Tensor], expected: dict[str, Tensor], limit: float = 1e-9
) -> None:
    """Every output and gradient of two float64 runs agrees within `limit` of its size.

    A gradient that is zero but for rounding (of a bias in front of a batch normalisation, of what a softmax
    does not see) has no digits to compare: it has to be as small in both."""
    assert actual.keys() == expected.keys()
    largest = max(float(value.abs().max()) for value in expected.values())
    compared = 0
    for name, value in expected.items():
        assert torch.isfinite(value).all(), name
        if value.abs().max() > 0.01 * limit * largest:
            assert rms_ratio(actual[name], value) <= limit, f"{name}: {rms_ratio(actual[name], value):.1e}"
            compared += 1
        else:
            assert actual[name].abs().max() <= 0.1 * limit * largest, name
    assert compared > 0.8 * len(expected), f"only {compared} of {len(expected)} are not zero"


def double(model: nn.Module) -> nn.Module:
    """A float64 copy."""
    return copy.deepcopy(model).double()


def loss_curve(
    model: nn.Module, x: Tensor, target: Tensor, steps: int, loss: Callable[..., Tensor]
) -> Tensor:
    """Losses [steps] of AdamW on one batch."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(steps):
        optimiser.zero_grad()
        value = loss(model(x), target)
        value.backward()
        optimiser.step()
        losses.append(value.detach())
    return torch.stack(losses)


class CountOps(TorchDispatchMode):
    """Count calls of vicinal's ops, by name and overload."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "vicinal":
            self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))
