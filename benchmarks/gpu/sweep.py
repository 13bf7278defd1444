"""Tiles: those of neighborhood plans for both backends, and those of each Triton kernel. A tile counts only
if its results are those of the default tiles, up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from math import prod
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from vicinal import _neighborhood_op
from vicinal._neighborhood_tiles import choose_tiles
from vicinal.kernels import tiles

from . import cases
from .bench import outputs
from .cases import CASES, Case
from .timing import arguments, chosen, median_seconds, write

PLANS = {
    "dinat-56": ((1, 14), (1, 28), (2, 8), (4, 4), (2, 14), (4, 14), (4, 8), (8, 8), (14, 4)),
    "hdit-64": ((1, 16), (2, 8), (4, 4), (1, 32), (2, 16), (4, 16), (8, 8), (16, 4)),
    "video-stage4": ((1, 1, 16), (1, 4, 4), (1, 2, 8), (2, 4, 4), (1, 8, 8), (2, 4, 8), (4, 4, 4)),
    "sequence-32768": ((16,), (32,), (64,)),
    "sliding-1024": ((16,), (32,), (64,)),
}
SIDES = (16, 32, 64, 128)
TRITON = ("dinat-56", "hdit-64", "sliding-1024")


@contextmanager
def plan_tiles(tile: tuple[int, ...], key_tile: tuple[int, ...]) -> Iterator[None]:
    _neighborhood_op.plans.cache_clear()
    with mock.patch.object(_neighborhood_op, "choose_tiles", return_value=(tile, key_tile)):
        yield
    _neighborhood_op.plans.cache_clear()


@contextmanager
def triton_tile(kernel: str, tile: tiles.Tile) -> Iterator[None]:
    original: Callable[..., tiles.Tile] = tiles.choose

    def choose(name: str, *given: Any) -> tiles.Tile:
        return tile if name == kernel else original(name, *given)

    with mock.patch.object(tiles, "choose", choose):
        yield


def close(results: list[Tensor], usual: list[Tensor], dtype: torch.dtype) -> bool:
    """Sums of other orders: the largest difference is a few roundings of the largest value."""
    eps = torch.finfo(dtype).eps
    pairs = zip(results, usual, strict=True)
    return all(float((x - y).abs().max()) <= 8 * eps * float(y.abs().max()) for x, y in pairs)


class Trial:
    """A case, and its results under the default tiles."""

    def __init__(self, case: Case, backend: str) -> None:
        self.case = case
        self.solve = cases.ours(case, backend)
        self.given, self.table, self.dout = cases.tensors(case)
        self.usual = self.run(case.backward)

    def run(self, backward: bool) -> list[Tensor]:
        with torch.set_grad_enabled(backward):
            return outputs(self.solve, self.given, self.table, self.dout, backward)

    def measure(self) -> dict[str, Any]:
        """Median seconds, or why there are none."""
        try:
            if not close(self.run(self.case.backward), self.usual, self.case.dtype):
                return {"wrong": True}
            found = {"fwd": median_seconds(lambda: self.run(False), 0.1)}
            if self.case.backward:
                found["fwd+bwd"] = median_seconds(lambda: self.run(True), 0.2)
            return found
        except Exception as error:
            return {"failed": f"{type(error).__name__}: {error}"[:200]}


def sweep_plans(case: Case, backend: str) -> dict[str, Any]:
    trial = Trial(case, backend)
    axes = cases.geometry_of(case.where, len(case.space), case.bias)[0].on(case.space, case.space)
    result: dict[str, Any] = {"default": [*choose_tiles(backend, axes)], "times": {}}
    result["times"]["default"] = trial.measure()
    for tile in PLANS[case.name]:
        with plan_tiles(tile, tile):
            result["times"][str(tile)] = trial.measure()
    return result


def candidates(kernel: str) -> Iterator[tiles.Tile]:
    for block_q, block_k, warps, stages in product(SIDES, SIDES, (2, 4, 8), (1, 2, 3)):
        per_warp = block_q * block_k // warps
        if 256 <= per_warp <= 2048 and (stages == 1 or kernel in ("fwd", "q")):
            yield tiles.Tile(block_q, block_k, warps, stages)


def sweep_triton(case: Case, kernel: str) -> dict[str, Any]:
    case = replace(case, backward=kernel != "fwd")
    trial = Trial(case, "triton")
    result: dict[str, Any] = {"times": {"default": trial.measure()}}
    for tile in candidates(kernel):
        with triton_tile(kernel, tile):
            result["times"][str(tuple(tile))] = trial.measure()
    return result


def best(times: dict[str, Any]) -> str:
    direction = "fwd+bwd" if any("fwd+bwd" in t for t in times.values()) else "fwd"
    ranked = sorted((t[direction], name) for name, t in times.items() if direction in t)
    wrong = [name for name, t in times.items() if t.get("wrong")]
    text = ", ".join(f"{name} {seconds * 1e3:.3f} ms" for seconds, name in ranked[:4])
    return text + (f"; WRONG: {' '.join(wrong)}" if wrong else "")


def main() -> None:
    args = arguments("Tiles of neighborhood plans and of Triton's kernels")
    names = [f"plan {backend} {name}" for backend, name in product(("cuda", "triton"), PLANS)]
    names += [f"kernel {kernel} {name}" for kernel in ("fwd", "q", "kv", "bias") for name in TRITON]
    results: list[dict[str, Any]] = []
    for name in chosen(names, args):
        kind, what, case = name.split()
        of_case = CASES[case]
        found = (sweep_plans if kind == "plan" else sweep_triton)(of_case, what)
        results.append({"case": name, "tokens": prod(of_case.space), **found})
        print(f"{name}: {best(found['times'])}", flush=True)
        write(args.json, results)


if __name__ == "__main__":
    main()
