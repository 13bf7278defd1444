"""Neighborhood problems as models have them, and PyTorch's ways to solve them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vicinal import Neighborhood, neighborhood_attention
from vicinal._neighborhood_plan import axis_table
from vicinal._neighborhood_run import geometry_of

N = Neighborhood
Solve = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]


@dataclass(frozen=True)
class Case:
    """One problem: q, k, v [batch, *space, heads, dim]."""

    name: str
    batch: int
    space: tuple[int, ...]
    heads: int
    dim: int
    where: Neighborhood
    bias: bool = False
    dtype: torch.dtype = torch.bfloat16
    backward: bool = True
    device: str = "cuda"

    @property
    def tokens(self) -> int:
        return prod(self.space)


CASES = {
    c.name: c
    for c in (
        Case("dinat-56", 128, (56, 56), 2, 32, N(7), bias=True),
        Case("dinat-56-d8", 128, (56, 56), 2, 32, N(7, dilation=8), bias=True),
        Case("dinat-28", 128, (28, 28), 4, 32, N(7), bias=True),
        Case("dinat-14", 128, (14, 14), 8, 32, N(7), bias=True),
        Case("dinat-14-d2", 128, (14, 14), 8, 32, N(7, dilation=2), bias=True),
        Case("dinat-96-k11", 32, (96, 96), 6, 32, N(11), bias=True),
        Case("hdit-64", 16, (64, 64), 8, 64, N(7)),
        Case("video-stage4", 1, (40, 96, 96), 8, 64, N((3, 5, 5)), backward=False),
        Case("video-k11", 1, (80, 96, 96), 4, 64, N(11), backward=False),
        Case("cube-32-fp32", 1, (32, 32, 32), 4, 64, N(3), dtype=torch.float32),
        Case("video-256-fp32", 1, (16, 256, 256), 8, 32, N((3, 5, 5)), dtype=torch.float32),
        *(Case(f"width-{d}", 8, (64, 64), 12, d, N(7)) for d in (40, 48, 72, 80, 96)),
        Case("sequence-32768", 1, (32768,), 1, 128, N(2048)),
        Case("flux-256", 1, (256, 256), 24, 128, N(80), backward=False),
        Case("hunyuan", 1, (30, 48, 80), 24, 128, N((18, 24, 24)), backward=False),
        Case("sliding-512", 8, (8192,), 16, 32, N((511, 0), border="truncate")),
        Case("sliding-1024", 4, (8192,), 16, 64, N((1023, 0), border="truncate")),
    )
}


def tensors(case: Case) -> tuple[list[Tensor], Tensor | None, Tensor]:
    """q, k, v, the bias table in float32 or None, and the gradient of the output."""
    generator = torch.Generator(case.device).manual_seed(0)
    shape = (case.batch, *case.space, case.heads, case.dim)
    q, k, v, dout = (
        torch.randn(shape, generator=generator, device=case.device, dtype=case.dtype) for _ in range(4)
    )
    table = None
    if case.bias:
        axes = geometry_of(case.where, len(case.space), True)[0].on(case.space, case.space)
        sizes = (case.heads, *(2 * a.kernel - 1 for a in axes))
        table = torch.randn(sizes, generator=generator, device=case.device, requires_grad=True)
    return [x.requires_grad_() for x in (q, k, v)], table, dout


class Pairs:
    """Which keys each query of a case reads, and the index of their bias, axis by axis."""

    def __init__(self, case: Case) -> None:
        axes = geometry_of(case.where, len(case.space), case.bias)[0].on(case.space, case.space)
        self.space, self.axes = case.space, []
        for axis in axes:
            table = axis_table(axis)
            order = torch.argsort(table.i)
            columns = (table.i % axis.dilation, table.p, table.a, table.b)
            group, p, a, b = (x[order].to(case.device) for x in columns)
            self.axes.append((group, p, a, b, axis.kernel))

    def _places(self, token: Tensor) -> list[Tensor]:
        places = []
        for length in reversed(self.space):
            places.append(token % length)
            token = token // length
        return places[::-1]

    def seen(self, i: Tensor, j: Tensor) -> Tensor:
        result = i == i
        pairs = zip(self.axes, self._places(i), self._places(j), strict=True)
        for (group, p, a, b, _), x, y in pairs:
            result = result & (group[x] == group[y]) & (p[y] >= a[x]) & (p[y] < b[x])
        return result

    def bias_index(self, i: Tensor, j: Tensor) -> Tensor:
        """Clamped into the table, for pairs that are not seen."""
        index = i * 0
        pairs = zip(self.axes, self._places(i), self._places(j), strict=True)
        for (_, p, _, _, kernel), x, y in pairs:
            index = index * (2 * kernel - 1) + (p[y] - p[x] + kernel - 1).clamp(0, 2 * kernel - 2)
        return index


def ours(case: Case, backend: str) -> Solve:
    def solve(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None) -> Tensor:
        out = neighborhood_attention(q, k, v, case.where, bias=table, backend=backend)
        assert isinstance(out, Tensor)
        return out

    return solve


def _heads_first(x: Tensor) -> Tensor:
    return x.flatten(1, -3).transpose(1, 2)


def _heads_last(x: Tensor, case: Case) -> Tensor:
    return x.transpose(1, 2).reshape(case.batch, *case.space, case.heads, case.dim)


def sdpa(case: Case) -> Solve:
    """scaled_dot_product_attention under a dense mask."""
    pairs, token = Pairs(case), torch.arange(case.tokens, device=case.device)
    seen = pairs.seen(token[:, None], token[None])
    index = pairs.bias_index(token[:, None], token[None]) if case.bias else None

    def solve(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None) -> Tensor:
        mask = seen
        if table is not None and index is not None:
            mask = table.flatten(1)[:, index].masked_fill(~seen, -torch.inf)[None].to(q.dtype)
        q, k, v = (_heads_first(x) for x in (q, k, v))
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return _heads_last(out, case)

    return solve


def eager(case: Case) -> Solve:
    pairs, token = Pairs(case), torch.arange(case.tokens, device=case.device)
    seen = pairs.seen(token[:, None], token[None])
    index = pairs.bias_index(token[:, None], token[None]) if case.bias else None

    def solve(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None) -> Tensor:
        q, k, v = map(_heads_first, (q, k, v))
        scores = (q * case.dim**-0.5) @ k.transpose(-2, -1)
        if table is not None and index is not None:
            scores = scores + table.flatten(1)[:, index].to(scores.dtype)
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        return _heads_last(weights @ v, case)

    return solve


def flex(case: Case) -> Solve:
    """FlexAttention, compiled, with a block mask made once."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    pairs = Pairs(case)

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return pairs.seen(i, j)

    mask = create_block_mask(mask_mod, None, None, case.tokens, case.tokens, device=case.device)
    compiled: Any = torch.compile(flex_attention)

    def solve(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None) -> Tensor:
        score_mod = None
        if table is not None:
            flat = table.flatten(1)

            def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
                return score + flat[h, pairs.bias_index(i, j)]

        given = [_heads_first(x).contiguous() for x in (q, k, v)]
        return _heads_last(compiled(*given, score_mod=score_mod, block_mask=mask), case)

    return solve


def contenders(case: Case) -> dict[str, Callable[[], Solve]]:
    """By name, how to make each; dense ones where their matrices fit."""
    made: dict[str, Callable[[], Solve]] = {
        "cuda": lambda: ours(case, "cuda"),
        "triton": lambda: ours(case, "triton"),
        "flex": lambda: flex(case),
    }
    if case.tokens <= 16384:
        made["sdpa"] = lambda: sdpa(case)
    if case.batch * case.heads * case.tokens**2 <= 5e9:
        made["eager"] = lambda: eager(case)
    return made
