"""The CUDA kernels of linear attention on the emulator: problems of all backends, chosen so that every mask,
option, layout and way of cutting is there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from linear_problems import (
    BY_NAME,
    Problem,
    compare,
    error,
    exact,
    feature_maps,
    make,
    plain_errors,
    run,
    solve,
)

from vicinal import LinearState, linear_attention_step

from .conftest import HostBuild
from .emulated import Emulation
from .emulated_linear import DTYPES, emulated
from .test_attend import SCHEDULES

# Runs of 256 tokens and blocks above 64 of them, cut into pieces.
LONG = (
    Problem("long-blocks", 700, batch=1, heads=1, causal=True, block_size=300, state=True),
    Problem("long-blocks-packed", 420, batch=1, heads=1, causal=True, block_size=70, ends=(0, 280, 400)),
    Problem("long-inclusive", 300, batch=1, heads=1, causal=True, block_size=130, block_mode="inclusive"),
    Problem("long-runs", 530, batch=1, heads=1, causal=True, decay="step", steepness=0.02),
)
NAMED = BY_NAME | {p.name: p for p in LONG}
CHOSEN = (
    *("n1", "n17", "n1000", "causal-n1", "causal-n65", "dims-1-1", "dims-53-32", "dims-256-8"),
    *("causal-dims-128-64",),
    *("cross", "no-keys", "relu-param", "relu2", "exp", "identity", "softmax", "scale-eps"),
    *("const", "mask-all"),
    *("den-options", "shared", "one-qk-head", "state", "packed", "packed-rest", "causal-head-decay"),
    *("causal-steep-decay", "causal-retention", "causal-const-mask", "causal-no-decay-const", "causal-den"),
    *("causal-den-options", "causal-shared", "causal-state-head", "causal-packed", "causal-packed-rest"),
    *("causal-chunk-20", "causal-one-feature", "blocks-previous", "blocks-inclusive", "blocks-den-shared"),
    *("blocks-packed", "blocks-of-one", "huge-logits", "huge-exp", "layout-nchw", "layout-crop"),
    *("causal-layout-strided",),
    *(p.name for p in LONG),
)  # fmt: skip
HARD = ("den-options", "causal-packed", "blocks-packed", "layout-crop", "shared", "causal-den-options")


def emulate(name: str, dtype: torch.dtype, build: HostBuild, flavor: str, schedule: str) -> Emulation:
    """Checks outputs and all gradients by the rule of linear_problems.py."""
    problem = NAMED[name]
    tensors = make(problem, dtype)
    truth = exact(problem, tensors)
    plain = plain_errors(problem, tensors, truth)
    order, copies, seed = SCHEDULES[schedule]
    with emulated(build, flavor, order=order, copies=copies, seed=seed) as emulation:
        assert not compare(solve(problem, tensors, "emulated"), truth, plain, dtype)
    return emulation


@pytest.mark.parametrize("name", CHOSEN)
def test_problem(name: str, host_build: HostBuild) -> None:
    """Types and schedules take turns. 99 KiB: what the smallest device gives a block."""
    turn = CHOSEN.index(name)
    dtype, schedule = DTYPES[turn % 3], list(SCHEDULES)[turn % 5]
    found = emulate(name, dtype, host_build, "plain", schedule)
    assert found.conflicts == 0
    assert found.largest_block <= 99 * 1024


@pytest.mark.parametrize("name", ["causal-den", "blocks-previous"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_results_do_not_depend_on_the_schedule(name: str, dtype: torch.dtype, host_build: HostBuild) -> None:
    results = []
    for order, copies, seed in SCHEDULES.values():
        with emulated(host_build, "plain", order=order, copies=copies, seed=seed):
            results.append(solve(NAMED[name], make(NAMED[name], dtype), "emulated"))
    for result in results[1:]:
        assert all(torch.equal(result[n], x) for n, x in results[0].items())


@pytest.mark.parametrize("name", ["causal-n17", "causal-step-decay", "causal-retention", "causal-shared"])
def test_steps_are_the_full_run(name: str, host_build: HostBuild) -> None:
    problem = replace(NAMED[name], tokens=4, dim_v=70)
    tensors = {n: x.detach() for n, x in make(problem).items()}
    expected = run(problem, tensors, "reference")
    shape = (2, problem.heads, problem.width)
    z = torch.zeros(shape) if problem.normalize else None
    state, outs = LinearState(torch.zeros(*shape, problem.value_dim), z), []
    with emulated(host_build, order=2, copies=2):
        for t in range(problem.tokens):
            q, k, v = (tensors[n][:, t : t + 1] for n in "qkv")
            decay = tensors.get("decay")
            if decay is not None and decay.dim() == 3:
                decay = decay[:, t : t + 1]
            options: dict[str, Any] = {"normalize": problem.normalize, "scale": problem.scale, "decay": decay}
            maps = feature_maps(problem, tensors)
            outs.append(
                linear_attention_step(q, k, v, state, feature_map=maps, backend="emulated", **options)
            )
    assert error(torch.cat(outs, 1), expected["out"]) < 1e-5
    assert error(state.s, expected["s"]) < 1e-5
    assert state.z is None or error(state.z, expected["z"]) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", HARD)
def test_address_sanitizer(name: str, host_build: HostBuild) -> None:
    emulate(name, DTYPES[HARD.index(name) % 3], host_build, "asan", "forward_eager")


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["forward_eager", "random_1"])
@pytest.mark.parametrize("name", HARD[:4])
def test_race_detector(name: str, schedule: str, host_build: HostBuild) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        emulate(name, dtype, host_build, "tsan", schedule)
