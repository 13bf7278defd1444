"""Windowed attention the way published models write it, in plain PyTorch: what vicinal is measured against.

roll, pad, partition into windows, attention with the gathered bias and the region mask, reverse, roll back.
Index, mask and geometry are made once, as their buffers are; everything that a forward does is inside the
call.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from vicinal import reference

from .windowed_problems import Group, Problem

Attend = Callable[[Tensor, Tensor, Tensor, "Tensor | None", "Tensor | None", float], Tensor]


def split(x: Tensor, window: tuple[int, ...], grid: bool) -> Tensor:
    """[B, *S, h, d] -> [B, windows, N, h, d]; S divisible by window."""
    rank = len(window)
    shape = [x.shape[0]]
    for size, w in zip(x.shape[1 : rank + 1], window, strict=True):
        shape += [w, size // w] if grid else [size // w, w]
    outer = [1 + 2 * a + grid for a in range(rank)]
    inner = [2 + 2 * a - grid for a in range(rank)]
    rest = [2 * rank + 1 + a for a in range(x.dim() - rank - 1)]
    x = x.view(*shape, *x.shape[rank + 1 :]).permute(0, *outer, *inner, *rest)
    return x.reshape(shape[0], -1, prod(window), *x.shape[2 * rank + 1 :])


def merge(x: Tensor, space: tuple[int, ...], window: tuple[int, ...], grid: bool) -> Tensor:
    """[B, windows, N, h, d] -> [B, *S, h, d], the inverse of `split`."""
    rank = len(window)
    counts = [size // w for size, w in zip(space, window, strict=True)]
    x = x.view(x.shape[0], *counts, *window, *x.shape[3:])
    order = [0]
    for a in range(rank):
        order += [1 + rank + a, 1 + a] if grid else [1 + a, 1 + rank + a]
    return x.permute(*order, 2 * rank + 1, 2 * rank + 2).reshape(x.shape[0], *space, *x.shape[2 * rank + 1 :])


def unfold(x: Tensor, group: Group) -> Tensor:
    """[B, *S, h, d] -> [B, windows, M, h, d]: zero-padded key windows, centred on the query windows."""
    amounts: list[int] = [0, 0, 0, 0]
    for w, o in zip(reversed(group.window), reversed(group.k_window), strict=True):
        amounts += [(o - w) // 2, o - w - (o - w) // 2]
    x = F.pad(x, amounts)
    for a, (w, o) in enumerate(zip(group.window, group.k_window, strict=True)):
        x = x.unfold(a + 1, o, w)
    rank = len(group.window)
    x = x.permute(0, *range(1, rank + 1), *range(rank + 3, 2 * rank + 3), rank + 1, rank + 2)
    return x.reshape(x.shape[0], -1, prod(group.k_window), *x.shape[-2:])


def matmul_softmax(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float
) -> Tensor:
    """q, k, v [B, W, h, N, d], bias [h, N, M], mask [W, N, M] -> [B, W, h, N, dv]."""
    scores = (q * scale) @ k.transpose(-2, -1)
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = scores + mask[:, None]
    return scores.softmax(-1) @ v


def sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float) -> Tensor:
    """The same through scaled_dot_product_attention, with windows and heads in one dimension so that a mask
    per window broadcasts over the batch instead of being copied.
    """
    if mask is None:
        q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
        return F.scaled_dot_product_attention(q, k, v, None if bias is None else bias[None], scale=scale)
    per_window = mask[:, None] if bias is None else bias + mask[:, None]
    q, k, v = q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2)
    out = F.scaled_dot_product_attention(q, k, v, per_window.flatten(0, 1)[None], scale=scale)
    return out.unflatten(1, (mask.shape[0], -1))


class Published:
    """(tensors, table) -> heads [B, *Sq, h, dv]; `attend` computes the attention of the windows."""

    def __init__(self, problem: Problem, attend: Attend, dtype: torch.dtype, device: str) -> None:
        self.problem = problem
        self.scale = problem.head_dim**-0.5
        self.attend = attend
        self.grid = problem.windows.partition == "grid"
        self.index = [self._index(group).to(device) for group in problem.groups]
        self.masks = [self._mask(group, dtype, device) for group in problem.groups]

    def _index(self, group: Group) -> Tensor:
        if self.problem.bias is None:
            return torch.zeros(0, dtype=torch.long)
        return reference.relative_index(group.q_window, group.k_window, self.problem.bias).flatten()

    def _mask(self, group: Group, dtype: torch.dtype, device: str) -> Tensor | None:
        """[windows, N, N]: mask_value between regions that only the shift made neighbours."""
        if not any(group.shift):
            return None
        region = reference.region_ids(self.problem.space, group.window, group.shift)
        crossing = region[:, :, None] != region[:, None, :]
        return (crossing * self.problem.windows.mask_value).to(device, dtype)

    def __call__(self, tensors: tuple[Tensor, ...], table: Tensor | None) -> Tensor:
        problem, outs, first = self.problem, [], 0
        for group, index, mask in zip(problem.groups, self.index, self.masks, strict=True):
            q, k, v = self.windowed(tensors, group, slice(first, first + group.heads))
            bias = None
            if table is not None:
                shape = (prod(group.q_window), prod(group.k_window), -1)
                bias = table[index].view(shape).permute(2, 0, 1).contiguous()
            out = self.attend(q, k, v, bias, mask, self.scale)
            outs.append(self.restored(out, group, tensors[0].shape[0]))
            first += group.heads
        return outs[0] if len(outs) == 1 else torch.cat(outs, -2)

    def windowed(
        self, tensors: tuple[Tensor, ...], group: Group, heads: slice
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v [B, windows, h, N, d] of a head group; a packed tensor is rolled and partitioned as one."""
        if len(tensors) == 1 and group.k_window == group.window:
            x = split(self._rolled(tensors[0][..., heads, :], group), group.window, self.grid)
            q, k, v = x.permute(3, 0, 1, 4, 2, 5).unbind(0)
            return q, k, v
        q, k, v = tensors[0].unbind(-3) if len(tensors) == 1 else tensors
        q = split(self._rolled(q[..., heads, :], group), group.q_window, self.grid)
        if group.k_window == group.window:
            k, v = (split(self._rolled(x[..., heads, :], group), group.window, self.grid) for x in (k, v))
        else:
            k, v = unfold(k[..., heads, :], group), unfold(v[..., heads, :], group)
        return q.transpose(2, 3), k.transpose(2, 3), v.transpose(2, 3)

    def _rolled(self, x: Tensor, group: Group) -> Tensor:
        rank = len(group.window)
        amounts: list[int] = []
        for size, w in zip(reversed(x.shape[1 : rank + 1]), reversed(group.window), strict=True):
            amounts += [0, -size % w]
        if any(amounts) and not self.problem.q_space:
            x = F.pad(x, [0, 0] * (x.dim() - rank - 1) + amounts)
        if any(group.shift):
            x = x.roll([-s for s in group.shift], list(range(1, rank + 1)))
        return x

    def restored(self, out: Tensor, group: Group, batch: int) -> Tensor:
        """[B, windows, h, N, d] or [B * windows, ...] -> [B, *Sq, h, d]."""
        problem, rank = self.problem, len(group.window)
        counts = [-(-n // w) for n, w in zip(problem.space, group.window, strict=True)]
        padded = tuple(c * w for c, w in zip(counts, group.q_window, strict=True))
        out = out.reshape(batch, prod(counts), *out.shape[-3:]).transpose(2, 3)
        out = merge(out, padded, group.q_window, self.grid)
        if any(group.shift):
            out = out.roll(list(group.shift), list(range(1, rank + 1)))
        for a, size in enumerate(problem.query_space):
            if out.shape[a + 1] != size:
                out = out.narrow(a + 1, 0, size)
        return out


def compiled_flex() -> Attend:
    """The same through FlexAttention, which reads bias and mask per score. Only the attention is compiled:
    with the partition in the same graph, inductor has no CPU template for it (torch 2.13).
    """
    from torch.nn.attention.flex_attention import flex_attention

    @torch.compile(fullgraph=True)
    def flat(
        q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float
    ) -> Tensor:
        def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            if bias is not None:
                score = score + bias[h, i, j]
            if mask is not None:
                score = score + mask[b % mask.shape[0], i, j]
            return score

        out = flex_attention(q, k, v, score_mod=score_mod, scale=scale)
        assert isinstance(out, Tensor)
        return out

    def flex(
        q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float
    ) -> Tensor:
        return flat(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), bias, mask, scale)

    return flex
