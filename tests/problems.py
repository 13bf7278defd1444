"""Named windowed problems, shared by the tests and the benchmarks.

A problem is everything but the numbers: `make` draws the tensors, `run` calls `windowed_attention`, `solve`
also differentiates, `exact` is the float64 solution, `dense_errors` those of plain PyTorch in the problem's
own dtype, and `compare` is the rule of rule.py. Nothing here imports pytest.
"""

from __future__ import annotations

from math import prod
from typing import Any

import rule
import torch
from rule import INF, TRAINED, accumulator, compare, differentiate, widened
from torch import Tensor
from windowed_problems import BY_NAME, PROBLEMS, Problem

from vicinal import RelativeBias, windowed_attention, windowed_attention_qkvpacked
from vicinal._windowed_run import geometry_of, prepare, run_reference

__all__ = [
    "BY_NAME",
    "PROBLEMS",
    "TRAINED",
    "Problem",
    "accumulator",
    "arguments",
    "compare",
    "counts",
    "dense_errors",
    "differentiate",
    "exact",
    "make",
    "run",
    "solve",
    "upstream",
    "violations",
    "widened",
]


def counts(problem: Problem) -> tuple[int, int, int]:
    """Windows, query slots, key slots (of the first head group)."""
    geometry = geometry_of(problem.windows, len(problem.space))
    axes = geometry.axes(geometry.groups[0], problem.query_space, problem.space)
    slots_q, slots_k = prod(a.q_window for a in axes), prod(a.kv or a.window for a in axes)
    return prod(a.n_windows for a in axes), slots_q, slots_k


def make(
    problem: Problem, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
) -> dict[str, Tensor]:
    """The tensors of a problem by argument name, those of TRAINED as leaves that require a gradient."""
    generator = torch.Generator().manual_seed(seed)
    p, acc = problem, accumulator(dtype)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tensors = dict(zip("qkv", _query_key_value(p, dtype, device, generator), strict=True))
    if p.bias:
        low = dtype if p.low_bias else acc
        tensors["bias"] = normal(*_bias_shape(p)).to(low)
    for a, shape in enumerate(rel_pos_shapes(p)):
        tensors[f"rel_pos_{a}"] = (normal(*shape) * 0.5).to(acc)
    if p.cosine:  # around Swin V2's log 10; one head is above the bound log 100
        tensors["logit_scale"] = (1.5 + 0.5 * normal(p.heads)).index_fill(0, torch.tensor(0), 5.0).to(acc)
    small = {
        "edge_k": (p.edge_k, (p.heads, p.dim)),
        "edge_v": (p.edge_v, (p.heads, p.value_dim)),
        "extra_k": (p.extra, (p.batch, p.extra, p.heads, p.dim)),
        "extra_v": (p.extra, (p.batch, p.extra, p.heads, p.value_dim)),
        "extra_bias": (p.extra_bias, (p.heads, p.extra)),
    }
    for name, (wanted, shape) in small.items():
        if wanted:
            tensors[name] = normal(*shape).to(acc if name == "extra_bias" else dtype)
    if p.padding:
        tensors["key_padding_mask"] = _padding(p, generator)
        if p.padding == "float":
            tensors["key_padding_mask"] = tensors["key_padding_mask"].to(acc)
    if p.mask:
        tensors["attn_mask"] = _mask(p, generator).to(acc)
    made = {name: t.to(device) for name, t in tensors.items()}
    return {name: t.requires_grad_(name in TRAINED) for name, t in made.items()}


def _query_key_value(p: Problem, dtype: torch.dtype, device: str, generator: torch.Generator) -> list[Tensor]:
    shapes = (
        (p.batch, *p.query_space, p.heads, p.dim),
        (p.batch, *p.space, p.heads, p.dim),
        (p.batch, *p.space, p.heads, p.value_dim),
    )
    drawn = [torch.randn(s, generator=generator, dtype=torch.float64).to(device, dtype) for s in shapes]
    if p.layout in ("packed", "qkvpacked"):
        return [x.detach() for x in torch.stack(drawn, -3).unbind(-3)]
    if p.layout == "transposed":
        return [x.movedim(-2, 1).contiguous().movedim(1, -2) for x in drawn]
    if p.layout == "crop":
        return [_cropped(x) for x in drawn]
    return drawn


def _cropped(x: Tensor) -> Tensor:
    """A view, in a larger buffer of NaN, that holds x."""
    *outer, heads, dim = x.shape
    buffer = x.new_full((outer[0] + 1, *outer[1:], heads + 1, dim + 3), float("nan"))
    view = buffer[1:, ..., :heads, 2 : 2 + dim]
    return view.copy_(x).detach()


def _bias_shape(p: Problem) -> tuple[int, ...]:
    _, n, m = counts(p)
    geometry = geometry_of(p.windows, len(p.space))
    axes = geometry.axes(geometry.groups[0], p.query_space, p.space)
    q_window = p.bias_window or tuple(a.q_window for a in axes)
    k_window = p.bias_window or tuple(a.kv or a.window for a in axes)
    if p.bias == "abs":
        return prod(q_window), p.heads
    if p.bias == "index":
        return 11, p.heads
    if p.bias == "dense":
        return p.heads, n, m
    if p.bias == "dense4":
        return 1, p.heads, n, m
    return prod(a + b - 1 for a, b in zip(q_window, k_window, strict=True)), p.heads


def rel_pos_shapes(p: Problem) -> list[tuple[int, ...]]:
    if not p.rel_pos:
        return []
    geometry = geometry_of(p.windows, len(p.space))
    axes = geometry.axes(geometry.groups[0], p.query_space, p.space)
    rows = [a.q_window + (a.kv or a.window) - 1 for a in axes]
    return [(n, p.dim) if p.rel_pos == "shared" else (p.heads, n, p.dim) for n in rows]


def _padding(p: Problem, generator: torch.Generator) -> Tensor:
    shape = (p.batch, *p.space)
    if p.padding == "float":
        added = torch.randn(shape, generator=generator, dtype=torch.float64)
        return added.masked_fill(torch.rand(shape, generator=generator) < 0.2, -INF)
    ignored = torch.rand(shape, generator=generator) < 0.3
    if p.padding == "window":
        ignored[0, : p.space[0] // 2] = True
    if p.padding == "sample":
        ignored[0] = True
    return ignored


def _mask(p: Problem, generator: torch.Generator) -> Tensor:
    windows, n, m = counts(p)
    shape = {
        "windows": (windows, n, m),
        "samples": (p.batch * windows, 1, n, m),
        "heads": (p.batch * windows, p.heads, n, m),
    }[p.mask]
    mask = torch.randn(shape, generator=generator, dtype=torch.float64)
    if p.mask == "heads":
        mask = mask.masked_fill(torch.rand(shape, generator=generator) < 0.3, -INF)
    return mask


def arguments(problem: Problem, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The keyword arguments of `windowed_attention` besides q, k and v."""
    p = problem
    bias: Any = None
    if p.bias == "q-k" and p.bias_window is None:
        bias = tensors["bias"]
    elif p.bias in ("q-k", "k-q", "abs"):
        bias = RelativeBias(tensors["bias"], p.bias, p.bias_window)
    elif p.bias == "index":
        _, n, m = counts(p)
        index = torch.arange(n * m, device=tensors["bias"].device).view(n, m) * 7 % 19 - 9
        bias = RelativeBias(tensors["bias"], index)
    elif p.bias:
        bias = tensors["bias"]
    names = (
        "logit_scale",
        "edge_k",
        "edge_v",
        "extra_k",
        "extra_v",
        "extra_bias",
        "key_padding_mask",
        "attn_mask",
    )
    given = {name: tensors.get(name) for name in names}
    return {
        "windows": p.windows,
        "bias": bias,
        "rel_pos": tuple(tensors[f"rel_pos_{a}"] for a in range(len(p.space))) if p.rel_pos else None,
        "scale": p.scale,
        **given,
        "activation": p.activation,
        "dropout_p": p.dropout_p,
    }


def run(problem: Problem, tensors: dict[str, Tensor], backend: str | None = None) -> tuple[Tensor, ...]:
    """out, and lse under softmax, of the public function; the dropout bits are the same in every run."""
    q, k, v = tensors["q"], tensors["k"], tensors["v"]
    with_lse = problem.activation == "softmax"
    options = {**arguments(problem, tensors), "return_lse": with_lse, "backend": backend}
    torch.manual_seed(1234)
    if problem.layout == "qkvpacked":
        result = windowed_attention_qkvpacked(torch.stack([q, k, v], -3), **options)
    else:
        result = windowed_attention(q, k, v, **options)
    return result if isinstance(result, tuple) else (result,)


def upstream(problem: Problem, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Gradients of out and lse."""
    rows = (problem.batch, *problem.query_space, problem.heads)
    return rule.upstream(rows, problem.value_dim, dtype, device)


def solve(problem: Problem, tensors: dict[str, Tensor], backend: str | None = None) -> dict[str, Tensor]:
    """Outputs and gradients of the public function."""
    q = tensors["q"]
    return differentiate(run(problem, tensors, backend), upstream(problem, q.dtype, str(q.device)), tensors)


def exact(problem: Problem, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The reference in float64 on the same numbers, under the same upstream gradients."""
    q, wide = tensors["q"], widened(tensors)
    return differentiate(run(problem, wide, "reference"), upstream(problem, q.dtype, str(q.device)), wide)


def dense_errors(
    problem: Problem, tensors: dict[str, Tensor], exact_results: dict[str, Tensor]
) -> dict[str, float]:
    """`rule.dense_errors` of the reference in the problem's own dtype."""
    return rule.dense_errors(
        tensors, exact_results, lambda given: exact(problem, given), lambda *given: _dense(problem, *given)
    )


def _dense(problem: Problem, tensors: dict[str, Tensor], c: float, backwards: bool) -> dict[str, Tensor]:
    given = arguments(problem, tensors)
    torch.manual_seed(1234)
    seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64) if problem.dropout_p > 0 else None
    if not problem.cosine:
        given["scale"] = (problem.dim**-0.5 if problem.scale is None else problem.scale) / c

    def changed(x: Tensor | None, factor: float) -> Tensor | None:
        if x is None:
            return None
        return (x.flip(-1) if backwards else x) * factor

    q, k, v = (changed(tensors[n], 1.0 if n == "k" else c) for n in "qkv")
    assert q is not None
    assert k is not None
    assert v is not None
    if given["rel_pos"] is not None:
        given["rel_pos"] = tuple(changed(t, 1 / c) for t in given["rel_pos"])
    for name, factor in (("edge_k", 1.0), ("extra_k", 1.0), ("edge_v", c), ("extra_v", c)):
        given[name] = changed(given[name], factor)
    out, lse = run_reference(prepare(q, k, v, **given), seed, q.dtype)
    out = (out.flip(-1) if backwards else out) / c
    outputs = (out, lse) if problem.activation == "softmax" else (out,)
    return differentiate(outputs, upstream(problem, q.dtype, str(q.device)), tensors)


def violations(
    problem: Problem, dtype: torch.dtype, backend: str | None = None, device: str = "cpu", seed: int = 0
) -> list[str]:
    """What is wrong with a backend's outputs and gradients for a problem; empty if nothing is."""
    tensors = make(problem, dtype, device, seed)
    truth = exact(problem, tensors)
    return compare(solve(problem, tensors, backend), truth, dense_errors(problem, tensors, truth), dtype)
