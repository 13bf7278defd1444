"""Hash attention (csrc/hash.h has the formula): sums of unit vectors; codes and their sums; results; and the
three passes of the backward.

A program is a block of tokens of one sample and head; sums over tokens leave as one partial per block. Codes
go from one product to the next as packed words, never as the transpose of a result."""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Rows(NamedTuple):
    """[B, N, H, D] with D contiguous."""

    data: Any
    stride_b: Any
    stride_n: Any
    stride_h: Any


class Tables(NamedTuple):
    """anchors [H, m, D], weight [H, bits, m], mean [H, m], contiguous; m is `count`."""

    anchors: Any
    weight: Any
    mean: Any
    count: Any


@triton.jit
def load_rows(t, b, h, token, ok, SIZE: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """[tokens, BLOCK]; zeros beyond SIZE."""
    column = tl.arange(0, BLOCK)
    at = t.data + b.to(tl.int64) * t.stride_b + token[:, None].to(tl.int64) * t.stride_n + h * t.stride_h
    return tl.load(at + column[None, :], mask=ok[:, None] & (column < SIZE)[None, :], other=0.0).to(ACC)


@triton.jit
def store_rows(t, b, h, token, ok, x, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    at = t.data + b.to(tl.int64) * t.stride_b + token[:, None].to(tl.int64) * t.stride_n + h * t.stride_h
    ok = ok[:, None] & (column < SIZE)[None, :]
    tl.store(at + column[None, :], x.to(t.data.dtype.element_ty), mask=ok)


@triton.jit
def unit_rows(qk, b, h, token, ok, D: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr):
    """x [tokens, BLOCK_D] and 1 / |qk| [tokens], both 0 for a zero vector."""
    rows = load_rows(qk, b, h, token, ok, D, BLOCK_D, ACC)
    norm = tl.sqrt(tl.sum(rows * rows, 1))
    inverse = tl.where(norm > 0, 1.0 / tl.where(norm > 0, norm, 1.0), 0.0)
    return rows * inverse[:, None], inverse


@triton.jit
def distances(x, tables, h, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, ACC: tl.constexpr):
    """d [tokens, BLOCK_M]."""
    d, m = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_M)
    at = tables.anchors + (h * tables.count + m[None, :]) * D + d[:, None]
    anchors = tl.load(at, mask=(m < tables.count)[None, :] & (d < D)[:, None], other=0.0)
    dots = tl.dot(x, anchors, input_precision="ieee", out_dtype=ACC)
    return 1.0 + tl.sum(anchors * anchors, 0)[None, :] - 2.0 * dots


@triton.jit
def decode(word, bit, BITS: tl.constexpr, ACC: tl.constexpr):
    """+1 and -1, 0 beyond BITS; word and bit expanded against each other."""
    sign = ((word >> bit) & 1).to(ACC) * 2.0 - 1.0
    return tl.where(bit < BITS, sign, 0.0)


@triton.jit
def hash_units_kernel(
    qk, partial, n, heads, blocks, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """partial [B * heads, blocks, D]: sums of x."""
    pair, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    b, h = pair // heads, pair % heads
    token = block * BLOCK_T + tl.arange(0, BLOCK_T)
    x, _ = unit_rows(qk, b, h, token, token < n, D, BLOCK_D, ACC)
    d = tl.arange(0, BLOCK_D)
    tl.store(partial + tl.program_id(0).to(tl.int64) * D + d, tl.sum(x, 0), mask=d < D)


@triton.jit
def store_sums(
    partial, size, of_codes, of_ones, z, BITS: tl.constexpr, DV: tl.constexpr, BLOCK_V: tl.constexpr
):  # fmt: skip
    """A partial of the state without sigma: [BITS][DV], [DV], [BITS]."""
    bit, column = tl.arange(0, 16), tl.arange(0, BLOCK_V)
    at = partial + tl.program_id(0).to(tl.int64) * size
    inside = (bit < BITS)[:, None] & (column < DV)[None, :]
    tl.store(at + bit[:, None] * DV + column[None, :], of_codes, mask=inside)
    tl.store(at + BITS * DV + column, of_ones, mask=column < DV)
    tl.store(at + (BITS + 1) * DV + bit, z, mask=bit < BITS)


@triton.jit
def hash_codes_kernel(
    qk, v, tables, codes, state, partial, n, heads, blocks, size, BITS: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """codes, and partials of S, of the sum of v and of z."""
    pair, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    b, h = pair // heads, pair % heads
    token = block * BLOCK_T + tl.arange(0, BLOCK_T)
    ok = token < n
    x, _ = unit_rows(qk, b, h, token, ok, D, BLOCK_D, ACC)
    sigma = tl.load(state + (pair.to(tl.int64) + 1) * (size + 1) - 1)
    m, bit = tl.arange(0, BLOCK_M), tl.arange(0, 16)
    d = distances(x, tables, h, D, BLOCK_D, BLOCK_M, ACC)
    mean = tl.load(tables.mean + h * tables.count + m, mask=m < tables.count, other=0.0)
    features = tl.where((m < tables.count)[None, :], tl.exp(-d / (2.0 * sigma)) - mean[None, :], 0.0)
    at = tables.weight + (h * BITS + bit[None, :]) * tables.count + m[:, None]
    weight = tl.load(at, mask=(bit < BITS)[None, :] & (m < tables.count)[:, None], other=0.0)
    y = tl.dot(features, weight, input_precision="ieee", out_dtype=ACC)
    word = ((y >= 0).to(tl.int32) << bit[None, :]) | ((tl.abs(y) < 1).to(tl.int32) << (16 + bit)[None, :])
    word = tl.sum(tl.where((bit < BITS)[None, :], word, 0), 1)
    tl.store(codes + pair.to(tl.int64) * n + token, word, mask=ok)
    code = tl.where(ok[None, :], decode(word[None, :], bit[:, None], BITS, ACC), 0.0)
    values = load_rows(v, b, h, token, ok, DV, BLOCK_V, ACC)
    of_codes = tl.dot(code, values, input_precision="ieee", out_dtype=ACC)
    store_sums(partial, size, of_codes, tl.sum(values, 0), tl.sum(code, 1), BITS, DV, BLOCK_V)


@triton.jit
def load_sums(state, stride, BITS: tl.constexpr, DV: tl.constexpr, BLOCK_V: tl.constexpr):
    """S [16, BLOCK_V], its transpose, the sum of v [BLOCK_V] and z [16]."""
    bit, column = tl.arange(0, 16), tl.arange(0, BLOCK_V)
    inside = (bit < BITS)[:, None] & (column < DV)[None, :]
    across = (bit < BITS)[None, :] & (column < DV)[:, None]
    s = tl.load(state + stride + bit[:, None] * DV + column[None, :], mask=inside, other=0.0)
    st = tl.load(state + stride + bit[None, :] * DV + column[:, None], mask=across, other=0.0)
    ones = tl.load(state + stride + BITS * DV + column, mask=column < DV, other=0.0)
    z = tl.load(state + stride + (BITS + 1) * DV + bit, mask=bit < BITS, other=0.0)
    return s, st, ones, z


@triton.jit
def hash_fwd_kernel(
    v, out, codes, state, n, heads, blocks, size, offset, SELF: tl.constexpr, BITS: tl.constexpr,
    DV: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_T: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    pair, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    b, h = pair // heads, pair % heads
    token = block * BLOCK_T + tl.arange(0, BLOCK_T)
    ok = token < n
    s, _, ones, z = load_sums(state, pair.to(tl.int64) * (size + 1), BITS, DV, BLOCK_V)
    word = tl.load(codes + pair.to(tl.int64) * n + token, mask=ok, other=0)
    code = decode(word[:, None], tl.arange(0, 16)[None, :], BITS, ACC)
    top = tl.dot(code, s, input_precision="ieee", out_dtype=ACC)
    if SELF:
        top += offset * load_rows(v, b, h, token, ok, DV, BLOCK_V, ACC)
    else:
        top += offset * ones[None, :]
    bottom = tl.sum(code * z[None, :], 1) + n * offset
    store_rows(out, b, h, token, ok, top / bottom[:, None], DV, BLOCK_V)


@triton.jit
def read_block(
    v, dout, codes, state, n, offset, pair, b, h, token, ok, size, SELF: tl.constexpr, BITS: tl.constexpr,
    DV: tl.constexpr, BLOCK_V: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Words, codes, r, e = -(out . dout) / den, S dout / den, and z of a block."""
    _, st, ones, z = load_sums(state, pair.to(tl.int64) * (size + 1), BITS, DV, BLOCK_V)
    word = tl.load(codes + pair.to(tl.int64) * n + token, mask=ok, other=0)
    code = decode(word[:, None], tl.arange(0, 16)[None, :], BITS, ACC)
    grad = load_rows(dout, b, h, token, ok, DV, BLOCK_V, ACC)
    reads = tl.dot(grad, st, input_precision="ieee", out_dtype=ACC)
    if SELF:
        constant = tl.sum(grad * load_rows(v, b, h, token, ok, DV, BLOCK_V, ACC), 1)
    else:
        constant = tl.sum(grad * ones[None, :], 1)
    inverse = 1.0 / (tl.sum(code * z[None, :], 1) + n * offset)
    e = -(tl.sum(code * reads, 1) + offset * constant) * inverse * inverse
    return word, code, grad * inverse[:, None], e, reads * inverse[:, None], z


@triton.jit
def hash_bwd_sums_kernel(
    v, dout, codes, state, partial, n, heads, blocks, size, offset, SELF: tl.constexpr, BITS: tl.constexpr,
    DV: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_T: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Partials of dS, of the sum of r and of dz."""
    pair, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    b, h = pair // heads, pair % heads
    token = block * BLOCK_T + tl.arange(0, BLOCK_T)
    ok = token < n
    word, code, r, e, _, _ = read_block(
        v, dout, codes, state, n, offset, pair, b, h, token, ok, size, SELF, BITS, DV, BLOCK_V, ACC
    )
    across = decode(word[None, :], tl.arange(0, 16)[:, None], BITS, ACC)
    of_codes = tl.dot(across, r, input_precision="ieee", out_dtype=ACC)
    store_sums(partial, size, of_codes, tl.sum(r, 0), tl.sum(code * e[:, None], 0), BITS, DV, BLOCK_V)


@triton.jit
def hash_bwd_kernel(
    qk, v, dout, dv, tables, codes, state, total, dx, slopes, n, heads, blocks, size, offset,
    SELF: tl.constexpr, BITS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dv; dx [B * heads, n, D] but for what sigma adds; slopes [B * heads, n]: sums of T d."""
    pair, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    b, h = pair // heads, pair % heads
    token = block * BLOCK_T + tl.arange(0, BLOCK_T)
    ok = token < n
    word, code, r, e, reads, z = read_block(
        v, dout, codes, state, n, offset, pair, b, h, token, ok, size, SELF, BITS, DV, BLOCK_V, ACC
    )
    ds, dst, all_r, dz = load_sums(total, pair.to(tl.int64) * size, BITS, DV, BLOCK_V)
    values = load_rows(v, b, h, token, ok, DV, BLOCK_V, ACC)
    grad = tl.dot(code, ds, input_precision="ieee", out_dtype=ACC)
    grad += offset * r if SELF else offset * all_r[None, :]
    store_rows(dv, b, h, token, ok, grad, DV, BLOCK_V)

    dcode = reads + e[:, None] * z[None, :] + dz[None, :]
    dcode += tl.dot(values, dst, input_precision="ieee", out_dtype=ACC)
    m, bit, d = tl.arange(0, BLOCK_M), tl.arange(0, 16), tl.arange(0, BLOCK_D)
    near = ((word[:, None] >> (16 + bit)[None, :]) & 1) != 0
    dy = tl.where(near & ok[:, None], dcode, 0.0)
    at = tables.weight + (h * BITS + bit[:, None]) * tables.count + m[None, :]
    weight = tl.load(at, mask=(bit < BITS)[:, None] & (m < tables.count)[None, :], other=0.0)
    slope = tl.dot(dy, weight, input_precision="ieee", out_dtype=ACC)
    sigma = tl.load(state + (pair.to(tl.int64) + 1) * (size + 1) - 1)
    x, _ = unit_rows(qk, b, h, token, ok, D, BLOCK_D, ACC)
    distance = distances(x, tables, h, D, BLOCK_D, BLOCK_M, ACC)
    slope *= tl.exp(-distance / (2.0 * sigma))
    tl.store(slopes + pair.to(tl.int64) * n + token, tl.sum(slope * distance, 1), mask=ok)
    at = tables.anchors + (h * tables.count + m[:, None]) * D + d[None, :]
    anchors = tl.load(at, mask=(m < tables.count)[:, None] & (d < D)[None, :], other=0.0)
    found = tl.dot(slope / sigma, anchors, input_precision="ieee", out_dtype=ACC)  # -2 times -1 / 2
    at = dx + (pair.to(tl.int64) * n + token[:, None]) * D + d[None, :]
    tl.store(at, found, mask=ok[:, None] & (d < D)[None, :])


@triton.jit
def hash_bwd_qk_kernel(
    qk, dqk, dx, constant, n, heads, blocks, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """dqk from dx and what sigma adds to it, constant [B * heads, D]."""
    pair, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    b, h = pair // heads, pair % heads
    token = block * BLOCK_T + tl.arange(0, BLOCK_T)
    ok, d = token < n, tl.arange(0, BLOCK_D)
    x, inverse = unit_rows(qk, b, h, token, ok, D, BLOCK_D, ACC)
    inside = ok[:, None] & (d < D)[None, :]
    grad = tl.load(dx + (pair.to(tl.int64) * n + token[:, None]) * D + d[None, :], mask=inside, other=0.0)
    grad += tl.load(constant + pair * D + d, mask=d < D, other=0.0)[None, :]
    grad = (grad - x * tl.sum(x * grad, 1)[:, None]) * inverse[:, None]
    store_rows(dqk, b, h, token, ok, grad, D, BLOCK_D)
