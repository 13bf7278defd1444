"""Value objects of windowed attention: how a grid is cut, and which bias a pair of tokens reads."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from operator import index
from typing import Any

from torch import Tensor

from . import _windowed_check as check
from . import reference
from ._hashed import HashedOnce

Size = int | tuple[int, ...]


@dataclass(frozen=True)
class Windows(HashedOnce):
    """How a token grid is cut into windows. Frozen and hashable: make it once, pass it to every call.

    Args:
        size: slots per window and axis, int or one per axis; -1 is the whole axis. May exceed the axis, which
            then pads.
        shift: cyclic shift, int or per axis, 0 <= shift < size; needs partition "block". Default 0.
        partition: "block", contiguous windows, or "grid": token r of group i is r * groups + i. Default
            "block".
        edge: what the slots do where windows overhang the grid: "mask", excluded; "zero", k = v = 0 takes
            part; "const", k = edge_k, v = edge_v takes part (zero padding before a qkv projection). Default
            "mask".
        mask_value: added to the logit of a pair of tokens that a shift brought together from different
            regions: -100 (Swin), -200 (Hugging Face Swinv2) or -inf. Default -100.
        pad_order: "pad_roll", grids are padded, then rolled; "roll_pad", the reverse (timm). Default
            "pad_roll".
        pad_side: "end" or "center". Default "end".
        q_size: window of a pooled query grid, whose number of windows matches; -1 is the whole axis. Default
            None: as size.
        kv_size: larger key windows centred on the query windows (overlapping attention). Default None: as
            size.
        head_groups: ((heads, size[, shift]), ...) in the order of the heads, replaces size and shift. Default
            None.

    Raises:
        TypeError, ValueError: a field is of the wrong type or value; the message names it.

    Example:
        >>> Windows(7, shift=3)
        Windows(size=7, shift=3)
        >>> Windows(None, head_groups=((2, (-1, 7)), (2, (7, -1)))).head_groups
        ((2, (-1, 7), 0), (2, (7, -1), 0))
    """

    size: Size | None
    shift: Size = 0
    partition: str = "block"
    edge: str = "mask"
    mask_value: float = -100.0
    pad_order: str = "pad_roll"
    pad_side: str = "end"
    q_size: Size | None = None
    kv_size: Size | None = None
    head_groups: tuple[tuple[Any, ...], ...] | None = None

    def __post_init__(self) -> None:
        check.check_windows(self)
        if self.head_groups is not None:
            groups = tuple((g[0], g[1], g[2] if len(g) == 3 else 0) for g in self.head_groups)
            object.__setattr__(self, "head_groups", groups)
        self.remember_hash()

    __hash__ = HashedOnce.__hash__  # dataclass would replace an inherited one

    def __repr__(self) -> str:
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        shown = [f"{n}={v!r}" for n, v in fields.items() if v != self.__dataclass_fields__[n].default]
        return f"Windows({', '.join(shown)})"


@dataclass(frozen=True, eq=False)
class RelativeBias:
    """A table of relative position bias, added to the scaled logits.

    Args:
        table: [T, heads], any float dtype, trainable.
        index: which row a pair (query, key) reads, with d = coordinate of query - coordinate of key per axis:
            "q-k": sum of (d_a + w_a - 1) * stride_a over (2w-1)-sized axes, last axis fastest (Swin); "k-q":
            d negated (MaxViT of TensorFlow; with kv_size the table is (w + kv - 1) wide); "abs": |d| over
            w-sized axes (LeViT); or an integer tensor [Nq, Nk] of rows, negative rows count from the end.
            Default "q-k".
        window: the window that the table was made for, whose first Nq rows and Nk columns of its index are
            read (as Video-Swin does when a window shrinks). Default None: the window in use.
    """

    table: Tensor
    index: str | Tensor = "q-k"
    window: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check.check_relative_bias(self)

    def dense(self, q_window: tuple[int, ...], k_window: tuple[int, ...]) -> Tensor:
        """[heads, Nq, Nk]: the bias of every pair of slots."""
        n, m = prod(q_window), prod(k_window)
        if isinstance(self.index, Tensor):
            index = self.index.to(self.table.device)
        else:
            made = (self.window, self.window) if self.window is not None else (q_window, k_window)
            index = reference.relative_index(*made, self.index)[:n, :m].to(self.table.device)
        return self.table[index.flatten() % len(self.table)].t().unflatten(-1, (n, m))


def per_axis(value: Size, rank: int) -> tuple[int, ...]:
    # operator.index: torch.compile makes integers symbolic that differ between calls; windows are constants
    return (index(value),) * rank if isinstance(value, int) else tuple([index(v) for v in value])
