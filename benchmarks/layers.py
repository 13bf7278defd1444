"""Layers of sequence, graph and image models before and after `vicinal.accelerate`: inference, and forward
with backward, in float32.

The baselines are the layers as they are (vicinal's references in plain PyTorch, or other libraries' modules)
and the same compiled by torch.compile; all on the same weights. Before anything is timed, the outputs are
compared.
"""

from __future__ import annotations

import copy
import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import vicinal
from vicinal.models import Mamba2Config, Mamba2Mixer, PerformerAttention, lra_text
from vicinal.models.hnet import HNetAttention
from vicinal.models.lra import ClassifierBlock
from vicinal.models.mamba2 import Packing

from . import torchvision_operators
from .measure import Contender, interleave, median, ratios
from .results import Report, Result
from .table import number
from .windowed import OURS, reason, spread

BASELINES = ("eager", "compiled")
CLOSE = 1e-4  # of the largest output


class Packed(nn.Module):
    """A layer on packed sequences: [T, C] -> [T, C]."""

    def __init__(self, layer: nn.Module, ends: list[int]) -> None:
        super().__init__()
        self.layer = layer
        self.packing = Packing.of(torch.tensor(ends, dtype=torch.int32), ends[-1])

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, self.packing)


class Graphs(nn.Module):
    """A layer on 64 graphs of 10 to 500 nodes: [T, C] -> [T, C]."""

    def __init__(self, layer: nn.Module, batch_vector: bool) -> None:
        super().__init__()
        self.layer = layer
        sizes = torch.tensor(graph_sizes())
        self.batch = torch.repeat_interleave(torch.arange(64), sizes) if batch_vector else None
        self.ends = torch.cat([torch.zeros(1), sizes.cumsum(0)]).to(torch.int32)

    def forward(self, x: Tensor) -> Tensor:
        if self.batch is None:
            return self.layer(x, self.ends)
        return self.layer(x, torch.zeros(2, 0, dtype=torch.long), self.batch)


def graph_sizes() -> list[int]:
    drawn = torch.randint(10, 501, (64,), generator=torch.Generator().manual_seed(0))
    return drawn.tolist()


def gps() -> nn.Module:
    layer = importlib.import_module("torch_geometric.nn").GPSConv(64, None, heads=4, norm="layer_norm")
    return Graphs(layer, True)


def lite_mla(width: int) -> nn.Module:
    torchvision_operators.declare()
    block = importlib.import_module("timm.models.efficientvit_mit").EfficientVitBlock(width, head_dim=16)
    assert isinstance(block, nn.Module)
    return block


def classifier(attention: str) -> nn.Module:
    return ClassifierBlock(lra_text(attention=attention, max_len=4095))


# name -> layer, shape of its input
PROBLEMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mamba2-1024": (lambda: Packed(Mamba2Mixer(Mamba2Config(1024)), [0, 2048]), (2048, 1024)),
    "mamba2-packed": (lambda: Packed(Mamba2Mixer(Mamba2Config(1024)), [0, 300, 900, 2048]), (2048, 1024)),
    "hnet-window": (lambda: Packed(HNetAttention(1024, 16, 32, 1023), [0, 2048]), (2048, 1024)),
    "lra-elu1": (lambda: classifier("elu1"), (1, 4096, 256)),
    "lra-favor": (lambda: classifier("favor"), (1, 4096, 256)),
    "lra-local": (lambda: classifier("local"), (1, 4096, 256)),
    "lra-longformer": (lambda: classifier("longformer"), (1, 4096, 256)),
    "efficientvit-b1-64x64": (lambda: lite_mla(128), (1, 128, 64, 64)),
    "efficientvit-b1-14x14": (lambda: lite_mla(128), (8, 128, 14, 14)),
    "gps-softmax": (gps, (sum(graph_sizes()), 64)),
    "gps-performer": (lambda: Graphs(PerformerAttention(64, 4), False), (sum(graph_sizes()), 64)),
}


def inference(layer: nn.Module, x: Tensor) -> Callable[[], Any]:
    def step() -> Tensor:
        with torch.no_grad():
            out = layer(x)
        assert isinstance(out, Tensor)
        return out

    return step


def training(layer: nn.Module, x: Tensor) -> Callable[[], Any]:
    """Forward and backward to the input and the parameters."""
    leaf = x.clone().requires_grad_()
    wanted = [leaf, *layer.parameters()]
    upstream = torch.randn(layer(leaf).shape, generator=torch.Generator().manual_seed(1))

    def step() -> Any:
        return torch.autograd.grad(layer(leaf), wanted, upstream, allow_unused=True)

    return step


def run(
    report: Report, threads: tuple[int, ...], seconds: float, quick: bool, wanted: list[str] | None = None
) -> Iterator[str]:
    """Time every layer whose name has a part that is `wanted` (None: all); yields a line for each."""
    for problem in PROBLEMS:
        if wanted is None or any(part in problem for part in wanted):
            yield from run_problem(report, problem, threads, seconds, quick)


def run_problem(
    report: Report, problem: str, threads: tuple[int, ...], seconds: float, quick: bool
) -> Iterator[str]:
    """Time one layer."""
    build, shape = PROBLEMS[problem]
    torch.manual_seed(0)
    try:
        eager = build().eval()
    except ImportError as error:
        report.unavailable.append({"group": f"layers/{problem}", "impl": "all", "reason": reason(error)})
        yield f"layers/{problem}  not available: {reason(error)}"
        return
    fast, x = copy.deepcopy(eager), torch.randn(shape)
    replaced = vicinal.accelerate(fast).replaced
    with torch.no_grad():
        out = eager(x)
        error_size = float((fast(x) - out).abs().max() / out.abs().max())
    if not replaced or not error_size < CLOSE:
        complaint = f"{OURS} differs from eager by {error_size:.1e} of the largest output"
        report.refused.append({"group": f"layers/{problem}", "reason": complaint})
        yield f"layers/{problem}  REFUSED: {complaint}"
        return
    found = {OURS: fast, "eager": eager}
    if not quick:
        found["compiled"] = torch.compile(copy.deepcopy(eager))  # type: ignore[assignment]
    for count in threads:
        torch.set_num_threads(count)
        for direction, prepare in (("inference", inference), ("fwd+bwd", training)):
            group = f"layers/{problem}/float32/{direction}/{count}t"
            ready = contenders(report, group, found, functools.partial(prepare, x=x))
            timed = interleave(ready, seconds=seconds, rounds=(3, 10) if quick else (7, 40)).contenders
            params = {"problem": problem, "dtype": "float32", "direction": direction}
            report.results += results(group, {**params, "threads": count, "device": "cpu"}, timed)
            yield line(group, timed)


def contenders(
    report: Report, group: str, found: dict[str, nn.Module], prepare: Callable[[nn.Module], Callable[[], Any]]
) -> list[Contender]:
    """Those that run once; why the others do not is in the report."""
    ready = []
    for name, layer in found.items():
        try:
            call = prepare(layer)
            call()
        except Exception as error:  # a compiler fails in any way
            if name == OURS:
                raise
            report.unavailable.append({"group": group, "impl": name, "reason": reason(error)})
        else:
            ready.append(Contender(name, call))
    return ready


def results(group: str, params: dict[str, Any], timed: list[Contender]) -> list[Result]:
    """A result each; ours has the ratio to the best of the others."""
    mine = next(c for c in timed if c.name == OURS).seconds
    best = min((c for c in timed if c.name != OURS), key=lambda c: median(c.seconds))
    collected = []
    for c in timed:
        result = Result(group, c.name, params, c.seconds, c.repeats)
        if c.name == OURS:
            result.extra |= {"best_baseline": best.name, "ratio": spread(ratios(best.seconds, mine))}
        else:
            result.extra["ratio_to_ours"] = spread(ratios(c.seconds, mine))
        collected.append(result)
    return collected


def line(group: str, timed: list[Contender]) -> str:
    mine = next(c for c in timed if c.name == OURS).seconds
    rest = ", ".join(f"{median(ratios(c.seconds, mine)):.2f}x {c.name}" for c in timed if c.name != OURS)
    return f"{group:<52} {number(1e3 * median(mine))} ms  {rest}"
