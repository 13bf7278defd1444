"""Every backend of linear attention against float64: all problems, outputs and gradients, by the rule of
linear_problems.py.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from backends_support import DTYPES, device_of, reason_against, short
from linear_problems import (
    BY_NAME,
    PROBLEMS,
    Problem,
    compare,
    error,
    exact,
    make,
    plain_errors,
    run,
    solve,
    violations,
)
from torch import Tensor

from vicinal import LinearState, _backends, ema_scan, linear_attention, linear_attention_step

OPS = [name for name in _backends.ORDER if name != "reference"]
needs_cpu = pytest.mark.skipif(bool(reason_against("cpu", family="linear")), reason="no cpu backend")


def parameter(backend: str, *values: Any, dtype: torch.dtype = torch.float32, name: str = "") -> Any:
    reason = reason_against(backend, dtype, "linear")
    marks = [pytest.mark.skip(reason=f"{backend}: {reason}")] if reason else []
    return pytest.param(backend, *values, marks=marks, id=name or backend)


BACKENDS = [parameter(name) for name in OPS]
BACKENDS_AND_REFERENCE = [*BACKENDS, pytest.param("reference", id="reference")]
BACKENDS_AND_DTYPES = [
    parameter(name, dtype, dtype=dtype, name=f"{name}-{short(dtype)}") for name in OPS for dtype in DTYPES
]


@lru_cache(maxsize=256)
def solution(problem: Problem, dtype: torch.dtype, device: str) -> Any:
    """The tensors, the float64 solution, and the errors of plain PyTorch."""
    tensors = make(problem, dtype, device)
    truth = exact(problem, tensors)
    return tensors, truth, plain_errors(problem, tensors, truth)


def complaints(problem: Problem, dtype: torch.dtype, backend: str) -> list[str]:
    tensors, truth, plain = solution(problem, dtype, device_of(backend))
    return compare(solve(problem, tensors, backend), truth, plain, dtype)


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS_AND_DTYPES)
def test_problem(problem: Problem, backend: str, dtype: torch.dtype) -> None:
    assert not complaints(problem, dtype, backend)


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_repeated_runs_are_bit_equal(problem: Problem, backend: str) -> None:
    tensors = make(problem, torch.float32, device_of(backend))
    first, again = solve(problem, tensors, backend), solve(problem, tensors, backend)
    for name, x in first.items():
        assert torch.equal(x, again[name]), name


# Their maps are PyTorch's own code before the kernel, and its sums depend on the number of threads.
MAPPED_OUTSIDE = ("softmax", "focused", "focused-all", "favor")


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_number_of_threads_does_not_change_a_bit(dtype: torch.dtype) -> None:
    before = torch.get_num_threads()
    try:
        for problem in PROBLEMS:
            if problem.feature_map in MAPPED_OUTSIDE:
                continue
            tensors = make(problem, dtype)
            results = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(solve(problem, tensors, "cpu"))
            for name, x in results[0].items():
                assert torch.equal(x, results[1][name]), (problem.name, name)
                assert torch.equal(x, results[2][name]), (problem.name, name)
    finally:
        torch.set_num_threads(before)


@needs_cpu
@pytest.mark.parametrize("isa", _backends._C.available_isas() if _backends._C else [])
def test_instruction_sets(isa: str) -> None:
    before = _backends._C.isa()
    try:
        _backends._C.set_isa(isa)
        for problem in PROBLEMS[::2]:
            for dtype in (torch.float32, torch.float64, torch.bfloat16):
                assert not complaints(problem, dtype, "cpu"), problem
    finally:
        _backends._C.set_isa(before)


@pytest.mark.parametrize(
    "name", ["mask", "den-options", "softmax", "favor", "causal-const-mask", "causal-den-options"]
)
@pytest.mark.parametrize("backend", BACKENDS_AND_REFERENCE)
def test_ignored_keys_may_hold_anything(name: str, backend: str) -> None:
    problem = BY_NAME[name]
    clean = make(problem, torch.float32, device_of(backend))
    ignored = clean["ignored"][..., None, None]
    poison = 7.0 if name in ("softmax", "favor") else float("nan")  # those two do not treat NaN as absent
    changed = {
        n: t.detach().masked_fill(ignored, poison).requires_grad_() if n in ("k", "v", "k_den") else t
        for n, t in clean.items()
    }
    expected, got = solve(problem, clean, backend), solve(problem, changed, backend)
    for n, x in got.items():
        assert torch.equal(x, expected[n]), n
    for n in ("dk", "dv", "dk_den"):
        assert n not in got or not got[n].masked_select(ignored).any(), n


@pytest.mark.parametrize("name", ["relu", "causal-const-mask", "favor", "softmax", "den"])
@pytest.mark.parametrize("backend", BACKENDS_AND_REFERENCE)
def test_padding_and_a_mask_are_a_shorter_input(name: str, backend: str) -> None:
    problem = replace(BY_NAME[name], mask="", state=False, tokens=90)
    short_ones = make(problem, torch.float32, device_of(backend))
    expected = solve(problem, short_ones, backend)
    longer = dict(short_ones)
    for n in ("k", "v", "k_den", *(("q", "q_den", "decay") if problem.causal else ())):
        if n in short_ones:
            x = short_ones[n].detach()
            longer[n] = torch.cat([x, torch.randn_like(x[:, :30])], 1).requires_grad_()
    longer["ignored"] = torch.arange(120, device=longer["k"].device).expand(2, 120) >= 90
    got = run(replace(problem, mask="some"), longer, backend)["out"][:, :90]
    assert error(got, expected["out"]) < 1e-6


@pytest.mark.parametrize("name", ["packed", "causal-packed", "blocks-packed"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_sequences_are_separate_ones(name: str, backend: str) -> None:
    problem = replace(BY_NAME[name], state=False)
    tensors = make(problem, torch.float32, device_of(backend))
    got = run(problem, tensors, backend)
    for r, (a, b) in enumerate(zip(problem.ends, problem.ends[1:])):
        alone = {n: x[:, a:b] for n, x in tensors.items() if n != "ends"}
        expected = run(replace(problem, ends=(), tokens=b - a), alone, backend)
        torch.testing.assert_close(got["out"][:, a:b], expected["out"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(got["s"][r : r + 1], expected["s"], rtol=1e-5, atol=1e-6)


STEPPED = [
    "causal-n17",
    "causal-head-decay",
    "causal-step-decay",
    "causal-retention",
    "causal-shared",
    "causal-state",
]


@pytest.mark.parametrize("name", [*STEPPED, "favor-causal", "causal-no-decay-const"])
@pytest.mark.parametrize("backend", BACKENDS_AND_REFERENCE)
def test_steps_are_the_full_run(name: str, backend: str) -> None:
    problem = replace(BY_NAME[name], mask="", tokens=21)
    tensors = {n: x.detach() for n, x in make(problem, torch.float32, device_of(backend)).items()}
    expected = run(problem, tensors, "reference")
    first = 13  # by a full run, the rest by steps
    part = {
        n: x if (n == "decay" and x.dim() == 1) or n not in ("q", "k", "v", "decay") else x[:, :first]
        for n, x in tensors.items()
    }
    found = run(replace(problem, tokens=first), part, backend)
    state, outs = LinearState(found["s"], found.get("z")), [found["out"]]
    pointer = state.s.data_ptr()
    from linear_problems import feature_maps

    for t in range(first, problem.tokens):
        decay = tensors.get("decay")
        q, k, v = (tensors[n][:, t : t + 1] for n in "qkv")
        out = linear_attention_step(
            q,
            k,
            v,
            state,
            feature_map=feature_maps(problem, tensors),
            decay=decay if decay is None or decay.dim() == 1 else decay[:, t : t + 1],
            normalize=problem.normalize,
            scale=problem.scale,
            eps=problem.eps,
            const=problem.const,
            backend=backend,
        )
        outs.append(out)
    assert state.s.data_ptr() == pointer
    assert error(torch.cat(outs, 1), expected["out"]) < 1e-5
    assert error(state.s, expected["s"]) < 1e-5
    assert state.z is None or error(state.z, expected["z"]) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS_AND_REFERENCE)
def test_a_run_in_two_parts_is_one_run(backend: str) -> None:
    tensors = {n: x.detach() for n, x in make(BY_NAME["n500"], torch.float32, device_of(backend)).items()}
    q, k, v = (tensors[n] for n in "qkv")
    options: Any = {"is_causal": True, "output_final_state": True, "backend": backend}
    whole, last = linear_attention(q, k, v, **options)
    first, state = linear_attention(q[:, :201], k[:, :201], v[:, :201], **options)
    second, end = linear_attention(q[:, 201:], k[:, 201:], v[:, 201:], initial_state=state, **options)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(end.s, last.s, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_weight_are_zero(backend: str, causal: bool) -> None:
    device = device_of(backend)
    q, k, v = (torch.randn(2, 70, 2, 8, device=device) for _ in range(3))
    q[:, 5] = -1.0
    q[:, 0] = -2.0
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = linear_attention(q, k, v, feature_map="relu", eps=0.0, is_causal=causal, backend=backend)
    assert isinstance(out, Tensor)
    assert bool((out[:, (0, 5)] == 0).all())
    grads = torch.autograd.grad(out.square().sum(), leaves)
    assert all(bool(g.isfinite().all()) for g in grads)
    assert bool((grads[0][:, (0, 5)] == 0).all())


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_long_sequences_in_bfloat16(backend: str, causal: bool) -> None:
    problem = Problem(
        "long", 65_536, batch=1, heads=1, causal=causal, decay="head" if causal else "", steepness=1e-3
    )
    assert not violations(problem, torch.bfloat16, backend, device_of(backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_results_do_not_depend_on_the_batch(backend: str) -> None:
    for name in ("n1000", "causal-step-decay"):
        problem = BY_NAME[name]
        tensors = make(problem, torch.float32, device_of(backend))
        both = run(problem, tensors, backend)
        one = {n: x[1:] if n in ("q", "k", "v", "decay") else x for n, x in tensors.items()}
        alone = run(replace(problem, batch=1), one, backend)
        assert all(torch.equal(alone[n], both[n][1:]) for n in alone)


@pytest.mark.parametrize("backend", BACKENDS)
def test_out_has_the_memory_order_of_v(backend: str) -> None:
    for layout in ("tokens", "nchw", "heads"):
        problem = replace(BY_NAME["cross"], layout=layout, dim_v=16)
        tensors = make(problem, torch.float32, device_of(backend))
        results = solve(problem, tensors, backend)
        order = sorted(range(4), key=lambda d: -tensors["v"].stride()[d])
        for name in ("out", "dq", "dk", "dv"):
            assert sorted(range(4), key=lambda d: -results[name].stride()[d]) == order, (layout, name)


@pytest.mark.parametrize("heads", [0, 2])
@pytest.mark.parametrize("tokens", [0, 3])
@pytest.mark.parametrize("batch", [0, 2])
@pytest.mark.parametrize("backend", BACKENDS_AND_REFERENCE)
def test_empty(backend: str, batch: int, tokens: int, heads: int) -> None:
    device = device_of(backend)
    leaves = [torch.randn(batch, tokens, heads, 4, device=device, requires_grad=True) for _ in range(3)]
    for causal in (False, True):
        out, state = linear_attention(*leaves, is_causal=causal, output_final_state=True, backend=backend)
        assert out.shape == (batch, tokens, heads, 4)
        assert state.s.shape == (batch, heads, 4, 4)
        assert bool(state.s.isfinite().all())
        grads = torch.autograd.grad((out.sum(), state.s.sum()), leaves, allow_unused=True)
        assert all(g is None or g.shape == leaf.shape for g, leaf in zip(grads, leaves))


@pytest.mark.parametrize("backend", BACKENDS_AND_REFERENCE)
def test_queries_without_keys_are_zero(backend: str) -> None:
    q = torch.randn(2, 3, 2, 4, device=device_of(backend), requires_grad=True)
    k = torch.randn(2, 0, 2, 4, device=q.device)
    out = linear_attention(q, k, k, backend=backend)
    assert isinstance(out, Tensor)
    assert bool((out == 0).all())
    (grad,) = torch.autograd.grad(out.sum(), q)
    assert bool((grad == 0).all())


@pytest.mark.parametrize("ends", [None, (0, 30, 30, 100)])
@pytest.mark.parametrize("backend", BACKENDS_AND_REFERENCE)
def test_ema_scan(backend: str, ends: tuple[int, ...] | None) -> None:
    device = device_of(backend)
    x = torch.randn(1, 100, 5, dtype=torch.float64)
    p = torch.rand(1, 100, dtype=torch.float64) * 0.98 + 0.01
    starts = set(ends or (0,))
    rows: list[torch.Tensor] = []
    for t in range(100):
        before = torch.zeros(5, dtype=torch.float64) if t in starts else rows[-1]
        rows.append(p[0, t] * x[0, t] + (1 - p[0, t]) * before)
    cu_seqlens = None if ends is None else torch.tensor(ends, dtype=torch.int32, device=device)
    dtype = torch.float64 if not reason_against(backend, torch.float64, "linear") else torch.float32
    given = [t.to(device, dtype).requires_grad_() for t in (x, p)]
    got, last = ema_scan(*given, cu_seqlens=cu_seqlens, output_final_state=True, backend=backend)
    torch.testing.assert_close(got[0].cpu(), torch.stack(rows).to(dtype), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(last[-1], got[0, -1])
    grads = torch.autograd.grad(got.sum(), given)
    assert all(bool(g.isfinite().all()) for g in grads)
    if ends is None:
        again = ema_scan(
            given[0][:, 60:], given[1][:, 60:], initial_state=got[:, 59].detach(), backend=backend
        )
        assert isinstance(again, Tensor)
        torch.testing.assert_close(again, got[:, 60:])
