"""The ops vicinal::windowed_fwd and windowed_bwd: their geometry as text, and its plans."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ._attend_op import AttendOps
from .plan import AxisWindows, Plan, window_plan


@dataclass(frozen=True)
class Group:
    """Consecutive heads that share a window: `heads` 0 means all. A window of -1 is the whole axis."""

    heads: int
    window: tuple[int, ...]
    shift: tuple[int, ...]


@dataclass(frozen=True)
class Geometry:
    """Everything that the ops need to know of a windowed problem besides the tensors' shapes."""

    partition: str
    pad_order: str
    pad_side: str
    bias: str  # "none", "q-k", "k-q" or "dense": what the table's index means
    kv: tuple[int, ...]
    q: tuple[int, ...]
    groups: tuple[Group, ...]

    def encode(self) -> str:
        groups = [f"{g.heads}:{_join(g.window)}:{_join(g.shift)}" for g in self.groups]
        fields = (self.partition, self.pad_order, self.pad_side, self.bias, _join(self.kv), _join(self.q))
        return " ".join([*fields, *groups])

    @staticmethod
    @lru_cache(maxsize=512)
    def decode(text: str) -> Geometry:
        partition, pad_order, pad_side, bias, kv, q, *groups = text.split(" ")
        parsed = [g.split(":") for g in groups]
        made = tuple(Group(int(n), _split(window), _split(shift)) for n, window, shift in parsed)
        return Geometry(partition, pad_order, pad_side, bias, _split(kv), _split(q), made)

    def axes(
        self, group: Group, q_space: tuple[int, ...], k_space: tuple[int, ...]
    ) -> tuple[AxisWindows, ...]:
        """The axes of one group on grids of these sizes."""
        result = []
        for a, (length, q_length) in enumerate(zip(k_space, q_space, strict=True)):
            window = length if group.window[a] == -1 else group.window[a]
            kv = self.kv[a] if self.kv else 0
            q_window = self.q[a] if self.q else window
            q_window = q_length if q_window == -1 else q_window
            result.append(AxisWindows(length, window, group.shift[a], kv, q_length, q_window))
        return tuple(result)


def _join(values: tuple[int, ...]) -> str:
    return "x".join(map(str, values)) if values else "-"


def _split(text: str) -> tuple[int, ...]:
    return () if text == "-" else tuple(map(int, text.split("x")))


@lru_cache(maxsize=1024)
def plans(
    text: str, q_space: tuple[int, ...], k_space: tuple[int, ...], heads: int, device: torch.device
) -> tuple[tuple[int, int, Plan], ...]:
    """(first head, last head + 1, plan) of every head group."""
    geometry, first, result = Geometry.decode(text), 0, []
    for group in geometry.groups:
        last = first + (group.heads or heads)
        axes = geometry.axes(group, q_space, k_space)
        plan = window_plan(
            axes, geometry.bias, geometry.partition, geometry.pad_order, geometry.pad_side, device
        )
        result.append((first, last, plan))
        first = last
    return tuple(result)


def _plans(text: str, q: Tensor, k: Tensor, backend: str) -> tuple[tuple[int, int, Plan], ...]:
    return plans(text, tuple(q.shape[1:-2]), tuple(k.shape[1:-2]), q.shape[-2], q.device)


WINDOWED = AttendOps("windowed", _plans)
