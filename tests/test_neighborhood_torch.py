"""Neighborhood attention inside PyTorch: op checks, compile, export, autocast, torch.func, checkpointing,
second derivatives.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backends_support import device_of, op_backends
from dispatch_modes import Recorded
from neighborhood_problems import BY_NAME
from neighborhood_solutions import make, options, run, solve
from rule import TRAINED
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vicinal import Neighborhood, neighborhood_attention, neighborhood_attention_qkvpacked

ALL = [*op_backends(), "reference"]


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    torch._dynamo.reset()  # the tests compile the same code for many problems, more than torch's limit


OPCHECKED = (
    "2d-dilated",
    "2d-dense-groups",
    "extra-grouped",
    "padding-window",
    "dropout",
    "more-keys",
    "qkvpacked",
    "batch-0",
)


@pytest.mark.parametrize("name", OPCHECKED)
@pytest.mark.parametrize("backend", op_backends())
def test_opcheck(name: str, backend: str) -> None:
    with Recorded() as mode:
        solve(BY_NAME[name], make(BY_NAME[name], torch.float32, device_of(backend)), backend)
    ops = [func for func, _ in mode.calls]
    assert ops == [getattr(getattr(torch.ops.vicinal, f"neighborhood_{d}"), backend) for d in ("fwd", "bwd")]
    for func, args in mode.calls:
        torch.library.opcheck(func, args)


def layer(backend: str, where: Neighborhood, **given: Any) -> Any:
    """A function of q, k, v and a table to compile: attention amid other operations."""

    def function(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        out = neighborhood_attention(q * 2, k, v, where, bias=table, backend=backend, **given)
        assert isinstance(out, Tensor)
        return out.sin()

    return function


def inputs_of(device: str, *space: int, batch: int = 2) -> list[Tensor]:
    """q, k, v and a table for kernels of 3."""
    qkv = [torch.randn(batch, *space, 3, 8, device=device, requires_grad=True) for _ in range(3)]
    return [*qkv, torch.randn(3, 5, 5, device=device, requires_grad=True)]


def gradients(function: Any, inputs: list[Tensor]) -> list[Tensor]:
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), inputs)]


WHERE = Neighborhood(3, dilation=(2, 1))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("backend", ALL)
def test_compile_with_gradients(backend: str, compiler: str) -> None:
    inputs, function = inputs_of(device_of(backend), 8, 6), layer(backend, WHERE)
    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    for x, y in zip(gradients(compiled, inputs), gradients(function, inputs)):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("backend", op_backends())
def test_compile_with_dynamic_shapes(backend: str) -> None:
    device, function = device_of(backend), layer(backend, WHERE)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch, height, width in ((2, 8, 6), (3, 9, 7), (5, 12, 10)):
        inputs = inputs_of(device, height, width, batch=batch)
        for x, y in zip(gradients(compiled, inputs), gradients(function, inputs)):
            torch.testing.assert_close(x, y)


COMPILED = (
    "3d-causal-time",
    "truncate-pair-2d",
    "unlimited-causal",
    "more-keys-stride",
    "extra-grouped",
    "padding-window",
    "qkvpacked",
    "rel-pos-2d",
)


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("backend", ALL)
def test_compile_every_option(name: str, backend: str) -> None:
    problem = BY_NAME[name]
    tensors = make(problem, torch.float32, device_of(backend))

    def function(given: dict[str, Tensor]) -> Any:
        q, k, v = given["q"], given["k"], given["v"]
        rest: Any = {"return_lse": True, "backend": backend, **options(problem, given)}
        if name == "qkvpacked":
            return neighborhood_attention_qkvpacked(torch.stack([q, k, v], -3), problem.where, **rest)
        where = problem.where
        fields: Any = {n: getattr(where, n) for n in ("dilation", "stride", "is_causal", "border")}
        return neighborhood_attention(q, k, v, where.kernel_size, **fields, **rest)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    leaves = [t for n, t in tensors.items() if n in TRAINED]
    results = []
    for f in (compiled, function):
        out, lse = f(tensors)
        lse = lse.masked_fill(lse.isinf(), 0.0)
        results.append([out, lse, *torch.autograd.grad((out.sum(), lse.sum()), leaves)])
    for x, y in zip(*results):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("backend", ALL)
def test_compile_layers_that_differ_in_their_dilation(backend: str) -> None:
    inputs = [x.detach() for x in inputs_of(device_of(backend), 12, 12)]
    for dilation in (1, 4, 2, 3):  # torch.compile would make it a symbol from the second layer on
        function = layer(backend, Neighborhood(3, dilation=dilation))
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*inputs), function(*inputs))


class Attention(nn.Module):
    def __init__(self, backend: str) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(3, 5, 5, device=device_of(backend)))
        self.backend = backend

    def forward(self, x: Tensor) -> Tensor:
        out = neighborhood_attention_qkvpacked(x, 3, dilation=2, bias=self.table, backend=self.backend)
        assert isinstance(out, Tensor)
        return out


@pytest.mark.parametrize("backend", ALL)
def test_export(backend: str) -> None:
    device = device_of(backend)
    module = Attention(backend).eval()
    x = torch.randn(2, 8, 6, 3, 3, 8, device=device)
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(module, (x,), dynamic_shapes=({0: batch},)).module()
    for n in (2, 5):
        x = torch.randn(n, 8, 6, 3, 3, 8, device=device)
        torch.testing.assert_close(exported(x), module(x))


@pytest.mark.parametrize("backend", ALL)
def test_autocast_rounds_q_k_v_and_extra_keys(backend: str) -> None:
    device = device_of(backend)
    q, k, v, table = inputs_of(device, 7, 6)
    extra = [torch.randn(2, 1, 3, 8, device=device) for _ in range(2)]

    def attend(q: Tensor, k: Tensor, v: Tensor, extra_k: Tensor, extra_v: Tensor) -> Tensor:
        out = neighborhood_attention(
            q, k, v, WHERE, bias=table, extra_k=extra_k, extra_v=extra_v, backend=backend
        )
        assert isinstance(out, Tensor)
        return out

    with torch.autocast(device, torch.float16):
        out = attend(q, k, v, *extra)
        packed = neighborhood_attention_qkvpacked(
            torch.stack([q, k, v], -3), WHERE, bias=table, backend=backend
        )
    expected = attend(*[x.half() for x in (q, k, v, *extra)])
    assert out.dtype == torch.float16
    assert torch.equal(out, expected)
    assert isinstance(packed, Tensor)
    plain = neighborhood_attention(q.half(), k.half(), v.half(), WHERE, bias=table, backend=backend)
    assert isinstance(plain, Tensor)
    assert torch.equal(packed, plain)
    grads = torch.autograd.grad(out.float().sum(), (q, k, v, table))
    assert [g.dtype for g in grads] == [torch.float32] * 4


def single(backend: str) -> Any:
    """Attention of one sample: q, k, v [H, W, h, d]."""

    def function(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        out = neighborhood_attention(q[None], k[None], v[None], WHERE, bias=table, backend=backend)
        assert isinstance(out, Tensor)
        return out[0]

    return function


@pytest.mark.parametrize("backend", ALL)
def test_vmap(backend: str) -> None:
    device = device_of(backend)
    q, k, v, _ = (x.detach() for x in inputs_of(device, 8, 6, batch=3))
    table = torch.randn(3, 3, 5, 5, device=device)
    function = single(backend)
    expected = torch.stack([function(*row) for row in zip(q, k, v, table)])
    torch.testing.assert_close(torch.vmap(function)(q, k, v, table), expected)
    shared = torch.stack([function(a, k[0], b, table[0]) for a, b in zip(q, v)])
    moved = torch.vmap(function, in_dims=(1, None, 0, None))(q.movedim(0, 1), k[0], v, table[0])
    torch.testing.assert_close(moved, shared)


@pytest.mark.parametrize("backend", ALL)
def test_gradients_of_torch_func(backend: str) -> None:
    inputs, function = inputs_of(device_of(backend), 8, 6), layer(backend, WHERE)
    expected = torch.autograd.grad(function(*inputs).square().sum(), inputs)
    plain = [x.detach() for x in inputs]
    got = torch.func.grad(lambda *args: function(*args).square().sum(), argnums=(0, 1, 2, 3))(*plain)
    for x, y in zip(got, expected):
        torch.testing.assert_close(x, y)
    out, vjp = torch.func.vjp(function, *plain)[:2]
    for x, y in zip(vjp(2 * out), expected):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("backend", ALL)
def test_gradients_per_sample(backend: str) -> None:
    q, k, v, table = (x.detach() for x in inputs_of(device_of(backend), 8, 6, batch=3))
    function = single(backend)

    def loss(table: Tensor, *sample: Tensor) -> Tensor:
        return function(*sample, table).square().sum()

    got = torch.vmap(torch.func.grad(loss), in_dims=(None, 0, 0, 0))(table, q, k, v)
    expected = torch.stack([torch.func.grad(loss)(table, *sample) for sample in zip(q, k, v)])
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("backend", op_backends())
def test_second_derivatives_of_kernels_are_refused(backend: str) -> None:
    inputs = inputs_of(device_of(backend), 8, 6)
    out = layer(backend, WHERE)(*inputs)
    (first,) = torch.autograd.grad(out.square().sum(), inputs[0], create_graph=True)
    for loss in (first.sum(), first.square().sum() + inputs[0].square().sum()):
        with pytest.raises(RuntimeError, match="is differentiable once; backend='reference'"):
            torch.autograd.grad(loss, inputs[0], retain_graph=True)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("backend", ALL)
def test_activation_checkpointing_repeats_the_dropout(backend: str, reentrant: bool) -> None:
    inputs = inputs_of(device_of(backend), 8, 6)
    function = layer(backend, WHERE, dropout_p=0.4)
    results = []
    for f in (function, lambda *args: checkpoint(function, *args, use_reentrant=reentrant)):
        torch.manual_seed(5)
        out = f(*inputs)
        out.square().sum().backward()
        results.append([out.detach(), *[x.grad for x in inputs]])
        for x in inputs:
            x.grad = None
    for x, y in zip(*results):
        assert torch.equal(x, y)


@pytest.mark.parametrize("backend", ALL)
def test_without_gradients(backend: str) -> None:
    problem = BY_NAME["extra-grouped"]
    tensors = make(problem, torch.float32, device_of(backend))
    expected = run(problem, tensors, backend)
    with torch.no_grad():
        plain = run(problem, tensors, backend)
    with torch.inference_mode():
        inference = run(problem, tensors, backend)
    for x, y, z in zip(expected, plain, inference):
        assert x.requires_grad
        assert not y.requires_grad
        assert torch.equal(x, y)
        assert torch.equal(y, z)


@pytest.mark.parametrize("backend", ALL)
def test_no_samples_give_empty_outputs_with_a_graph(backend: str) -> None:
    tensors = make(BY_NAME["batch-0"], torch.float32, device_of(backend))
    out, lse = run(BY_NAME["batch-0"], tensors, backend)
    assert out.shape == (0, 7, 6, 2, 8)
    assert lse.shape == (0, 7, 6, 2)
    dq, dbias = torch.autograd.grad((out.sum(), lse.sum()), (tensors["q"], tensors["bias"]))
    assert dq.shape == tensors["q"].shape
    assert not dbias.any()


@pytest.mark.parametrize("backend", ALL)
def test_fake_tensors(backend: str) -> None:
    with torch._subclasses.FakeTensorMode():
        q = torch.empty(2, 7, 6, 4, 8, device=device_of(backend))
        k = torch.empty(2, 7, 6, 2, 8, device=device_of(backend))
        v = torch.empty(2, 7, 6, 2, 5, device=device_of(backend))
        result = neighborhood_attention(q, k, v, WHERE, return_lse=True, backend=backend)
    assert isinstance(result, tuple)
    out, lse = result
    assert out.shape == (2, 7, 6, 4, 5)
    assert lse.shape == (2, 7, 6, 4)


@pytest.mark.parametrize("backend", op_backends())
def test_inputs_are_left_alone(backend: str) -> None:
    problem = BY_NAME["padding-sample-extra"]
    tensors = make(problem, torch.float32, device_of(backend))
    before = {n: t.detach().clone() for n, t in tensors.items()}
    versions = {n: t._version for n, t in tensors.items()}
    solve(problem, tensors, backend)
    for n, t in tensors.items():
        assert torch.equal(t.detach(), before[n])
        assert t._version == versions[n]


@pytest.mark.parametrize("backend", op_backends())
def test_views_of_a_packed_projection_are_not_copied(backend: str) -> None:
    qkv = torch.randn(2, 8, 6, 3, 2, 8, device=device_of(backend))
    q, k, v = qkv.unbind(-3)
    with Recorded() as mode:
        neighborhood_attention(q, k, v, 3, backend=backend)
        neighborhood_attention_qkvpacked(qkv, 3, backend=backend)
    assert len(mode.calls) == 2
    for _, args in mode.calls:
        assert [x.data_ptr() for x in args[:3]] == [x.data_ptr() for x in (q, k, v)]
