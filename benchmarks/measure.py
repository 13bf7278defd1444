"""Interleaved timing: rounds in one process, in alternating order, with a probe of the machine's speed in
every round.

A shared machine's speed changes by more than the differences that matter, and it changes for everything at
once. So no time is compared with one from another minute: each round times every contender once, a ratio is
formed within its round, and the reported ratio is the median over rounds.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

MIN_SAMPLE = 2e-3  # seconds: shorter calls are repeated within a sample


@dataclass
class Contender:
    """Something to time, and its seconds per call, one entry a round."""

    name: str
    call: Callable[[], Any]
    repeats: int = 1
    seconds: list[float] = field(default_factory=list)


@dataclass
class Rounds:
    """What interleaving gave: contenders with their samples, and the probe's GFLOP/s a round (empty without
    one).
    """

    contenders: list[Contender]
    probe: list[float]

    def __getitem__(self, name: str) -> list[float]:
        return next(c.seconds for c in self.contenders if c.name == name)


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear between the closest ranks."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def median(values: Sequence[float]) -> float:
    return percentile(values, 50)


def ratios(other: Sequence[float], ours: Sequence[float]) -> list[float]:
    """Per round: how many times as long the other took."""
    return [a / b for a, b in zip(other, ours, strict=True)]


def once(call: Callable[[], Any], repeats: int, device: str) -> float:
    """Seconds per call of `repeats` calls; on a GPU, the device's own time."""
    if device == "cpu":
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) / repeats
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(repeats):
        call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) * 1e-3 / repeats


@contextmanager
def without_gc() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def interleave(
    contenders: list[Contender],
    *,
    seconds: float,
    rounds: tuple[int, int],
    device: str = "cpu",
    probe: Callable[[], float] | None = None,
) -> Rounds:
    """Time contenders in rounds for about `seconds`, with at least rounds[0] and at most rounds[1] rounds."""
    with without_gc():
        estimate = 0.0
        for c in contenders:
            c.call()  # lazy initialisation
            took = once(c.call, 1, device)
            c.repeats = max(1, min(1000, round(MIN_SAMPLE / took)))
            estimate += took * c.repeats
        number = max(rounds[0], min(rounds[1], int(seconds / max(estimate, 1e-9))))
        probed = []
        for index in range(number):
            if probe is not None:
                probed.append(probe())
            for c in contenders if index % 2 == 0 else reversed(contenders):
                c.seconds.append(once(c.call, c.repeats, device))
    return Rounds(contenders, probed)


def fma_probe(device: str, threads: int) -> Callable[[], float] | None:
    """Float32 GFLOP/s of multiply-adds out of registers, on as many threads as the kernels use; CPUs only."""
    try:
        from vicinal import _C
    except ImportError:
        return None
    return (lambda: float(_C.fma_probe(0.01, threads))) if device == "cpu" else None
