"""Random neighborhood problems: every backend with kernels against float64, and the reference against the
loops over pairs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import neighborhood_brute_force as brute
import pytest
import torch
from backends_support import device_of, op_backends
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from neighborhood_problems import Problem
from neighborhood_solutions import make, run, solve, violations

from vicinal import Neighborhood, _backends

FUZZ = settings(
    max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


@st.composite
def problems(draw: Any) -> Problem:
    """Any combination of options that neighborhood_attention takes, on small grids.

    Some query reads two keys: the gradients of a softmax over one key are exactly 0, and the rule of rule.py
    would compare a kernel's rounding with nothing.
    """
    rank = draw(st.integers(1, 3))
    space = (draw(st.integers(4, 16)), *[draw(st.integers(1, (24, 9, 5)[rank - 1])) for _ in range(rank - 1)])
    border = draw(st.sampled_from(["shift", "truncate"]))
    axes = [_axis(draw, n, border, a == 0) for a, n in enumerate(space)]
    kernel, dilation, stride, causal = zip(*axes)
    where = Neighborhood(kernel, dilation, stride, causal, border)
    limited = all(isinstance(k, int) or -1 not in k for k in kernel)
    kv_heads, group = draw(st.sampled_from([(1, 1), (2, 1), (3, 1), (1, 2), (2, 2), (1, 4)]))
    q_length = draw(st.integers(2, space[0])) if rank == 1 and border == "truncate" else 0
    return Problem(
        "fuzz",
        space,
        where,
        batch=draw(st.integers(1, 3)),
        heads=kv_heads * group,
        kv_heads=kv_heads,
        dim=draw(st.integers(1, 24)),
        dim_v=draw(st.integers(1, 24)),
        q_length=q_length,
        scale=draw(st.sampled_from([None, None, 1.0, 0.3, 0.0])),
        bias=limited and draw(st.booleans()),
        extra=draw(st.sampled_from([0, 0, 1, 3])),
        padding=draw(st.sampled_from(["", "", "bool", "sample"])),
        dropout_p=draw(st.sampled_from([0.0, 0.0, 0.3])),
        layout=draw(st.sampled_from(["contiguous", "transposed", "crop"])),
    )


def _axis(draw: Any, length: int, border: str, first: bool) -> tuple[Any, int, int, bool]:
    """Kernel, dilation, stride and causality; the first axis has windows of two keys or more."""
    causal = draw(st.booleans())
    least = 2 if first else 1
    if border == "shift":
        k = draw(st.integers(least, length)) if length > least else length
        return k, draw(st.integers(1, length // k)), draw(st.integers(1, k)), causal
    d = draw(st.integers(1, 2 if first else length))
    if draw(st.booleans()):
        k = draw(st.integers(least, length + 3))
        return k, d, draw(st.integers(1, k)), causal
    left, right = draw(st.integers(-1, 6)), draw(st.integers(-1, 6))
    if first and left == right == 0:
        left = 1
    if causal:
        right, left = 0, left if left else 1
        return (left, right), d, draw(st.integers(1, left + 1 if left > 0 else 4)), causal
    most = min(2 * left + 1 if left >= 0 else 9, 2 * right + 2 if right >= 0 else 9)
    return (left, right), d, draw(st.integers(1, most)), causal


@FUZZ
@given(problem=problems())
def test_the_reference_agrees_with_loops_over_pairs(problem: Problem) -> None:
    problem = replace(problem, dropout_p=0.0)
    tensors = make(problem, torch.float64)
    for x, y in zip(run(problem, tensors, "reference"), brute.solve(problem, tensors)):
        torch.testing.assert_close(x.detach(), y, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", op_backends())
def test_backends_agree_with_float64(backend: str, dtype: torch.dtype) -> None:
    row, device = next(r for r in _backends.rows("neighborhood") if r.backend == backend), device_of(backend)
    if dtype not in row.dtypes or (device, dtype) in row.wrong:
        pytest.skip(f"{backend} does not take {dtype} on {device}")

    @FUZZ
    @given(problem=problems())
    def agrees(problem: Problem) -> None:
        assert not violations(problem, dtype, backend, device)
        tensors = make(problem, dtype, device)
        first, again = solve(problem, tensors, backend), solve(problem, tensors, backend)
        assert all(torch.equal(x, again[n]) for n, x in first.items())

    agrees()
