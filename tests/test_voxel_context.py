"""ContextTable: the two forms that kernels take, ConDaFormer's planes, op checks, compilation, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backends_support import device_of, op_backends
from dispatch_modes import Recorded
from rule import TRAINED, compare
from test_voxel_backends import solution
from torch import Tensor
from voxel_problems import BY_NAME
from voxel_solutions import context_cells, make, solve, terms

from vicinal import ContextTable, segments, voxel_attention
from vicinal._voxel_context import Channels
from vicinal._voxel_run import _head_groups, prepare


@pytest.mark.parametrize("name", ["context-apart", "context-overlap", "context-small"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_channels_are_the_terms(name: str, dtype: torch.dtype) -> None:
    """What kernels without tables run on, through kernels and through their autograd."""
    problem = BY_NAME[name]
    tensors, made = make(problem, dtype), problem.segments
    given = terms(problem, tensors)
    term = given[0] if isinstance(given, tuple) else given
    q, k, v = (tensors[n] for n in "qkv")
    call = prepare(q, k, v, made, term)
    channels = Channels(term, _head_groups(call))
    a, b, c = channels.longer(q, k, v, call.scale)
    longer = voxel_attention(a, b, c, made, scale=call.scale, return_lse=True, backend="cpu")
    expected = voxel_attention(q, k, v, made, bias=term, return_lse=True, backend="reference")
    results: list[list[Tensor]] = []
    douts: Any = None
    leaves = [t for n, t in tensors.items() if n in TRAINED and n != "extra_bias"]
    for o, sums in ((channels.narrow(longer[0], v.shape[-1]), longer[1]), expected):
        douts = douts or (torch.randn_like(o), torch.randn_like(sums).masked_fill(sums.isinf(), 0.0))
        sums = sums.masked_fill(sums.isinf(), 0.0)
        results.append([o, sums, *torch.autograd.grad((o, sums), leaves, douts)])
    limit = 1e-4 if dtype == torch.float32 else 6e-2
    for x, y in zip(*results):
        assert float((x - y).abs().max()) <= limit * float(y.abs().max())


def test_a_plane_is_a_window_with_cells_of_its_own() -> None:
    """ConDaFormer's three planes in one call are three calls on a third of the heads each."""
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(300, 3, generator=generator) * 9
    batch = (torch.arange(300) % 2).long()
    q, k, v = (torch.randn(300, 6, 16, generator=generator) for _ in range(3))
    for shifted in (False, True):
        made, cells, offsets = segments.condaformer_planes(
            points, batch, 2, 4.0, 0.25, shifted=shifted, heads=6
        )
        tables = [torch.randn(offsets, 3, 6, 16, generator=generator) * 0.2 for _ in range(3)]
        whole = voxel_attention(q, k, v, made, bias=ContextTable(tuple(cells), *tables))
        parts = []
        for i, ((plane, _), c) in enumerate(zip(made.groups, cells)):
            h = slice(2 * i, 2 * i + 2)
            term = ContextTable(c, *(t[:, :, h] for t in tables))
            parts.append(voxel_attention(q[:, h], k[:, h], v[:, h], plane, bias=term, backend="reference"))
        assert isinstance(whole, Tensor)
        torch.testing.assert_close(whole, torch.cat(parts, 1), rtol=1e-4, atol=1e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize("axes", [1, 2])
@pytest.mark.parametrize("backend", op_backends())
def test_fewer_axes(axes: int, backend: str) -> None:
    device = device_of(backend)
    made = segments.from_lengths(torch.tensor([7, 2, 9])).to(device)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(18, 2, 8, generator=generator).to(device) for _ in range(3))
    cells = torch.randint(0, 5, (18, axes), generator=generator).to(device)
    tables = [torch.randn(9, axes, 2, 8, generator=generator).to(device).requires_grad_() for _ in range(3)]
    found = []
    for name in (backend, "reference"):
        out = voxel_attention(q, k, v, made, bias=ContextTable(cells, *tables), backend=name)
        assert isinstance(out, Tensor)
        found.append([out, *torch.autograd.grad(out.sin().sum(), tables)])
    for x, y in zip(*found):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["context-mixed", "context-overlap"])
def test_runs_and_threads_agree_bit_for_bit(name: str) -> None:
    problem = BY_NAME[name]
    tensors = make(problem, torch.float32)
    first, before = solve(problem, tensors, "cpu"), torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for n, t in solve(problem, tensors, "cpu").items():
                assert torch.equal(t, first[n]), n
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_instruction_sets(isa: str) -> None:
    from vicinal import _backends

    if _backends._C is None or isa not in _backends._C.available_isas():
        pytest.skip(f"no {isa} code here")
    before = _backends._C.isa()
    try:
        _backends._C.set_isa(isa)
        for name, dtype in (("context-overlap", torch.float32), ("context-apart", torch.float32)):
            problem = BY_NAME[name]
            truth, errors = solution(name, dtype)
            assert not compare(solve(problem, make(problem, dtype), "cpu"), truth, errors, dtype)
    finally:
        _backends._C.set_isa(before)


def test_opcheck() -> None:
    problem = BY_NAME["context-mixed"]
    with Recorded() as mode:
        solve(problem, make(problem), "cpu")
    ops = torch.ops.vicinal
    assert [func for func, _ in mode.calls] == [ops.voxel_context_fwd.cpu, ops.voxel_context_bwd.cpu]
    for func, args in mode.calls:
        torch.library.opcheck(func, args)


@pytest.mark.parametrize("backend", op_backends())
def test_compile_without_graph_break(backend: str) -> None:
    torch._dynamo.reset()
    problem, device = BY_NAME["context-apart"], device_of(backend)
    tensors, made = make(problem, torch.float32, device), problem.segments.to(device)
    cells = tuple(c.to(device) for _, _, c in context_cells(problem))
    leaves = [tensors[n] for n in ("q", "k", "v", "q_table", "k_table", "v_table")]

    def function(q: Tensor, k: Tensor, v: Tensor, *tables: Tensor) -> Tensor:
        out = voxel_attention(q * 2, k, v, made, bias=ContextTable(cells, *tables), backend=backend)
        assert isinstance(out, Tensor)
        return out.sin()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    found = [torch.autograd.grad(f(*leaves).sum(), leaves) for f in (function, compiled)]  # builds the plan
    for x, y in zip(*found):
        torch.testing.assert_close(x, y)


def test_errors() -> None:
    problem = BY_NAME["context-small"]
    tensors = make(problem)
    good = terms(problem, tensors)
    tables = (good.q_table, good.k_table, good.v_table)
    q = tensors["q"]
    cells = torch.zeros(12, 3, dtype=torch.int32)
    cases: list[tuple[Any, str]] = [
        (lambda: ContextTable((), *tables), "cells is an empty tuple"),
        (lambda: ContextTable(cells - 1, *tables), "cells has values from -1 to -1"),
        (
            lambda: ContextTable(cells + 16, *tables),
            r"from 16 to 16; they must be from 0 to \(L - 1\) / 2 = 15",
        ),
        (lambda: ContextTable((cells, cells[:5]), *tables), "cells has shapes"),
        (lambda: ContextTable(cells, tables[0][1:], *tables[1:]), "q_table has shape"),
        (
            lambda: voxel_attention(q, q, q, problem.segments, bias=ContextTable((cells,) * 2, *tables)),
            "2 tensors of cells; segments has 1 groups",
        ),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
