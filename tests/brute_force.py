"""Windowed attention written pair by pair in Python floats, straight from the definition; shares no code with
vicinal.

Per axis: P = ceil(L / w) * w slots, P / w windows. Slot r of window i holds the token p - lo with p = (i w +
r + s) mod P (blocks padded, then rolled), (p + s) mod L with p = i w + r < L (rolled, then padded), r * P / w
+ i - lo (grids), or i w - (o - w) // 2 + r (key windows of width o); outside [0, L) it is a pad. Slots wrap
if r >= w - s in the last window.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from problems import Problem, arguments
from torch import Tensor

Slot = tuple[int | None, int]  # coordinate or None for a pad, wrap bit
Place = tuple[int | None, tuple[int, ...]]  # token or None for a pad, wrap bits


def axis_windows(length: int, w: int, s: int, windows: Any, kv: int) -> list[list[Slot]]:
    padded = math.ceil(length / w) * w
    count, low = padded // w, (padded - length) // 2 if windows.pad_side == "center" else 0

    def slot(i: int, r: int) -> Slot:
        wraps = int(s > 0 and i == count - 1 and r >= w - s)
        if kv:
            g = i * w - (kv - w) // 2 + r
        elif windows.partition == "grid":
            g = r * count + i - low
        elif windows.pad_order == "roll_pad":
            p = i * w + r
            g = (p + s) % length if p < length else -1
        else:
            g = (i * w + r + s) % padded - low
        return (g if 0 <= g < length else None), wraps

    return [[slot(i, r) for r in range(kv or w)] for i in range(count)]


def places(axes: list[list[list[Slot]]], lengths: tuple[int, ...]) -> list[list[Place]]:
    """Per window, in row-major order: its slots, in row-major order."""
    result = []
    for window in itertools.product(*axes):
        slots: list[Place] = []
        for combination in itertools.product(*window):
            token: int | None = 0
            for (g, _), length in zip(combination, lengths):
                token = None if g is None or token is None else token * length + g
            slots.append((token, tuple(wrap for _, wrap in combination)))
        result.append(slots)
    return result


def coordinates(window: tuple[int, ...]) -> list[tuple[int, ...]]:
    return list(itertools.product(*[range(w) for w in window]))


class BruteForce:
    """One problem: `solve` gives out and lse."""

    def __init__(self, problem: Problem, tensors: dict[str, Tensor]) -> None:
        self.problem, self.windows = problem, problem.windows
        self.options = arguments(problem, tensors)
        self.values = {
            name: t.detach().double().tolist()
            for name, t in tensors.items()
            if name not in ("q", "k", "v", "attn_mask", "key_padding_mask")
        }
        flat = [tensors[n].detach().double().flatten(1, -3).tolist() for n in "qkv"]
        self.q, self.k, self.v = flat
        padding = tensors.get("key_padding_mask")
        self.padding = None if padding is None else padding.flatten(1).tolist()
        mask = tensors.get("attn_mask")
        self.mask = None if mask is None else mask.detach().double()
        self.rank = len(problem.space)

    def sizes(self, value: Any) -> tuple[int, ...]:
        return tuple(value) if isinstance(value, tuple) else (value,) * self.rank

    def groups(self) -> list[tuple[range, tuple[int, ...], tuple[int, ...]]]:
        p, windows = self.problem, self.windows
        entries = windows.head_groups or ((p.heads, windows.size, windows.shift),)
        found, first = [], 0
        for n, size, shift in entries:
            window = tuple(length if w == -1 else w for w, length in zip(self.sizes(size), p.space))
            found.append((range(first, first + n), window, self.sizes(shift)))
            first += n
        return found

    def solve(self) -> tuple[Tensor, Tensor]:
        p = self.problem
        out = torch.zeros(p.batch, math.prod(p.query_space), p.heads, p.value_dim, dtype=torch.float64)
        lse = torch.zeros(out.shape[:-1], dtype=torch.float64)
        for heads, window, shift in self.groups():
            kv = self.sizes(self.windows.kv_size or 0)
            q_window = self.sizes(self.windows.q_size or 0) if self.windows.q_size else window
            k_axes = [axis_windows(*a[:3], self.windows, a[3]) for a in zip(p.space, window, shift, kv)]
            q_axes = [axis_windows(*a, self.windows, 0) for a in zip(p.query_space, q_window, shift)]
            pairs = list(zip(places(q_axes, p.query_space), places(k_axes, p.space)))
            k_window = tuple(o or w for o, w in zip(kv, window))
            for b, (i, (queries, keys)) in itertools.product(range(p.batch), enumerate(pairs)):
                for h, (n, (token, wraps)) in itertools.product(heads, enumerate(queries)):
                    if token is None:
                        continue
                    row = self.row(b, h, b * len(pairs) + i, n, token, wraps, keys, q_window, k_window)
                    out[b, token, h], lse[b, token, h] = torch.tensor(row[0], dtype=torch.float64), row[1]
        space = (p.batch, *p.query_space, p.heads)
        return out.view(*space, p.value_dim), lse.view(space)

    def row(
        self,
        b: int,
        h: int,
        window: int,
        n: int,
        token: int,
        wraps: Any,
        keys: list[Place],
        q_w: Any,
        k_w: Any,
    ) -> tuple[list[float], float]:
        """out and lse of one query."""
        p, q = self.problem, self.q[b][token][h]
        scores, values = [], []
        for m, (key, key_wraps) in enumerate(keys):
            pair = self.key_value(b, key, h)
            if pair is None:
                continue
            s = self.score(q, pair[0], h) + self.bias(h, n, m, q_w, k_w)
            s += self.contextual(q, h, n, m, q_w, k_w)
            s += self.added(b, h, window, n, m, key)
            if key_wraps != wraps:
                s = -math.inf if p.activation != "softmax" else s + self.windows.mask_value
            scores.append(s)
            values.append(pair[1])
        for e in range(p.extra):
            s = self.score(q, self.values["extra_k"][b][e][h], h)
            scores.append(s + (self.values["extra_bias"][h][e] if p.extra_bias else 0.0))
            values.append(self.values["extra_v"][b][e][h])
        largest = max(scores, default=-math.inf)
        if largest == -math.inf:
            return [0.0] * p.value_dim, -math.inf
        lse = largest + math.log(sum(math.exp(s - largest) for s in scores))
        weights = [self.weight(s, lse) for s in scores]
        return [math.fsum(w * v[d] for w, v in zip(weights, values)) for d in range(p.value_dim)], lse

    def key_value(self, b: int, key: int | None, h: int) -> Any:
        """The key and the value of a slot, None where the slot does not exist."""
        p = self.problem
        if key is not None:
            return self.k[b][key][h], self.v[b][key][h]
        if self.windows.edge == "mask":
            return None
        edge_k = self.values["edge_k"][h] if p.edge_k else [0.0] * p.dim
        return edge_k, self.values["edge_v"][h] if p.edge_v else [0.0] * p.value_dim

    def score(self, q: list[float], k: list[float], h: int) -> float:
        p, dot = self.problem, math.fsum(x * y for x, y in zip(q, k))
        if not p.cosine:
            return dot * (p.dim**-0.5 if p.scale is None else p.scale)
        tau = math.exp(min(self.values["logit_scale"][h], math.log(100)))
        return tau * dot / max(math.hypot(*q), 1e-12) / max(math.hypot(*k), 1e-12)

    def weight(self, s: float, lse: float) -> float:
        if self.problem.activation == "softmax":
            return math.exp(s - lse)
        if s == -math.inf:
            return 0.0
        return {"relu": max(s, 0.0), "relu2": max(s, 0.0) ** 2, "none": s}[self.problem.activation]

    def added(self, b: int, h: int, window: int, n: int, m: int, key: int | None) -> float:
        """What key_padding_mask and attn_mask add."""
        total = 0.0
        if self.padding is not None and key is not None:
            value = self.padding[b][key]
            total += (-math.inf if value else 0.0) if isinstance(value, bool) else value
        if self.mask is not None:
            mask = self.mask if self.mask.dim() == 4 else self.mask[:, None]
            total += float(mask[window % len(mask), h % mask.shape[1], n, m])
        return total

    def contextual(self, q: list[float], h: int, n: int, m: int, q_w: Any, k_w: Any) -> float:
        """The products of the query with the rows of its offset from the key."""
        if not self.problem.rel_pos:
            return 0.0
        total = 0.0
        for a, (x, y) in enumerate(zip(coordinates(q_w)[n], coordinates(k_w)[m])):
            table = self.values[f"rel_pos_{a}"]
            rows = table[h] if self.problem.rel_pos == "heads" else table
            total += math.fsum(c * r for c, r in zip(q, rows[x - y + k_w[a] - 1]))
        return total

    def bias(self, h: int, n: int, m: int, q_window: tuple[int, ...], k_window: tuple[int, ...]) -> float:
        kind = self.problem.bias
        if not kind:
            return 0.0
        table = self.values["bias"]
        if kind == "dense":
            return table[h][n][m]
        if kind == "dense4":
            return table[0][h][n][m]
        if kind == "index":
            return table[int(self.options["bias"].index[n, m])][h]
        made = self.problem.bias_window
        q, k = coordinates(made or q_window)[n], coordinates(made or k_window)[m]
        index = 0
        for x, y, w, o in zip(q, k, made or q_window, made or k_window):
            if kind == "abs":
                index = index * w + abs(x - y)
            else:
                index = index * (w + o - 1) + (x - y + o - 1 if kind == "q-k" else y - x + w - 1)
        return table[index][h]
