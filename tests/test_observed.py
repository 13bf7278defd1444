"""Calls on ordinary CPU tensors pass over the dispatcher, but whatever wants to see the op does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vicinal import _backends, _family, windowed_attention
from vicinal._family import unobserved

pytestmark = pytest.mark.skipif(bool(_backends.have_cpu("cpu")), reason=_backends.have_cpu("cpu"))


class Seen(TorchDispatchMode):
    """The names of the ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def inputs(grad: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, 7, 7, 2, 16, generator=generator).requires_grad_(grad) for _ in range(3))
    return q, k, v


def step(q: Tensor, k: Tensor, v: Tensor) -> None:
    windowed_attention(q, k, v, 7, backend="cpu").sum().backward()  # type: ignore[union-attr]


def test_a_plain_call_skips_the_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    for key in (("windowed_fwd", "cpu"), ("windowed_bwd", "cpu")):

        def counted(
            *args: Any, name: str = key[0], run: Callable[..., Any] = _family.IMPLEMENTATIONS[key]
        ) -> Any:
            ran.append(name)
            return run(*args)

        monkeypatch.setitem(_family.IMPLEMENTATIONS, key, counted)
    step(*inputs(grad=True))
    assert ran == ["windowed_fwd", "windowed_bwd"]


def test_dispatch_modes_see_both_ops() -> None:
    with Seen() as mode:
        step(*inputs(grad=True))
    assert [n for n in mode.names if n.startswith("vicinal")] == [
        "vicinal.windowed_fwd.cpu",
        "vicinal.windowed_bwd.cpu",
    ]


def test_profiles_name_both_ops() -> None:
    with torch.profiler.profile() as profile:
        step(*inputs(grad=True))
    names = {event.key for event in profile.key_averages()}
    assert {"vicinal::windowed_fwd", "vicinal::windowed_bwd"} <= names


def test_tensors_that_are_not_what_their_memory_says() -> None:
    q, k, v = inputs()
    negative = torch._neg_view(q)
    assert unobserved((q, k, v, None))
    assert not unobserved((negative, k, v))
    found, expected = (windowed_attention(x, k, v, 7, backend="cpu") for x in (negative, -q))
    assert isinstance(found, Tensor)
    assert isinstance(expected, Tensor)
    assert torch.equal(found, expected)


def test_subclasses_and_other_devices_are_observed() -> None:
    class Marked(Tensor):
        pass

    q, _, _ = inputs()
    assert unobserved((torch.nn.Parameter(q),))
    assert not unobserved((q.as_subclass(Marked),))
    assert not unobserved((q.to("meta"),))
