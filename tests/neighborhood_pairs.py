"""Neighborhood attention of a module by pairs of tokens, from loops over the definition."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from torch import Tensor, nn


def keys_of(i: int, L: int, k: int, d: int, s: int, causal: bool) -> dict[int, int]:
    """Key -> entry of the bias table, of query i on an axis of L tokens, with the window moved inward."""
    g, p = i % d, i // d
    group = list(range(g, L, d))
    n = len(group)
    if causal:
        leader = min(p // s * s + s - 1, n - 1)
        places = range(max(leader - k + 1, 0), p + 1)
    else:
        leader = p // s * s + s // 2
        first = min(max(leader - k // 2, 0), n - k)
        places = range(first, first + k)
    return {group[t]: t - p + k - 1 for t in places}


def per_axis(value: Any, rank: int) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,) * rank


class ByPairs(nn.Module):
    """A module's function with a dense mask that loops build."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.m = module

    def forward(self, x: Tensor) -> Tensor:
        m, space = self.m, x.shape[1:-1]
        rank = len(space)
        options = zip(*(per_axis(o, rank) for o in (m.kernel_size, m.dilation, m.stride, m.is_causal)))
        axes = [[keys_of(i, L, *o) for i in range(L)] for L, o in zip(space, options)]
        tokens = list(product(*(range(L) for L in space)))
        place = {token: n for n, token in enumerate(tokens)}
        mask = torch.full((len(tokens), len(tokens)), -torch.inf, dtype=x.dtype)
        entry = torch.zeros(len(tokens), len(tokens), dtype=torch.long)
        for n, token in enumerate(tokens):
            for key in product(*(axis[i].items() for axis, i in zip(axes, token))):
                other = place[tuple(j for j, _ in key)]
                mask[n, other] = 0
                for (_, b), k in zip(key, per_axis(m.kernel_size, rank)):
                    entry[n, other] = entry[n, other] * (2 * k - 1) + b
        q, k, v = m.qkv(x).flatten(1, -2).unflatten(-1, (3, m.num_heads, -1)).permute(2, 0, 3, 1, 4)
        logits = m.scale * q @ k.transpose(-2, -1) + mask
        if m.rpb is not None:
            logits = logits + m.rpb.flatten(1)[:, entry]
        return m.proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2).view_as(x))
