"""The neighborhood family: ours and the baselines, checked, then timed interleaved.

Baselines: a gather of every window (what a model without a kernel does), dense scaled_dot_product_attention
with the neighborhood as its mask and without any (which is another function: a yardstick), natten, and
compiled FlexAttention (the last two only forward, they have no CPU backward).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vicinal import neighborhood_attention

from . import check
from .measure import Contender, Rounds, fma_probe, interleave, median, ratios
from .neighborhood_problems import PROBLEMS, Problem
from .results import Report, Result
from .table import number
from .windowed import OURS, reason, spread

Step = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]
YARDSTICK = "sdpa-no-mask"  # not the same function
FORWARD_ONLY = ("flex", "natten")
BASELINES = ("gather", "sdpa-mask", YARDSTICK, *FORWARD_ONLY)
MOST_DENSE = 17_000  # tokens whose dense mask still fits


def gather(problem: Problem) -> Step:
    """Every window of k and v side by side, then products with them."""
    index, there = problem.keys()
    at = problem.bias_index(index) if problem.bias else None

    def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        flat = [x.flatten(1, -3) for x in (q, k, v)]
        windows = [x[:, index.flatten()].unflatten(1, index.shape) for x in flat[1:]]  # [B, N, S, h, d]
        scores = torch.einsum("bnhd,bnshd->bnhs", flat[0], windows[0]) * q.shape[-1] ** -0.5
        if bias is not None and at is not None:
            scores = scores + bias.flatten(1)[:, at].transpose(0, 1)
        scores = scores.masked_fill(~there[:, None], float("-inf"))
        return torch.einsum("bnhs,bnshd->bnhd", scores.softmax(-1), windows[1]).view(q.shape)

    return run


def sdpa(problem: Problem, masked: bool) -> Step:
    """Dense attention of all tokens, with the neighborhood as its mask or with none."""
    index, there = problem.keys()
    n = len(index)
    at = problem.bias_index(index) if problem.bias else None
    allowed = torch.zeros(n, n, dtype=torch.bool).scatter_(1, index, there) if masked else None

    def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        mask: Tensor | None = allowed
        if bias is not None and at is not None and masked:
            dense = torch.full((q.shape[-2], n, n), float("-inf"), dtype=bias.dtype)
            mask = dense.scatter(2, index.expand(len(bias), -1, -1), bias.flatten(1)[:, at]).to(q.dtype)
        first, second, third = (x.flatten(1, -3).transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(first, second, third, attn_mask=mask)
        return out.transpose(1, 2).reshape(q.shape)

    return run


def flex(problem: Problem) -> Step:
    """Compiled FlexAttention over a block mask of the neighborhood."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if problem.bias:
        raise NotImplementedError("a trainable table needs a backward, which FlexAttention lacks on a CPU")
    index, there = problem.keys()
    n = len(index)
    allowed = torch.zeros(n, n, dtype=torch.bool).scatter_(1, index, there)
    blocks = create_block_mask(lambda b, h, i, j: allowed[i, j], None, None, n, n, device="cpu")
    compiled: Any = torch.compile(flex_attention)

    def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        heads_first = (x.flatten(1, -3).transpose(1, 2) for x in (q, k, v))
        out: Tensor = compiled(*heads_first, block_mask=blocks)
        return out.transpose(1, 2).reshape(q.shape)

    return run


def natten(problem: Problem) -> Step:
    import natten as published

    if problem.bias or not problem.plain:
        raise NotImplementedError("natten has no relative position bias and no one-sided windows")
    rank = len(problem.space)
    call = getattr(published, f"na{rank}d")
    where = problem.where

    def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        out: Tensor = call(q, k, v, kernel_size=where.kernel_size, dilation=where.dilation)
        return out

    return run


def baseline(name: str, problem: Problem) -> Step:
    if name != "gather" and name != "natten" and prod(problem.space) > MOST_DENSE:
        raise MemoryError(f"a dense mask of {prod(problem.space)} tokens squared")
    if name == "gather":
        return gather(problem)
    if name == "flex":
        return flex(problem)
    return natten(problem) if name == "natten" else sdpa(problem, masked=name != YARDSTICK)


def ours(problem: Problem, backend: str | None) -> Step:
    def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        out = neighborhood_attention(q, k, v, problem.where, bias=bias, backend=backend)
        assert isinstance(out, Tensor)
        return out

    return run


@dataclass
class Inputs:
    """q, k, v [B, *S, h, d], the table or None, and a gradient of the output."""

    tensors: list[Tensor]
    bias: Tensor | None
    dout: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        return self.tensors if self.bias is None else [*self.tensors, self.bias]


def make_inputs(problem: Problem, dtype: torch.dtype, heads: int) -> Inputs:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    q, k, v, dout = (draw(1, *problem.space, heads, problem.head_dim).to(dtype) for _ in range(4))
    bias = draw(heads, *problem.table) if problem.bias else None
    return Inputs([q, k, v], bias, dout)


def outputs(run: Step, inputs: Inputs, dtype: torch.dtype, backward: bool) -> check.Tensors:
    """The output and, with `backward`, the gradient of every input, computed in a dtype."""
    tensors = [x.to(dtype).requires_grad_(backward) for x in inputs.tensors]
    bias = inputs.bias
    if bias is not None:
        bias = (bias.double() if dtype == torch.float64 else bias.clone()).requires_grad_(backward)
    out = run(tensors[0], tensors[1], tensors[2], bias)
    if not backward:
        return {"out": out}
    leaves = tensors if bias is None else [*tensors, bias]
    grads = torch.autograd.grad(out, leaves, inputs.dout.to(dtype))
    return {"out": out.detach()} | dict(zip(("dq", "dk", "dv", "dbias"), grads, strict=False))


def step(run: Step, inputs: Inputs, backward: bool) -> Callable[[], Any]:
    """What one sample times: a forward without gradients, or a forward and the gradients of every input."""
    q, k, v = inputs.tensors
    if backward:
        return lambda: torch.autograd.grad(run(q, k, v, inputs.bias), inputs.leaves, inputs.dout)

    def forward() -> Tensor:
        with torch.no_grad():
            return run(q, k, v, inputs.bias)

    return forward


@dataclass(frozen=True)
class Case:
    problem: Problem
    dtype: torch.dtype
    backward: bool
    threads: int

    @property
    def params(self) -> dict[str, Any]:
        direction = "fwd+bwd" if self.backward else "fwd"
        dtype = str(self.dtype).removeprefix("torch.")
        more = {"direction": direction, "threads": self.threads, "device": "cpu"}
        return {"problem": self.problem.name, "dtype": dtype, **more}

    @property
    def group(self) -> str:
        p = self.params
        return f"neighborhood/{p['problem']}/{p['dtype']}/{p['direction']}/{self.threads}t"


def checked(case: Case, backend: str | None) -> tuple[check.Errors, check.Errors, check.Tensors]:
    """Errors of ours and of the gather, on one head, and what float64 gives."""
    inputs = make_inputs(case.problem, case.dtype, 1)
    expected = outputs(ours(case.problem, "reference"), inputs, torch.float64, case.backward)
    mine = outputs(ours(case.problem, backend), inputs, case.dtype, case.backward)
    eager = outputs(gather(case.problem), inputs, case.dtype, case.backward)
    return check.errors(mine, expected), check.errors(eager, expected), expected


def contenders(
    case: Case, known: check.Errors, expected: check.Tensors, names: tuple[str, ...], backend: str | None,
    report: Report,
) -> list[Contender]:  # fmt: skip
    """Ours, and the baselines that run and are right; the others are listed with their reason."""
    inputs = make_inputs(case.problem, case.dtype, case.problem.heads)
    for x in inputs.leaves:
        x.requires_grad_(case.backward)
    one_head = make_inputs(case.problem, case.dtype, 1)
    found = [Contender(OURS, step(ours(case.problem, backend), inputs, case.backward))]
    for name in names:
        try:
            if case.backward and name in FORWARD_ONLY:
                raise NotImplementedError("has no backward on a CPU")
            run = baseline(name, case.problem)
            if name != YARDSTICK:
                errors = check.errors(outputs(run, one_head, case.dtype, case.backward), expected)
                if text := check.complaint(errors, known, case.dtype, factor=8.0):
                    raise ArithmeticError(text)
            found.append(Contender(name, step(run, inputs, case.backward)))
        except Exception as error:
            report.unavailable.append({"group": case.group, "impl": name, "reason": reason(error)})
    return found


def results(case: Case, timed: Rounds, mine: check.Errors, eager: check.Errors) -> list[Result]:
    """A result each; ours has the ratio to the best baseline of the same function and its share of the
    probe."""
    seconds = timed[OURS]
    flops, traffic = case.problem.flops(case.backward), case.problem.bytes(case.dtype, case.backward)
    found = []
    for c in timed.contenders:
        result = Result(case.group, c.name, case.params, c.seconds, c.repeats)
        if c.name != OURS:
            result.extra["ratio_to_ours"] = spread(ratios(c.seconds, seconds))
        found.append(result)
    extra = found[0].extra
    extra |= {"flops": flops, "bytes": traffic, "errors": mine, "eager_errors": eager}
    extra |= {"gflops": flops / median(seconds) * 1e-9, "gbps": traffic / median(seconds) * 1e-9}
    if timed.probe:
        extra["probe_gflops"] = spread(timed.probe)
        shares = [flops / t * 1e-9 / p for t, p in zip(seconds, timed.probe, strict=True)]
        extra["share_of_probe"] = spread(shares)
    others = [c for c in timed.contenders if c.name not in (OURS, YARDSTICK)]
    if others:
        best = min(others, key=lambda c: median(c.seconds))
        extra |= {"best_baseline": best.name, "ratio": spread(ratios(best.seconds, seconds))}
    return found


def cases(
    names: list[str] | None, dtypes: tuple[torch.dtype, ...], directions: tuple[bool, ...],
    threads: tuple[int, ...], quick: bool, full: bool,
) -> list[Case]:  # fmt: skip
    """Those named (any part of a name), or the usual, quick or full selection."""
    chosen = [
        p
        for p in PROBLEMS
        if (any(n in p.name for n in names) if names else p.quick if quick else p.core or full)
    ]
    return [
        Case(p, dtype, backward, count)
        for p in chosen
        for dtype in dtypes
        for count in threads
        for backward in directions
    ]


def run(
    report: Report,
    asked: list[Case],
    baselines: tuple[str, ...],
    seconds: float,
    quick: bool,
    backend: str | None,
) -> Iterator[str]:
    """Check and time every case; yields a line for each."""
    for case in asked:
        torch.set_num_threads(case.threads)
        mine, eager, expected = checked(case, backend)
        if complaint := check.complaint(mine, eager, case.dtype):
            report.refused.append({"group": case.group, "reason": complaint})
            yield f"{case.group}  REFUSED: {complaint}"
            continue
        ready = contenders(case, eager, expected, baselines, backend, report)
        limits: dict[str, Any] = {"seconds": seconds, "rounds": (3, 10) if quick else (7, 40)}
        timed = interleave(ready, probe=fma_probe("cpu", case.threads), **limits)
        added = results(case, timed, mine, eager)
        report.results += added
        share = added[0].extra.get("share_of_probe", {"median": float("nan")})["median"]
        times = ", ".join(f"{c.name} {number(median(c.seconds) * 1e3)} ms" for c in timed.contenders)
        yield f"{case.group:<52} {share:.0%} of FMA  {times}"
