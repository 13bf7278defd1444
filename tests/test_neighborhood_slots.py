"""Scores in slot order and sums with given weights, against loops over pairs and the fused function."""

from __future__ import annotations

import itertools
import math
from typing import Any

import neighborhood_brute_force as brute
import pytest
import torch
import torch.nn.functional as F
from dispatch_modes import refused
from neighborhood_problems import BY_NAME, PROBLEMS, Problem
from neighborhood_solutions import make, options
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vicinal import Neighborhood, neighborhood_aggregate, neighborhood_attention, neighborhood_scores

N = Neighborhood
FIXED = [
    p
    for p in PROBLEMS
    if p.batch and all(a.kernel for a in brute.axes_of(p))
    if not p.padding and not p.dropout_p and not p.rel_pos and p.dim < 60
]


def loops(problem: Problem, tensors: dict[str, Tensor], weights: Tensor) -> tuple[Tensor, Tensor]:
    """Scores with scale 1 and sums with these weights, pair by pair in float64."""
    p, axes = problem, brute.axes_of(problem)
    found = brute.pairs(axes)
    slots = math.prod(a.kernel for a in axes)
    q, k, v = (tensors[n].detach().double().flatten(1, -3) for n in "qkv")
    bias = tensors["bias"].detach().double().flatten(1) if p.bias else None
    rows = (p.batch, len(found), p.heads)
    scores = torch.full((*rows, slots + p.extra), -math.inf, dtype=torch.float64)
    sums = torch.zeros(*rows, p.value_dim, dtype=torch.float64)
    flat = weights.detach().double().view(*rows, slots + p.extra)
    for h in range(p.heads):
        shared = h // (p.heads // p.key_heads)
        for i, keys in enumerate(found):
            for j, (entry, slot) in keys.items():
                added = 0.0 if bias is None else bias[h, entry]
                scores[:, i, h, slot] = (q[:, i, h] * k[:, j, shared]).sum(-1) + added
                sums[:, i, h] += flat[:, i, h, slot, None] * v[:, j, shared]
        for e in range(p.extra):
            extra_k, extra_v = (tensors[n].detach().double()[:, e, shared] for n in ("extra_k", "extra_v"))
            scores[:, :, h, slots + e] = (q[:, :, h] * extra_k[:, None]).sum(-1)
            sums[:, :, h] += flat[:, :, h, slots + e, None] * extra_v[:, None]
    space = (p.batch, *p.query_space, p.heads)
    return scores.view(*space, -1), sums.view(*space, -1)


def halves(problem: Problem, tensors: dict[str, Tensor], weights: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v, where = tensors["q"], tensors["k"], tensors["v"], problem.where
    given = options(problem, tensors)
    scores = neighborhood_scores(q, k, where, bias=given["bias"], extra_k=given["extra_k"])
    return scores, neighborhood_aggregate(weights, v, where, extra_v=given["extra_v"])


def weights_of(problem: Problem, dtype: torch.dtype = torch.float64) -> Tensor:
    slots = math.prod(a.kernel for a in brute.axes_of(problem)) + problem.extra
    shape = (problem.batch, *problem.query_space, problem.heads, slots)
    return torch.randn(shape, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("problem", FIXED, ids=str)
def test_loops_over_pairs(problem: Problem) -> None:
    tensors, weights = make(problem, torch.float64), weights_of(problem)
    for x, y in zip(halves(problem, tensors, weights), loops(problem, tensors, weights)):
        torch.testing.assert_close(x.detach(), y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("problem", FIXED, ids=str)
def test_the_halves_make_the_whole(problem: Problem) -> None:
    """scores + softmax + aggregate is the fused function, with all gradients."""
    tensors = make(problem, torch.float64)
    q, k, v, where, given = tensors["q"], tensors["k"], tensors["v"], problem.where, options(problem, tensors)
    scale = problem.dim**-0.5 if problem.scale is None else problem.scale
    scores = neighborhood_scores(q, k, where, bias=given["bias"], scale=scale, extra_k=given["extra_k"])
    out = neighborhood_aggregate(scores.softmax(-1), v, where, extra_v=given["extra_v"])
    fused = neighborhood_attention(q, k, v, where, **given, backend="reference")
    assert isinstance(fused, Tensor)
    torch.testing.assert_close(out, fused)
    leaves, grad = [t for t in tensors.values() if t.requires_grad], torch.randn_like(out)
    for x, y in zip(*[torch.autograd.grad(o, leaves, grad) for o in (out, fused)]):
        torch.testing.assert_close(x, y)


DIFFERENTIATED = ["1d-stride-dilated", "1d-causal-stride", "2d-dilated", "3d", "truncate-pair-2d"]
DIFFERENTIATED += ["more-keys-stride", "extra-grouped", "truncate-dilation-above-axis"]


@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_gradients_of_all_orders(name: str) -> None:
    problem = Problem(**{**BY_NAME[name].__dict__, "dim": 2, "dim_v": 3, "batch": 1})
    tensors, weights = make(problem, torch.float64), weights_of(problem)
    names = [n for n, t in tensors.items() if t.requires_grad]

    def function(weights: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        scores, sums = halves(problem, {**tensors, **dict(zip(names, values))}, weights)
        return scores.masked_fill(scores.isinf(), 0.0), sums

    inputs = (weights, *[tensors[n] for n in names])
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def test_holes_take_nothing_and_get_nothing() -> None:
    where = N(5, border="truncate")
    weights = torch.randn(1, 6, 1, 5, requires_grad=True)
    v = torch.randn(1, 6, 1, 3, requires_grad=True)
    holes = torch.isinf(neighborhood_scores(v.detach(), v.detach(), where))
    assert holes.sum(-1).flatten().tolist() == [2, 1, 0, 0, 1, 2]
    poisoned = weights.detach().masked_fill(holes, float("nan")).requires_grad_()
    expected, out = (neighborhood_aggregate(w, v, where) for w in (weights, poisoned))
    assert torch.equal(out, expected)
    dw, dv = torch.autograd.grad(out.square().sum(), (poisoned, v))
    assert not dw[holes].any()
    assert bool(dw.isfinite().all())
    assert bool(dv.isfinite().all())


def test_truncated_sums_are_dynamic_convolutions_with_zero_padding() -> None:
    batch, height, width, groups, dim = 2, 9, 7, 8, 6
    weights = torch.randn(batch, height, width, groups, 49, requires_grad=True)
    v = torch.randn(batch, height, width, groups, dim, requires_grad=True)
    image = v.flatten(-2).permute(0, 3, 1, 2)
    columns = F.unfold(image, 7, padding=3).view(batch, groups, dim, 49, height, width)
    expected = torch.einsum("bgdshw,bhwgs->bhwgd", columns, weights)
    out = neighborhood_aggregate(weights, v, 7, border="truncate")
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    for x, y in zip(*[torch.autograd.grad(o, (weights, v), grad) for o in (out, expected)]):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sums_are_of_full_precision(dtype: torch.dtype) -> None:
    problem = BY_NAME["extra-grouped"]
    tensors, weights = make(problem, dtype), weights_of(problem, dtype)
    for x, y in zip(halves(problem, tensors, weights), loops(problem, tensors, weights)):
        assert x.dtype == dtype
        size = float(y[y.isfinite()].abs().max())
        assert float((x.detach().double() - y).nan_to_num().abs().max()) <= 3 * torch.finfo(dtype).eps * size


class LargestTensor(TorchDispatchMode):
    """The most elements that any result had."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.numel())
        return result


def test_no_copy_of_the_values_for_every_slot() -> None:
    v = torch.randn(1, 16, 16, 2, 32, requires_grad=True)
    weights = torch.randn(1, 16, 16, 2, 49, requires_grad=True)
    with LargestTensor() as mode:
        out = neighborhood_aggregate(weights, v, 7)
        neighborhood_scores(v, v, 7).sum().backward()
        out.sum().backward()
    assert mode.elements <= max(weights.numel(), v.numel())


def test_compile_and_vmap() -> None:
    q, k, v = (torch.randn(3, 6, 5, 2, 4) for _ in range(3))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = neighborhood_scores(q, k, 3, dilation=(2, 1)).softmax(-1)
        return neighborhood_aggregate(weights, v, 3, dilation=(2, 1))

    expected = attend(q, k, v)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), expected)
    mapped = torch.vmap(lambda *x: attend(*[t[None] for t in x])[0])(q, k, v)
    torch.testing.assert_close(mapped, expected)


def rand(*shape: int) -> Tensor:
    return torch.rand(*shape)


SCORES: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (TypeError, "q is a list|tensor", {"q": [1]}),
    (ValueError, "k is torch.float64|torch.float32", {"k": rand(1, 6, 7, 2, 4).double()}),
    (ValueError, "k has the grid [6, 8]|q has [6, 7]", {"k": rand(1, 6, 8, 2, 4)}),
    (ValueError, "k has shape [1, 6, 7, 2, 3]|[1, 6, 7, 2, 4]", {"k": rand(1, 6, 7, 2, 3)}),
    (ValueError, "q has 2 heads|a multiple of the 4", {"k": rand(1, 6, 7, 4, 4)}),
    (ValueError, "7 * 1 = 7 on axis 0", {"kernel_size": 7}),
    (ValueError, "stride is 4 on axis 0", {"stride": 4}),
    (
        ValueError,
        "neighborhood_scores needs a window of a fixed size|(-1, 0) on axis 1",
        {"kernel_size": (3, (-1, 0)), "border": "truncate"},
    ),
    (ValueError, "bias has shape [2, 3, 3]|[2, 5, 5]", {"bias": rand(2, 3, 3)}),
    (ValueError, "scale is nan", {"scale": float("nan")}),
    (ValueError, "extra_k has shape [1, 1, 3, 4]|[1, 1, 2, 4]", {"extra_k": rand(1, 1, 3, 4)}),
    (ValueError, "backend is 'cpu'|'reference'", {"backend": "cpu"}),
]


@pytest.mark.parametrize(
    ("error", "words", "changes"), SCORES, ids=lambda x: x if isinstance(x, str) else None
)
def test_refused_scores(error: type[Exception], words: str, changes: dict[str, Any]) -> None:
    given: dict[str, Any] = {"q": rand(1, 6, 7, 2, 4), "k": rand(1, 6, 7, 2, 4), "kernel_size": 3}
    refused(error, words, neighborhood_scores, **{**given, **changes})


AGGREGATES: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (TypeError, "weights is a int|tensor", {"weights": 1}),
    (ValueError, "v is torch.float64|torch.float32", {"v": rand(1, 6, 7, 2, 4).double()}),
    (ValueError, "weights has shape [1, 6, 7, 2, 8]|[1, 6, 7, 2, 9]", {"weights": rand(1, 6, 7, 2, 8)}),
    (ValueError, "weights has shape|[1, 6, 7, 2, 11]", {"extra_v": rand(1, 2, 2, 4)}),
    (ValueError, "weights has 2 heads|a multiple of the 3", {"v": rand(1, 6, 7, 3, 4)}),
    (ValueError, "v has the grid [6, 6]|weights has [6, 7]", {"v": rand(1, 6, 6, 2, 4)}),
    (ValueError, "extra_v has shape [1, 1, 2, 3]", {"extra_v": rand(1, 1, 2, 3)}),
]


@pytest.mark.parametrize(
    ("error", "words", "changes"), AGGREGATES, ids=lambda x: x if isinstance(x, str) else None
)
def test_refused_sums(error: type[Exception], words: str, changes: dict[str, Any]) -> None:
    given: dict[str, Any] = {"weights": rand(1, 6, 7, 2, 9), "v": rand(1, 6, 7, 2, 4), "kernel_size": 3}
    refused(error, words, neighborhood_aggregate, **{**given, **changes})


def test_every_slot_of_every_small_axis() -> None:
    """Slots count from the start of the window, or from where it would have started."""
    for length, d, causal, border in itertools.product(
        range(1, 8), (1, 2), (False, True), ("shift", "truncate")
    ):
        for k in range(1, length // d + 1 if border == "shift" else length + 2):
            for s in range(1, k + 1):
                problem = Problem("axis", (length,), N(k, d, s, causal, border))
                one = torch.ones(1, length, 1, 1)
                place = torch.arange(1.0, length + 1).view(1, length, 1, 1)
                got = neighborhood_scores(one, place, problem.where)[0, :, 0]
                expected = torch.full_like(got, -torch.inf)
                for i, keys in enumerate(brute.pairs(brute.axes_of(problem))):
                    for j, (_, slot) in keys.items():
                        expected[i, slot] = j + 1
                assert torch.equal(got, expected), problem.where
