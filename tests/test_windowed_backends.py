"""Every backend with kernels against float64: all problems, outputs and gradients, by the one rule of
problems.py.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from backends_support import device_of, op_backends, op_backends_and_dtypes, reason_against
from dispatch_modes import Replaced
from problems import (
    BY_NAME,
    PROBLEMS,
    Problem,
    accumulator,
    compare,
    dense_errors,
    exact,
    make,
    run,
    solve,
)
from torch import Tensor

from vicinal import RelativeBias, Windows, _backends, _windowed_run, windowed_attention


@lru_cache(maxsize=256)
def solution(problem: Problem, dtype: torch.dtype, device: str) -> Any:
    """The tensors, the float64 solution, and the errors of plain PyTorch."""
    tensors = make(problem, dtype, device)
    truth = exact(problem, tensors)
    return tensors, truth, dense_errors(problem, tensors, truth)


def capability(backend: str) -> _backends.Row:
    return next(r for r in _backends.rows("windowed") if r.backend == backend)


def skip_beyond_capability(problem: Problem, backend: str, dtype: torch.dtype) -> None:
    """Skip with the row's reasons a problem that the backend says it does not take."""
    features = {problem.activation} if problem.activation != "softmax" else set()
    features |= {"dropout"} if problem.dropout_p else set()
    device = device_of(backend)
    asked = _backends.Problem("windowed", device, dtype, problem.dim, problem.value_dim, frozenset(features))
    if why := _backends.reasons(capability(backend), asked):
        pytest.skip(f"{backend}: {'; '.join(why)}")


def check(problem: Problem, dtype: torch.dtype, backend: str, got: dict[str, Tensor]) -> None:
    _, truth, errors = solution(problem, dtype, device_of(backend))
    assert not compare(got, truth, errors, dtype)


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
@pytest.mark.parametrize(("backend", "dtype"), op_backends_and_dtypes())
def test_problem(problem: Problem, backend: str, dtype: torch.dtype) -> None:
    skip_beyond_capability(problem, backend, dtype)
    tensors = solution(problem, dtype, device_of(backend))[0]
    check(problem, dtype, backend, solve(problem, tensors, backend))


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
@pytest.mark.parametrize("backend", op_backends())
def test_repeated_runs_are_bit_equal(problem: Problem, backend: str) -> None:
    skip_beyond_capability(problem, backend, torch.float32)
    tensors = make(problem, torch.float32, device_of(backend))
    _windowed_run._settled.clear()  # the first run checks and chooses, the others repeat its launch
    first = solve(problem, tensors, backend)
    for again in (solve(problem, tensors, backend), solve(problem, tensors, backend)):
        assert first.keys() == again.keys()
        for name, x in first.items():
            assert torch.equal(x, again[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.skipif(bool(reason_against("cpu")), reason=f"cpu: {reason_against('cpu')}")
def test_the_number_of_threads_does_not_change_a_bit(dtype: torch.dtype) -> None:
    before = torch.get_num_threads()
    try:
        for problem in PROBLEMS:
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


@pytest.mark.skipif(bool(reason_against("cpu")), reason=f"cpu: {reason_against('cpu')}")
@pytest.mark.parametrize("isa", _backends._C.available_isas() if _backends._C else [])
def test_instruction_sets(isa: str) -> None:
    before = _backends._C.isa()
    try:
        _backends._C.set_isa(isa)
        for problem, dtype in itertools.product(PROBLEMS[::3], (torch.float32, torch.bfloat16)):
            tensors = solution(problem, dtype, "cpu")[0]
            check(problem, dtype, "cpu", solve(problem, tensors, "cpu"))
    finally:
        _backends._C.set_isa(before)


@pytest.mark.parametrize(
    "name", ["padding-bool", "padding-window", "padding-sample-extra", "overlap-const", "mask-extra"]
)
@pytest.mark.parametrize("backend", [*op_backends(), "reference"])
def test_ignored_keys_may_hold_anything(name: str, backend: str) -> None:
    problem = BY_NAME[name]
    clean = make(problem, torch.float32, device_of(backend))
    ignored = clean["key_padding_mask"][..., None, None]
    poisoned = {
        n: t.detach().masked_fill(ignored, float("nan")).requires_grad_() if n in "kv" else t
        for n, t in clean.items()
    }
    expected, got = solve(problem, clean, backend), solve(problem, poisoned, backend)
    for n, x in got.items():
        assert torch.equal(x, expected[n]), n
    assert not got["dk"].masked_select(ignored).any()
    assert not got["dv"].masked_select(ignored).any()


MIXED = [
    BY_NAME[n]
    for n in (
        "2d-shift-overhang",
        "edge-const-extra",
        "cosine-const",
        "dropout",
        "padding-sample",
        "overlap",
        "stripes",
    )
]


@pytest.mark.parametrize("problem", MIXED, ids=str)
@pytest.mark.parametrize("backend", op_backends())
def test_the_backward_takes_the_outputs_of_another_backend(problem: Problem, backend: str) -> None:
    skip_beyond_capability(problem, backend, torch.float32)
    device = device_of(backend)
    tensors = solution(problem, torch.float32, device)[0]
    others = [
        n
        for n in ("cuda", "triton", "cpu")
        if n != backend and device_of(n) == device and not reason_against(n)
    ]
    out, lse = (x.detach().contiguous() for x in run(problem, tensors, "reference"))
    given: list[Any] = [lambda *args: (out.clone(), lse.clone())]
    given += [getattr(torch.ops.vicinal.windowed_fwd, other) for other in others]
    for other_forward in given:
        with Replaced(getattr(torch.ops.vicinal.windowed_fwd, backend), other_forward) as mode:
            got = solve(problem, tensors, backend)
        assert mode.calls == 1
        check(problem, torch.float32, backend, got)


def tiny(dim: int = 8, dim_v: int = 8, **options: Any) -> Problem:
    return Problem("tiny", (6,), Windows(4, shift=1), dim=dim, dim_v=dim_v, batch=1, bias="q-k", **options)


@pytest.mark.parametrize("backend", op_backends())
def test_a_row_is_true_at_its_edges(backend: str) -> None:
    row, device = capability(backend), device_of(backend)
    widest = row.max_head_dim or 384
    for dim, dim_v in ((1, 1), (widest, 8), (8, widest), (widest, widest)):
        problem = tiny(dim, dim_v)
        tensors = solution(problem, torch.float32, device)[0]
        check(problem, torch.float32, backend, solve(problem, tensors, backend))
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        if dtype in row.dtypes:
            tensors = solution(tiny(), dtype, device)[0]
            check(tiny(), dtype, backend, solve(tiny(), tensors, backend))
        else:
            with pytest.raises(NotImplementedError, match=str(dtype).removeprefix("torch.")):
                run(tiny(), make(tiny(), dtype, device), backend)
    if row.max_head_dim is not None:
        with pytest.raises(NotImplementedError, match=f"head_dim {widest + 1} is above {widest}"):
            run(tiny(widest + 1), make(tiny(widest + 1), torch.float32, device), backend)
    for feature in row.missing:
        problem = tiny(dropout_p=0.5) if feature == "dropout" else tiny(activation=feature)
        with pytest.raises(NotImplementedError, match=f"{feature} is missing"):
            run(problem, make(problem, torch.float32, device), backend)


DROPPED = [
    Problem("grid", (7, 6), Windows(4, shift=2, edge="zero"), heads=3, dim_v=18, dropout_p=0.4, extra=2),
    Problem("overlap", (8, 8), Windows(4, kv_size=6, edge="zero"), dim_v=36, dropout_p=0.4),
    Problem(
        "groups",
        (6, 8),
        Windows(None, head_groups=((1, (-1, 2)), (2, (3, -1)))),
        heads=3,
        dim_v=24,
        dropout_p=0.4,
    ),
]


@pytest.mark.parametrize("problem", DROPPED, ids=str)
@pytest.mark.parametrize("backend", op_backends())
def test_dropout_bits_are_those_of_the_reference(problem: Problem, backend: str) -> None:
    tensors = make(problem, torch.float32, device_of(backend))
    width = (
        problem.value_dim
    )  # every value is a different unit vector inside a window, as far as the width goes
    token = torch.arange(tensors["v"][0, ..., 0, 0].numel(), device=tensors["v"].device)
    unit = torch.eye(width, device=token.device)[token % width]
    shape = tensors["v"].shape
    tensors["v"] = unit.view(1, *shape[1:-2], 1, width).expand(shape).contiguous()
    got, expected = (run(problem, tensors, name)[0].detach() for name in (backend, "reference"))
    tiny = torch.finfo(torch.float32).tiny  # a kernel may flush a weight below it
    assert torch.equal(got >= tiny, expected >= tiny)
    assert not got[expected == 0].any()
    torch.testing.assert_close(got, expected)
    plain = run(replace(problem, dropout_p=0.0), tensors, backend)[0].detach()
    assert not torch.equal(plain == 0, got == 0)


@pytest.mark.parametrize("bias", ["q-k", "k-q", "abs"])
@pytest.mark.parametrize("backend", op_backends())
def test_the_gradient_of_a_table_sums_to_zero_under_softmax(bias: str, backend: str) -> None:
    problem = Problem("swin", (14, 10), Windows((7, 5), shift=(3, 0)), heads=3, dim=16, bias=bias)
    tensors = make(problem, torch.float32, device_of(backend))
    q, k, v, table = (tensors[n] for n in ("q", "k", "v", "bias"))
    out = windowed_attention(q, k, v, problem.windows, bias=RelativeBias(table, bias), backend=backend)
    assert isinstance(out, Tensor)
    (grad,) = torch.autograd.grad(out, table, torch.randn_like(out))
    total, size = grad.double().sum(0), grad.double().abs().sum(0)
    assert bool((size > 1).all())
    assert bool((total.abs() <= 1e-5 * size).all())


@pytest.mark.parametrize("backend", op_backends())
def test_only_the_wanted_gradients(backend: str) -> None:
    problem = BY_NAME["edge-const-extra"]
    tensors = make(problem, torch.float32, device_of(backend))
    full = solve(problem, tensors, backend)
    for name in [n for n, t in tensors.items() if t.requires_grad]:
        one = {n: t.detach().requires_grad_(n == name) for n, t in tensors.items()}
        got = solve(problem, one, backend)
        assert set(got) == {"out", "lse", f"d{name}"}
        assert torch.equal(got[f"d{name}"], full[f"d{name}"])


@pytest.mark.parametrize("backend", op_backends())
def test_a_query_without_keys(backend: str) -> None:
    problem = BY_NAME["padding-sample"]
    tensors = make(problem, torch.float32, device_of(backend))
    got = solve(problem, tensors, backend)
    assert bool((got["out"][0] == 0).all())
    assert bool((got["lse"][0] == -torch.inf).all())
    for name in ("dq", "dk", "dv"):
        assert bool((got[name][0] == 0).all()), name


@pytest.mark.parametrize("backend", op_backends())
def test_lse_has_the_accumulation_type(backend: str) -> None:
    row = capability(backend)
    for dtype in row.dtypes:
        problem = tiny()
        out, lse = run(problem, make(problem, dtype, device_of(backend)), backend)
        assert out.dtype == dtype
        assert lse.dtype == accumulator(dtype)
        assert out.shape == (1, 6, 2, 8)
        assert lse.shape == (1, 6, 2)


@pytest.mark.parametrize("backend", op_backends())
def test_many_windows_and_long_rows(backend: str) -> None:
    # more windows than a 16-bit grid axis holds, and more keys than any tile
    many = Problem("many", (1,), Windows(1), batch=70_000, heads=1, dim=4)
    tensors = make(many, torch.float32, device_of(backend))
    torch.testing.assert_close(run(many, tensors, backend)[0], tensors["v"])
    long = Problem("long", (1, 700), Windows((1, 700)), batch=1, heads=1, dim=4)
    check(
        long,
        torch.float32,
        backend,
        solve(long, solution(long, torch.float32, device_of(backend))[0], backend),
    )
