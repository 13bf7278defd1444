"""Tokens inside the kernels of linear attention: parts of sequences, features, decays, what sees what.

A *part* is a run of consecutive tokens of one sequence, a few tiles long; tokens are counted in the sample
and, where decays, blocks and causality are concerned, from the start of their part. Between parts there are
only sums, so decays are differences inside one part and all exponents are at most 0."""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Strided(NamedTuple):
    """[B, N, H, D] of any strides; data None: not there."""

    data: Any
    stride_b: Any
    stride_n: Any
    stride_h: Any
    stride_d: Any


class Lines(NamedTuple):
    """Numbers per sample, head and token, [B, H, N] contiguous or None: the denominators, their gradients,
    the sums of the decay since the start of the part. `decay` [H], if constant; `ignored` uint8 [B, N]."""

    den: Any
    d: Any
    b: Any
    decay: Any
    ignored: Any


class Sums(NamedTuple):
    """S [slots, H, K, DV] and z [slots, H, K] (or None), and the elements from one (slot, head) to the next.
    The sums entering part t of sequence r are in slot t + r, those leaving it in the next."""

    s: Any
    z: Any
    step_s: Any
    step_z: Any


@triton.jit
def find_part(table, at, parts, size, n):
    """Sample, sequence, first token and end of part `at`; `table` int32 [parts, 3] for packed sequences."""
    if table is not None:
        r = tl.load(table + at * 3).to(tl.int64)
        b = r * 0
        begin, end = tl.load(table + at * 3 + 1).to(tl.int64), tl.load(table + at * 3 + 2).to(tl.int64)
    else:
        r = at // parts
        b = r
        begin = at % parts * size
        end = tl.minimum(begin + size, n)
    return b, r, begin, end


@triton.jit
def pointers(x, b, h, token, column):
    """Of a tensor; token and column are expanded against each other, in either orientation."""
    return (
        x.data + b * x.stride_b + h * x.stride_h + token * x.stride_n + column.to(tl.int64) * x.stride_d
    )  # fmt: skip


@triton.jit
def as_operand(x, KIND: tl.constexpr):
    """x as products take it: bfloat16, or float32 that tensor cores do not round any more, or as it is.

    Where a token sees one key only, gradients of numerator and denominator cancel; they do so because sums
    and products are made of the same, rounded features."""
    if KIND == "half":
        found = x.to(tl.bfloat16)
    elif KIND == "tf32":
        bits = x.to(tl.int32, bitcast=True)
        found = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    else:
        found = x
    return found


@triton.jit
def load_x(x, b, h, token, ok, column, D: tl.constexpr, ACC: tl.constexpr):
    return tl.load(pointers(x, b, h, token, column), mask=ok & (column < D), other=0.0).to(ACC)


@triton.jit
def features(
    x, b, h, token, ok, column, param, scale, constant, PHI: tl.constexpr, D: tl.constexpr,
    CONST: tl.constexpr, KIND: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """scale * phi(x), then the constant in column D; zeros beyond and where not ok."""
    there = ok & (column < D)
    phi = tl.where(there, PHI(load_x(x, b, h, token, ok, column, D, ACC), param) * scale, 0.0)
    if CONST:
        phi = tl.where(ok & (column == D), constant, phi)
    return as_operand(phi, KIND)


@triton.jit
def kept(lines, b, n, token, ok):
    """The tokens that take part as keys."""
    if lines.ignored is not None:
        ok = ok & (tl.load(lines.ignored + b * n + token, mask=ok, other=1) == 0)
    return ok


@triton.jit
def load_line(line, b, h, heads, n, token, ok, OTHER: tl.constexpr):
    return tl.load(line + (b * heads + h) * n + token, mask=ok, other=OTHER)


@triton.jit
def inverse_den(lines, b, h, heads, n, token, ok):
    """1 / den, 0 where it is too small."""
    return inverse(load_line(lines.den, b, h, heads, n, token, ok, 1.0))


@triton.jit
def inverse(den):
    seen = tl.abs(den) >= 1e-30
    return tl.where(seen, 1.0 / tl.where(seen, den, 1.0), 0.0)


@triton.jit
def decayed(lines, b, h, heads, n, token, begin, ok):
    """Sum of the decay from the start of the part to each token."""
    if lines.b is not None:
        found = load_line(lines.b, b, h, heads, n, token, ok, 0.0)
    else:
        per_token = tl.load(lines.decay + h)
        found = (token - begin + 1).to(per_token.dtype) * per_token
    return found


@triton.jit
def sees(i, j, block, MASK: tl.constexpr):
    """Whether queries i see keys j of the same part."""
    if MASK == "causal":
        seen = j <= i
    elif MASK == "previous":
        seen = j // block < i // block
    else:
        seen = j // block <= i // block
    return seen
