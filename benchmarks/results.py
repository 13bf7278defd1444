"""Results as JSON in pytest-benchmark's schema, so its tools read them; what only we know is under
extra_info.
"""

from __future__ import annotations

import datetime
import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vicinal import __version__

from . import machine
from .measure import percentile

SCHEMA_VERSION = "5.2.3"  # of pytest-benchmark, whose fields these are


@dataclass
class Result:
    """One contender in one group of interleaved contenders."""

    group: str
    contender: str
    params: dict[str, Any]
    seconds: list[float]
    repeats: int
    extra: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        name = f"{self.group}[{self.contender}]"
        return {
            "group": self.group,
            "name": name,
            "fullname": f"benchmarks::{name}",
            "params": {**self.params, "impl": self.contender},
            "param": self.contender,
            "extra_info": self.extra,
            "options": {"timer": "perf_counter", "disable_gc": True, "interleaved": True},
            "stats": stats(self.seconds, self.repeats),
        }


def stats(seconds: list[float], repeats: int) -> dict[str, Any]:
    """pytest-benchmark's statistics, and p20 and p80."""
    q1, q3 = percentile(seconds, 25), percentile(seconds, 75)
    inner = [s for s in seconds if q1 - 1.5 * (q3 - q1) <= s <= q3 + 1.5 * (q3 - q1)]
    mean = statistics.fmean(seconds)
    deviation = statistics.stdev(seconds) if len(seconds) > 1 else 0.0
    outside = sum(abs(s - mean) > deviation for s in seconds)
    return {
        "min": min(seconds),
        "max": max(seconds),
        "mean": mean,
        "stddev": deviation,
        "rounds": len(seconds),
        "median": percentile(seconds, 50),
        "iqr": q3 - q1,
        "q1": q1,
        "q3": q3,
        "iqr_outliers": len(seconds) - len(inner),
        "stddev_outliers": outside,
        "outliers": f"{outside};{len(seconds) - len(inner)}",
        "ld15iqr": min(inner),
        "hd15iqr": max(inner),
        "ops": 1 / mean,
        "total": sum(seconds),
        "iterations": repeats,
        "p20": percentile(seconds, 20),
        "p80": percentile(seconds, 80),
    }


@dataclass
class Report:
    """A run: what was measured, what could not run and why, and the cases that were refused because of wrong
    results.
    """

    device: str
    results: list[Result] = field(default_factory=list)
    unavailable: list[dict[str, str]] = field(default_factory=list)
    refused: list[dict[str, str]] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return {
            "machine_info": machine.machine_info(self.device),
            "commit_info": machine.commit_info(),
            "benchmarks": [result.as_json() for result in self.results],
            "unavailable": self.unavailable,
            "refused": self.refused,
            "datetime": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "vicinal": __version__,
            "version": SCHEMA_VERSION,
        }

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.as_json(), indent=1) + "\n")


def default_path(name: str, device: str) -> Path:
    return machine.RESULTS / machine.machine_name(device) / f"{name}-{device}.json"


def load(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text())
    if not isinstance(found, dict) or "benchmarks" not in found:
        raise ValueError(f"{path} is not a benchmark result: it has no list of benchmarks")
    return found
