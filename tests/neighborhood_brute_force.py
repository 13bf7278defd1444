"""Neighborhood attention written pair by pair in Python numbers, straight from the definition; shares no code
with vicinal.

Per axis of length L: index i is place p = i // d of group g = i % d, which has n = ceil((L - g) / d) places.
Its leader is l = (p // s) s + s // 2, under causality (p // s) s + s - 1, and it reads the places [a, b):

    shift              a = min(max(l - k // 2, 0), n - k)     b = a + k
    shift, causal      a = max(min(l, n - 1) - k + 1, 0)      b = p + 1
    truncate           a = max(l - left, 0)                   b = min(l + right + 1, n)
    truncate, causal   a = max(l - left, 0)                   b = p + 1
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import torch
from neighborhood_problems import Problem
from torch import Tensor


class Axis(NamedTuple):
    """One axis: left and right -1 for unlimited, kernel 0 where either is; q_length queries at its end."""

    length: int
    kernel: int
    left: int
    right: int
    dilation: int
    stride: int
    causal: bool
    border: str
    q_length: int


def axes_of(problem: Problem) -> list[Axis]:
    where, rank = problem.where, len(problem.space)

    def entry(value: Any, a: int) -> Any:
        return value[a] if isinstance(value, tuple) else value

    kernels: Any = where.kernel_size
    if where.border == "truncate" and rank == 1 and isinstance(kernels, tuple) and len(kernels) == 2:
        kernels = (kernels,)
    made = []
    for a, (length, q_length) in enumerate(zip(problem.space, problem.query_space)):
        causal, kernel = entry(where.is_causal, a), entry(kernels, a)
        if isinstance(kernel, tuple):
            left, right = kernel
        elif causal:
            left, right = kernel - 1, 0
        else:
            left, right = kernel // 2, kernel - 1 - kernel // 2
        k = 0 if -1 in (left, right) else left + right + 1
        d, s = entry(where.dilation, a), entry(where.stride, a)
        made.append(Axis(length, k, left, right, d, s, causal, where.border, q_length))
    return made


def places(axis: Axis, p: int, n: int) -> tuple[int, int]:
    """[a, b): the places that place p of a group of n reads."""
    s, k = axis.stride, axis.kernel
    leader = p // s * s + (s - 1 if axis.causal else s // 2)
    if axis.border == "shift":
        if axis.causal:
            return max(min(leader, n - 1) - k + 1, 0), p + 1
        a = min(max(leader - k // 2, 0), n - k)
        return a, a + k
    a = 0 if axis.left == -1 else max(leader - axis.left, 0)
    if axis.causal:
        return a, p + 1
    return a, n if axis.right == -1 else min(leader + axis.right + 1, n)


def neighbors(axis: Axis) -> list[dict[int, tuple[int, int]]]:
    """Per query: its keys, each with (entry of the bias table, slot)."""
    found = []
    for query in range(axis.q_length):
        i = query + axis.length - axis.q_length
        g, p = i % axis.dilation, i // axis.dilation
        n = math.ceil((axis.length - g) / axis.dilation)
        a, b = places(axis, p, n)
        leader = p // axis.stride * axis.stride
        leader += axis.stride - 1 if axis.causal else axis.stride // 2
        start = a if axis.border == "shift" else leader - axis.left
        keys = {g + axis.dilation * t: (t - p + axis.kernel - 1, t - start) for t in range(a, b)}
        found.append(keys)
    return found


Pairs = list[dict[int, tuple[int, int]]]


def pairs(axes: list[Axis]) -> Pairs:
    """Per query token: its key tokens, each with (flat entry of the bias table, flat slot)."""
    per_axis = [neighbors(axis) for axis in axes]
    found = []
    for query in itertools.product(*per_axis):
        keys = {}
        for combination in itertools.product(*[keys.items() for keys in query]):
            token = entry = slot = 0
            for axis, (coordinate, (index, place)) in zip(axes, combination):
                token = token * axis.length + coordinate
                entry = entry * (2 * axis.kernel - 1) + index
                slot = slot * axis.kernel + place
            keys[token] = (entry, slot)
        found.append(keys)
    return found


def contextual(p: Problem, tables: dict[str, list], row: list[float], h: int, entry: int) -> float:
    """The products of a query with the rows of its offset; `entry`: of a flat table of all offsets."""
    total = 0.0
    for a, axis in reversed(list(enumerate(axes_of(p)))) if tables else ():
        entry, r = divmod(entry, 2 * axis.kernel - 1)
        table = tables[f"rel_pos_{a}"]
        rows = table[h] if p.rel_pos == "heads" else table
        total += math.fsum(x * y for x, y in zip(row, rows[r]))
    return total


def solve(problem: Problem, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """out and lse, in float64."""
    p = problem
    given = {n: t.detach().double().tolist() for n, t in tensors.items() if n.startswith("extra")}
    q, k, v = (tensors[n].detach().double().flatten(1, -3).tolist() for n in "qkv")
    bias = tensors["bias"].detach().double().flatten(1).tolist() if p.bias else None
    tables = {n: t.detach().double().tolist() for n, t in tensors.items() if n.startswith("rel_pos")}
    mask = tensors.get("key_padding_mask")
    ignored = None if mask is None else mask.flatten(1).tolist()
    scale = p.dim**-0.5 if p.scale is None else p.scale
    found = pairs(axes_of(p))
    out = torch.zeros(p.batch, len(found), p.heads, p.value_dim, dtype=torch.float64)
    lse = torch.full(out.shape[:-1], -math.inf, dtype=torch.float64)
    for b, (i, keys), h in itertools.product(range(p.batch), enumerate(found), range(p.heads)):
        shared = h // (p.heads // p.key_heads)
        row, values = q[b][i][h], []
        scores = []
        for j, (entry, _) in keys.items():
            if ignored is None or not ignored[b][j]:
                added = bias[h][entry] if bias else 0.0
                added += contextual(p, tables, row, h, entry)
                scores.append(scale * math.fsum(x * y for x, y in zip(row, k[b][j][shared])) + added)
                values.append(v[b][j][shared])
        for e in range(p.extra):
            extra = given["extra_k"][b][e][shared]
            scores.append(scale * math.fsum(x * y for x, y in zip(row, extra)))
            values.append(given["extra_v"][b][e][shared])
        if not scores:
            continue
        largest = max(scores)
        total = largest + math.log(math.fsum(math.exp(s - largest) for s in scores))
        weights = [math.exp(s - total) for s in scores]
        mean = [math.fsum(w * x[c] for w, x in zip(weights, values)) for c in range(p.value_dim)]
        out[b, i, h], lse[b, i, h] = torch.tensor(mean, dtype=torch.float64), total
    rows = (p.batch, *p.query_space, p.heads)
    return out.view(*rows, p.value_dim), lse.view(rows)
