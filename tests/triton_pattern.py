"""Run by test_plan.py in its own process: pattern.py in Triton's interpreter, against Python."""

from __future__ import annotations

import itertools
import os

os.environ["TRITON_INTERPRET"] = "1"

from types import FunctionType
from typing import Any

import torch
import triton
import triton.language as tl

from vicinal import pattern


def bound(function: Any) -> Any:
    """The function as a jitted one; the interpreter wants triton.language among its globals."""
    copy = FunctionType(function.__code__, {"tl": tl}, function.__name__)
    copy.__module__ = function.__module__
    return triton.jit(copy)


bias_index = bound(pattern.bias_index)
crosses = bound(pattern.crosses)
visible = bound(pattern.visible)


@triton.jit
def facts(A: Any, B: Any, Index: Any, Crosses: Any, n: Any, BLOCK: tl.constexpr) -> None:
    at = tl.arange(0, BLOCK)
    a = tl.load(A + at, mask=at < n)
    b = tl.load(B + at, mask=at < n)
    tl.store(Index + at, bias_index(a, b), mask=at < n)
    tl.store(Crosses + at, crosses(a, b).to(tl.int32), mask=at < n)


@triton.jit
def ranges(First: Any, Last: Any, Place: Any, Visible: Any, guard: Any, n: Any, BLOCK: tl.constexpr) -> None:
    at = tl.arange(0, BLOCK)
    first = tl.load(First + at, mask=at < n)
    last = tl.load(Last + at, mask=at < n)
    place = tl.load(Place + at, mask=at < n)
    tl.store(Visible + at, visible(first, last, place, guard).to(tl.int32), mask=at < n)


def check_ranges() -> None:
    """Two fields of three bits, a guard bit above each."""
    guard, values = 8 | 8 << 4, [0, 1, 3, 6, 7]
    packed = [x | y << 4 for x in values for y in values]
    triples = list(itertools.product(packed, repeat=3))
    columns = [torch.tensor(column, dtype=torch.int32) for column in zip(*triples)]
    seen = torch.empty_like(columns[0])
    ranges[(1,)](*columns, seen, guard, len(triples), BLOCK=16384)
    assert seen.tolist() == [int(pattern.visible(x, y, z, guard)) for x, y, z in triples]


def main() -> None:
    check_ranges()
    values = torch.arange(-9, 10, dtype=torch.int32)
    a, b = (x.flatten().contiguous() for x in torch.meshgrid(values, values, indexing="ij"))
    index, crossed = torch.empty_like(a), torch.empty_like(a)
    facts[(1,)](a, b, index, crossed, a.numel(), BLOCK=512)
    pairs = list(zip(a.tolist(), b.tolist()))
    assert index.tolist() == [pattern.bias_index(x, y) for x, y in pairs]
    assert crossed.tolist() == [int(pattern.crosses(x, y)) for x, y in pairs]
    print("equal", len(pairs))


if __name__ == "__main__":
    main()
