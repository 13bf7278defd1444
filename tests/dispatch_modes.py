"""What the tests watch or replace below the public functions: calls of ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Replaced(TorchDispatchMode):
    """Calls of one op return what `result` makes of their arguments."""

    def __init__(self, op: Any, result: Any) -> None:
        super().__init__()
        self.op, self.result, self.calls = op, result, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is self.op:
            self.calls += 1
            return self.result(*args)
        return func(*args, **(kwargs or {}))


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


class NoLaunch(TorchDispatchMode):
    """Fails when an op of vicinal or a matrix product runs."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.namespace != "vicinal", f"{func} ran"
        assert func not in (torch.ops.aten.bmm.default, torch.ops.aten.mm.default)
        return func(*args, **(kwargs or {}))


def refused(
    error: type[Exception], words: str, function: Callable[..., Any], *args: Any, **options: Any
) -> None:
    """`function` raises `error`, and its message has each of the words (separated by |)."""
    with pytest.raises(error) as caught, NoLaunch():
        function(*args, **options)
    for word in words.split("|"):
        assert word in str(caught.value), f"{word!r} is not in {str(caught.value)!r}"
