"""Whole models before and after `vicinal.drop_in.accelerate`, inference and training steps: Swin-T and
DiNAT-Mini at 224 pixels.

The baselines are the reference models of vicinal.models, which compute what the official releases do (DiNAT
gathers the keys of every window), and for Swin-T timm's, with its own fused attention; all on the same
weights. Before anything is timed, the outputs are compared.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vicinal.drop_in import accelerate
from vicinal.models import DiNAT, SwinTransformer, dinat_mini, swin_tiny

from . import torchvision_operators
from .measure import Contender, interleave, median, ratios
from .results import Report, Result
from .table import number
from .windowed import OURS, spread

BASELINES = ("reference", "timm")
PROBLEMS: dict[str, Callable[[], nn.Module]] = {
    "swin-t": lambda: SwinTransformer(swin_tiny()),
    "dinat-mini": lambda: DiNAT(dinat_mini()),
}


def swin_of_timm() -> nn.Module:
    torchvision_operators.declare()
    import timm

    torch.manual_seed(0)
    model: nn.Module = timm.create_model("swin_tiny_patch4_window7_224", drop_path_rate=0.0)
    return model


def models(problem: str) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Ours and the baselines on the same weights, and why a baseline is missing."""
    torch.manual_seed(0)
    reference = PROBLEMS[problem]()
    fast = copy.deepcopy(reference)
    accelerate(fast)
    found: dict[str, nn.Module] = {OURS: fast, "reference": reference}
    missing: dict[str, str] = {}
    if problem != "swin-t":
        return found, missing
    try:
        other = swin_of_timm()
        accelerated_timm = copy.deepcopy(other)
        accelerate(accelerated_timm)
        found |= {"timm": other, "timm, accelerated": accelerated_timm}
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision beside another build of torch
        missing["timm"] = f"{type(error).__name__}: {error}"[:200]
    return found, missing


def inference(model: nn.Module, images: Tensor) -> Callable[[], Any]:
    model.eval()

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


def disagreement(found: dict[str, nn.Module], images: Tensor) -> str:
    """Why the accelerated models are not the originals, or an empty text: float32 outputs within 1e-4 of
    their size.
    """
    with torch.inference_mode():
        outs = {name: model.eval()(images) for name, model in found.items()}
    for fast, slow in ((OURS, "reference"), ("timm, accelerated", "timm")):
        if fast in outs:
            error = float((outs[fast] - outs[slow]).abs().max() / outs[slow].abs().max())
            if not error < 1e-4:
                return f"{fast} differs from {slow} by {error:.1e} of the largest output"
    return ""


def run(
    report: Report, threads: tuple[int, ...], seconds: float, quick: bool, wanted: list[str] | None = None
) -> Iterator[str]:
    """Time every model whose name has a part that is `wanted` (None: all); yields a line for each batch size
    and step."""
    for problem in PROBLEMS:
        if wanted is None or any(part in problem for part in wanted):
            yield from run_problem(report, problem, threads, seconds, quick)


def run_problem(
    report: Report, problem: str, threads: tuple[int, ...], seconds: float, quick: bool
) -> Iterator[str]:
    """Time one model."""
    found, missing = models(problem)
    report.unavailable += [{"group": "models", "impl": n, "reason": why} for n, why in missing.items()]
    if complaint := disagreement(found, torch.randn(1, 3, 224, 224)):
        report.refused.append({"group": f"models/{problem}", "reason": complaint})
        yield f"models/{problem}  REFUSED: {complaint}"
        return
    for count in threads:
        torch.set_num_threads(count)
        for batch in (1,) if quick else (1, 8):
            images = torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(0))
            name = f"{problem}-b{batch}"
            for direction, prepare in (("inference", inference), ("training", training)):
                group = f"models/{name}/float32/{direction}/{count}t"
                ready = [Contender(impl, prepare(model, images)) for impl, model in found.items()]
                timed = interleave(ready, seconds=seconds, rounds=(3, 5) if quick else (7, 40))
                params = {"problem": name, "dtype": "float32", "direction": direction}
                more = {"threads": count, "device": "cpu", "batch": batch}
                report.results += results(group, {**params, **more}, timed.contenders)
                yield line(group, timed.contenders, batch)


def results(group: str, params: dict[str, Any], contenders: list[Contender]) -> list[Result]:
    """A result each; ours has the ratio to the best model that is not accelerated."""
    by_name = {c.name: c for c in contenders}
    mine = by_name[OURS].seconds
    best = min((by_name[n] for n in BASELINES if n in by_name), key=lambda c: median(c.seconds))
    found = []
    for c in contenders:
        result = Result(group, c.name, params, c.seconds, c.repeats)
        if c.name == OURS:
            result.extra |= {"best_baseline": best.name, "ratio": spread(ratios(best.seconds, mine))}
        else:
            result.extra["ratio_to_ours"] = spread(ratios(c.seconds, mine))
        found.append(result)
    return found


def line(group: str, contenders: list[Contender], batch: int) -> str:
    rates = ", ".join(f"{c.name} {number(batch / median(c.seconds))}" for c in contenders)
    return f"{group:<44} images/s: {rates}"
