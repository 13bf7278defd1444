"""Joint attention (MossFormer) and hash attention (EcoFormer): ours and the baselines, timed interleaved.

Useful flops per token of joint attention with groups of g, d and W = 2 V columns: 2 g d + 2 g W + 4 d W, and
with the backward 8 g d + 6 g W + 12 d W. Of hash attention per token and head with m anchors, b bits: 2 D m
+ 2 m b + 4 b V, and with the backward three times that. Results must be within the tests' RMS tolerances of
float64; codes of hash attention may flip where a sum is near 0, so there 1 % is allowed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vicinal import hash_attention, joint_attention

from . import joint_published as published
from .linear import Options, collect, params_of
from .measure import Contender, fma_probe, interleave
from .results import Report
from .windowed import OURS

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 5e-3}
DIM, BITS, ANCHORS = 128, 16, 25


@dataclass(frozen=True)
class Problem:
    """kind "joint": `width` columns of v and of u; "hash": `heads` of `width` channels."""

    name: str
    model: str
    kind: str
    batch: int
    tokens: int
    width: int
    heads: int = 1
    core: bool = True
    quick: bool = False

    def flops_of(self, backward: bool) -> float:
        if self.kind == "joint":
            g, wide = published.GROUP, 2 * self.width
            pairs, groups, linear = (8, 6, 12) if backward else (2, 2, 4)
            each = pairs * g * DIM + groups * g * wide + linear * DIM * wide
            return float(self.batch * self.tokens * each)
        each = 2 * self.width * ANCHORS + 2 * ANCHORS * BITS + 4 * BITS * self.width
        return float(self.batch * self.tokens * self.heads * each * (3 if backward else 1))

    def bytes_of(self, dtype: torch.dtype, backward: bool) -> int:
        """Inputs and output once; with the backward also their gradients, and the inputs again."""
        tokens = self.batch * self.tokens * dtype.itemsize
        if self.kind == "joint":
            inputs, out = 4 * DIM + 2 * self.width, self.width
        else:
            inputs, out = 2 * self.heads * self.width, self.heads * self.width
        return tokens * (3 * inputs + 2 * out if backward else inputs + out)


PROBLEMS = (
    Problem("mossformer-4k", "MossFormer2, 4 s", "joint", 1, 4000, 1024, quick=True),
    Problem("mossformer-20k", "MossFormer2, 20 s", "joint", 1, 20000, 1024),
    Problem("mossformer-1k", "MossFormer2, 1 s", "joint", 1, 1000, 1024, core=False),
    Problem("ecoformer-stage1", "EcoFormer-PVTv2-B0, stage 1", "hash", 8, 3136, 32, 1, quick=True),
    Problem("ecoformer-stage2", "EcoFormer-PVTv2-B0, stage 2", "hash", 8, 784, 32, 2, core=False),
    Problem("ecoformer-stage3", "EcoFormer-PVTv2-B0, stage 3", "hash", 8, 196, 32, 5, core=False),
)


def make_inputs(p: Problem, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Trained inputs, tables, and the gradient of the output."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    if p.kind == "joint":
        values = normal(p.batch, p.tokens, 2 * p.width).to(dtype).chunk(2, -1)
        leaves = [*(normal(p.batch, p.tokens, DIM).to(dtype) for _ in range(4)), *values]
        return leaves, [], normal(p.batch, p.tokens, p.width).to(dtype)
    shape = (p.batch, p.tokens, p.heads, p.width)
    tables = [
        F.normalize(normal(p.heads, ANCHORS, p.width), dim=-1),
        normal(p.heads, BITS, ANCHORS),
        torch.full((p.heads, ANCHORS), 0.6),
    ]
    qk, v, dout = (normal(*shape).to(dtype) for _ in range(3))
    return [qk, v], tables, dout


def ours(p: Problem, backend: str | None) -> Callable[..., Any]:
    if p.kind == "joint":
        return lambda *x: joint_attention(*x, gate=True, backend=backend)
    return lambda *x: hash_attention(*x, backend=backend)


def baselines(p: Problem, dtype: torch.dtype, quick: bool) -> dict[str, Callable[..., Any]]:
    plain: dict[str, Callable[..., Any]] = {"einsum": published.mossformer}
    if p.kind == "hash":
        plain = {"released": published.ecoformer, "gemm-distance": published.ecoformer_gemm}
    found = dict(plain)
    for name, layer in plain.items():
        if not quick:
            found[f"{name}-compiled"] = torch.compile(layer, fullgraph=True, dynamic=False)
    return found


def outputs(
    run: Callable[..., Any], leaves: Sequence[Tensor], tables: Sequence[Tensor], dout: Tensor, backward: bool
) -> list[Tensor]:
    if not backward:
        with torch.no_grad():
            return [run(*leaves, *tables)]
    trained = [x.detach().requires_grad_() for x in leaves]
    out = run(*trained, *tables)
    return [out.detach(), *torch.autograd.grad(out, trained, dout)]


def rms_ratio(x: Tensor, truth: Tensor) -> float:
    return float((x.double() - truth).square().mean().sqrt() / truth.square().mean().sqrt())


def selected(names: list[str] | None, *, quick: bool, full: bool) -> list[Problem]:
    if names:
        return [p for p in PROBLEMS if any(n in p.name for n in names)]
    return [p for p in PROBLEMS if (p.quick if quick else p.core or full)]


def run(problems: list[Problem], options: Options, report: Report) -> Iterator[str]:
    """Check and time every case, adding to the report; yields a line for each."""
    for problem in problems:
        for dtype in options.dtypes:
            for threads in options.threads:
                torch.set_num_threads(threads)
                for backward in options.directions:
                    yield time_case(problem, dtype, backward, threads, options, report)


def time_case(
    p: Problem, dtype: torch.dtype, backward: bool, threads: int, options: Options, report: Report
) -> str:
    params = params_of(p, dtype, "fwd+bwd" if backward else "fwd", threads)  # type: ignore[arg-type]
    group = f"joint/{p.name}/{params['dtype']}/{params['direction']}/{threads}t"
    leaves, tables, dout = make_inputs(p, dtype)
    mine = ours(p, options.backend)
    wide, tables_wide = ([x.double() for x in given] for given in (leaves, tables))
    expected = outputs(ours(p, "reference"), wide, tables_wide, dout.double(), backward)
    found = [rms_ratio(x, y) for x, y in zip(outputs(mine, leaves, tables, dout, backward), expected)]
    limit = 1e-2 if p.kind == "hash" else TOLERANCE[dtype]
    if max(found) > limit:
        report.refused.append({"group": group, "reason": f"RMS ratio {max(found):.2g} is above {limit:.0e}"})
        return f"{group}  REFUSED: {report.refused[-1]['reason']}"
    torch.compiler.reset()
    contenders = []
    for name, layer in ({OURS: mine} | baselines(p, dtype, options.quick)).items():
        given = tables if name == OURS else [x.to(dtype) for x in tables]
        try:
            outputs(layer, leaves, given, dout, backward)
        except Exception as error:
            text = f"{type(error).__name__}: {error}".splitlines()[0][:240]
            report.unavailable.append({"group": group, "impl": name, "reason": text})
            continue
        contenders.append(
            Contender(name, lambda f=layer, t=given: outputs(f, leaves, t, dout, backward))  # type: ignore[misc]
        )
    probe = fma_probe("cpu", threads)
    timed = interleave(contenders, seconds=options.seconds, rounds=options.rounds, probe=probe)
    work = (p.flops_of(backward), p.bytes_of(dtype, backward))
    return collect(report, group, params, timed.contenders, timed.probe, work, {"rms": max(found)})
