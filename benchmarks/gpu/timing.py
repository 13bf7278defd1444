"""Device time with a cold cache, and cases that stop in time and can be resumed."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

FLUSH = 256 * 2**20  # bytes: above the second-level cache of every GPU


def median_seconds(call: Callable[[], Any], seconds: float = 0.3, least: int = 10, most: int = 100) -> float:
    """Median device time of a call; between two calls a buffer larger than the cache is written."""
    return median_of([call], seconds, least, most)[0]


def median_of(
    calls: list[Callable[[], Any]], seconds: float = 0.3, least: int = 10, most: int = 100
) -> list[float]:
    """The same for several calls, in rounds, so that the clocks drift for all of them."""
    flush = torch.empty(FLUSH, dtype=torch.uint8, device="cuda")
    for call in calls:
        call()
        call()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for call in calls:
        call()
    torch.cuda.synchronize()
    once = time.perf_counter() - began
    rounds = max(least, min(most, int(seconds * len(calls) / max(once, 1e-6))))
    events: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, of_call in zip(calls, events, strict=True):
            flush.zero_()
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            call()
            end.record()
            of_call.append((begin, end))
    torch.cuda.synchronize()
    times = [sorted(begin.elapsed_time(end) * 1e-3 for begin, end in of_call) for of_call in events]
    return [t[len(t) // 2] for t in times]


def arguments(description: str) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=description)
    p.add_argument("--json", type=Path, required=True)
    p.add_argument("--minutes", type=float, default=8.0)
    p.add_argument("--only", nargs="+", metavar="NAME")
    p.add_argument("--after", metavar="NAME")
    return p.parse_args()


def chosen(names: Iterable[str], args: argparse.Namespace) -> Iterator[str]:
    """The names that are asked for, while there is time; says where to go on."""
    began, reached = time.monotonic(), args.after is None
    wanted = []
    for name in names:
        if reached and (not args.only or any(part in name for part in args.only)):
            wanted.append(name)
        reached = reached or name == args.after
    longest, last = 0.0, args.after
    for at, name in enumerate(wanted):
        left = 60 * args.minutes - (time.monotonic() - began)
        if left < longest:
            print(f"{len(wanted) - at} cases left: go on with --after {last}", flush=True)
            return
        start = time.monotonic()
        yield name
        longest, last = max(longest, time.monotonic() - start), name


def write(path: Path, results: list[dict[str, Any]]) -> None:
    device = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    path.write_text(json.dumps({"device": device, "results": results}, indent=1))
