"""The value object of neighborhood attention: which keys a query reads."""

from __future__ import annotations

from dataclasses import dataclass
from operator import index
from typing import Any

from . import _neighborhood_check as check
from ._hashed import HashedOnce
from ._neighborhood_plan import AxisNeighborhood

Side = tuple[int, int]  # keys left and right of the leader, -1: all
Kernel = int | tuple[int | Side, ...]
Size = int | tuple[int, ...]


@dataclass(frozen=True)
class Neighborhood(HashedOnce):
    """Which keys a query reads. Frozen and hashable: make it once, pass it to every call.

    Args:
        kernel_size: keys per axis, an int or one per axis, even or odd. Under border "truncate" an entry may
            be a pair (left, right) of keys on either side of the query, -1 for all of that side; on a grid of
            one axis, (left, right) alone is the pair.
        dilation: distance between the keys of a window, int or per axis. Default 1.
        stride: consecutive queries that share the window of one of them, int or per axis, at most the kernel
            size. Default 1: every query has its own; as large as the kernel: blocks.
        is_causal: no query reads a key behind it on this axis, bool or per axis. Default False.
        border: "shift": at the ends of an axis the window moves inward and keeps its size; "truncate": what
            hangs over is dropped. Default "shift".

    Raises:
        TypeError, ValueError: a field is of the wrong type or value; the message names it.

    Example:
        >>> Neighborhood(7, dilation=(1, 2))
        Neighborhood(kernel_size=7, dilation=(1, 2))
        >>> Neighborhood((511, 0), border="truncate")  # a sliding window of 512 with itself
        Neighborhood(kernel_size=(511, 0), border='truncate')
    """

    kernel_size: Kernel
    dilation: Size = 1
    stride: Size = 1
    is_causal: bool | tuple[bool, ...] = False
    border: str = "shift"

    def __post_init__(self) -> None:
        check.check_neighborhood(self)
        self.remember_hash()

    __hash__ = HashedOnce.__hash__  # dataclass would replace an inherited one

    def __repr__(self) -> str:
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        shown = [f"{n}={v!r}" for n, v in fields.items() if v != self.__dataclass_fields__[n].default]
        return f"Neighborhood({', '.join(shown)})"


@dataclass(frozen=True)
class AxisGeometry:
    """One axis without its lengths; the fields as in AxisNeighborhood."""

    left: int
    right: int
    dilation: int
    stride: int
    causal: bool


@dataclass(frozen=True)
class Geometry:
    """Everything that the ops need to know of a neighborhood problem besides the tensors' shapes."""

    shift: bool
    biased: bool
    axes: tuple[AxisGeometry, ...]

    def encode(self) -> str:
        axes = [f"{a.left}:{a.right}:{a.dilation}:{a.stride}:{a.causal:d}" for a in self.axes]
        return " ".join(["shift" if self.shift else "truncate", "bias" if self.biased else "-", *axes])

    @staticmethod
    def decode(text: str) -> Geometry:
        border, bias, *axes = text.split(" ")
        made = []
        for a in axes:
            left, right, dilation, stride, causal = map(int, a.split(":"))
            made.append(AxisGeometry(left, right, dilation, stride, bool(causal)))
        return Geometry(border == "shift", bias == "bias", tuple(made))

    def on(self, q_space: tuple[int, ...], k_space: tuple[int, ...]) -> tuple[AxisNeighborhood, ...]:
        """The axes of grids of these sizes."""
        return tuple(
            AxisNeighborhood(n, a.left, a.right, a.dilation, a.stride, a.causal, self.shift, n_q)
            for a, n, n_q in zip(self.axes, k_space, q_space, strict=True)
        )


def resolve(neighborhood: Neighborhood, rank: int, biased: bool) -> Geometry:
    """The ops' geometry of a neighborhood that was checked against a grid of this rank."""
    kernel = neighborhood.kernel_size
    if isinstance(kernel, int) or (rank == 1 and len(kernel) == 2):
        kernel = (kernel,) * rank  # type: ignore[assignment]
    axes = []
    for a in range(rank):
        causal = per_axis(neighborhood.is_causal, rank)[a]
        left, right = sides(kernel[a], causal)  # type: ignore[index]
        d, s = per_axis(neighborhood.dilation, rank)[a], per_axis(neighborhood.stride, rank)[a]
        axes.append(AxisGeometry(left, right, index(d), index(s), causal))
    return Geometry(neighborhood.border == "shift", biased, tuple(axes))


def per_axis(value: Any, rank: int) -> Any:
    return value if isinstance(value, tuple) else (value,) * rank


def sides(kernel: int | Side, causal: bool) -> Side:
    """Keys left and right of the leader."""
    # operator.index: torch.compile makes integers symbolic that differ between calls; windows are constants
    if isinstance(kernel, tuple):
        return index(kernel[0]), index(kernel[1])
    k = index(kernel)
    return (k - 1, 0) if causal else (k // 2, k - 1 - k // 2)
