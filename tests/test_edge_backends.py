"""Edge attention on every backend against float64 over padded tables, by the one rule of rule.py; and its
properties."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
from backends_support import device_of, op_backends, reason_against, short
from edge_problems import BY_NAME, PROBLEMS, Problem, dense_errors, exact, make, run, solve
from rule import compare, largest
from torch import Tensor
from voxel_problems import BY_NAME as VOXEL

from vicinal import Graph, Segments, _backends, edge_attention, explain, voxel_attention

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LOW = (
    "draw",
    "hubs-terms",
    "neighbours",
    "softmax-all",
    "tied-all",
    "exp-all",
    "gate-all",
    "dim-10-10-terms",
)


def backends(dtype: torch.dtype = torch.float32) -> list[Any]:
    found = [pytest.param("reference", id="reference")]
    for name in _backends.ORDER:
        if name != "reference":
            why = reason_against(name, dtype, "edge")
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
    if why := reason_against(backend, dtype, "edge"):
        pytest.skip(f"{backend}: {why}")
    check(BY_NAME[name], dtype, backend)


@pytest.mark.parametrize("name", ["draw", "hubs-terms", "hubs-exp", "hubs-gate", "softmax-all"])
@pytest.mark.parametrize("backend", op_backends("edge"))
def test_runs_agree_bit_for_bit(name: str, backend: str) -> None:
    problem = BY_NAME[name]
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


@pytest.mark.parametrize("name", ["windows", "groups", "trellis", "neighbours", "arrays"])
@pytest.mark.parametrize("backend", [*op_backends("edge"), "reference"])
def test_edges_of_segments_are_segment_attention(name: str, backend: str) -> None:
    made = VOXEL[name].segments
    assert isinstance(made, Segments)
    device = device_of(backend)
    shapes = ((made.n_q, 2, 8), (made.n_k, 2, 8), (made.n_k, 2, 8))
    leaves = [torch.randn(s, dtype=torch.float64).float().to(device).requires_grad_() for s in shapes]
    graph = Graph.from_segments(made).to(device)
    results = []
    edges, voxels = (_any(f) for f in (edge_attention, voxel_attention))
    for found in (
        edges(*leaves, graph, return_lse=True, backend=backend),
        voxels(*(x.cpu() for x in leaves), made, return_lse=True, backend="reference"),
    ):
        out, lse = (x.cpu() for x in found)
        grads = torch.autograd.grad((out.sin().sum() + lse.clamp_min(-9).sum()), leaves)
        results.append([out, lse, *(g.cpu() for g in grads)])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def _any(function: Any) -> Any:
    return function


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("backend", [*op_backends("edge"), "reference"])
def test_edges_in_another_order(backend: str) -> None:
    """Edges between different nodes come to the same slots, whatever the order of the caller."""
    device = device_of(backend)
    pairs = torch.randperm(20 * 20, generator=torch.Generator().manual_seed(0))[:150]
    src, dst, edge = pairs % 20, pairs // 20, normal(150, 2, 8).to(device)
    q, k, v = normal(20, 3, 2, 8).unbind(1)
    shuffle = torch.randperm(150)
    plain, moved = (
        edge_attention(q.to(device), k.to(device), v.to(device), g.to(device), edge_k=e, backend=backend)
        for g, e in (
            (Graph.from_coo(src, dst, 20), edge),
            (Graph.from_coo(src[shuffle], dst[shuffle], 20), edge[shuffle.to(device)]),
        )
    )
    assert isinstance(plain, Tensor)
    assert isinstance(moved, Tensor)
    assert torch.equal(plain, moved)


@pytest.mark.parametrize("backend", [*op_backends("edge"), "reference"])
def test_a_node_of_many_edges(backend: str) -> None:
    """100,000 edges into one node and out of one: the mean of equal scores, and small gradients of them."""
    if backend == "triton" and device_of(backend) == "cpu":
        pytest.skip("triton: its interpreter takes minutes for 100,000 edges")
    device, n = device_of(backend), 100_000
    graph = Graph.from_coo(torch.arange(n) % 50, torch.zeros(n).long(), 50, 2).to(device)
    q, k = (torch.ones(m, 1, 8, device=device, requires_grad=True) for m in (2, 50))
    v = normal(50, 1, 8).to(device).requires_grad_()
    out = edge_attention(q, k, v, graph, backend=backend)
    assert isinstance(out, Tensor)
    torch.testing.assert_close(out[0, 0], v.detach().mean((0, 1)), rtol=1e-4, atol=1e-5)
    assert not out[1].any()
    dq, dk, dv = torch.autograd.grad(out[0].sum(), (q, k, v))
    torch.testing.assert_close(dv, torch.full_like(dv, 1 / 50), rtol=1e-4, atol=1e-6)
    assert largest(dq) < 1e-4
    hub = Graph.from_coo(torch.zeros(n).long(), torch.arange(n) % 50, 2, 50).to(device)
    dk = torch.autograd.grad(
        edge_attention(k, q, q, hub, backend=backend).sum(),  # type: ignore[union-attr]
        q,
    )[0]
    torch.testing.assert_close(dk[0], torch.full_like(dk[0], 50.0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", [*op_backends("edge"), "reference"])
def test_large_scores_with_equal_values(backend: str) -> None:
    """dx is 0 whatever p is, which a rounded delta would spoil."""
    device = device_of(backend)
    graph = BY_NAME["softmax-all"].listed.graph.to(device)
    for dtype in (torch.float32, torch.bfloat16):
        if reason_against(backend, dtype, "edge") if backend != "reference" else "":
            continue
        q, k = (30 * normal(23, 2, 2, 16)).to(device, dtype).unbind(1)
        v = torch.full_like(k, 0.7)
        q.requires_grad_(), k.requires_grad_()
        out = edge_attention(q, k, v, graph, backend=backend)
        assert isinstance(out, Tensor)
        for grad in torch.autograd.grad(out.sum(), (q, k)):
            assert largest(grad) < 1e-3


def test_constant_shift_of_scores_changes_only_lse() -> None:
    problem = BY_NAME["bias"]
    tensors = make(problem, torch.float64)
    first = run(problem, tensors)
    second = run(problem, tensors | {"edge_bias": tensors["edge_bias"] + 3})
    torch.testing.assert_close(second["out"], first["out"])
    torch.testing.assert_close(second["lse"], first["lse"] + 3)


@pytest.mark.parametrize("mode", ["softmax", "exp", "gate"])
def test_gradients_of_the_reference(mode: str) -> None:
    graph = Graph.from_coo(torch.tensor([0, 1, 1, 2, 2]), torch.tensor([0, 0, 0, 2, 1]), 3)
    given = [normal(*s).double().requires_grad_() for s in [(3, 1, 2)] * 3 + [(5, 1, 2)] * 4 + [(5, 1)]]

    def function(q: Any, k: Any, v: Any, *edges: Any) -> Any:
        names = ("edge_k", "edge_v", "edge_mul", "edge_gate", "edge_bias")
        options: Any = dict(zip(names, edges))
        more: Any = {"return_lse": True} if mode != "gate" else {}
        return edge_attention(
            q, k, v, graph, **options, mode=mode, clamp=3.0, return_edge=True, backend="reference", **more
        )

    assert torch.autograd.gradcheck(function, given)
    assert torch.autograd.gradgradcheck(function, given)


def test_wide_slot_numbers() -> None:
    """int64 numbers of slots, as from 2**31 edges on."""
    from dataclasses import replace

    problem = BY_NAME["softmax-all"]
    tensors = make(problem)
    graph = problem.listed.graph
    wide = replace(graph, rowptr=graph.rowptr.long(), edge_id=graph.edge_id.long(), kept={})
    edges: Any = {n: tensors[n] for n in ("edge_k", "edge_v", "edge_mul", "edge_gate", "edge_bias")}
    found = []
    for g in (graph, wide):
        out = _any(edge_attention)(*(tensors[n] for n in "qkv"), g, **edges, backend="cpu")
        assert isinstance(out, Tensor)
        found.append([out, *torch.autograd.grad(out.sum(), list(tensors.values()))])
    assert wide.reverse().rev.dtype == torch.int64
    for a, b in zip(*found):
        assert torch.equal(a, b)


def test_explain_names_the_backend() -> None:
    problem = BY_NAME["draw"]
    tensors = make(problem)
    assert explain(edge_attention, *(tensors[n] for n in "qkv"), problem.listed.graph).backend in (
        "cpu",
        "reference",
    )
