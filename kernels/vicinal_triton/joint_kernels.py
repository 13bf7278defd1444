"""Joint attention (csrc/joint.h has the formula): partial states, results, and three backward passes.

Tiles of columns are of v and, at the same places, of u. Every pass recomputes the scores that it needs, in
the orientation in which it multiplies them: no product takes the transpose of another one's result. A program
of the results and of the value gradients holds one tile of columns, so the scores are computed once per tile:
at 2 x 1024 columns, dimension 128 and tiles of 64 that doubles the products with the values.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Matrix(NamedTuple):
    """[B, N, D] with D contiguous; data None: not there."""

    data: Any
    stride_b: Any
    stride_n: Any


class Inputs(NamedTuple):
    """What all passes read; bias [group, group], ignored [B, n] and u may be None."""

    quad_q: Any
    quad_k: Any
    lin_q: Any
    lin_k: Any
    v: Any
    u: Any
    bias: Any
    ignored: Any
    n: Any
    group: Any
    groups: Any
    quad_scale: Any
    lin_scale: Any


class Upstream(NamedTuple):
    """Gradients of the results, and O_v and O_u of a gate."""

    dout: Any
    dother: Any
    inner_v: Any
    inner_u: Any


@triton.jit
def load_at(m, b, token, column, ok):
    """The elements of token and column, which are expanded against each other in either orientation."""
    at = m.data + b.to(tl.int64) * m.stride_b + token.to(tl.int64) * m.stride_n + column
    return tl.load(at, mask=ok, other=0.0)


@triton.jit
def store_at(m, b, token, column, ok, x):
    at = m.data + b.to(tl.int64) * m.stride_b + token.to(tl.int64) * m.stride_n + column
    tl.store(at, x.to(m.data.dtype.element_ty), mask=ok)


@triton.jit
def sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x > 0, 1.0 / (1.0 + e), e / (1.0 + e))


@triton.jit
def load_dout(p, upstream, b, token, column, ok, GATE: tl.constexpr, ACC: tl.constexpr):
    """Gradients of O_v and O_u at token and column."""
    dy = load_at(upstream.dout, b, token, column, ok).to(ACC)
    if GATE:
        v, u = load_at(p.v, b, token, column, ok).to(ACC), load_at(p.u, b, token, column, ok).to(ACC)
        of_v = load_at(upstream.inner_v, b, token, column, ok).to(ACC)
        of_u = load_at(upstream.inner_u, b, token, column, ok).to(ACC)
        t = sigmoid(of_v * u)
        return dy * of_u * v * t * (1.0 - t) * u, dy * v * t
    if p.u.data is not None:
        return dy, load_at(upstream.dother, b, token, column, ok).to(ACC)
    return dy, dy


@triton.jit
def kept(p, b, token, ok):
    """The tokens that take part as keys."""
    if p.ignored is not None:
        return ok & (tl.load(p.ignored + b.to(tl.int64) * p.n + token, mask=ok, other=1) == 0)
    return ok


@triton.jit
def weights_and_slopes(qk, p, i, j, keep, CAUSAL: tl.constexpr, LAPLACE: tl.constexpr):
    """A and dA/ds from the dot products of queries at i and keys at j of the group, expanded."""
    s = qk * p.quad_scale
    if p.bias is not None:
        s += tl.load(p.bias + i.to(tl.int64) * p.group + j, mask=(i < p.group) & (j < p.group), other=0.0)
    if LAPLACE:
        z = (s - 0.70710678118654752440) * 2.50662827463100050242
        weight = 0.5 * (1.0 + tl.erf(z))
        slope = tl.exp(-z * z) * 1.41421356237309504880
    else:
        positive = tl.maximum(s, 0.0)
        weight = positive * positive
        slope = 2.0 * positive
    seen = keep
    if CAUSAL:
        seen = seen & (j <= i)
    return tl.where(seen, weight, 0.0), tl.where(seen, slope, 0.0)


@triton.jit
def joint_state_kernel(
    p, left, upstream, state, chunk, chunks, width, scale, GATE: tl.constexpr, BACKWARD: tl.constexpr,
    HAS_U: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_T: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """state [B, chunks, D, width]: per chunk of tokens sums of left_j X_j^T; X is W or the gradient of O."""
    b, c = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    d = tl.arange(0, BLOCK_D)[:, None]
    column = (tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V))[None, :]
    of_v, of_u = tl.zeros((BLOCK_D, BLOCK_V), ACC), tl.zeros((BLOCK_D, BLOCK_V), ACC)
    for start in range(0, chunk, BLOCK_T):
        offset = start + tl.arange(0, BLOCK_T)
        token = c * chunk + offset
        ok = (offset < chunk) & (token < p.n)
        if not BACKWARD:
            ok = kept(p, b, token, ok)
        rows = load_at(left, b, token[None, :], d, ok[None, :] & (d < D))
        there = ok[:, None] & (column < DV)
        if BACKWARD:
            x, y = load_dout(p, upstream, b, token[:, None], column, there, GATE, ACC)
            x, y = x.to(rows.dtype), y.to(rows.dtype)
        else:
            x = load_at(p.v, b, token[:, None], column, there)
            y = x
            if HAS_U:
                y = load_at(p.u, b, token[:, None], column, there)
        of_v += tl.dot(rows, x, input_precision=PRECISION, out_dtype=ACC)
        if HAS_U:
            of_u += tl.dot(rows, y, input_precision=PRECISION, out_dtype=ACC)
    at = state + (tl.program_id(0).to(tl.int64) * D + d) * width + column
    tl.store(at, of_v * scale, mask=(d < D) & (column < DV))
    if HAS_U:
        tl.store(at + DV, of_u * scale, mask=(d < D) & (column < DV))


@triton.jit
def joint_fwd_kernel(
    p, out, other, inner_v, inner_u, state, states, width, blocks, GATE: tl.constexpr, CAUSAL: tl.constexpr,
    LAPLACE: tl.constexpr, HAS_U: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_T: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    STATE_PRECISION: tl.constexpr,
):  # fmt: skip
    """A block of queries of one group, and one tile of columns."""
    pair, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    b, g = pair // p.groups, pair % p.groups
    d = tl.arange(0, BLOCK_D)
    column = (tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V))[None, :]
    i = block * BLOCK_T + tl.arange(0, BLOCK_T)
    token = g * p.group + i
    ok = (i < p.group) & (token < p.n)
    here = ok[:, None] & (d < D)[None, :]
    there = ok[:, None] & (column < DV)
    queries = load_at(p.quad_q, b, token[:, None], d[None, :], here)
    of_v, of_u = tl.zeros((BLOCK_T, BLOCK_V), ACC), tl.zeros((BLOCK_T, BLOCK_V), ACC)
    end = (block + 1) * BLOCK_T if CAUSAL else p.group
    for start in range(0, end, BLOCK_T):
        j = start + tl.arange(0, BLOCK_T)
        key = g * p.group + j
        keep = kept(p, b, key, (j < p.group) & (key < p.n))
        keys = load_at(p.quad_k, b, key[None, :], d[:, None], keep[None, :] & (d < D)[:, None])
        qk = tl.dot(queries, keys, input_precision=PRECISION, out_dtype=ACC)
        weight, _ = weights_and_slopes(qk, p, i[:, None], j[None, :], keep[None, :], CAUSAL, LAPLACE)
        weight = weight.to(queries.dtype)
        values = load_at(p.v, b, key[:, None], column, keep[:, None] & (column < DV))
        of_v += tl.dot(weight, values, input_precision=PRECISION, out_dtype=ACC)
        if HAS_U:
            values = load_at(p.u, b, key[:, None], column, keep[:, None] & (column < DV))
            of_u += tl.dot(weight, values, input_precision=PRECISION, out_dtype=ACC)
    reads = load_at(p.lin_q, b, token[:, None], d[None, :], here).to(ACC)
    which = b * states + (g if CAUSAL else 0)
    at = state + (which.to(tl.int64) * D + d[:, None]) * width + column
    inside = (d < D)[:, None] & (column < DV)
    memory = tl.load(at, mask=inside, other=0.0) * p.lin_scale
    of_v += tl.dot(reads, memory, input_precision=STATE_PRECISION, out_dtype=ACC)
    if HAS_U:
        memory = tl.load(at + DV, mask=inside, other=0.0) * p.lin_scale
        of_u += tl.dot(reads, memory, input_precision=STATE_PRECISION, out_dtype=ACC)
    if GATE:
        v = load_at(p.v, b, token[:, None], column, there).to(ACC)
        u = load_at(p.u, b, token[:, None], column, there).to(ACC)
        store_at(out, b, token[:, None], column, there, of_u * v * sigmoid(of_v * u))
        if inner_v.data is not None:
            store_at(inner_v, b, token[:, None], column, there, of_v)
            store_at(inner_u, b, token[:, None], column, there, of_u)
    else:
        store_at(out, b, token[:, None], column, there, of_v)
        if HAS_U:
            store_at(other, b, token[:, None], column, there, of_u)


@triton.jit
def joint_bwd_values_kernel(
    p, upstream, dv, du, dstate, states, width, blocks, GATE: tl.constexpr, CAUSAL: tl.constexpr,
    LAPLACE: tl.constexpr, HAS_U: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_T: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    STATE_PRECISION: tl.constexpr,
):  # fmt: skip
    """dv and du of a block of keys of one group, and one tile of columns."""
    pair, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    b, g = pair // p.groups, pair % p.groups
    d = tl.arange(0, BLOCK_D)
    column = (tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V))[None, :]
    j = block * BLOCK_T + tl.arange(0, BLOCK_T)
    token = g * p.group + j
    ok = (j < p.group) & (token < p.n)
    keep = kept(p, b, token, ok)
    here = keep[:, None] & (d < D)[None, :]
    there = ok[:, None] & (column < DV)
    keys = load_at(p.quad_k, b, token[:, None], d[None, :], here)
    of_v, of_u = tl.zeros((BLOCK_T, BLOCK_V), ACC), tl.zeros((BLOCK_T, BLOCK_V), ACC)
    for start in range(block * BLOCK_T if CAUSAL else 0, p.group, BLOCK_T):
        i = start + tl.arange(0, BLOCK_T)
        query = g * p.group + i
        asks = (i < p.group) & (query < p.n)
        queries = load_at(p.quad_q, b, query[None, :], d[:, None], asks[None, :] & (d < D)[:, None])
        kq = tl.dot(keys, queries, input_precision=PRECISION, out_dtype=ACC)
        weight, _ = weights_and_slopes(kq, p, i[None, :], j[:, None], keep[:, None], CAUSAL, LAPLACE)
        weight = weight.to(keys.dtype)
        x, y = load_dout(p, upstream, b, query[:, None], column, asks[:, None] & (column < DV), GATE, ACC)
        of_v += tl.dot(weight, x.to(keys.dtype), input_precision=PRECISION, out_dtype=ACC)
        if HAS_U:
            of_u += tl.dot(weight, y.to(keys.dtype), input_precision=PRECISION, out_dtype=ACC)
    writes = load_at(p.lin_k, b, token[:, None], d[None, :], here).to(ACC)
    which = b * states + (g if CAUSAL else 0)
    at = dstate + (which.to(tl.int64) * D + d[:, None]) * width + column
    inside = (d < D)[:, None] & (column < DV)
    memory = tl.load(at, mask=inside, other=0.0)
    of_v += tl.dot(writes, memory, input_precision=STATE_PRECISION, out_dtype=ACC)
    if HAS_U:
        memory = tl.load(at + DV, mask=inside, other=0.0)
        of_u += tl.dot(writes, memory, input_precision=STATE_PRECISION, out_dtype=ACC)
    of_v, of_u = tl.where(keep[:, None], of_v, 0.0), tl.where(keep[:, None], of_u, 0.0)
    if GATE:
        dy = load_at(upstream.dout, b, token[:, None], column, there).to(ACC)
        v = load_at(p.v, b, token[:, None], column, there).to(ACC)
        u = load_at(p.u, b, token[:, None], column, there).to(ACC)
        inner_v = load_at(upstream.inner_v, b, token[:, None], column, there).to(ACC)
        inner_u = load_at(upstream.inner_u, b, token[:, None], column, there).to(ACC)
        t = sigmoid(inner_v * u)
        of_v += dy * inner_u * t
        of_u += dy * inner_u * v * t * (1.0 - t) * inner_v
    store_at(dv, b, token[:, None], column, there, of_v)
    if HAS_U:
        store_at(du, b, token[:, None], column, there, of_u)


@triton.jit
def joint_bwd_queries_kernel(
    p, upstream, dquad_q, dlin_q, state, pairs, states, width, blocks, GATE: tl.constexpr,
    CAUSAL: tl.constexpr, LAPLACE: tl.constexpr, HAS_U: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_T: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr, STATE_PRECISION: tl.constexpr,
):  # fmt: skip
    """dquad_q and dlin_q of a block of queries; pairs [B * groups, group, group], if there, gets dscores."""
    pair, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    b, g = pair // p.groups, pair % p.groups
    d = tl.arange(0, BLOCK_D)
    i = block * BLOCK_T + tl.arange(0, BLOCK_T)
    token = g * p.group + i
    ok = (i < p.group) & (token < p.n)
    here = ok[:, None] & (d < D)[None, :]
    queries = load_at(p.quad_q, b, token[:, None], d[None, :], here)
    which = b * states + (g if CAUSAL else 0)
    reads = tl.zeros((BLOCK_T, BLOCK_D), ACC)
    for first in range(0, DV, BLOCK_V):
        column = first + tl.arange(0, BLOCK_V)
        inside = ok[:, None] & (column < DV)[None, :]
        x, y = load_dout(p, upstream, b, token[:, None], column[None, :], inside, GATE, ACC)
        at = state + (which.to(tl.int64) * D + d[None, :]) * width + column[:, None]
        inside = (d < D)[None, :] & (column < DV)[:, None]
        memory = tl.load(at, mask=inside, other=0.0)
        reads += tl.dot(x, memory, input_precision=STATE_PRECISION, out_dtype=ACC)
        if HAS_U:
            memory = tl.load(at + DV, mask=inside, other=0.0)
            reads += tl.dot(y, memory, input_precision=STATE_PRECISION, out_dtype=ACC)
    store_at(dlin_q, b, token[:, None], d[None, :], here, reads * p.lin_scale)
    total = tl.zeros((BLOCK_T, BLOCK_D), ACC)
    end = (block + 1) * BLOCK_T if CAUSAL else p.group
    for start in range(0, end, BLOCK_T):
        j = start + tl.arange(0, BLOCK_T)
        key = g * p.group + j
        keep = kept(p, b, key, (j < p.group) & (key < p.n))
        keys = load_at(p.quad_k, b, key[None, :], d[:, None], keep[None, :] & (d < D)[:, None])
        qk = tl.dot(queries, keys, input_precision=PRECISION, out_dtype=ACC)
        _, slope = weights_and_slopes(qk, p, i[:, None], j[None, :], keep[None, :], CAUSAL, LAPLACE)
        grad = tl.zeros((BLOCK_T, BLOCK_T), ACC)
        for first in range(0, DV, BLOCK_V):
            column = first + tl.arange(0, BLOCK_V)
            inside = ok[:, None] & (column < DV)[None, :]
            x, y = load_dout(p, upstream, b, token[:, None], column[None, :], inside, GATE, ACC)
            inside = keep[None, :] & (column < DV)[:, None]
            values = load_at(p.v, b, key[None, :], column[:, None], inside)
            grad += tl.dot(x.to(values.dtype), values, input_precision=PRECISION, out_dtype=ACC)
            if HAS_U:
                values = load_at(p.u, b, key[None, :], column[:, None], inside)
                grad += tl.dot(y.to(values.dtype), values, input_precision=PRECISION, out_dtype=ACC)
        grad = tl.where(ok[:, None], grad * slope, 0.0)
        if pairs is not None:
            at = pairs + (pair.to(tl.int64) * p.group + i[:, None]) * p.group + j[None, :]
            tl.store(at, grad, mask=(i < p.group)[:, None] & (j < p.group)[None, :])
        rows = load_at(p.quad_k, b, key[:, None], d[None, :], keep[:, None] & (d < D)[None, :])
        total += tl.dot(grad.to(rows.dtype), rows, input_precision=PRECISION, out_dtype=ACC)
    store_at(dquad_q, b, token[:, None], d[None, :], here, total * p.quad_scale)


@triton.jit
def joint_bwd_keys_kernel(
    p, upstream, dquad_k, dlin_k, dstate, states, width, blocks, GATE: tl.constexpr, CAUSAL: tl.constexpr,
    LAPLACE: tl.constexpr, HAS_U: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_T: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    STATE_PRECISION: tl.constexpr,
):  # fmt: skip
    """dquad_k and dlin_k of a block of keys."""
    pair, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    b, g = pair // p.groups, pair % p.groups
    d = tl.arange(0, BLOCK_D)
    j = block * BLOCK_T + tl.arange(0, BLOCK_T)
    token = g * p.group + j
    ok = (j < p.group) & (token < p.n)
    keep = kept(p, b, token, ok)
    here = keep[:, None] & (d < D)[None, :]
    keys = load_at(p.quad_k, b, token[:, None], d[None, :], here)
    which = b * states + (g if CAUSAL else 0)
    writes = tl.zeros((BLOCK_T, BLOCK_D), ACC)
    for first in range(0, DV, BLOCK_V):
        column = first + tl.arange(0, BLOCK_V)
        values = keep[:, None] & (column < DV)[None, :]
        x = load_at(p.v, b, token[:, None], column[None, :], values).to(ACC)
        at = dstate + (which.to(tl.int64) * D + d[None, :]) * width + column[:, None]
        inside = (d < D)[None, :] & (column < DV)[:, None]
        memory = tl.load(at, mask=inside, other=0.0)
        writes += tl.dot(x, memory, input_precision=STATE_PRECISION, out_dtype=ACC)
        if HAS_U:
            x = load_at(p.u, b, token[:, None], column[None, :], values).to(ACC)
            memory = tl.load(at + DV, mask=inside, other=0.0)
            writes += tl.dot(x, memory, input_precision=STATE_PRECISION, out_dtype=ACC)
    total = tl.zeros((BLOCK_T, BLOCK_D), ACC)
    for start in range(block * BLOCK_T if CAUSAL else 0, p.group, BLOCK_T):
        i = start + tl.arange(0, BLOCK_T)
        query = g * p.group + i
        asks = (i < p.group) & (query < p.n)
        queries = load_at(p.quad_q, b, query[None, :], d[:, None], asks[None, :] & (d < D)[:, None])
        kq = tl.dot(keys, queries, input_precision=PRECISION, out_dtype=ACC)
        _, slope = weights_and_slopes(kq, p, i[None, :], j[:, None], keep[:, None], CAUSAL, LAPLACE)
        grad = tl.zeros((BLOCK_T, BLOCK_T), ACC)
        for first in range(0, DV, BLOCK_V):
            column = first + tl.arange(0, BLOCK_V)
            inside = asks[None, :] & (column < DV)[:, None]
            x, y = load_dout(p, upstream, b, query[None, :], column[:, None], inside, GATE, ACC)
            inside = keep[:, None] & (column < DV)[None, :]
            values = load_at(p.v, b, token[:, None], column[None, :], inside)
            grad += tl.dot(values, x.to(values.dtype), input_precision=PRECISION, out_dtype=ACC)
            if HAS_U:
                values = load_at(p.u, b, token[:, None], column[None, :], inside)
                grad += tl.dot(values, y.to(values.dtype), input_precision=PRECISION, out_dtype=ACC)
        grad = grad * slope
        rows = load_at(p.quad_q, b, query[:, None], d[None, :], asks[:, None] & (d < D)[None, :])
        total += tl.dot(grad.to(rows.dtype), rows, input_precision=PRECISION, out_dtype=ACC)
    every = ok[:, None] & (d < D)[None, :]
    store_at(dlin_k, b, token[:, None], d[None, :], every, tl.where(keep[:, None], writes, 0.0))
    store_at(dquad_k, b, token[:, None], d[None, :], every, total * p.quad_scale)
