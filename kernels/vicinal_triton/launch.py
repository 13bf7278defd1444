"""The one place that launches a kernel: tests replace `run` to see what would be launched."""

from typing import Any


def run(kernel: Any, grid: tuple[int, ...], args: dict[str, Any], warps: int, stages: int = 1) -> None:
    kernel[grid](**args, num_warps=warps, num_stages=stages)
