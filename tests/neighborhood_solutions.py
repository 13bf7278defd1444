"""Tensors, runs and solutions of the named neighborhood problems; judged by rule.py. Nothing here imports
pytest.
"""

from __future__ import annotations

from typing import Any

import rule
import torch
from neighborhood_problems import Problem
from rule import TRAINED, Results, accumulator, compare, differentiate, widened
from torch import Tensor

from vicinal import neighborhood_attention, neighborhood_attention_qkvpacked
from vicinal._attend_run import draw_seed
from vicinal._neighborhood_run import geometry_of, prepare, run_reference

SEED = 1234


def table_shape(problem: Problem) -> tuple[int, ...]:
    geometry, _ = geometry_of(problem.where, len(problem.space), False)
    axes = geometry.on(problem.query_space, problem.space)
    return (problem.heads, *[2 * a.kernel - 1 for a in axes])


def make(
    problem: Problem, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
) -> dict[str, Tensor]:
    """The tensors of a problem by argument name, those of TRAINED as leaves that require a gradient."""
    generator = torch.Generator().manual_seed(seed)
    p = problem

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    shapes = (
        (p.batch, *p.query_space, p.heads, p.dim),
        (p.batch, *p.space, p.key_heads, p.dim),
        (p.batch, *p.space, p.key_heads, p.value_dim),
    )
    drawn = [normal(*s).to(device, dtype) for s in shapes]
    tensors = dict(zip("qkv", _laid_out(drawn, p.layout), strict=True))
    if p.bias:
        tensors["bias"] = normal(*table_shape(p)).to(dtype if p.low_bias else accumulator(dtype))
    for a, n in enumerate(table_shape(p)[1:] if p.rel_pos else ()):
        rows = (n, p.dim) if p.rel_pos == "shared" else (p.heads, n, p.dim)
        tensors[f"rel_pos_{a}"] = (normal(*rows) * 0.5).to(accumulator(dtype))
    if p.extra:
        for name, width in (("extra_k", p.dim), ("extra_v", p.value_dim)):
            extra = normal(p.batch, p.extra, p.key_heads, width).to(dtype)
            tensors[name] = cropped(extra) if p.layout == "crop" else extra
    if p.padding:
        tensors["key_padding_mask"] = _padding(p, generator)
    made = {name: t.to(device) for name, t in tensors.items()}
    return {name: t.requires_grad_(name in TRAINED) for name, t in made.items()}


def _laid_out(drawn: list[Tensor], layout: str) -> list[Tensor]:
    if layout in ("packed", "qkvpacked"):
        return [x.detach() for x in torch.stack(drawn, -3).unbind(-3)]
    if layout == "transposed":
        return [x.movedim(-2, 1).contiguous().movedim(1, -2) for x in drawn]
    if layout == "crop":
        return [cropped(x) for x in drawn]
    if layout == "expanded":
        return [drawn[0], *[x[:1].expand_as(x) for x in drawn[1:]]]
    return drawn


def cropped(x: Tensor) -> Tensor:
    """A view, in a larger buffer of NaN, that holds x."""
    *outer, heads, dim = x.shape
    buffer = x.new_full((outer[0] + 1, *outer[1:], heads + 1, dim + 3), float("nan"))
    view = buffer[1:, ..., :heads, 2 : 2 + dim]
    return view.copy_(x).detach()


def _padding(p: Problem, generator: torch.Generator) -> Tensor:
    ignored = torch.rand(p.batch, *p.space, generator=generator) < 0.3
    if p.padding == "window":
        ignored[0, : p.space[0] // 2] = True
    if p.padding == "sample":
        ignored[0] = True
    return ignored


def options(problem: Problem, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The keyword arguments of `prepare` besides q, k, v and the neighborhood."""
    names = ("bias", "extra_k", "extra_v", "key_padding_mask")
    given = {name: tensors.get(name) for name in names}
    tables = tuple(tensors[f"rel_pos_{a}"] for a in range(len(problem.space))) if problem.rel_pos else None
    return {**given, "rel_pos": tables, "scale": problem.scale, "dropout_p": problem.dropout_p}


def run(problem: Problem, tensors: dict[str, Tensor], backend: str | None = None) -> tuple[Tensor, Tensor]:
    """out and lse of the public function; the dropout bits are the same in every run."""
    q, k, v = tensors["q"], tensors["k"], tensors["v"]
    given: dict[str, Any] = {**options(problem, tensors), "return_lse": True, "backend": backend}
    torch.manual_seed(SEED)
    if problem.layout == "qkvpacked":
        result = neighborhood_attention_qkvpacked(torch.stack([q, k, v], -3), problem.where, **given)
    else:
        result = neighborhood_attention(q, k, v, problem.where, **given)
    assert isinstance(result, tuple)
    return result


def upstream(problem: Problem, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Gradients of out and lse."""
    rows = (problem.batch, *problem.query_space, problem.heads)
    return rule.upstream(rows, problem.value_dim, dtype, device)


def solve(problem: Problem, tensors: dict[str, Tensor], backend: str | None = None) -> Results:
    """Outputs and gradients of the public function."""
    q = tensors["q"]
    return differentiate(run(problem, tensors, backend), upstream(problem, q.dtype, str(q.device)), tensors)


def exact(problem: Problem, tensors: dict[str, Tensor]) -> Results:
    """The reference in float64 on the same numbers, under the same upstream gradients."""
    q, wide = tensors["q"], widened(tensors)
    return differentiate(run(problem, wide, "reference"), upstream(problem, q.dtype, str(q.device)), wide)


def dense_errors(problem: Problem, tensors: dict[str, Tensor], exact_results: Results) -> dict[str, float]:
    """`rule.dense_errors` of the reference in the problem's own dtype."""
    return rule.dense_errors(
        tensors, exact_results, lambda given: exact(problem, given), lambda *given: _dense(problem, *given)
    )


def _dense(problem: Problem, tensors: dict[str, Tensor], c: float, backwards: bool) -> Results:
    given = options(problem, tensors)
    given["scale"] = (problem.dim**-0.5 if problem.scale is None else problem.scale) / c
    torch.manual_seed(SEED)
    if problem.dropout_p == 1:
        given["dropout_p"] = 0.0
    seed = draw_seed(given["dropout_p"], tensors["q"].device)

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
    for name, factor in (("extra_k", 1.0), ("extra_v", c)):
        given[name] = changed(given[name], factor)
    out, lse = run_reference(prepare(q, k, v, problem.where, **given), seed, q.dtype)
    out = (out.flip(-1) if backwards else out) / c
    if problem.dropout_p == 1:
        out = out * 0.0
    return differentiate((out, lse), upstream(problem, q.dtype, str(q.device)), tensors)


def violations(
    problem: Problem, dtype: torch.dtype, backend: str | None = None, device: str = "cpu", seed: int = 0
) -> list[str]:
    """What is wrong with a backend's outputs and gradients for a problem; empty if nothing is."""
    tensors = make(problem, dtype, device, seed)
    truth = exact(problem, tensors)
    return compare(solve(problem, tensors, backend), truth, dense_errors(problem, tensors, truth), dtype)
