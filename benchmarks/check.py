"""No time without a right result: errors against float64, and the rule that decides whether a case may run.

The error of a tensor is its largest absolute deviation from float64 over the largest float64 value. An
implementation passes if, for the output and every gradient, its error is at most twice that of the eager
baseline in the same dtype plus 4 eps. A rounding error is a draw, so the baseline's is the largest of three,
as in the project's tests.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .windowed_problems import Inputs

Run = Callable[[tuple[Tensor, ...], "Tensor | None"], Tensor]
Tensors = dict[str, Tensor]


def outputs(run: Run, inputs: Inputs, backward: bool) -> Tensors:
    """The output and, with `backward`, the gradient of every input."""
    if not backward:
        with torch.no_grad():
            return {"out": run(inputs.tensors, inputs.table)}
    inputs.requires_grad_(True)
    out = run(inputs.tensors, inputs.table)
    grads = torch.autograd.grad(out, inputs.leaves, inputs.dout)
    inputs.requires_grad_(False)
    return {"out": out.detach()} | {f"d{n}": g for n, g in zip(inputs.names, grads, strict=True)}


def exact(reference: Run, inputs: Inputs, backward: bool) -> Tensors:
    """float64 results, one sample at a time so that memory stays small."""
    parts: list[Tensors] = []
    for sample in range(inputs.dout.shape[0]):
        parts.append(outputs(reference, inputs.converted(torch.float64, sample), backward))
    joined = {n: torch.cat([p[n] for p in parts]) for n in parts[0] if n != "dbias"}
    if "dbias" in parts[0]:
        joined["dbias"] = torch.stack([p["dbias"] for p in parts]).sum(0)
    return joined


def errors(found: Tensors, expected: Tensors) -> dict[str, float]:
    """Relative to the largest value; inf where a value is not finite."""
    result = {}
    for name, want in expected.items():
        got = found[name].to(want)
        error = float((got - want).abs().max() / want.abs().max().clamp_min(1e-300))
        result[name] = error if error == error else float("inf")
    return result


Errors = dict[str, float]  # by tensor


def worst(draws: list[Errors]) -> Errors:
    return {name: max(draw[name] for draw in draws) for name in draws[0]}


def complaint(ours: Errors, eager: Errors, dtype: torch.dtype, factor: float = 2.0) -> str:
    """What breaks the rule, or an empty text."""
    slack = 4 * torch.finfo(dtype).eps
    broken = [
        f"error of {name} is {ours[name]:.1e}, more than {factor:g} x {eager[name]:.1e} + {slack:.1e}"
        for name in eager
        if not ours[name] <= factor * eager[name] + slack
    ]
    return "; ".join(broken)
