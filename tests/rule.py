"""The one rule that a result is judged by, and what it is made of. Nothing here knows a family or imports
pytest.

TRAINED are the names of the tensors that get a gradient, in every family.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

TRAINED = (
    *("q", "k", "v", "bias", "logit_scale", "edge_k", "edge_v", "extra_k", "extra_v", "extra_bias"),
    *("q_table", "k_table", "v_table", "angles", "rel_pos_0", "rel_pos_1", "rel_pos_2"),
    *("edge_mul", "edge_gate", "edge_bias"),
)
INF = float("inf")

Results = dict[str, Tensor]


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def upstream(
    rows: Sequence[int], dim_v: int, dtype: torch.dtype, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Gradients of out [*rows, dim_v] and lse [*rows]."""
    generator = torch.Generator().manual_seed(99)
    dout = torch.randn(*rows, dim_v, generator=generator, dtype=torch.float64)
    dlse = torch.randn(*rows, generator=generator, dtype=torch.float64)
    return dout.to(device, dtype), dlse.to(device, accumulator(dtype))


def differentiate(
    outputs: Sequence[Tensor], grads: Sequence[Tensor], tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """out, lse and the gradient of every trained tensor ("dq", "dk", ..) for these gradients of the
    outputs."""
    leaves = {name: t for name, t in tensors.items() if t.requires_grad}
    upstream = [g.to(x.dtype) for g, x in zip(grads, outputs)]
    found = torch.autograd.grad(outputs, list(leaves.values()), upstream, allow_unused=True)
    results = {f"d{n}": torch.zeros_like(t) if g is None else g for (n, t), g in zip(leaves.items(), found)}
    return {**{n: x.detach() for n, x in zip(("out", "lse"), outputs)}, **results}


def widened(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same numbers in float64, as leaves."""
    return {
        name: (t.detach().double() if t.is_floating_point() else t).requires_grad_(name in TRAINED)
        for name, t in tensors.items()
    }


def dense_errors(
    tensors: dict[str, Tensor],
    exact_results: Results,
    exact: Callable[[dict[str, Tensor]], Results],
    dense: Callable[[dict[str, Tensor], float, bool], Results],
) -> dict[str, float]:
    """Per output and gradient max|dense - x64|, with dense plain PyTorch, every step in the problem's own
    dtype.

    A rounding error is a draw, so this takes the largest of three: dense(tensors, c, backwards) passes the
    values through a factor c and back, the scores through c and 1 / c, and once runs the sums over the head
    dimension backwards. float64 has no wider type to be measured against: there it is the error in float32,
    scaled by the ratio of the two precisions, and half as much again, because the truth is a dense run of the
    same precision, whose own error comes on top of the two that the rule grants.
    """
    if tensors["q"].dtype == torch.float64:
        single = {name: t.detach().float() if t.is_floating_point() else t for name, t in tensors.items()}
        single = {name: t.requires_grad_(name in TRAINED) for name, t in single.items()}
        errors = dense_errors(single, exact(single), exact, dense)
        ratio = 1.5 * torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
        return {name: error * ratio for name, error in errors.items()}
    runs = [dense(tensors, c, backwards) for c, backwards in ((1.0, False), (3.0, True), (5.0, False))]
    return {name: max(error_of(other[name], x) for other in runs) for name, x in exact_results.items()}


def error_of(x: Tensor, truth: Tensor) -> float:
    """The largest difference where truth is finite; infinite where only x is not."""
    finite = truth.isfinite()
    difference = x.double()[finite] - truth.double()[finite]
    return largest(difference.nan_to_num(nan=INF, posinf=INF, neginf=INF))


def compare(
    got: dict[str, Tensor], exact_results: dict[str, Tensor], errors: dict[str, float], dtype: torch.dtype
) -> list[str]:
    """The rule: for every output and gradient,

        max|x - x64| <= 2 max|dense - x64| + 4 eps(dtype) max|x64| + tiny(dtype)

    with x64 = `exact` and max|dense - x64| from `dense_errors`; infinities must agree and nothing may be NaN.
    tiny is the smallest normal number: a kernel may flush what is below it, like exp(-100) in float32.
    Returns a line per violation.
    """
    wrong = []
    if set(got) != set(exact_results):
        wrong.append(f"results are {sorted(got)}; expected {sorted(exact_results)}")
    for name in set(got) & set(exact_results):
        x, truth = got[name].double(), exact_results[name].double()
        assert not truth.isnan().any(), f"the float64 {name} has NaN"
        if x.shape != truth.shape:
            wrong.append(f"{name} has shape {list(x.shape)}; expected {list(truth.shape)}")
            continue
        infinite = truth.isinf()
        if not torch.equal(x[infinite], truth[infinite]) or not x[~infinite].isfinite().all():
            wrong.append(f"{name} has NaN or other infinities than the float64 result")
            continue
        limits = torch.finfo(dtype)
        bound = 2 * errors[name] + 4 * limits.eps * largest(truth[~infinite]) + limits.tiny
        assert bound < INF, f"the dense {name} is NaN or infinite, so nothing could fail"
        if not error_of(x, truth) <= bound:
            wrong.append(f"{name}: error {error_of(x, truth):.3g} is above {bound:.3g}")
    return wrong


def largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0
