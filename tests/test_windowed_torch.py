"""Windowed attention inside PyTorch: op checks, compile, export, autocast, torch.func, checkpointing, second
derivatives.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
from backends_support import device_of, op_backends
from dispatch_modes import Recorded
from problems import BY_NAME, TRAINED, make, run, solve
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vicinal import Neighborhood, RelativeBias, Windows, windowed_attention, windowed_attention_qkvpacked

OPCHECKED = (
    "2d-shift-overhang",
    "edge-const-extra",
    "cosine-const",
    "dropout",
    "mask-heads",
    "overlap",
    "stripes",
    "relu2",
)


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    torch._dynamo.reset()  # the tests compile the same code for many problems, more than torch's limit


@pytest.mark.parametrize("name", [*OPCHECKED, "qkvpacked"])
@pytest.mark.parametrize("backend", op_backends())
def test_opcheck(name: str, backend: str) -> None:
    with Recorded() as mode:
        solve(BY_NAME[name], make(BY_NAME[name], torch.float32, device_of(backend)), backend)
    ops = [func for func, _ in mode.calls]
    assert ops == [getattr(getattr(torch.ops.vicinal, f"windowed_{d}"), backend) for d in ("fwd", "bwd")]
    for func, args in mode.calls:
        torch.library.opcheck(func, args)


def layer(backend: str, windows: Windows, **options: Any) -> Any:
    """A function of q, k, v and a table to compile: attention amid other operations."""

    def function(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        out = windowed_attention(q * 2, k, v, windows, bias=RelativeBias(table), backend=backend, **options)
        assert isinstance(out, Tensor)
        return out.sin()

    return function


def qkv(device: str, *space: int, batch: int = 2) -> list[Tensor]:
    return [torch.randn(batch, *space, 3, 8, device=device, requires_grad=True) for _ in range(3)]


def gradients(function: Any, inputs: list[Tensor]) -> list[Tensor]:
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), inputs)]


WINDOWS = Windows(4, shift=2)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("backend", [*op_backends(), "reference"])
def test_compile_with_gradients(backend: str, compiler: str) -> None:
    device = device_of(backend)
    inputs = [*qkv(device, 8, 6), torch.randn(49, 3, device=device, requires_grad=True)]
    function = layer(backend, WINDOWS)
    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    for x, y in zip(gradients(compiled, inputs), gradients(function, inputs)):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("backend", [*op_backends(), "reference"])
def test_compile_with_dynamic_shapes(backend: str) -> None:
    device = device_of(backend)
    table = torch.randn(49, 3, device=device, requires_grad=True)
    function = layer(backend, WINDOWS)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch, height, width in ((2, 8, 6), (3, 9, 7), (5, 12, 10)):
        inputs = [*qkv(device, height, width, batch=batch), table]
        for x, y in zip(gradients(compiled, inputs), gradients(function, inputs)):
            torch.testing.assert_close(x, y)


COMPILED = (
    "edge-const-extra",
    "cosine-const",
    "padding-bool",
    "mask-windows",
    "overlap",
    "pooled",
    "stripes",
    "qkvpacked",
    "rel-pos-roll-pad",
    "rel-pos-cosine",
)


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("backend", [*op_backends(), "reference"])
def test_compile_every_option(name: str, backend: str) -> None:
    problem = BY_NAME[name]
    tensors = make(problem, torch.float32, device_of(backend))

    def function(given: dict[str, Tensor]) -> Any:
        q, k, v = given["q"], given["k"], given["v"]
        rest: dict[str, Any] = {n: t for n, t in given.items() if n not in "qkv"}
        if problem.rel_pos:
            rest["rel_pos"] = tuple(rest.pop(f"rel_pos_{a}") for a in range(len(problem.space)))
        options: Any = {"return_lse": True, "backend": backend, **rest}
        if name == "qkvpacked":
            return windowed_attention_qkvpacked(torch.stack([q, k, v], -3), problem.windows, **options)
        return windowed_attention(q, k, v, problem.windows, **options)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    leaves = [t for n, t in tensors.items() if n in TRAINED]
    results = []
    for f in (compiled, function):
        out, lse = f(tensors)
        results.append([out, lse, *torch.autograd.grad((out.sum(), lse.sum()), leaves)])
    for x, y in zip(*results):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("backend", [*op_backends(), "reference"])
def test_compile_layers_that_differ_in_their_windows(backend: str) -> None:
    device = device_of(backend)
    inputs = [*qkv(device, 8, 6), torch.randn(49, 3, device=device)]
    for shift in (0, 2, 1):  # torch.compile would make the shift a symbol from the second layer on
        function = layer(backend, Windows(4, shift=shift))
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*inputs), function(*inputs))


class Attention(nn.Module):
    def __init__(self, backend: str) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(49, 3, device=device_of(backend)))
        self.backend = backend

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = x.unbind(-3)
        out = windowed_attention(q, k, v, WINDOWS, bias=RelativeBias(self.table), backend=self.backend)
        assert isinstance(out, Tensor)
        return out


@pytest.mark.parametrize("backend", [*op_backends(), "reference"])
def test_export(backend: str) -> None:
    device = device_of(backend)
    module = Attention(backend).eval()
    x = torch.randn(2, 8, 6, 3, 3, 8, device=device)
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(module, (x,), dynamic_shapes=({0: batch},)).module()
    for n in (2, 5):
        x = torch.randn(n, 8, 6, 3, 3, 8, device=device)
        torch.testing.assert_close(exported(x), module(x))


@pytest.mark.parametrize("backend", [*op_backends(), "reference"])
def test_autocast_rounds_q_k_and_v(backend: str) -> None:
    device = device_of(backend)
    q, k, v = qkv(device, 7, 6)
    table = torch.randn(49, 3, device=device, requires_grad=True)
    with torch.autocast(device, torch.bfloat16):
        out = windowed_attention(q, k, v, WINDOWS, bias=table, backend=backend)
        packed = windowed_attention_qkvpacked(
            torch.stack([q, k, v], -3), WINDOWS, bias=table, backend=backend
        )
    low_q, low_k, low_v = (x.bfloat16() for x in (q, k, v))
    expected = windowed_attention(low_q, low_k, low_v, WINDOWS, bias=table, backend=backend)
    assert isinstance(out, Tensor)
    assert isinstance(expected, Tensor)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)
    assert isinstance(packed, Tensor)
    assert torch.equal(packed, expected)
    grads = torch.autograd.grad(out.float().sum(), (q, k, v, table))
    assert [g.dtype for g in grads] == [torch.float32] * 4


def single(backend: str) -> Any:
    """Attention of one sample: q, k, v [H, W, h, d]."""

    def function(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        out = windowed_attention(
            q[None], k[None], v[None], WINDOWS, bias=RelativeBias(table), backend=backend
        )
        assert isinstance(out, Tensor)
        return out[0]

    return function


@pytest.mark.parametrize("backend", [*op_backends(), "reference"])
def test_vmap(backend: str) -> None:
    device = device_of(backend)
    q, k, v = (x.detach() for x in qkv(device, 8, 6, batch=3))
    table = torch.randn(3, 49, 3, device=device)
    function = single(backend)
    expected = torch.stack([function(*row) for row in zip(q, k, v, table)])
    torch.testing.assert_close(torch.vmap(function)(q, k, v, table), expected)
    shared = torch.stack([function(a, k[0], b, table[0]) for a, b in zip(q, v)])
    moved = torch.vmap(function, in_dims=(1, None, 0, None))(q.movedim(0, 1), k[0], v, table[0])
    torch.testing.assert_close(moved, shared)


@pytest.mark.parametrize("backend", [*op_backends(), "reference"])
def test_gradients_of_torch_func(backend: str) -> None:
    device = device_of(backend)
    inputs = [*qkv(device, 8, 6), torch.randn(49, 3, device=device, requires_grad=True)]
    function = layer(backend, WINDOWS)
    expected = torch.autograd.grad(function(*inputs).square().sum(), inputs)
    plain = [x.detach() for x in inputs]
    got = torch.func.grad(lambda *args: function(*args).square().sum(), argnums=(0, 1, 2, 3))(*plain)
    for x, y in zip(got, expected):
        torch.testing.assert_close(x, y)
    out, vjp = torch.func.vjp(function, *plain)[:2]
    for x, y in zip(vjp(2 * out), expected):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("backend", [*op_backends(), "reference"])
def test_gradients_per_sample(backend: str) -> None:
    device = device_of(backend)
    q, k, v = (x.detach() for x in qkv(device, 8, 6, batch=3))
    table, function = torch.randn(49, 3, device=device), single(backend)

    def loss(table: Tensor, *sample: Tensor) -> Tensor:
        return function(*sample, table).square().sum()

    got = torch.vmap(torch.func.grad(loss), in_dims=(None, 0, 0, 0))(table, q, k, v)
    expected = torch.stack([torch.func.grad(loss)(table, *sample) for sample in zip(q, k, v)])
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("backend", op_backends())
def test_second_derivatives_of_kernels_are_refused(backend: str) -> None:
    inputs = [
        *qkv(device_of(backend), 8, 6),
        torch.randn(49, 3, device=device_of(backend), requires_grad=True),
    ]
    out = layer(backend, WINDOWS)(*inputs)
    (first,) = torch.autograd.grad(out.square().sum(), inputs[0], create_graph=True)
    for loss in (first.sum(), first.square().sum() + inputs[0].square().sum()):
        for allow_unused in (False, True):
            with pytest.raises(RuntimeError, match="is differentiable once; backend='reference'"):
                torch.autograd.grad(loss, inputs[0], retain_graph=True, allow_unused=allow_unused)
    with pytest.raises(RuntimeError, match="is differentiable once; backend='reference'"):
        first.sum().backward()


def test_second_derivatives_of_the_reference() -> None:
    inputs = [*qkv("cpu", 4, 4), torch.randn(49, 3, requires_grad=True)]
    out = layer("reference", WINDOWS)(*inputs)
    (first,) = torch.autograd.grad(out.square().sum(), inputs[0], create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), inputs[0])
    assert bool(second.abs().sum() > 0)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("backend", [*op_backends(), "reference"])
def test_activation_checkpointing_repeats_the_dropout(backend: str, reentrant: bool) -> None:
    device = device_of(backend)
    inputs = [*qkv(device, 8, 6), torch.randn(49, 3, device=device, requires_grad=True)]
    function = layer(backend, WINDOWS, dropout_p=0.4)
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


@pytest.mark.parametrize("backend", [*op_backends(), "reference"])
def test_without_gradients(backend: str) -> None:
    tensors = make(BY_NAME["edge-const-extra"], torch.float32, device_of(backend))
    expected = run(BY_NAME["edge-const-extra"], tensors, backend)
    with torch.no_grad():
        plain = run(BY_NAME["edge-const-extra"], tensors, backend)
    with torch.inference_mode():
        inference = run(BY_NAME["edge-const-extra"], tensors, backend)
    for x, y, z in zip(expected, plain, inference):
        assert x.requires_grad
        assert not y.requires_grad
        assert torch.equal(x, y)
        assert torch.equal(y, z)


@pytest.mark.parametrize("backend", [*op_backends(), "reference"])
def test_meta_and_fake_tensors(backend: str) -> None:
    with torch._subclasses.FakeTensorMode():
        q = torch.empty(2, 7, 6, 3, 8, device=device_of(backend))
        v = torch.empty(2, 7, 6, 3, 5, device=device_of(backend))
        result = windowed_attention(q, q, v, WINDOWS, return_lse=True, backend=backend)
    assert isinstance(result, tuple)
    out, lse = result
    assert out.shape == (2, 7, 6, 3, 5)
    assert lse.shape == (2, 7, 6, 3)


@pytest.mark.parametrize("backend", op_backends())
def test_inputs_are_left_alone(backend: str) -> None:
    problem = BY_NAME["mask-extra"]
    tensors = make(problem, torch.float32, device_of(backend))
    before = {n: t.detach().clone() for n, t in tensors.items()}
    versions = {n: t._version for n, t in tensors.items()}
    solve(problem, tensors, backend)
    for n, t in tensors.items():
        assert torch.equal(t.detach(), before[n])
        assert t._version == versions[n]


@pytest.mark.parametrize(
    "geometry", [Windows(7, shift=3, partition="block"), Neighborhood(7, border="truncate")], ids=str
)
def test_pickled_geometry_hashes_like_an_equal_one_in_another_process(geometry: Any) -> None:
    script = (
        "import pickle; from vicinal import Neighborhood, Windows;"
        f"x = pickle.loads({pickle.dumps(geometry)!r}); y = {geometry!r}; "
        "assert x == y and hash(x) == hash(y)"
    )
    for seed in ("1", "2"):
        subprocess.run([sys.executable, "-c", script], env={**os.environ, "PYTHONHASHSEED": seed}, check=True)
