"""Linear attention inside PyTorch: op checks, compile, autocast, torch.func, memory, second derivatives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backends_support import device_of
from linear_problems import BY_NAME, make, run, solve
from test_linear_backends import BACKENDS, BACKENDS_AND_REFERENCE
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from vicinal import LinearState, explain, linear_attention, linear_attention_step

OPCHECKED = (
    "cross",
    "den-options",
    "state",
    "packed",
    "causal-step-decay",
    "causal-state-head",
    "blocks-previous",
    "layout-nchw",
    "identity",
)


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    torch._dynamo.reset()


class Recorded(TorchDispatchMode):
    """The arguments of every call of an op of vicinal."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "vicinal":
            detached = tuple(a.detach() if isinstance(a, Tensor) else a for a in args)
            self.calls.append((func, detached))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", OPCHECKED)
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(name: str, backend: str) -> None:
    with Recorded() as mode:
        solve(BY_NAME[name], make(BY_NAME[name], torch.float32, device_of(backend)), backend)
    ops = [func for func, _ in mode.calls]
    assert ops == [getattr(getattr(torch.ops.vicinal, f"linear_{d}"), backend) for d in ("fwd", "bwd")]
    for func, args in mode.calls:
        torch.library.opcheck(func, args)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_of_a_step(backend: str) -> None:
    device = device_of(backend)
    q, k, v = (torch.randn(2, 1, 3, 8, device=device) for _ in range(3))
    s, z = torch.zeros(2, 3, 8, 8, device=device), torch.zeros(2, 3, 8, device=device)
    op = getattr(torch.ops.vicinal.linear_step, backend)
    torch.library.opcheck(op, (q, k, v, s, z, None, "elu1", 0.0, "elu1", 0.0, 1.0, 1e-6, 0.0))
    torch.library.opcheck(op, (q, k, v, s, None, None, "elu1", 0.0, "elu1", 0.0, 1.0, 1e-6, 0.0))


COMPILED = (
    "cross",
    "state",
    "causal-step-decay",
    "favor",
    "focused",
    "causal-state",
    "blocks-previous",
    "layout-nchw",
)


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("backend", BACKENDS_AND_REFERENCE)
def test_compile(name: str, backend: str) -> None:
    problem = BY_NAME[name]
    tensors = make(problem, torch.float32, device_of(backend))
    compiled = torch.compile(lambda t: run(problem, t, backend), fullgraph=True, backend="aot_eager")
    leaves = [x for x in tensors.values() if x.requires_grad]
    results = []
    for function in (compiled, lambda t: run(problem, t, backend)):
        found = function(tensors)
        total = torch.stack([x.float().square().sum() for x in found.values()]).sum()
        results.append([*found.values(), *torch.autograd.grad(total, leaves)])
    for x, y in zip(*results):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_with_inductor_and_dynamic_shapes(backend: str) -> None:
    device = device_of(backend)

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = linear_attention(q * 2, k, v, is_causal=True, backend=backend)
        assert isinstance(out, Tensor)
        return out.sin()

    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    for n in (17, 70, 33):
        inputs = [torch.randn(2, n, 3, 8, device=device, requires_grad=True) for _ in range(3)]
        torch.testing.assert_close(compiled(*inputs), function(*inputs))
        got = torch.autograd.grad(compiled(*inputs).square().sum(), inputs)
        for x, y in zip(got, torch.autograd.grad(function(*inputs).square().sum(), inputs)):
            torch.testing.assert_close(x, y)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_a_step(backend: str) -> None:
    device = device_of(backend)
    q, k, v = (torch.randn(2, 1, 3, 8, device=device) for _ in range(3))

    def function(state: LinearState) -> Tensor:
        return linear_attention_step(q, k, v, state, backend=backend)

    states = [
        LinearState(torch.ones(2, 3, 8, 8, device=device), torch.ones(2, 3, 8, device=device)) for _ in "ab"
    ]
    with torch.no_grad():
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        for _ in range(3):
            torch.testing.assert_close(compiled(states[0]), function(states[1]))
    torch.testing.assert_close(states[0].s, states[1].s)


@pytest.mark.parametrize("backend", BACKENDS_AND_REFERENCE)
def test_autocast_rounds_q_k_and_v(backend: str) -> None:
    device = device_of(backend)
    leaves = [torch.randn(2, 33, 3, 8, device=device, requires_grad=True) for _ in range(3)]
    with torch.autocast(device, torch.bfloat16):
        out = linear_attention(*leaves, backend=backend)
    expected = linear_attention(*[x.bfloat16() for x in leaves], backend=backend)
    assert isinstance(out, Tensor)
    assert isinstance(expected, Tensor)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(out.float().sum(), leaves))


@pytest.mark.parametrize("backend", BACKENDS_AND_REFERENCE)
def test_vmap_and_gradients_of_torch_func(backend: str) -> None:
    device = device_of(backend)
    q, k, v = (torch.randn(3, 2, 20, 2, 8, device=device) for _ in range(3))

    def loss(*args: Tensor) -> Tensor:
        out = linear_attention(*args, is_causal=True, backend=backend)
        assert isinstance(out, Tensor)
        return out.square().sum()

    got = torch.vmap(torch.func.grad(loss, argnums=(0, 1, 2)))(q, k, v)
    for i in range(3):
        leaves = [x[i].clone().requires_grad_() for x in (q, k, v)]
        for x, y in zip(got, torch.autograd.grad(loss(*leaves), leaves)):
            torch.testing.assert_close(x[i], y)


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivatives_of_kernels_are_refused(backend: str) -> None:
    leaves = [torch.randn(1, 5, 1, 4, device=device_of(backend), requires_grad=True) for _ in range(3)]
    out = linear_attention(*leaves, backend=backend)
    assert isinstance(out, Tensor)
    (first,) = torch.autograd.grad(out.square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="is differentiable once; backend='reference'"):
        first.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS_AND_REFERENCE)
def test_checkpoint(backend: str) -> None:
    leaves = [torch.randn(1, 50, 2, 8, device=device_of(backend), requires_grad=True) for _ in range(3)]

    def function(*args: Tensor) -> Tensor:
        out = linear_attention(*args, is_causal=True, backend=backend)
        assert isinstance(out, Tensor)
        return out

    expected = torch.autograd.grad(function(*leaves).square().sum(), leaves)
    got = torch.autograd.grad(checkpoint(function, *leaves, use_reentrant=False).square().sum(), leaves)
    assert all(torch.equal(x, y) for x, y in zip(got, expected))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_saved_for_the_backward(backend: str, causal: bool) -> None:
    batch, n, heads, dim, saved = 2, 500, 3, 16, 0
    leaves = [
        torch.randn(batch, n, heads, dim, device=device_of(backend), requires_grad=True) for _ in range(3)
    ]

    def pack(x: Tensor) -> Tensor:
        nonlocal saved
        saved += x.numel()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        linear_attention(*leaves, is_causal=causal, backend=backend)
    tokens, state = batch * n * heads, batch * heads * dim
    assert saved <= tokens * (4 * dim + 1) + state * (dim + 1)  # q, k, v, out, den, s, z


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_are_left_alone(backend: str) -> None:
    problem = BY_NAME["causal-const-mask"]
    tensors = make(problem, torch.float32, device_of(backend))
    before = {n: (x.detach().clone(), x._version) for n, x in tensors.items()}
    solve(problem, tensors, backend)
    for n, x in tensors.items():
        assert torch.equal(x.detach(), before[n][0])
        assert x._version == before[n][1]


def test_explain() -> None:
    q = torch.randn(1, 5, 2, 4)
    told = explain(linear_attention, q, q, q, is_causal=True, decay=torch.zeros(1, 5, 2, 4))
    assert told.backend == "reference"
    assert "decay per channel is missing" in str(told)
    assert explain(linear_attention, q, q, q, backend="reference").backend == "reference"
    state = LinearState(torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4))
    assert set(explain(linear_attention_step, q[:, :1], q[:, :1], q[:, :1], state).reasons) >= {"reference"}
