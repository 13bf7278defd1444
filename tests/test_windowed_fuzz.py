"""Random windowed problems: every backend with kernels against float64, and the plan against the loops over
pairs.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backends_support import device_of, op_backends
from brute_force import BruteForce
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from problems import Problem, make, run, solve, violations

from vicinal import Windows, _backends

INF = float("inf")
FUZZ = settings(
    max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


@st.composite
def problems(draw: Any) -> Problem:
    """Any combination of options that windowed_attention takes, on small grids.

    Some window holds two keys of one region: the gradients of a softmax over one key are exactly 0, and the
    rule of problems.py would compare a kernel's rounding with nothing.
    """
    rank = draw(st.integers(1, 3))
    space = (draw(st.integers(6, 12)), *[draw(st.integers(1, (24, 7, 4)[rank - 1])) for _ in range(rank - 1)])
    window = (draw(st.integers(3, 7)), *[draw(st.integers(1, min(n + 2, 4))) for n in space[1:]])
    kind = draw(st.sampled_from(["block", "block", "block", "grid", "overlap", "pooled", "groups"]))
    heads = draw(st.integers(1, 3)) if kind != "groups" else draw(st.integers(2, 4))
    windows, q_space = _windows(draw, kind, space, window, heads)
    edge = windows.edge
    extra = draw(st.sampled_from([0, 0, 1, 3]))
    cosine = draw(st.integers(0, 3)) == 0
    biases = ["", "q-k", "k-q", "dense", "dense4", "index"] + (
        [] if kind in ("overlap", "pooled") else ["abs"]
    )
    return Problem(
        "fuzz",
        space,
        windows,
        batch=draw(st.integers(1, 3)),
        heads=heads,
        dim=draw(st.integers(1 + cosine, 20)),
        dim_v=draw(st.integers(1, 20)),
        q_space=q_space,
        scale=None if cosine else draw(st.sampled_from([None, 1.0, 0.3, 0.0])),
        bias=draw(st.sampled_from(biases)) if kind != "groups" else "",
        cosine=cosine,
        edge_k=edge == "const" and draw(st.booleans()),
        edge_v=edge == "const" and draw(st.booleans()),
        extra=extra,
        extra_bias=extra > 0 and draw(st.booleans()),
        padding=draw(st.sampled_from(["", "", "bool", "float", "sample"])),
        mask="" if kind == "groups" else draw(st.sampled_from(["", "", "windows", "samples", "heads"])),
        activation=draw(st.sampled_from(["softmax", "softmax", "softmax", "relu2", "relu", "none"])),
        dropout_p=draw(st.sampled_from([0.0, 0.0, 0.3])),
        layout=draw(st.sampled_from(["contiguous", "transposed", "crop"])),
    )


def _windows(draw: Any, kind: str, space: Any, window: Any, heads: int) -> tuple[Windows, Any]:
    """The windows, and the grid of the queries where it is another."""
    edge = draw(st.sampled_from(["mask", "zero", "const"]))
    side = draw(st.sampled_from(["end", "center"]))
    shift = tuple(draw(st.integers(0, w - 1)) for w in window)
    mask_value = draw(st.sampled_from([-100.0, -200.0, -INF, -0.5]))
    if kind == "grid":
        return Windows(window, partition="grid", edge=edge, pad_side=side), None
    if kind == "overlap":
        kv = tuple(w + draw(st.integers(0, 3)) for w in window)
        return Windows(window, kv_size=kv, edge=edge), None
    if kind == "pooled":
        q_window = tuple(draw(st.integers(1, w)) for w in window)
        counts = [-(-n // w) for n, w in zip(space, window)]
        return Windows(window, q_size=q_window, edge=edge), tuple(n * w for n, w in zip(counts, q_window))
    if kind == "groups":
        first = draw(st.integers(1, heads - 1))
        other = tuple(draw(st.sampled_from([-1, 1, 2])) for _ in window)
        return Windows(None, head_groups=((first, window, shift), (heads - first, other)), edge=edge), None
    order = draw(st.sampled_from(["pad_roll", "roll_pad"])) if side == "end" else "pad_roll"
    return Windows(
        window, shift=shift, edge=edge, mask_value=mask_value, pad_order=order, pad_side=side
    ), None


@FUZZ
@given(problem=problems())
def test_the_reference_agrees_with_loops_over_pairs(problem: Problem) -> None:
    if problem.dropout_p:
        problem = Problem(**{**problem.__dict__, "dropout_p": 0.0})
    tensors = make(problem, torch.float64)
    for x, y in zip(run(problem, tensors, "reference"), BruteForce(problem, tensors).solve()):
        torch.testing.assert_close(x.detach(), y, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", op_backends())
def test_backends_agree_with_float64(backend: str, dtype: torch.dtype) -> None:
    row = next(r for r in _backends.rows("windowed") if r.backend == backend)

    @FUZZ
    @given(problem=problems())
    def agrees(problem: Problem) -> None:
        features = {problem.activation, "dropout" if problem.dropout_p else ""}
        if dtype not in row.dtypes or features & row.missing:
            return
        device = device_of(backend)
        assert not violations(problem, dtype, backend, device)
        tensors = make(problem, dtype, device)
        first, again = solve(problem, tensors, backend), solve(problem, tensors, backend)
        assert all(torch.equal(x, again[n]) for n, x in first.items())

    agrees()
