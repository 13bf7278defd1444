"""Whole models before and after `vicinal.drop_in.accelerate`, inference and training steps.

The baselines are the reference models of vicinal.models, which compute what the official releases do (DiNAT
gathers the keys of every window), and the same models of timm, torchvision and transformers with what fused
attention they have; with `--compile` also compiled by torch.compile. An accelerated model has the weights of
its original, and before anything is timed their outputs are compared.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vicinal.drop_in import accelerate

from .measure import Contender, interleave, median, ratios
from .models_published import PROBLEMS, Problem
from .results import Report, Result
from .table import number
from .windowed import OURS, spread


def fast_name(name: str, problem: Problem) -> str:
    """The name of the accelerated copy of a model; the first one's is what tables call ours."""
    return OURS if name == next(iter(problem.makers)) else f"{name}, accelerated"


def models(problem: Problem, compiled: bool) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Originals and accelerated copies on the same weights, and why a library's model is missing."""
    found: dict[str, nn.Module] = {}
    missing: dict[str, str] = {}
    for name, make in problem.makers.items():
        torch.manual_seed(0)
        try:
            original = make()
        except (
            ImportError,
            RuntimeError,
        ) as error:  # RuntimeError: torchvision beside another build of torch
            missing[name] = f"{type(error).__name__}: {error}"[:200]
            continue
        fast = copy.deepcopy(original)
        accelerate(fast)
        found |= {fast_name(name, problem): fast, name: original}
        if compiled:
            pair = {f"{fast_name(name, problem)}, compiled": fast, f"{name}, compiled": original}
            found |= {key: _compiled(model) for key, model in pair.items()}
    return found, missing


def _compiled(model: nn.Module) -> nn.Module:
    module: nn.Module = torch.compile(copy.deepcopy(model), dynamic=False)  # type: ignore[assignment]
    return module


def inference(model: nn.Module, images: Tensor) -> Callable[[], Any]:
    _evaluated(model)

    def step() -> Tensor:
        with torch.inference_mode():
            out = model(images)
        assert isinstance(out, Tensor)
        return out

    return step


def training(model: nn.Module, images: Tensor) -> Callable[[], Any]:
    """Forward, cross entropy, backward and an SGD step."""
    model.train()
    target = torch.zeros(len(images), dtype=torch.long)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), target).backward()
        optimizer.step()

    return step


def disagreement(problem: Problem, found: dict[str, nn.Module]) -> str:
    """Why the accelerated models are not the originals, or an empty text: float32 outputs within 1e-4 of
    their size.
    """
    images = torch.randn(1, 3, problem.pixels, problem.pixels)
    for name in problem.makers:
        if name not in found:
            continue
        with torch.inference_mode():
            slow, fast = (_evaluated(found[key])(images) for key in (name, fast_name(name, problem)))
        error = float((fast - slow).abs().max() / slow.abs().max())
        if not error < 1e-4:
            return f"{name}, accelerated, differs by {error:.1e} of the largest output"
    return ""


def _evaluated(model: nn.Module) -> nn.Module:
    model.eval()  # whose result timm's LeViT and EfficientViT attention forget
    return model


def run(
    report: Report,
    threads: tuple[int, ...],
    seconds: float,
    quick: bool,
    wanted: list[str] | None = None,
    compiled: bool = False,
) -> Iterator[str]:
    """Time every model whose name has a part that is `wanted` (None: all); yields a line for each batch size
    and step."""
    for problem in PROBLEMS:
        if wanted is None or any(part in problem for part in wanted):
            yield from run_problem(report, problem, threads, seconds, quick, compiled)


def run_problem(
    report: Report, name: str, threads: tuple[int, ...], seconds: float, quick: bool, compiled: bool
) -> Iterator[str]:
    """Time one model."""
    problem = PROBLEMS[name]
    found, missing = models(problem, compiled)
    report.unavailable += [{"group": "models", "impl": n, "reason": why} for n, why in missing.items()]
    if not found:
        return
    if complaint := disagreement(problem, found):
        report.refused.append({"group": f"models/{name}", "reason": complaint})
        yield f"models/{name}  REFUSED: {complaint}"
        return
    for count in threads:
        torch.set_num_threads(count)
        for batch in problem.batches[: 1 if quick else None]:
            shape = (batch, 3, problem.pixels, problem.pixels)
            images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
            for direction, prepare in (("inference", inference), ("training", training)):
                group = f"models/{name}-b{batch}/float32/{direction}/{count}t"
                ready = [Contender(impl, prepare(model, images)) for impl, model in found.items()]
                timed = interleave(ready, seconds=seconds, rounds=(3, 9) if quick else (7, 40))
                params = {"problem": f"{name}-b{batch}", "dtype": "float32", "direction": direction}
                more = {"threads": count, "device": "cpu", "batch": batch}
                report.results += results(group, {**params, **more}, problem, timed.contenders)
                yield line(group, problem, timed.contenders, batch)


def results(
    group: str, params: dict[str, Any], problem: Problem, contenders: list[Contender]
) -> list[Result]:
    """A result each; ours has the ratio to the best model that is not accelerated, other accelerated models
    that to their own original."""
    by_name = {c.name: c for c in contenders}
    slow = [c for c in contenders if c.name.partition(", ")[0] != OURS and "accelerated" not in c.name]
    best = min(slow, key=lambda c: median(c.seconds))
    original = {fast_name(name, problem): name for name in problem.makers}
    found = []
    for c in contenders:
        result = Result(group, c.name, params, c.seconds, c.repeats)
        if c.name == OURS:
            result.extra |= {"best_baseline": best.name, "ratio": spread(ratios(best.seconds, c.seconds))}
        else:
            result.extra["ratio_to_ours"] = spread(ratios(c.seconds, by_name[OURS].seconds))
        if c.name in original:
            its = by_name[original[c.name]]
            result.extra["ratio_to_original"] = spread(ratios(its.seconds, c.seconds))
        found.append(result)
    return found


def line(group: str, problem: Problem, contenders: list[Contender], batch: int) -> str:
    by_name = {c.name: c.seconds for c in contenders}
    rates = ", ".join(f"{c.name} {number(batch / median(c.seconds))}" for c in contenders)
    gains = [
        f"{name} {median(ratios(by_name[name], by_name[fast_name(name, problem)])):.2f}x"
        for name in problem.makers
        if name in by_name
    ]
    return f"{group:<44} images/s: {rates}; over its original: {', '.join(gains)}"
