"""The windowed family: ours and the baselines, checked, then timed interleaved."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vicinal import windowed_attention, windowed_attention_qkvpacked

from . import check, memory
from .measure import Contender, Rounds, fma_probe, interleave, median, percentile, ratios
from .results import Report, Result
from .windowed_problems import PROBLEMS, Inputs, Problem, make_inputs, relative_bias
from .windowed_published import Published, compiled_flex, matmul_softmax, sdpa

OURS = "vicinal"
BASELINES = ("eager", "sdpa", "eager-compiled", "sdpa-compiled", "flex")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Case:
    """A problem in one dtype and direction, on a number of threads."""

    problem: Problem
    dtype: torch.dtype
    backward: bool
    threads: int
    device: str

    @property
    def params(self) -> dict[str, Any]:
        return {
            "problem": self.problem.name,
            "dtype": str(self.dtype).removeprefix("torch."),
            "direction": "fwd+bwd" if self.backward else "fwd",
            "threads": self.threads,
            "device": self.device,
        }

    @property
    def group(self) -> str:
        p = self.params
        return f"windowed/{p['problem']}/{p['dtype']}/{p['direction']}/{self.threads}t"


def problems(names: list[str] | None, *, quick: bool, full: bool) -> list[Problem]:
    """Those named (any part of a name), or the usual, quick or full selection."""
    if names:
        return [p for p in PROBLEMS if any(n in p.name for n in names)]
    return [p for p in PROBLEMS if (p.quick if quick else p.core or full)]


def ours(problem: Problem, backend: str | None) -> check.Run:
    call: Callable[..., Any] = windowed_attention_qkvpacked if problem.packed else windowed_attention

    def run(tensors: tuple[Tensor, ...], table: Tensor | None) -> Tensor:
        out = call(*tensors, problem.windows, bias=relative_bias(problem, table), backend=backend)
        assert isinstance(out, Tensor)
        return out

    return run


def baseline(name: str, case: Case) -> check.Run:
    """A baseline by name; it may raise where PyTorch does not support the case."""
    attend = (
        compiled_flex() if name == "flex" else {"eager": matmul_softmax, "sdpa": sdpa}[name.split("-")[0]]
    )
    published = Published(case.problem, attend, case.dtype, case.device)
    if not name.endswith("-compiled"):
        return published
    compiled: check.Run = torch.compile(lambda tensors, table: published(tensors, table), fullgraph=True)
    return compiled


def rescaled(case: Case, factor: float) -> check.Run:
    """The eager baseline with q and v times a factor, undone in the scale and the output: it rounds
    elsewhere.
    """
    eager = Published(case.problem, matmul_softmax, case.dtype, case.device)
    eager.scale /= factor

    def run(tensors: tuple[Tensor, ...], table: Tensor | None) -> Tensor:
        q, k, v = tensors[0].unbind(-3) if len(tensors) == 1 else tensors
        scaled = (q * factor, k, v * factor)
        if len(tensors) == 1:
            return eager((torch.stack(scaled, -3),), table) / factor
        return eager(scaled, table) / factor

    return run


def reason(error: BaseException) -> str:
    """The first line of the error at the bottom of the chain: compilers wrap what went wrong."""
    while (below := error.__cause__ or error.__context__) is not None:
        error = below
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:240]


@dataclass(frozen=True)
class Options:
    """What the command line asked for."""

    problems: list[Problem]
    dtypes: tuple[torch.dtype, ...]
    directions: tuple[bool, ...]  # backward?
    threads: tuple[int, ...]
    device: str = "cpu"
    backend: str | None = None
    baselines: tuple[str, ...] = BASELINES
    seconds: float = 6.0
    rounds: tuple[int, int] = (7, 40)
    memory: bool = True

    def cases(self) -> list[Case]:
        return [
            Case(problem, dtype, backward, threads, self.device)
            for problem in self.problems
            for dtype in self.dtypes
            for threads in self.threads
            for backward in self.directions
        ]


@dataclass
class Checked:
    """Inputs of a problem in one dtype, and every implementation's errors against float64."""

    inputs: Inputs
    expected: check.Tensors
    eager: check.Errors
    ours: check.Errors

    def complaint(self, case: Case) -> str:
        """What is wrong with our results in the case's direction, or an empty text."""
        names = tensors_of(case, self.eager)
        return check.complaint(
            {n: self.ours[n] for n in names}, {n: self.eager[n] for n in names}, case.dtype
        )


def tensors_of(case: Case, errors: check.Errors) -> list[str]:
    """The tensors that the case computes: a forward is not judged by gradients."""
    return list(errors) if case.backward else ["out"]


def checked(case: Case, mine: check.Run, backward: bool) -> Checked:
    """Run ours and eager once and compare both with the reference in float64."""
    problem = case.problem
    inputs = make_inputs(problem, case.dtype, case.device)
    expected = check.exact(ours(problem, "reference"), inputs, backward)
    draws = [check.outputs(rescaled(case, factor), inputs, backward) for factor in (1.0, 3.0, 5.0)]
    eager = check.worst([check.errors(draw, expected) for draw in draws])
    found = check.errors(check.outputs(mine, inputs, backward), expected)
    return Checked(inputs, expected, eager, found)


def stepper(run: check.Run, inputs: Inputs, backward: bool) -> Callable[[], Any]:
    """What one sample times: a forward without gradients, or a forward and the gradients of every input."""
    if backward:
        return lambda: torch.autograd.grad(run(inputs.tensors, inputs.table), inputs.leaves, inputs.dout)

    def forward() -> Tensor:
        with torch.no_grad():
            return run(inputs.tensors, inputs.table)

    return forward


def contenders(
    case: Case, known: Checked, mine: check.Run, options: Options, report: Report
) -> list[Contender]:
    """Ours, and the baselines that run and are right; the others are listed with their reason."""
    found = [Contender(OURS, stepper(mine, known.inputs, case.backward))]
    for name in options.baselines:
        try:
            run = baseline(name, case)
            results = check.outputs(run, known.inputs, case.backward)
            wrong = check.errors(results, {n: known.expected[n] for n in results})
            # a baseline only has to be the same function: compilers and SDPA round elsewhere
            if text := check.complaint(wrong, {n: known.eager[n] for n in results}, case.dtype, factor=8.0):
                raise ArithmeticError(text)
        except Exception as error:
            report.unavailable.append({"group": case.group, "impl": name, "reason": reason(error)})
            continue
        found.append(Contender(name, stepper(run, known.inputs, case.backward)))
    return found


def run(
    options: Options, report: Report, mine: Callable[[Problem], check.Run] | None = None
) -> Iterator[Case]:
    """Check and time every case, adding to the report; yields each case once it is done.

    `mine`: what to measure in place of vicinal, for tests of the refusal.
    """
    known: Checked | None = None
    peaks: memory.Peaks = {}
    before: tuple[Problem, torch.dtype] | None = None
    for case in options.cases():
        torch.set_num_threads(case.threads)
        implementation = ours(case.problem, options.backend) if mine is None else mine(case.problem)
        if before != (case.problem, case.dtype) or known is None:
            before = (case.problem, case.dtype)
            known = checked(case, implementation, any(options.directions))
            if options.memory:
                peaks = memory.peaks(case.problem.name, case.params["dtype"], options.device, options.backend)
        if complaint := known.complaint(case):
            report.refused.append({"group": case.group, "reason": complaint})
        else:
            time_case(case, known, implementation, options, report, peaks)
        yield case


def time_case(
    case: Case, known: Checked, mine: check.Run, options: Options, report: Report, peaks: memory.Peaks
) -> None:
    """Time the contenders of one case and add a result for each."""
    torch.compiler.reset()  # compiled baselines bake in the number of threads
    known.inputs.requires_grad_(False)
    ready = contenders(case, known, mine, options, report)
    known.inputs.requires_grad_(case.backward)
    probe = fma_probe(case.device, case.threads)
    limits = {"seconds": options.seconds, "rounds": options.rounds}
    timed = interleave(ready, device=case.device, probe=probe, **limits)  # type: ignore[arg-type]
    known.inputs.requires_grad_(False)
    for result in collected(case, timed, known):
        result.extra |= peaks.get(result.contender, {}).get(case.params["direction"], {})
        report.results.append(result)


def collected(case: Case, timed: Rounds, known: Checked) -> list[Result]:
    """Results with the ratios within rounds; ours also says how near the machine's limits it comes."""
    mine = timed[OURS]
    found = []
    for c in timed.contenders:
        result = Result(case.group, c.name, case.params, c.seconds, c.repeats)
        if c.name != OURS:
            result.extra["ratio_to_ours"] = spread(ratios(c.seconds, mine))
        found.append(result)
    flops, traffic = case.problem.flops_of(case.backward), case.problem.bytes_of(case.dtype, case.backward)
    first = found[0].extra
    first |= {"flops": flops, "bytes": traffic, "model": case.problem.model}
    first |= {"gflops": flops / median(mine) * 1e-9, "gbps": traffic / median(mine) * 1e-9}
    names = tensors_of(case, known.ours)
    first["errors"] = {name: known.ours[name] for name in names}
    first["eager_errors"] = {name: known.eager[name] for name in names}
    if timed.probe:
        first["probe_gflops"] = spread(timed.probe)
        first["share_of_probe"] = spread(
            [flops / t * 1e-9 / p for t, p in zip(mine, timed.probe, strict=True)]
        )
    others = [c for c in timed.contenders if c.name != OURS]
    if others:
        best = min(others, key=lambda c: median(c.seconds))
        first["best_baseline"] = best.name
        first["ratio"] = spread(ratios(best.seconds, mine))
    return found


def spread(values: list[float]) -> dict[str, float]:
    return {"median": median(values), "p20": percentile(values, 20), "p80": percentile(values, 80)}
