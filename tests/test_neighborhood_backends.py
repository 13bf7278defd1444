"""Every backend with kernels against float64: all problems, outputs and gradients, by the one rule of
rule.py; and the keys that each query reads, exactly.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import lru_cache
from typing import Any

import neighborhood_brute_force as brute
import pytest
import torch
from backends_support import device_of, op_backends, op_backends_and_dtypes, reason_against
from dispatch_modes import Replaced
from neighborhood_problems import AWKWARD, BY_NAME, PROBLEMS, Problem
from neighborhood_solutions import dense_errors, exact, make, run, solve
from rule import accumulator, compare
from torch import Tensor

from vicinal import Neighborhood, _backends, _neighborhood_run, explain, neighborhood_attention
from vicinal._neighborhood_op import LARGE_GRID

N = Neighborhood


@lru_cache(maxsize=256)
def solution(problem: Problem, dtype: torch.dtype, device: str) -> Any:
    """The tensors, the float64 solution, and the errors of plain PyTorch."""
    tensors = make(problem, dtype, device)
    truth = exact(problem, tensors)
    return tensors, truth, dense_errors(problem, tensors, truth)


def capability(backend: str) -> _backends.Row:
    return next(r for r in _backends.rows("neighborhood") if r.backend == backend)


def skip_beyond_capability(problem: Problem, backend: str, dtype: torch.dtype) -> None:
    """Skip with the row's reasons a problem that the backend says it does not take."""
    features = frozenset({"dropout"} if problem.dropout_p else ())
    asked = _backends.Problem(
        "neighborhood", device_of(backend), dtype, problem.dim, problem.value_dim, features
    )
    if why := _backends.reasons(capability(backend), asked):
        pytest.skip(f"{backend}: {'; '.join(why)}")


def check(problem: Problem, dtype: torch.dtype, backend: str, got: dict[str, Tensor]) -> None:
    _, truth, errors = solution(problem, dtype, device_of(backend))
    assert not compare(got, truth, errors, dtype)


def check_solution(problem: Problem, backend: str, dtype: torch.dtype = torch.float32) -> None:
    tensors = solution(problem, dtype, device_of(backend))[0]
    check(problem, dtype, backend, solve(problem, tensors, backend))


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
@pytest.mark.parametrize(("backend", "dtype"), op_backends_and_dtypes())
def test_problem(problem: Problem, backend: str, dtype: torch.dtype) -> None:
    skip_beyond_capability(problem, backend, dtype)
    check_solution(problem, backend, dtype)


@pytest.mark.parametrize("problem", AWKWARD, ids=str)
@pytest.mark.parametrize("backend", op_backends())
def test_awkward_sizes(problem: Problem, backend: str) -> None:
    check_solution(problem, backend)


@pytest.mark.parametrize("causal", list(itertools.product([False, True], repeat=3)), ids=str)
@pytest.mark.parametrize("backend", op_backends())
def test_every_choice_of_causal_axes(backend: str, causal: tuple[bool, ...]) -> None:
    where = N((3, 2, 3), dilation=(1, 2, 1), stride=(2, 1, 3), is_causal=causal)
    problem = Problem("causal", (5, 4, 7), where, heads=2, kv_heads=1, bias=True, extra=1)
    check_solution(problem, backend)


def read_keys(problem: Problem, backend: str) -> Tensor:
    """int64 [queries, keys]: the entry of the bias table that a pair reads, -1 for a key that is not read.

    With q = k = 0 and one unit vector per value, out * exp(lse) is exp(bias) of every pair.
    """
    device, tokens = device_of(backend), torch.Size(problem.space).numel()
    q = torch.zeros(1, *problem.query_space, 1, 1, device=device)
    k = torch.zeros(1, *problem.space, 1, 1, device=device)
    v = torch.eye(tokens, device=device).view(1, *problem.space, 1, tokens)
    axes = brute.axes_of(problem)
    bias = None
    if all(a.kernel for a in axes):
        sizes = [2 * a.kernel - 1 for a in axes]
        bias = torch.log(torch.arange(1.0, 1 + torch.Size(sizes).numel(), device=device)).view(1, *sizes)
    out, lse = neighborhood_attention(q, k, v, problem.where, bias=bias, return_lse=True, backend=backend)
    sums = out.flatten(1, -3)[0, :, 0] * lse.flatten()[:, None].exp()
    return sums.round().long().cpu() - 1


def expected_keys(problem: Problem) -> Tensor:
    axes = brute.axes_of(problem)
    biased = all(a.kernel for a in axes)
    found = torch.full((torch.Size(problem.query_space).numel(), torch.Size(problem.space).numel()), -1)
    for i, keys in enumerate(brute.pairs(axes)):
        for j, (entry, _) in keys.items():
            found[i, j] = entry if biased else 0
    return found


def small_neighborhoods(length: int) -> list[Neighborhood]:
    """Both borders, all kernels, dilations and strides of an axis."""
    found = []
    for d, causal in itertools.product(range(1, length + 1), (False, True)):
        for k in range(1, length // d + 1):
            found += [N(k, d, s, causal) for s in range(1, k + 1)]
    for d, causal in itertools.product((1, 2, 3), (False, True)):
        for k in range(1, length + 3):
            found += [N(k, d, s, causal, "truncate") for s in range(1, k + 1)]
    for pair, causal in itertools.product(
        ((0, 0), (3, 0), (0, 2), (-1, 0), (-1, -1), (2, -1)), (False, True)
    ):
        if not (causal and pair[1]):
            found += [N(pair, d, 1, causal, "truncate") for d in (1, 2)]
    return found


@pytest.mark.parametrize("length", range(1, 13))
@pytest.mark.parametrize("backend", op_backends())
def test_every_query_reads_its_keys(backend: str, length: int) -> None:
    step = 1 if backend == "cpu" or device_of(backend) == "cuda" else 37  # the interpreter is slow
    for where in small_neighborhoods(length)[::step]:
        problem = Problem("axis", (length,), where)
        assert torch.equal(read_keys(problem, backend), expected_keys(problem)), where


AXES = [  # length, kernel, dilation, stride, causal
    (5, 3, 1, 1, False),
    (6, 3, 2, 1, False),
    (4, 4, 1, 1, False),
    (7, 3, 2, 2, True),
    (6, 3, 1, 3, False),
    (5, 2, 1, 1, True),
    (1, 1, 1, 1, False),
    (8, 5, 1, 4, False),
]


@pytest.mark.parametrize("border", ["shift", "truncate"])
@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("backend", op_backends())
def test_every_query_of_a_grid_reads_its_keys(backend: str, rank: int, border: str) -> None:
    fast = backend == "cpu" or device_of(backend) == "cuda"
    chosen = list(itertools.product(AXES, repeat=rank))[:: 1 if rank == 2 else 5]
    for axes in chosen[:: 1 if fast else 31]:
        space, kernel, dilation, stride, causal = zip(*axes)
        problem = Problem("grid", space, N(kernel, dilation, stride, causal, border))
        assert torch.equal(read_keys(problem, backend), expected_keys(problem)), problem.where


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
@pytest.mark.parametrize("backend", op_backends())
def test_repeated_runs_are_bit_equal(problem: Problem, backend: str) -> None:
    skip_beyond_capability(problem, backend, torch.float32)
    tensors = make(problem, torch.float32, device_of(backend))
    _neighborhood_run._settled.clear()  # the first run checks and chooses, the others repeat its launch
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
            check_solution(problem, "cpu", dtype)
    finally:
        _backends._C.set_isa(before)


PADDED = ["padding", "padding-dense-groups", "padding-window", "padding-sample-extra", "padding-truncate"]


@pytest.mark.parametrize("name", PADDED)
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
    "2d",
    "2d-dense-groups",
    "extra-grouped",
    "dropout-grouped",
    "padding-sample",
    "more-keys",
    "3d-stride",
]


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("backend", op_backends())
def test_the_backward_takes_the_outputs_of_another_backend(name: str, backend: str) -> None:
    problem, device = BY_NAME[name], device_of(backend)
    skip_beyond_capability(problem, backend, torch.float32)
    tensors = solution(problem, torch.float32, device)[0]
    others = [
        n
        for n in ("cuda", "triton", "cpu")
        if n != backend and device_of(n) == device and not reason_against(n)
    ]
    out, lse = (x.detach().contiguous() for x in run(problem, tensors, "reference"))
    given: list[Any] = [lambda *args: (out.clone(), lse.clone())]
    given += [getattr(torch.ops.vicinal.neighborhood_fwd, other) for other in others]
    for other_forward in given:
        with Replaced(getattr(torch.ops.vicinal.neighborhood_fwd, backend), other_forward) as mode:
            got = solve(problem, tensors, backend)
        assert mode.calls == 1
        check(problem, torch.float32, backend, got)


def tiny(dim: int = 8, dim_v: int = 8, **options: Any) -> Problem:
    return Problem("tiny", (6,), N(3), dim=dim, dim_v=dim_v, batch=1, bias=True, **options)


@pytest.mark.parametrize("backend", op_backends())
def test_a_row_is_true_at_its_edges(backend: str) -> None:
    row, device = capability(backend), device_of(backend)
    widest = row.max_head_dim or 384
    for dim, dim_v in ((1, 1), (widest, 8), (8, widest), (widest, widest)):
        check_solution(tiny(dim, dim_v), backend)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        if dtype in row.dtypes and (device, dtype) not in row.wrong:
            check_solution(tiny(), backend, dtype)
        else:
            with pytest.raises(NotImplementedError, match=str(dtype).removeprefix("torch.")):
                run(tiny(), make(tiny(), dtype, device), backend)
    if row.max_head_dim is not None:
        with pytest.raises(NotImplementedError, match=f"head_dim {widest + 1} is above {widest}"):
            run(tiny(widest + 1), make(tiny(widest + 1), torch.float32, device), backend)


@pytest.mark.parametrize("backend", op_backends())
def test_grids_whose_places_need_more_bits_go_to_the_reference(backend: str) -> None:
    device = device_of(backend)
    for space, fits in (((511, 511, 511), True), ((512, 512, 512), False)):
        q = torch.zeros(1, 1, 1, 1, 1, 1, device=device).expand(1, *space, 1, 1)
        found = explain(neighborhood_attention, q, q, q, 3)
        assert (found.backend == "reference") == (not fits)
        assert (f"{LARGE_GRID} is missing" in found.reasons[backend]) == (not fits)
    with pytest.raises(NotImplementedError, match=LARGE_GRID):
        neighborhood_attention(q, q, q, 3, backend=backend)


DROPPED = [
    Problem("grid", (7, 6), N(3), heads=4, kv_heads=2, dim_v=48, dropout_p=0.4, extra=2),
    Problem("dense-groups", (6, 8), N((3, 4), dilation=2), dim_v=48, dropout_p=0.4),
    Problem("sliding", (60,), N((12, 0), border="truncate"), dim_v=64, dropout_p=0.4, padding="bool"),
    Problem("more-keys", (40,), N((9, 1), border="truncate"), dim_v=48, dropout_p=0.4, q_length=7),
]


@pytest.mark.parametrize("problem", DROPPED, ids=str)
@pytest.mark.parametrize("backend", op_backends())
def test_dropout_bits_are_those_of_the_reference(problem: Problem, backend: str) -> None:
    tensors = make(problem, torch.float32, device_of(backend))
    width, shape = problem.value_dim, tensors["v"].shape  # every value is another unit vector
    token = torch.arange(shape[1:-2].numel(), device=tensors["v"].device)
    unit = torch.eye(width, device=token.device)[token]
    tensors["v"] = unit.view(1, *shape[1:-2], 1, width).expand(shape).contiguous()
    got, expected = (run(problem, tensors, name)[0].detach() for name in (backend, "reference"))
    assert torch.equal(got == 0, expected == 0)
    torch.testing.assert_close(got, expected)
    plain = run(replace(problem, dropout_p=0.0), tensors, backend)[0].detach()
    assert not torch.equal(plain == 0, got == 0)


@pytest.mark.parametrize("backend", op_backends())
def test_dropout_keeps_the_share_that_it_should(backend: str) -> None:
    q = torch.zeros(2, 64, 2, 8, device=device_of(backend))
    v = torch.ones(2, 64, 2, 1, device=device_of(backend))
    torch.manual_seed(0)
    out = neighborhood_attention(q, q, v, 33, dropout_p=0.25, backend=backend)
    assert isinstance(out, Tensor)
    pairs = 2 * 2 * 64 * 33
    assert abs(float(out.mean()) - 1) < 4 * (0.25 / 0.75 / pairs) ** 0.5


@pytest.mark.parametrize("name", ["2d", "2d-dense-groups", "1d-causal-stride", "truncate-pair-2d"])
@pytest.mark.parametrize("backend", op_backends())
def test_the_gradient_of_a_table_sums_to_zero_under_softmax(name: str, backend: str) -> None:
    problem = replace(BY_NAME[name], heads=3, dim=16)
    tensors = make(problem, torch.float32, device_of(backend))
    out, _ = run(problem, tensors, backend)
    (grad,) = torch.autograd.grad(out, tensors["bias"], torch.randn_like(out))
    total, size = grad.double().flatten(1).sum(1), grad.double().abs().flatten(1).sum(1)
    assert bool((size > 1).all())
    assert bool((total.abs() <= 1e-5 * size).all())


@pytest.mark.parametrize("name", ["extra-grouped", "extra-dense-groups"])
@pytest.mark.parametrize("backend", op_backends())
def test_only_the_wanted_gradients(name: str, backend: str) -> None:
    problem = BY_NAME[name]
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
    got = solve(problem, make(problem, torch.float32, device_of(backend)), backend)
    assert bool((got["out"][0] == 0).all())
    assert bool((got["lse"][0] == -torch.inf).all())
    for name in ("dq", "dk", "dv"):
        assert bool((got[name][0] == 0).all()), name


@pytest.mark.parametrize("backend", op_backends())
def test_a_key_without_queries_has_no_gradient(backend: str) -> None:
    problem = BY_NAME["more-keys-unread"]
    got = solve(problem, make(problem, torch.float32, device_of(backend)), backend)
    for name in ("dk", "dv"):
        assert bool((got[name][:, :54] == 0).all()), name
        assert bool((got[name][:, 54:] != 0).any()), name


@pytest.mark.parametrize("backend", op_backends())
def test_lse_has_the_accumulation_type(backend: str) -> None:
    device = device_of(backend)
    for dtype in capability(backend).dtypes:
        if (device, dtype) in capability(backend).wrong:
            continue
        out, lse = run(tiny(), make(tiny(), dtype, device), backend)
        assert out.dtype == dtype
        assert lse.dtype == accumulator(dtype)
        assert out.shape == (1, 6, 2, 8)
        assert lse.shape == (1, 6, 2)


@pytest.mark.parametrize("backend", op_backends())
def test_strides_beyond_32_bits(backend: str) -> None:
    problem = Problem("far", (9, 4), N(3), batch=2, heads=1, dim=4, bias=True)
    near = make(problem, torch.float32, device_of(backend))
    stride = 2**31 + 4  # elements between samples; only the first and the last pages are ever touched
    storage = torch.empty(0, device=device_of(backend)).set_(
        torch.UntypedStorage(4 * (stride + 9 * 4 * 4), device=device_of(backend))
    )
    far = dict(near)
    view = storage.as_strided(near["k"].shape, (stride, 16, 4, 4, 1))
    far["k"] = view.copy_(near["k"].detach()).detach().requires_grad_()
    expected, got = solve(problem, near, backend), solve(problem, far, backend)
    for name, x in got.items():
        assert torch.equal(x, expected[name]), name


@pytest.mark.parametrize("backend", op_backends())
def test_more_rows_than_a_16_bit_grid_axis_holds(backend: str) -> None:
    many = Problem("many", (1,), N(1), batch=70_000, heads=1, dim=4)
    tensors = make(many, torch.float32, device_of(backend))
    torch.testing.assert_close(run(many, tensors, backend)[0], tensors["v"])
