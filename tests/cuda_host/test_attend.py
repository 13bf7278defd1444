"""The CUDA attend kernels on the emulator: the problems of all backends, and those that tiles make hard."""

from __future__ import annotations

import pytest
import torch
from problems import BY_NAME, PROBLEMS, Problem, make, solve, violations

from vicinal import Windows

from .conftest import HostBuild
from .emulated import Emulation, emulated

# order, copies, seed of the emulator: see NamedSchedule in driver.h
SCHEDULES = {"forward_eager": (0, 0, 1), "reverse_lazy": (1, 1, 1)}
SCHEDULES |= {f"random_{seed}": (2, 2, seed) for seed in (1, 2, 3)}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# Several tiles of queries and keys, columns shared by blocks, one buffer for want of memory, every alignment.
TILES = (
    Problem("two-tiles", (9, 9), Windows(9), dim=30, dim_v=18, batch=1, bias="q-k"),
    Problem("three-tiles", (140,), Windows(70, shift=3), dim=32, heads=1, batch=1, bias="k-q", dropout_p=0.2),
    Problem(
        "tiles-extra",
        (70,),
        Windows(40, edge="const"),
        dim=10,
        edge_k=True,
        edge_v=True,
        extra=30,
        bias="q-k",
    ),
    Problem("tiles-packed", (2, 40), Windows((2, 40)), dim=40, batch=1, bias="dense", layout="qkvpacked"),
    Problem("wide", (8, 8), Windows(8), heads=1, dim=122, dim_v=77, batch=1, bias="q-k"),
    Problem("wider-values", (40,), Windows(40), heads=1, dim=16, dim_v=200, batch=1, bias="q-k"),
    Problem("wider-keys", (40,), Windows(40), heads=1, dim=250, dim_v=130, batch=1, mask="heads"),
    Problem("crop-odd", (6, 6), Windows(6), dim=53, dim_v=21, batch=1, layout="crop"),
    Problem("crop-even", (6, 6), Windows(6), dim=54, dim_v=22, batch=1, layout="crop"),
    Problem("transposed-dense", (9, 8), Windows((9, 8)), dim=24, bias="dense", layout="transposed", batch=1),
)
ALL = (*PROBLEMS, *TILES)
HARD = [
    *(TILES[i].name for i in range(len(TILES))),
    *(
        "2d-shift-overhang",
        "3d-overhang",
        "overlap-const",
        "edge-const-extra",
        "padding-sample-extra",
        "mask-extra",
    ),
    *("cosine-stripes", "relu2-padding-extra", "dropout-extra", "crop-overlap", "pooled-overhang"),
]
NAMED = BY_NAME | {p.name: p for p in TILES}


def emulate(
    problem: Problem, dtype: torch.dtype, build: HostBuild, flavor: str, schedule: str, shared: int
) -> Emulation:
    """Checks the outputs and all gradients by the one rule of problems.py."""
    order, copies, seed = SCHEDULES[schedule]
    with emulated(build, flavor, order=order, copies=copies, seed=seed, shared_memory=shared) as emulation:
        assert not violations(problem, dtype, "emulated")
    return emulation


@pytest.mark.parametrize("problem", ALL, ids=str)
def test_problem(problem: Problem, host_build: HostBuild) -> None:
    """Types and schedules take turns."""
    turn = ALL.index(problem)
    dtype, schedule = DTYPES[turn % 3], list(SCHEDULES)[turn % 5]
    assert emulate(problem, dtype, host_build, "plain", schedule, 227 * 1024).conflicts == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", TILES, ids=str)
def test_little_shared_memory(problem: Problem, dtype: torch.dtype, host_build: HostBuild) -> None:
    """Smaller tiles, one buffer: float32 with what the smallest device has (99 KiB), the others with less."""
    limit = {2: 56, 4: 99}[dtype.itemsize] * 1024
    assert emulate(problem, dtype, host_build, "plain", "reverse_lazy", limit).largest_block <= limit


@pytest.mark.parametrize("name", ["two-tiles", "tiles-extra", "wider-keys", "dropout-extra"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_results_do_not_depend_on_the_schedule(name: str, dtype: torch.dtype, host_build: HostBuild) -> None:
    results = []
    for order, copies, seed in SCHEDULES.values():
        with emulated(host_build, "plain", order=order, copies=copies, seed=seed):
            results.append(solve(NAMED[name], make(NAMED[name], dtype), "emulated"))
    for result in results[1:]:
        assert all(torch.equal(result[n], x) for n, x in results[0].items())


@pytest.mark.parametrize(("dim", "kibibytes"), [(32, 24), (64, 40), (96, 56), (128, 72), (256, 136)])
def test_shared_memory(dim: int, kibibytes: int, host_build: HostBuild) -> None:
    """What a 7 x 7 window needs, forward and backward. It decides how many blocks a multiprocessor with 227
    KiB holds: 9, 5, 4, 3 and 1."""
    problem = Problem("7 x 7", (7, 7), Windows(7), heads=1, dim=dim, batch=1)
    used = emulate(problem, torch.bfloat16, host_build, "plain", "forward_eager", 227 * 1024).largest_block
    assert used <= kibibytes * 1024


@pytest.mark.slow
@pytest.mark.parametrize("name", HARD)
def test_address_sanitizer(name: str, host_build: HostBuild) -> None:
    dtype = DTYPES[HARD.index(name) % 3]
    emulate(NAMED[name], dtype, host_build, "asan", "forward_eager", 227 * 1024)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["forward_eager", "random_1"])
@pytest.mark.parametrize("name", ["two-tiles", "tiles-extra", "wider-keys", "crop-odd", "dropout-extra"])
def test_race_detector(name: str, schedule: str, host_build: HostBuild) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        emulate(NAMED[name], dtype, host_build, "tsan", schedule, 227 * 1024)
