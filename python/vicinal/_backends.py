"""Capabilities: which backend takes which problem, every reason why one does not, and the choice."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch

_log = logging.getLogger("vicinal")

try:
    import vicinal._C as _C
except ModuleNotFoundError:  # built without a compiler; a broken library still raises
    _C = None  # type: ignore[assignment]


@dataclass(frozen=True)
class Problem:
    """What a backend has to take. `features` are names such as "dropout" or "relu2"."""

    family: str
    device: str
    dtype: torch.dtype
    head_dim: int
    head_dim_v: int
    features: frozenset[str] = frozenset()
    arch: int | None = None


@dataclass(frozen=True)
class Row:
    """One backend's capabilities for one family. `available` returns "" or the reason why the backend cannot
    run here; `max_head_dim` None: any; `missing`: features it does not have; `wrong`: pairs of device and
    dtype whose arithmetic is broken there."""

    backend: str
    family: str
    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    available: Callable[[str], str] = field(repr=False)
    max_head_dim: int | None = None
    min_arch: int | None = None
    missing: frozenset[str] = frozenset()
    wrong: frozenset[tuple[str, torch.dtype]] = frozenset()


ORDER = ("cpu", "cuda", "triton", "reference")
_rows: list[Row] = []


_listeners: list[Callable[[], None]] = []


def on_change(forget: Callable[[], None]) -> None:
    """Call `forget` whenever rows change: whoever remembers a choice must drop it then."""
    _listeners.append(forget)


def register(row: Row) -> None:
    _rows.append(row)
    _rows.sort(key=lambda r: ORDER.index(r.backend))
    _choice.cache_clear()
    for forget in _listeners:
        forget()


def rows(family: str | None = None) -> list[Row]:
    """All capability rows, in order of preference."""
    return [row for row in _rows if family in (None, row.family)]


def have_cpu(device: str) -> str:
    return "" if _C is not None else "vicinal was built without a C++ compiler"


def have_cuda(device: str) -> str:
    if _C is None or not _C.build_info()["with_cuda"]:
        return "vicinal was built without nvcc"
    return "" if torch.version.cuda else "this torch has no CUDA"


def have_triton(device: str) -> str:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "CPU tensors need Triton's interpreter (TRITON_INTERPRET=1)"
    return ""


def have_reference(device: str) -> str:
    return ""


def reasons(row: Row, problem: Problem) -> list[str]:
    """Every reason why this row does not take the problem; empty if it does."""
    found = []
    if problem.device not in row.devices and "any" not in row.devices:
        found.append(f"device {problem.device} is not one of {', '.join(row.devices)}")
    elif reason := row.available(problem.device):
        found.append(reason)
    if (problem.device, problem.dtype) in row.wrong:
        dtype = str(problem.dtype).removeprefix("torch.")
        found.append(f"{dtype} on {problem.device} would give wrong numbers")
    if problem.dtype not in row.dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in row.dtypes)
        found.append(f"dtype {str(problem.dtype).removeprefix('torch.')} is not one of {names}")
    widest = max(problem.head_dim, problem.head_dim_v)
    if row.max_head_dim is not None and widest > row.max_head_dim:
        found.append(f"head_dim {widest} is above {row.max_head_dim}")
    if row.min_arch is not None and problem.arch is not None and problem.arch < row.min_arch:
        found.append(f"GPU architecture sm_{problem.arch} is below sm_{row.min_arch}")
    found += [f"{name} is missing" for name in sorted(problem.features & row.missing)]
    return found


@lru_cache(maxsize=4096)
def _choice(problem: Problem, interpret: str | None) -> tuple[str, tuple[tuple[str, tuple[str, ...]], ...]]:
    """The first backend without a reason ("" if none), and the reasons of those before it."""
    refused: list[tuple[str, tuple[str, ...]]] = []
    for row in rows(problem.family):
        why = reasons(row, problem)
        if not why:
            _log_fallback(problem, row.backend, refused)
            return row.backend, tuple(refused)
        refused.append((row.backend, tuple(why)))
    return "", tuple(refused)


def _log_fallback(problem: Problem, backend: str, refused: list[tuple[str, tuple[str, ...]]]) -> None:
    """Once per problem: the reference runs although a faster backend serves this device."""
    if backend != "reference" or not refused:
        return
    lines = "; ".join(f"{name}: {', '.join(why)}" for name, why in refused)
    _log.warning("%s runs on the reference backend (%s)", problem.family, lines)


def select(problem: Problem, backend: str | None = None) -> str:
    """The backend that takes the problem. `backend` forces one: NotImplementedError with its reasons if it
    cannot."""
    if backend is None:
        chosen, refused = _choice(problem, os.environ.get("TRITON_INTERPRET"))
        if chosen:
            return chosen
        raise NotImplementedError(_message(problem, refused))
    if not isinstance(backend, str):
        raise TypeError(f"backend must be None or a string, got {type(backend).__name__}")
    row = next((r for r in rows(problem.family) if r.backend == backend), None)
    if row is None:
        names = ", ".join(repr(r.backend) for r in rows(problem.family))
        raise ValueError(f"backend is {backend!r}; {problem.family} has {names}")
    if why := reasons(row, problem):
        raise NotImplementedError(_message(problem, ((backend, tuple(why)),)))
    return backend


def _message(problem: Problem, refused: tuple[tuple[str, tuple[str, ...]], ...]) -> str:
    dtype = str(problem.dtype).removeprefix("torch.")
    options = f" with {', '.join(sorted(problem.features))}" if problem.features else ""
    what = f"{problem.family} on {problem.device} in {dtype}, head_dim {problem.head_dim}{options}"
    return f"no backend takes {what}" + "".join(f"\n  {name}: {'; '.join(why)}" for name, why in refused)


@dataclass(frozen=True)
class Explanation:
    """What a call would run and why: `backend`, and per backend in order of preference its reasons (empty:
    capable)."""

    problem: Problem
    backend: str
    reasons: dict[str, list[str]]

    def __str__(self) -> str:
        lines = [f"{self.problem.family}: {self.backend or 'no backend'}"]
        for name, why in self.reasons.items():
            state = "; ".join(why) if why else ("chosen" if name == self.backend else "capable, slower")
            lines.append(f"  {name:<10} {state}")
        return "\n".join(lines)


_explainers: dict[Callable[..., Any], Callable[..., tuple[Problem, str | None]]] = {}


def explains(function: Callable[..., Any], problem: Callable[..., tuple[Problem, str | None]]) -> None:
    """`problem(*args, **kwargs)` gives what `function(*args, **kwargs)` would ask for, and its `backend`
    argument."""
    _explainers[function] = problem


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Which backend `function(*args, **kwargs)` runs on and why, without running it.

    Args:
        function: a public function of vicinal, e.g. `vicinal.windowed_attention`, or a
            `vicinal.nn.MultiheadAttention`.
        *args, **kwargs: the arguments of the call; they are checked as the call would check them.

    Returns:
        An Explanation; printing it lists every backend with every reason.

    Raises:
        ValueError: function has no backends. Whatever the call itself would raise.

    Example:
        >>> import torch, vicinal
        >>> q = k = v = torch.randn(1, 14, 14, 3, 32)
        >>> vicinal.explain(vicinal.windowed_attention, q, k, v, 7, backend="reference").backend
        'reference'
    """
    own = getattr(function, "explain", None)
    if own is not None:
        explanation = own(*args, **kwargs)
        assert isinstance(explanation, Explanation)
        return explanation
    if function not in _explainers:
        known = ", ".join(sorted(f.__name__ for f in _explainers))
        raise ValueError(f"function is {getattr(function, '__name__', function)!r}; explain knows {known}")
    problem, backend = _explainers[function](*args, **kwargs)
    why = {row.backend: reasons(row, problem) for row in rows(problem.family)}
    return Explanation(problem, select(problem, backend), why)
