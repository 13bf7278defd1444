"""Joint and hash attention inside PyTorch: op checks, compile, autocast, torch.func, second derivatives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import hash_problems
import joint_problems
import pytest
import torch
from backends_support import device_of, op_backends
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from vicinal import hash_attention, joint_attention


@dataclass(frozen=True)
class Subject:
    """A function of trainable tensors to test: joint or hash attention amid other operations."""

    family: str
    inputs: Callable[[str], list[Tensor]]
    call: Callable[..., Tensor]


def joint_inputs(device: str) -> list[Tensor]:
    widths = (8, 8, 8, 8, 24, 24)
    return [torch.randn(2, 40, w, device=device, requires_grad=True) for w in widths]


def joint_call(*inputs: Tensor, backend: str) -> Tensor:
    first, *rest = inputs
    out = joint_attention(first * 2, *rest, group_size=16, gate=True, backend=backend)
    assert isinstance(out, Tensor)
    return out.sin()


def hash_inputs(device: str) -> list[Tensor]:
    return [torch.randn(2, 40, 2, 8, device=device, requires_grad=True) for _ in range(2)]


def hash_call(qk: Tensor, v: Tensor, *, backend: str) -> Tensor:
    anchors = torch.linspace(-1, 1, 40, device=v.device).sin().view(5, 8)
    weight = torch.linspace(0, 9, 80, device=v.device).sin().view(16, 5)
    mean = torch.full((5,), 0.6, device=v.device)
    return hash_attention(qk * 2, v, anchors, weight, mean, backend=backend).sin()


SUBJECTS = {
    "joint": Subject("joint", joint_inputs, joint_call),
    "hash": Subject("hash", hash_inputs, hash_call),
}


def cases() -> list[Any]:
    """(family, backend) for all that run here, the reference included."""
    found = []
    for family in SUBJECTS:
        for param in [*op_backends(family), pytest.param("reference")]:
            name = param.values[0]
            found.append(pytest.param(family, name, marks=param.marks, id=f"{family}-{name}"))
    return found


def kernel_cases() -> list[Any]:
    return [case for case in cases() if case.values[1] != "reference"]


def gradients(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), inputs)]


class Recorded(TorchDispatchMode):
    """The arguments of every call of an op of vicinal."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "vicinal":
            self.calls.append((func, tuple(a.detach() if isinstance(a, Tensor) else a for a in args)))
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", op_backends("joint"))
@pytest.mark.parametrize("name", ["gate", "without-u", "causal", "bias-laplace", "dropout", "mask"])
def test_opcheck_of_joint(name: str, backend: str) -> None:
    problem = joint_problems.BY_NAME[name]
    with Recorded() as mode:
        joint_problems.solve(problem, joint_problems.make(problem, device=device_of(backend)), backend)
    assert [f for f, _ in mode.calls] == [
        getattr(getattr(torch.ops.vicinal, f"joint_{d}"), backend) for d in ("fwd", "bwd")
    ]
    for func, args in mode.calls:
        torch.library.opcheck(func, args)


@pytest.mark.parametrize("backend", op_backends("hash"))
@pytest.mark.parametrize("name", ["tokens-17", "self"])
def test_opcheck_of_hash(name: str, backend: str) -> None:
    problem = hash_problems.BY_NAME[name]
    tensors = hash_problems.make(problem, device=device_of(backend))
    with Recorded() as mode:
        hash_problems.run(problem, tensors, backend).sum().backward()
    assert [f for f, _ in mode.calls] == [
        getattr(getattr(torch.ops.vicinal, f"hash_{d}"), backend) for d in ("fwd", "bwd")
    ]
    for func, args in mode.calls:
        torch.library.opcheck(func, args)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize(("family", "backend"), cases())
def test_compile_with_gradients(family: str, backend: str, compiler: str) -> None:
    subject = SUBJECTS[family]

    def function(*inputs: Tensor) -> Tensor:
        return subject.call(*inputs, backend=backend)

    inputs = subject.inputs(device_of(backend))
    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    for x, y in zip(gradients(compiled, inputs), gradients(function, inputs)):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize(("family", "backend"), cases())
def test_compile_with_dynamic_lengths(family: str, backend: str) -> None:
    subject = SUBJECTS[family]

    def function(*inputs: Tensor) -> Tensor:
        return subject.call(*inputs, backend=backend)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (40, 33, 21):
        inputs = [x[:, :tokens].detach().requires_grad_() for x in subject.inputs(device_of(backend))]
        for x, y in zip(gradients(compiled, inputs), gradients(function, inputs)):
            torch.testing.assert_close(x, y)


@pytest.mark.parametrize(("family", "backend"), cases())
def test_autocast_rounds_the_inputs(family: str, backend: str) -> None:
    subject = SUBJECTS[family]
    dtype = torch.float16 if backend == "triton" else torch.bfloat16
    inputs = subject.inputs(device_of(backend))
    with torch.autocast(device_of(backend), dtype):
        out = subject.call(*inputs, backend=backend)
    assert out.dtype == dtype
    low = [x.detach().to(dtype) for x in inputs]
    assert torch.equal(out, subject.call(*low, backend=backend))
    assert [g.dtype for g in torch.autograd.grad(out.float().sum(), inputs)] == [torch.float32] * len(inputs)


@pytest.mark.parametrize(("family", "backend"), kernel_cases())
def test_second_derivatives_of_kernels_are_refused(family: str, backend: str) -> None:
    subject = SUBJECTS[family]
    inputs = subject.inputs(device_of(backend))
    out = subject.call(*inputs, backend=backend)
    (first,) = torch.autograd.grad(out.square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="is differentiable once; backend='reference'"):
        torch.autograd.grad(first.sum(), inputs[0])


@pytest.mark.parametrize(("family", "backend"), cases())
def test_torch_func(family: str, backend: str) -> None:
    subject = SUBJECTS[family]
    inputs = subject.inputs(device_of(backend))
    everything = tuple(range(len(inputs)))

    def loss(*given: Tensor) -> Tensor:
        return subject.call(*given, backend=backend).square().sum()

    expected = torch.autograd.grad(loss(*inputs), inputs)
    plain = [x.detach() for x in inputs]
    for x, y in zip(torch.func.grad(loss, everything)(*plain), expected):
        torch.testing.assert_close(x, y)
    singles = [x[:, None] for x in plain]
    mapped = torch.vmap(lambda *given: subject.call(*given, backend=backend))(*singles)
    torch.testing.assert_close(mapped[:, 0], subject.call(*plain, backend=backend))


@pytest.mark.parametrize(("family", "backend"), cases())
def test_checkpointing_and_inference(family: str, backend: str) -> None:
    subject = SUBJECTS[family]
    inputs = subject.inputs(device_of(backend))

    def function(*given: Tensor) -> Tensor:
        return subject.call(*given, backend=backend)

    expected = gradients(function, inputs)
    repeated = gradients(lambda *given: checkpoint(function, *given, use_reentrant=False), inputs)
    for x, y in zip(repeated, expected):
        assert torch.equal(x, y)
    with torch.inference_mode():
        assert torch.equal(function(*inputs), expected[0])
