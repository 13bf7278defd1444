"""Segment attention on every backend against float64 over all pairs of rows, by the one rule of rule.py; and
its properties.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
from backends_support import device_of, op_backends, reason_against, short
from rule import compare, largest
from torch import Tensor
from voxel_problems import BY_NAME, PROBLEMS, Problem, voxels
from voxel_solutions import dense_errors, exact, make, run, seen, solve

from vicinal import ContextTable, KeyBias, RelTable, _backends, explain, segments, voxel_attention

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LOW = ("windows", "sets-x", "groups", "trellis", "neighbours", "key", "key-heads", "rope", "rel", "context")


def backends(dtype: torch.dtype = torch.float32) -> list[Any]:
    found = [pytest.param("reference", id="reference")]
    for name in _backends.ORDER:
        if name != "reference":
            why = reason_against(name, dtype, "voxel")
            marks = [pytest.mark.skip(reason=f"{name}: {why}")] if why else []
            found.append(pytest.param(name, marks=marks, id=name))
    return found


@lru_cache(maxsize=256)
def solution(name: str, dtype: torch.dtype) -> Any:
    problem = BY_NAME[name]
    tensors = make(problem, dtype)
    truth = exact(problem, tensors)
    return truth, dense_errors(problem, tensors, truth)


def check(problem: Problem, dtype: torch.dtype, backend: str) -> None:
    if backend != "reference" and not problem.runs_on(backend):
        with pytest.raises(NotImplementedError, match="Table"):
            run(problem, make(problem, dtype, device_of(backend)), backend)
        return
    truth, errors = solution(problem.name, dtype)
    got = solve(problem, make(problem, dtype, device_of(backend)), backend)
    assert not compare({n: t.cpu() for n, t in got.items()}, truth, errors, dtype)


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
@pytest.mark.parametrize("backend", backends())
def test_float32(problem: Problem, backend: str) -> None:
    check(problem, torch.float32, backend)


@pytest.mark.parametrize("name", LOW)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=short)
@pytest.mark.parametrize("backend", backends())
def test_other_dtypes(name: str, dtype: torch.dtype, backend: str) -> None:
    if why := reason_against(backend, dtype, "voxel"):
        pytest.skip(f"{backend}: {why}")
    check(BY_NAME[name], dtype, backend)


def test_pairs_are_counted() -> None:
    """The oracle itself: rows in no segment, keys read twice, keys read by nobody."""
    count = seen(BY_NAME["arrays"])[0]
    assert count.sum(1).tolist() == [5, 5, 4, 5, 0, 5, 0, 4, 0, 4]
    assert count[7].tolist() == [1, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 1]


@pytest.mark.parametrize(
    "name", ["windows", "groups-69", "trellis", "neighbours", "head-groups-mixed", "rel-mixed"]
)
@pytest.mark.parametrize("backend", op_backends())
def test_runs_agree_bit_for_bit(name: str, backend: str) -> None:
    problem = BY_NAME[name]
    if not problem.runs_on(backend):
        pytest.skip(f"{backend}: RelTable is missing")
    tensors = make(problem, torch.float32, device_of(backend))
    first = solve(problem, tensors, backend)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, *[2] * 17):
            torch.set_num_threads(threads)
            for n, t in solve(problem, tensors, backend).items():
                assert torch.equal(t, first[n]), n
    finally:
        torch.set_num_threads(before)


def random(n: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))


BUILDERS: dict[str, Any] = {
    "windows": lambda c, g, b: segments.windows(c, g, b, (12, 12, 1), (6, 6, 0)),
    "sets": lambda c, g, b: segments.dsvt_sets(c, g, b, (24, 24, 1), (6, 6, 0), 36)[1],
    "groups": lambda c, g, b: segments.flatformer_groups(c, g, b, (9, 9), 20, axis="y"),
    "patches": lambda c, g, b: segments.serialize(c, g, b, "hilbert").patches(33),
    "trellis": lambda c, g, b: segments.trellis_serialized(segments.serialize(c, g, b), 24, 5),
}


def solved(coords: Tensor, grid: Any, size: int, build: Any, backend: str, x: Tensor) -> list[Tensor]:
    device = device_of(backend)
    made = build(coords.to(device), grid, size)
    q, k, v = (y.to(device).requires_grad_() for y in x.unbind(1))
    out, lse = voxel_attention(q, k, v, made, return_lse=True, backend=backend)
    grads = torch.autograd.grad((out.sin().sum(), lse.sum()), (q, k, v))
    return [t.detach().cpu() for t in (out, lse, *grads)]


@pytest.mark.parametrize("builder", list(BUILDERS))
@pytest.mark.parametrize("backend", op_backends())
def test_rows_in_another_order(builder: str, backend: str) -> None:
    coords, grid, size = voxels("waymo_pillar", 600)
    x = random(len(coords), 3, 2, 16)
    permutation = torch.randperm(len(coords), generator=torch.Generator().manual_seed(1))
    plain = solved(coords, grid, size, BUILDERS[builder], backend, x)
    moved = solved(coords[permutation], grid, size, BUILDERS[builder], backend, x[permutation])
    for a, b in zip(plain, moved):
        assert torch.equal(a[permutation], b)


@pytest.mark.parametrize("builder", list(BUILDERS))
@pytest.mark.parametrize("backend", op_backends())
def test_a_sample_does_not_depend_on_its_batch(builder: str, backend: str) -> None:
    coords, grid, size = voxels("waymo_pillar", 600)
    x = random(len(coords), 3, 2, 16)
    together = solved(coords, grid, size, BUILDERS[builder], backend, x)
    mine = coords[:, 0] == 1
    alone = coords[mine].clone()
    alone[:, 0] = 0
    for a, b in zip(together, solved(alone, grid, 1, BUILDERS[builder], backend, x[mine])):
        assert torch.equal(a[mine], b)


@pytest.mark.parametrize("backend", backends())
def test_equal_keys_give_the_mean_of_the_values(backend: str) -> None:
    made = segments.from_lengths(torch.tensor([3, 40]))
    q, v = random(43, 2, 8), random(43, 2, 8, seed=1)
    k = torch.ones(43, 2, 8) * 0.3
    out = voxel_attention(q, k, v, made, backend=backend)
    assert isinstance(out, Tensor)
    expected = torch.cat([x.mean(0, keepdim=True).expand(len(x), -1, -1) for x in v.split([3, 40])])
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("backend", backends())
def test_one_key(backend: str) -> None:
    made = segments.from_lengths(torch.ones(9, dtype=torch.int64))
    q, k, v = (random(9, 2, 8, seed=i).requires_grad_() for i in range(3))
    out = voxel_attention(q, k, v, made, backend=backend)
    assert isinstance(out, Tensor)
    assert torch.equal(out, v)
    dq, dk, _ = torch.autograd.grad(out.sin().sum(), (q, k, v))
    assert largest(dq) <= 1e-7
    assert largest(dk) <= 1e-7


@pytest.mark.parametrize("backend", backends())
def test_a_constant_in_the_logits_changes_only_lse(backend: str) -> None:
    made = segments.from_lengths(torch.tensor([30, 13]))
    q, k, v = (random(43, 2, 8, seed=i) for i in range(3))
    plain = voxel_attention(q, k, v, made, return_lse=True, backend=backend)
    raised = voxel_attention(
        q, k, v, made, bias=KeyBias(torch.full((43,), 2.0)), return_lse=True, backend=backend
    )
    assert isinstance(plain, tuple)
    assert isinstance(raised, tuple)
    torch.testing.assert_close(raised[0], plain[0])
    torch.testing.assert_close(raised[1], plain[1] + 2.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
@pytest.mark.parametrize("backend", op_backends())
def test_huge_logits_with_equal_values(dtype: torch.dtype, backend: str) -> None:
    """Where all values agree, q and k have no influence, however large the logits are."""
    if why := reason_against(backend, dtype, "voxel"):
        pytest.skip(f"{backend}: {why}")
    device = device_of(backend)
    made = segments.from_lengths(torch.tensor([30, 13])).to(device)
    q, k = (random(43, 2, 8, seed=i).to(device, dtype).mul_(30).requires_grad_() for i in range(2))
    v = torch.ones(43, 2, 8, device=device, dtype=dtype).requires_grad_()
    out = voxel_attention(q, k, v, made, backend=backend)
    dout = random(43, 2, 8, seed=5).to(device, dtype)
    for g in torch.autograd.grad(out, (q, k), dout):
        assert largest(g) <= 200 * torch.finfo(torch.float32).eps * 30


@pytest.mark.parametrize(
    "name", ["ones", "arrays", "ranges-free", "neighbours", "rel-small", "context-small", "rope-small"]
)
def test_gradcheck_of_the_reference(name: str) -> None:
    problem = BY_NAME[name]
    tensors = make(problem, torch.float64)
    names = [n for n, t in tensors.items() if t.requires_grad]

    def function(*leaves: Tensor) -> Any:
        out, lse = run(problem, {**tensors, **dict(zip(names, leaves))}, "reference")
        return out, lse[lse.isfinite()]

    assert torch.autograd.gradcheck(function, [tensors[n] for n in names])


def test_plans_are_built_once() -> None:
    made = segments.from_lengths(torch.tensor([3, 2]))
    q = random(5, 2, 8)
    voxel_attention(q, q, q, made)
    plan = made.kept["plan"]
    voxel_attention(q, q, q, made)
    assert made.kept["plan"] is plan
    again = segments.from_lengths(torch.tensor([3, 2]))
    assert torch.equal(voxel_attention(q, q, q, again), voxel_attention(q, q, q, made))  # type: ignore[arg-type]


def test_explain_names_what_kernels_lack() -> None:
    q = random(5, 2, 8)
    made = segments.from_lengths(torch.tensor([3, 2]))
    cells = torch.zeros(5, 3, dtype=torch.int32)
    relative = RelTable(cells, torch.zeros(3, 3, 2))
    assert "RelTable" in str(explain(voxel_attention, q, q, q, made, bias=relative))
    context = ContextTable(cells, *(torch.zeros(3, 3, 2, 8) for _ in range(3)))
    both = explain(voxel_attention, q, q, q, made, bias=(relative, context))
    assert both.backend == "reference"
    assert "ContextTable beside RelTable" in str(both)


@pytest.mark.parametrize("backend", backends())
def test_offsets_of_any_size_are_clipped(backend: str) -> None:
    if not BY_NAME["rel"].runs_on(backend) and backend != "reference":
        pytest.skip(f"{backend}: RelTable is missing")
    made = segments.from_lengths(torch.tensor([9, 4]))
    q, k, v = (random(13, 2, 8, seed=i) for i in range(3))
    places = (0, 2**31 - 1, -(2**31), 5, 4, 3, 2, 1, 0, 7, -7, 2**30, 9)
    coords = torch.tensor(places, dtype=torch.int32)[:, None]
    table = random(1, 5, 2, seed=4)
    out = voxel_attention(q, k, v, made, bias=RelTable(coords, table), backend=backend)
    assert isinstance(out, Tensor)
    offset = (coords.long() - coords.long().t()).clamp(-2, 2) + 2
    s = torch.einsum("nhd,mhd->hnm", q, k) * 8**-0.5 + table[0][offset].movedim(-1, 0)
    apart = (torch.arange(13) < 9)[:, None] != (torch.arange(13) < 9)
    p = s.masked_fill(apart, -torch.inf).softmax(-1)
    torch.testing.assert_close(out, torch.einsum("hnm,mhd->nhd", p, v))


def test_errors() -> None:
    q = random(5, 2, 12)
    made = segments.from_lengths(torch.tensor([3, 2]))
    cases: list[tuple[Any, type[Exception], str]] = [
        (lambda: voxel_attention(q[:4], q, q, made), ValueError, "q has 4 rows; segments was built for 5"),
        (
            lambda: voxel_attention(q, q[:4], q[:4], made),
            ValueError,
            "k has 4 rows; segments was built for 5",
        ),
        (lambda: voxel_attention(q, q, q, (3, 2)), TypeError, "segments is a tuple"),  # type: ignore[arg-type]
        (lambda: voxel_attention(q[0], q, q, made), ValueError, "q has shape"),
        (lambda: voxel_attention(q, q.double(), q, made), TypeError, "k is torch.float64"),
        (lambda: voxel_attention(q, q[:, :1], q, made), ValueError, "k has shape"),
        (lambda: voxel_attention(q, q, q, made, scale=float("nan")), ValueError, "scale is nan"),
        (lambda: voxel_attention(q, q, q, made, bias=3), TypeError, "bias has a int"),  # type: ignore[arg-type]
        (
            lambda: voxel_attention(q, q, q, made, bias=KeyBias(q[:, 0, :1])),
            ValueError,
            "KeyBias has b of shape",
        ),
        (
            lambda: voxel_attention(q, q, q, segments.SegmentGroups([(made, 1)])),
            ValueError,
            "segments has 1 heads; q has 2",
        ),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=message):
            call()
