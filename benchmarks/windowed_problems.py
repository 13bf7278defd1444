"""The windowed problems that are timed: sizes of published models, their work in flops and bytes, and random
inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from vicinal import RelativeBias, Windows


@dataclass(frozen=True)
class Group:
    """Consecutive heads that share one window, with every size per axis."""

    heads: int
    window: tuple[int, ...]
    shift: tuple[int, ...]
    q_window: tuple[int, ...]
    k_window: tuple[int, ...]


def per_axis(value: int | tuple[int, ...], rank: int) -> tuple[int, ...]:
    return (value,) * rank if isinstance(value, int) else tuple(value)


@dataclass(frozen=True)
class Problem:
    """One attention core: q, k, v on a grid in, heads out. `bias`: index order of its table, or None for no
    bias.
    """

    name: str
    model: str
    batch: int
    space: tuple[int, ...]
    heads: int
    head_dim: int
    windows: Windows
    bias: str | None = "q-k"
    head_dim_v: int = 0
    q_space: tuple[int, ...] = ()
    core: bool = False  # part of every run; the others need --full
    quick: bool = False  # part of --quick

    @property
    def dv(self) -> int:
        return self.head_dim_v or self.head_dim

    @property
    def query_space(self) -> tuple[int, ...]:
        return self.q_space or self.space

    @property
    def packed(self) -> bool:
        """q, k and v come as one tensor, as a projection writes them."""
        return self.dv == self.head_dim and not self.q_space

    @property
    def groups(self) -> tuple[Group, ...]:
        w, rank = self.windows, len(self.space)
        listed = w.head_groups or ((self.heads, w.size, w.shift),)
        found = []
        for heads, size, shift in listed:
            sizes = per_axis(size, rank)
            window = tuple(n if s == -1 else s for n, s in zip(self.space, sizes, strict=True))
            q_window = window if w.q_size is None else per_axis(w.q_size, rank)
            k_window = window if w.kv_size is None else per_axis(w.kv_size, rank)
            found.append(Group(heads, window, per_axis(shift, rank), q_window, k_window))
        return tuple(found)

    @property
    def flops(self) -> float:
        """Useful flops of the forward: scores and weighted values, without pads, softmax or bias."""
        total = 0.0
        for g in self.groups:
            windows = prod(n / w for n, w in zip(self.space, g.window, strict=True))
            total += windows * g.heads * prod(g.q_window) * prod(g.k_window)
        return 2.0 * self.batch * total * (self.head_dim + self.dv)

    def flops_of(self, backward: bool) -> float:
        """The backward has five such products where the forward has two."""
        return self.flops * (3.5 if backward else 1.0)

    def elements(self) -> tuple[int, int, int]:
        """Elements of q, of k and v together, and of out."""
        keys, queries = prod(self.space), prod(self.query_space)
        per_head = self.batch * self.heads
        return (
            per_head * queries * self.head_dim,
            per_head * keys * (self.head_dim + self.dv),
            per_head * queries * self.dv,
        )

    def bytes_of(self, dtype: torch.dtype, backward: bool) -> int:
        """Least traffic: the forward moves q, k, v and out once; the backward reads them and the gradient of
        out, and writes three gradients, which is twice as much.
        """
        return dtype.itemsize * sum(self.elements()) * (3 if backward else 1)


@dataclass
class Inputs:
    """(qkv,) packed [B, *S, 3, h, d] or (q, k, v) [B, *S, h, d]; table [T, h]; gradient of the output [B,
    *Sq, h, dv].
    """

    tensors: tuple[Tensor, ...]
    table: Tensor | None
    dout: Tensor

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self.tensors if self.table is None else (*self.tensors, self.table)

    @property
    def names(self) -> tuple[str, ...]:
        first = ("qkv",) if len(self.tensors) == 1 else ("q", "k", "v")
        return first if self.table is None else (*first, "bias")

    def requires_grad_(self, on: bool) -> Inputs:
        for leaf in self.leaves:
            leaf.requires_grad_(on)
        return self

    def converted(self, dtype: torch.dtype, sample: int | None = None) -> Inputs:
        """A copy in another dtype, of one sample or of all."""
        part = slice(None) if sample is None else slice(sample, sample + 1)
        tensors = tuple(t.detach()[part].to(dtype, copy=True) for t in self.tensors)
        table = None if self.table is None else self.table.detach().to(dtype, copy=True)
        return Inputs(tensors, table, self.dout[part].to(dtype, copy=True))


def table_rows(problem: Problem) -> int:
    group = problem.groups[0]
    if problem.bias == "abs":
        return prod(group.k_window)
    return prod(q + k - 1 for q, k in zip(group.q_window, group.k_window, strict=True))


def make_inputs(problem: Problem, dtype: torch.dtype, device: str) -> Inputs:
    """Normal random inputs, the same on every machine; the table has the spread of a trained one."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    b, h, d = problem.batch, problem.heads, problem.head_dim
    if problem.packed:
        tensors: tuple[Tensor, ...] = (normal(b, *problem.space, 3, h, d),)
    else:
        q = normal(b, *problem.query_space, h, d)
        tensors = (q, normal(b, *problem.space, h, d), normal(b, *problem.space, h, problem.dv))
    table = None if problem.bias is None else normal(table_rows(problem), h)
    return Inputs(tensors, table, normal(b, *problem.query_space, h, problem.dv))


def relative_bias(problem: Problem, table: Tensor | None) -> RelativeBias | None:
    return None if table is None or problem.bias is None else RelativeBias(table, problem.bias)


# head dimensions, windows and shifts as the models publish them
PROBLEMS = (
    Problem(
        "swin-stage1-shift",
        "Swin-T 224, stage 1",
        8,
        (56, 56),
        3,
        32,
        Windows(7, shift=3),
        core=True,
        quick=True,
    ),
    Problem("swin-stage1", "Swin-T 224, stage 1", 8, (56, 56), 3, 32, Windows(7), core=True),
    Problem("swin-stage4", "Swin-T 224, stage 4", 32, (7, 7), 24, 32, Windows(7), core=True, quick=True),
    Problem(
        "window16-shift", "window 16 at 256 x 256", 1, (256, 256), 3, 32, Windows(16, shift=8), core=True
    ),
    Problem("swinir-shift", "SwinIR 256 x 256", 1, (256, 256), 6, 30, Windows(8, shift=4), core=True),
    Problem(
        "swin-padded", "Swin-T segmentation, padded", 1, (256, 512), 3, 32, Windows(7, shift=3, edge="zero")
    ),
    Problem("hat", "HAT 64 x 64", 1, (64, 64), 6, 30, Windows(16, shift=8)),
    Problem(
        "hat-overlap", "HAT overlapping", 1, (64, 64), 6, 30, Windows(16, edge="zero", kv_size=24), bias="k-q"
    ),
    Problem("swinir-light", "SwinIR light 64 x 64", 1, (64, 64), 6, 10, Windows(8, shift=4)),
    Problem("efficientvit", "EfficientViT", 8, (14, 14), 1, 16, Windows(7), bias="abs", head_dim_v=96),
    Problem("video-swin", "Video-Swin-T", 1, (16, 56, 56), 3, 32, Windows((8, 7, 7), shift=(4, 3, 3))),
    Problem(
        "cswin-stage1",
        "CSWin-T 224, stage 1",
        8,
        (56, 56),
        2,
        32,
        Windows(None, head_groups=((1, (-1, 1)), (1, (1, -1)))),
        bias=None,
    ),
    Problem(
        "cswin-stage3",
        "CSWin-T 224, stage 3",
        8,
        (14, 14),
        8,
        32,
        Windows(None, head_groups=((4, (-1, 7)), (4, (7, -1)))),
        bias=None,
    ),
    Problem("hiera-units", "Hiera, units of 64", 8, (3136,), 1, 96, Windows(64, partition="grid"), bias=None),
    Problem(
        "hiera-pooled",
        "Hiera, pooled queries",
        8,
        (3136,),
        2,
        96,
        Windows(64, partition="grid", q_size=16),
        bias=None,
        q_space=(784,),
    ),
    Problem("tiny-windows", "TNT, 196 windows of 16", 196, (16,), 4, 6, Windows(16), bias=None, quick=False),
)
