"""The linear family: ours and the baselines, checked against float64, then timed interleaved.

Useful flops, per token and head with K features and V values: 4 K V for a forward without a mask (the sums,
and reading them) and 12 K V with the backward. Causal in chunks of C = 64, each square counted up to its
diagonal: 4 K V + (C + 1) (K + V), and with the backward 14 K V + (C + 1) (4 K + 3 V).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vicinal import FeatureMap, LinearState, favor_projection, linear_attention, linear_attention_step

from . import check, linear_published, table
from .measure import Contender, fma_probe, interleave, median, ratios
from .results import Report, Result
from .windowed import OURS, spread

CHUNK = 64


@dataclass(frozen=True)
class Problem:
    name: str
    model: str
    batch: int
    tokens: int
    heads: int
    dim: int
    kind: str = "full"  # or "causal", "decay", "nchw", "favor", "step"
    core: bool = True  # part of every run; the others need --full
    quick: bool = False

    @property
    def causal(self) -> bool:
        return self.kind in ("causal", "decay")

    def flops_of(self, backward: bool) -> float:
        pairs, k, v = self.batch * self.tokens * self.heads, self.dim, self.dim
        if self.causal and backward:
            return float(pairs * (14 * k * v + (CHUNK + 1) * (4 * k + 3 * v)))
        if self.causal:
            return float(pairs * (4 * k * v + (CHUNK + 1) * (k + v)))
        return float(pairs * k * v * (12 if backward else 4))

    def bytes_of(self, dtype: torch.dtype, backward: bool) -> int:
        """q, k, v and out once; with the backward seven more tensors: four read, three written."""
        return self.batch * self.tokens * self.heads * self.dim * dtype.itemsize * (11 if backward else 4)


PROBLEMS = (
    Problem("full-4k", "Linear Transformer, elu + 1", 4, 4096, 8, 64),
    Problem("full-16k", "Linear Transformer, elu + 1", 1, 16384, 8, 64, quick=True),
    Problem("full-64k", "Linear Transformer, elu + 1", 1, 65536, 2, 64, core=False),
    Problem("litemla-4k", "EfficientViT, SANA", 1, 4096, 36, 32, "nchw", quick=True),
    Problem("litemla-1k", "EfficientViT", 1, 1024, 16, 32, "nchw", core=False),
    Problem("causal-4k", "Linear Transformer, causal", 4, 4096, 8, 64, "causal"),
    Problem("causal-16k", "Linear Transformer, causal", 1, 16384, 8, 64, "causal", core=False),
    Problem("decay-4k", "scalar decay per token", 4, 4096, 8, 64, "decay"),
    Problem("decay-16k", "scalar decay per token", 1, 16384, 8, 64, "decay", core=False),
    Problem("favor-4k", "Performer, 266 features", 1, 4096, 8, 64, "favor", core=False),
    Problem("step", "decoding a token", 8, 1, 16, 64, "step"),
)


@dataclass
class Inputs:
    """q, k, v [B, N, H, D], decay [B, N, H] or None, the gradient of the output, favor's projection."""

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor | None
    dout: Tensor
    projection: Tensor | None

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return (self.q, self.k, self.v)

    def to(self, dtype: torch.dtype) -> Inputs:
        decay = None if self.decay is None else self.decay.to(torch.promote_types(dtype, torch.float32))
        projection = None if self.projection is None else self.projection.to(dtype)
        q, k, v = (x.detach().to(dtype) for x in self.leaves)
        return Inputs(q, k, v, decay, self.dout.to(dtype), projection)


def make_inputs(problem: Problem, dtype: torch.dtype) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    b, n, h, d = problem.batch, problem.tokens, problem.heads, problem.dim

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    if problem.kind == "nchw":
        q, k, v = (x.permute(0, 3, 1, 2) for x in normal(b, h, 3 * d, n).chunk(3, 2))
        dout = normal(b, h, d, n).permute(0, 3, 1, 2)
    else:
        q, k, v, dout = (normal(b, n, h, d) for _ in range(4))
    decay = -torch.rand(b, n, h, generator=generator) * 0.1 if problem.kind == "decay" else None
    projection = favor_projection(d, generator=generator).to(dtype) if problem.kind == "favor" else None
    return Inputs(q, k, v, decay, dout, projection)


def ours(problem: Problem, inputs: Inputs, backend: str | None) -> linear_published.Layer:
    options: dict[str, Any] = {"is_causal": problem.causal, "backend": backend}
    if problem.kind == "nchw":
        options |= {"feature_map": "relu", "eps": 1e-15}
    if problem.kind == "favor":
        options |= {"feature_map": FeatureMap("favor", projection=inputs.projection), "eps": 0.0}

    def run(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None) -> Tensor:
        out = linear_attention(q, k, v, decay=decay, **options)
        assert isinstance(out, Tensor)
        return out

    return run


def as_it_is(layer: linear_published.Layer) -> linear_published.Layer:
    return layer


def compiled(layer: linear_published.Layer) -> linear_published.Layer:
    made: linear_published.Layer = torch.compile(layer, fullgraph=True)
    return made


def baselines(
    problem: Problem, inputs: Inputs, quick: bool
) -> dict[str, Callable[[], linear_published.Layer]]:
    """What makes each baseline; making it may raise."""
    published = linear_published
    layers: dict[str, dict[str, linear_published.Layer]] = {
        "full": {"matmul": published.matmul, "einsum": published.einsum},
        "nchw": {"matmul": published.lite_mla},
        "causal": {"chunked": published.chunked},
        "decay": {"chunked": published.chunked},
    }
    found: dict[str, Callable[[], linear_published.Layer]] = {}
    for name, layer in layers.get(problem.kind, {}).items():
        found[name] = partial(as_it_is, layer)
        if not quick and name != "einsum":
            found[f"{name}-compiled"] = partial(compiled, layer)
    if problem.causal:
        found["sdpa"] = lambda: published.sdpa
    if inputs.projection is not None:
        projection = inputs.projection
        found["performer-pytorch"] = lambda: published.performer(projection)
    return found


def outputs(run: linear_published.Layer, inputs: Inputs, backward: bool) -> check.Tensors:
    if not backward:
        with torch.no_grad():
            return {"out": run(*inputs.leaves, inputs.decay)}
    for leaf in inputs.leaves:
        leaf.requires_grad_(True)
    out = run(*inputs.leaves, inputs.decay)
    grads = torch.autograd.grad(out, inputs.leaves, inputs.dout)
    for leaf in inputs.leaves:
        leaf.requires_grad_(False)
    return {"out": out.detach()} | dict(zip(("dq", "dk", "dv"), grads, strict=True))


def stepper(run: linear_published.Layer, inputs: Inputs, backward: bool) -> Callable[[], Any]:
    if backward:
        leaves = tuple(x.detach().requires_grad_() for x in inputs.leaves)
        return lambda: torch.autograd.grad(run(*leaves, inputs.decay), leaves, inputs.dout)

    def forward() -> Tensor:
        with torch.no_grad():
            return run(*inputs.leaves, inputs.decay)

    return forward


@dataclass(frozen=True)
class Options:
    problems: list[Problem]
    dtypes: tuple[torch.dtype, ...]
    directions: tuple[bool, ...]
    threads: tuple[int, ...]
    backend: str | None = None
    quick: bool = False
    seconds: float = 6.0
    rounds: tuple[int, int] = (7, 40)


def selected(names: list[str] | None, *, quick: bool, full: bool) -> list[Problem]:
    if names:
        return [p for p in PROBLEMS if any(n in p.name for n in names)]
    return [p for p in PROBLEMS if (p.quick if quick else p.core or full)]


def run(options: Options, report: Report) -> Iterator[str]:
    """Check and time every case, adding to the report; yields a line for each."""
    for problem in options.problems:
        for dtype in options.dtypes:
            for threads in options.threads:
                torch.set_num_threads(threads)
                if problem.kind == "step":
                    yield time_step(problem, dtype, threads, options, report)
                    continue
                for backward in options.directions:
                    yield time_case(problem, dtype, backward, threads, options, report)


def params_of(problem: Problem, dtype: torch.dtype, direction: str, threads: int) -> dict[str, Any]:
    name = str(dtype).removeprefix("torch.")
    return {
        "problem": problem.name,
        "dtype": name,
        "direction": direction,
        "threads": threads,
        "device": "cpu",
    }


def group_of(params: dict[str, Any]) -> str:
    return f"linear/{params['problem']}/{params['dtype']}/{params['direction']}/{params['threads']}t"


def time_case(
    problem: Problem, dtype: torch.dtype, backward: bool, threads: int, options: Options, report: Report
) -> str:
    params = params_of(problem, dtype, "fwd+bwd" if backward else "fwd", threads)
    group, inputs = group_of(params), make_inputs(problem, dtype)
    mine = ours(problem, inputs, options.backend)
    wide = inputs.to(torch.float64)
    expected = outputs(ours(problem, wide, "reference"), wide, backward)
    found = check.errors(outputs(mine, inputs, backward), expected)
    ready, same = [Contender(OURS, stepper(mine, inputs, backward))], []
    torch.compiler.reset()
    for name, make in baselines(problem, inputs, options.quick).items():
        try:
            layer = make()
            results = outputs(layer, inputs, backward)
            if name != "sdpa":
                same.append(check.errors(results, expected))
        except Exception as error:
            text = f"{type(error).__name__}: {error}".splitlines()[0][:240]
            report.unavailable.append({"group": group, "impl": name, "reason": text})
            continue
        ready.append(Contender(name, stepper(layer, inputs, backward)))
    if complaint := check.complaint(found, check.worst(same), dtype):
        report.refused.append({"group": group, "reason": complaint})
        return f"{group}  REFUSED: {complaint}"
    probe = fma_probe("cpu", threads)
    timed = interleave(ready, seconds=options.seconds, rounds=options.rounds, probe=probe)
    work = (problem.flops_of(backward), problem.bytes_of(dtype, backward))
    return collect(report, group, params, timed.contenders, timed.probe, work, found)


def time_step(problem: Problem, dtype: torch.dtype, threads: int, options: Options, report: Report) -> str:
    """Decoding: ours and the eager step, on states of their own."""
    params = params_of(problem, dtype, "fwd", threads)
    b, h, d = problem.batch, problem.heads, problem.dim
    q, k, v = (torch.randn(b, 1, h, d).to(dtype) for _ in range(3))
    state = LinearState(torch.zeros(b, h, d, d), torch.zeros(b, h, d))
    s, z = torch.zeros(b, h, d, d), torch.zeros(b, h, d)

    def mine() -> Tensor:
        with torch.no_grad():
            return linear_attention_step(q, k, v, state, backend=options.backend)

    def eager() -> Tensor:
        with torch.no_grad():
            return linear_published.step(q.float(), k.float(), v.float(), s, z).to(dtype)

    difference = float((mine().float() - eager().float()).abs().max())
    contenders = [Contender(OURS, mine), Contender("eager", eager)]
    timed = interleave(contenders, seconds=options.seconds, rounds=options.rounds)
    flops, moved = 5.0 * b * h * d * d, 8 * b * h * d * d
    return collect(
        report, group_of(params), params, timed.contenders, [], (flops, moved), {"out": difference}
    )


def collect(
    report: Report,
    group: str,
    params: dict[str, Any],
    contenders: list[Contender],
    probe: list[float],
    work: tuple[float, float],
    errors: check.Errors,
) -> str:
    """Results with ratios within rounds; a line for people."""
    mine, (flops, moved) = contenders[0].seconds, work
    results = [Result(group, c.name, params, c.seconds, c.repeats) for c in contenders]
    for result in results[1:]:
        result.extra["ratio_to_ours"] = spread(ratios(result.seconds, mine))
    first = results[0].extra
    first |= {"flops": flops, "bytes": moved, "errors": errors}
    first |= {"gflops": flops / median(mine) * 1e-9, "gbps": moved / median(mine) * 1e-9}
    if probe:
        first["probe_gflops"] = spread(probe)
        first["share_of_probe"] = spread([flops / t * 1e-9 / p for t, p in zip(mine, probe, strict=True)])
    if len(contenders) > 1:
        best = min(contenders[1:], key=lambda c: median(c.seconds))
        first["best_baseline"], first["ratio"] = best.name, spread(ratios(best.seconds, mine))
    report.results += results
    members = table.grouped(r.as_json() for r in results)[group]
    row = table.cells(group, members)
    rates = f"{row[9]:>4} of FMA  {row[8]:>5} GB/s"
    return f"{row[0]:<36} {row[1]:>7} ms  {rates}  {row[5]:>6}  ({table.others(members)})"
