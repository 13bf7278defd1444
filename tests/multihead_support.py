"""Calls of multi-head attention for the tests, and torch's own slow path to compare with."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from models_support import redraw
from torch import Tensor, nn

from vicinal.nn import MultiheadAttention

Results = dict[str, Tensor]


@contextmanager
def slow_path() -> Iterator[None]:
    """torch's modules without their fused inference path, which has other rules."""
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def pair(*args: Any, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, Any]:
    """Ours and torch's module with the same parameters, none of them zero."""
    ours = redraw(MultiheadAttention(*args, **options)).to(dtype)
    own = ("weights", "backend")
    theirs = nn.MultiheadAttention(*args, **{k: v for k, v in options.items() if k not in own}).to(dtype)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


def outputs_and_gradients(
    module: nn.Module, inputs: tuple[Tensor, ...], options: dict[str, Any], seed: int = 1
) -> Results:
    """Output, weights, and the gradients of random projections of both, by name. Tensors that are one stay
    one."""
    module.zero_grad()
    leaves = {id(x): x.detach().clone().requires_grad_() for x in inputs}
    given = [leaves[id(x)] for x in inputs]
    out, weights = module(*given, **options)
    generator = torch.Generator().manual_seed(seed)
    loss = (out * torch.randn(out.shape, generator=generator).to(out)).sum()
    results = {"output": out.detach()}
    if weights is not None:
        loss = loss + (weights * torch.randn(weights.shape, generator=generator).to(weights)).sum()
        results["weights"] = weights.detach()
    loss.backward()
    for name, x in zip(("query", "key", "value"), given):
        results[f"{name}.grad"] = torch.zeros_like(x) if x.grad is None else x.grad
    for name, parameter in module.named_parameters():
        found = parameter.grad
        results[f"{name}.grad"] = torch.zeros_like(parameter) if found is None else found.clone()
    module.zero_grad()
    mask = options.get("attn_mask")
    if mask is not None and mask.requires_grad:
        results["attn_mask.grad"] = mask.grad.clone()
        mask.grad = None
    return results


def differences(actual: Results, expected: Results, limit: float) -> list[str]:
    """A line for each result that differs by more than `limit` of the largest entry."""
    wrong = [] if actual.keys() == expected.keys() else [f"{sorted(actual)} are not {sorted(expected)}"]
    for name in actual.keys() & expected.keys():
        a, b = actual[name].double(), expected[name].double()
        if a.shape != b.shape:
            wrong.append(f"{name} has shape {list(a.shape)}, not {list(b.shape)}")
        elif a.numel() and not (a - b).abs().max() <= limit * max(1.0, float(b.abs().max())):
            wrong.append(f"{name} differs by {float((a - b).abs().max()):.2e}")
    return wrong


def tokens(n: int, length: int, width: int, batch_first: bool, dtype: torch.dtype = torch.float64) -> Tensor:
    shape = (n, length, width) if batch_first else (length, n, width)
    return torch.randn(shape, dtype=dtype)


def padding(n: int, length: int, seed: int = 3) -> Tensor:
    """bool [N, S]: some keys ignored, in the middle too, none of the samples wholly."""
    hidden = torch.rand(n, length, generator=torch.Generator().manual_seed(seed)) < 0.4
    hidden[:, 0] = False
    return hidden


def twin(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module)
