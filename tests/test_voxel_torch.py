"""Segment attention inside PyTorch: the module against padded torch.nn.MultiheadAttention, op checks,
compile, autocast, second derivatives.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backends_support import device_of, op_backends
from dispatch_modes import Recorded
from torch import Tensor, nn
from voxel_problems import BY_NAME, voxels
from voxel_solutions import make, run, solve

from benchmarks.voxel_published import padded, padded_attention, padded_sets, repeats
from vicinal import KeyBias, Segments, segments, voxel_attention
from vicinal.nn import SegmentMultiheadAttention


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("orientation", [0, 1])
@pytest.mark.parametrize(("window", "shift"), [((12, 12, 1), (0, 0, 0)), ((24, 24, 1), (6, 6, 0))])
def test_sets_are_those_of_unique_bincount_and_sort(window: Any, shift: Any, orientation: int) -> None:
    coords, grid, size = voxels("waymo_pillar", 3000)
    made = segments.dsvt_sets(coords, grid, size, window, shift, 36)[orientation]
    sets = padded_sets(coords, list(window), list(shift), 36, orientation)
    fresh = ~repeats(sets)
    lengths = fresh.sum(1)
    assert torch.equal(lengths, (made.q_ptr[1:] - made.q_ptr[:-1]).long())
    assert torch.equal(sets[fresh], made.q_index.long())


@pytest.mark.parametrize("name", ["sets", "windows"])
@pytest.mark.parametrize("backend", [*op_backends(), "reference"])
def test_module_is_padded_multihead_attention(name: str, backend: str) -> None:
    """Values, and gradients of the input and of every parameter."""
    coords, grid, size = voxels("waymo_pillar", 900)
    if name == "sets":
        made = segments.dsvt_sets(coords, grid, size, (12, 12, 1), (0, 0, 0), 36)[0]
    else:
        made = segments.windows(coords, grid, size, (12, 12, 1), (6, 6, 0))
    device = device_of(backend)
    published = nn.MultiheadAttention(24, 3, batch_first=True)
    ours = SegmentMultiheadAttention(24, 3, backend=backend)
    ours.load_state_dict(published.state_dict(), strict=True)
    published.load_state_dict(ours.state_dict(), strict=True)
    ours.to(device)
    x, pos = torch.randn(2, len(coords), 24).unbind(0)
    dout = torch.randn(len(coords), 24)
    found = []
    for module in (published, ours):
        where = device if module is ours else "cpu"
        a = x.to(where).detach().requires_grad_()
        qk = a + pos.to(where)
        if module is published:
            out = padded_attention(published, qk, a, *padded(made))
        else:
            out = ours(qk, qk, a, made.to(device))[0]
        leaves = [a, *(p for _, p in sorted(module.named_parameters()))]
        found.append([out, *torch.autograd.grad(out, leaves, dout.to(where))])
    for p, o in zip(*found):
        torch.testing.assert_close(o.cpu(), p, rtol=1e-4, atol=1e-5)


def test_module_projects_equal_inputs_together() -> None:
    module = SegmentMultiheadAttention(12, 2)
    x, y, z = torch.randn(3, 5, 12).unbind(0)
    made = segments.from_lengths(torch.tensor([3, 2]))
    for inputs in ((x, x, x), (x, x, y), (x, y, y), (x, y, z)):
        copies = [t.clone() for t in inputs]
        torch.testing.assert_close(module(*inputs, made)[0], module(*copies, made)[0])


def test_module_refuses_dropout_in_training() -> None:
    module = SegmentMultiheadAttention(12, 2, dropout=0.1)
    x, made = torch.randn(5, 12), segments.from_lengths(torch.tensor([3, 2]))
    with pytest.raises(NotImplementedError, match=r"dropout is 0\.1"):
        module(x, x, x, made)
    assert module.eval()(x, x, x, made)[0].shape == (5, 12)


@pytest.mark.parametrize("name", ["windows", "groups", "arrays", "head-groups-mixed", "key-fixed"])
@pytest.mark.parametrize("backend", op_backends())
def test_opcheck(name: str, backend: str) -> None:
    with Recorded() as mode:
        solve(BY_NAME[name], make(BY_NAME[name], torch.float32, device_of(backend)), backend)
    assert [f for f, _ in mode.calls] == [
        getattr(getattr(torch.ops.vicinal, f"voxel_{d}"), backend) for d in ("fwd", "bwd")
    ]
    for func, args in mode.calls:
        torch.library.opcheck(func, args)


def inputs(n: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.randn(3, n, 2, 8, device=device).unbind(0)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("backend", [*op_backends(), "reference"])
def test_compile_without_graph_break(backend: str, compiler: str) -> None:
    device = device_of(backend)

    def function(q: Tensor, k: Tensor, v: Tensor, made: Segments, b: Tensor) -> Tensor:
        out = voxel_attention(q * 2, k, v, made, bias=KeyBias(b), backend=backend)
        assert isinstance(out, Tensor)
        return out.sin()

    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    for lengths in ([20, 7], [3, 30, 9]):
        made = segments.from_lengths(torch.tensor(lengths)).to(device)
        plan = voxel_attention(*inputs(sum(lengths), device), made)  # the plan is built outside of the graph
        assert isinstance(plan, Tensor)
        given: Any = [
            *inputs(sum(lengths), device),
            torch.randn(sum(lengths), device=device, requires_grad=True),
        ]
        results = []
        for f in (compiled, function):
            out = f(given[0], given[1], given[2], made, given[3])
            results.append([out, *torch.autograd.grad(out.sum(), given)])
        for x, y in zip(*results):
            torch.testing.assert_close(x, y)


@pytest.mark.parametrize("backend", [*op_backends(), "reference"])
def test_autocast_rounds_q_k_and_v(backend: str) -> None:
    device = device_of(backend)
    made = segments.from_lengths(torch.tensor([20, 7])).to(device)
    q, k, v = inputs(27, device)
    with torch.autocast(device, torch.bfloat16):
        out = voxel_attention(q, k, v, made, backend=backend)
    expected = voxel_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), made, backend=backend)
    assert isinstance(out, Tensor)
    assert isinstance(expected, Tensor)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)


@pytest.mark.parametrize("backend", op_backends())
def test_second_derivatives_of_kernels_are_refused(backend: str) -> None:
    made = segments.from_lengths(torch.tensor([20, 7])).to(device_of(backend))
    given = inputs(27, device_of(backend))
    out = voxel_attention(*given, made, backend=backend)
    assert isinstance(out, Tensor)
    (first,) = torch.autograd.grad(out.square().sum(), given[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"voxel attention of backend .* is differentiable once"):
        torch.autograd.grad(first.sum(), given[0])


def test_second_derivatives_of_the_reference() -> None:
    made, given = segments.from_lengths(torch.tensor([5, 2])), inputs(7, "cpu")
    out = voxel_attention(*given, made, backend="reference")
    assert isinstance(out, Tensor)
    (first,) = torch.autograd.grad(out.square().sum(), given[0], create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), given[0])
    assert bool(second.abs().sum() > 0)


@pytest.mark.parametrize("backend", op_backends())
def test_inputs_are_left_alone(backend: str) -> None:
    problem = BY_NAME["groups"]
    tensors = make(problem, torch.float32, device_of(backend))
    versions = {n: t._version for n, t in tensors.items()}
    run(problem, tensors, backend)
    solve(problem, tensors, backend)
    assert {n: t._version for n, t in tensors.items()} == versions
