"""Attention of each plan row, backward. Every gradient has one owner, so nothing is atomic.

A window that fits one tile is one pass, `attend_bwd_tile_kernel`: scores once, five products, all
gradients; there rowsum(dout * out) is the rowsum of weights * dweights, so neither out nor a pass of its
own is needed. When the bias table wants its gradient, one program loops over many windows and keeps the sum
of its ds in registers.

Larger windows: a dq pass (rows = queries), a dk/dv pass (rows = keys) and, for the bias table, a third pass
that sums the ds of one tile over windows; delta comes from `attend_bwd_delta_kernel`. Scores are computed
again in each pass.

Products of transposed scores are computed as such (k q^T), never by transposing a result: Triton 3.4 to
3.7.0 miscompiles a transposed product result as left operand on Hopper.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .rows import (
    across,
    down,
    key_slots,
    load_box,
    load_flags,
    load_key_rows,
    load_rows,
    load_scalars,
    query_slots,
    store_rows,
    store_scalars,
)
from .scores import dropout_keep, finish_scores, load_added, pairs_seen


class Inputs(NamedTuple):
    """What every backward pass reads; `delta` [B, N, H] or None, the rest as in the forward."""

    q: Any
    k: Any
    v: Any
    extra_k: Any
    extra_v: Any
    dout: Any
    lse: Any
    delta: Any


class KeyGrads(NamedTuple):
    """`dk`, `dv`: Rows. `part_k`, `part_v`: Rows [window * key tiles, E, H, D] for the extra rows' shares,
    or None."""

    dk: Any
    dv: Any
    part_k: Any
    part_v: Any


class BiasGrad(NamedTuple):
    """Sums of ds over chunks of windows, [chunks, H, q_tiles * BLOCK_Q, k_tiles * BLOCK_K], zeros outside
    the boxes. `chunks` int32 [chunks, 4]: a chunk takes items [begin, end) of the samples times `listed` plan
    rows from rows[first] on, (first, listed, begin, end); all its rows are of one class (bias_grad.py)."""

    data: Any
    stride_c: Any
    stride_h: Any
    stride_q: Any
    chunks: Any
    rows: Any


@triton.jit
def store_key_rows(
    X, part, at, b, h, keys, flags, grad, EDGE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """The gradient of key or value slots [S, BLOCK_D]: tokens to X, extra rows to their share `at` of
    `part`."""
    store_rows(X, b, h, keys.token, keys.token >= 0, grad, D, BLOCK_D)
    if part is not None:
        store_rows(part, at, h, keys.extra, (keys.extra >= 0) & ~keys.boxed, grad, D, BLOCK_D)
        if EDGE:  # noqa: SIM102  (the first is decided by the compiler)
            if flags & 2:
                pads = keys.boxed & keys.ok & (keys.extra >= 0)
                edge = tl.sum(tl.where(pads[:, None], grad, 0.0), 0)
                d = tl.arange(0, BLOCK_D)
                tl.store(part.data + at * part.stride_b + h * part.stride_h + d, edge, mask=d < D)


@triton.jit
def load_delta(delta, b, h, queries):
    """delta [Q] of the query slots, 0 where there is none."""
    values = queries.factor * 0.0
    if delta is not None:
        values = load_scalars(delta, b, h, queries.token, queries.ok, 0.0)
    return values


@triton.jit(do_not_specialize=["n_tokens", "heads", "n_q"])
def attend_bwd_delta_kernel(
    Out, DOut, DLse, Delta, n_tokens, n_q, heads, ACC: tl.constexpr, SOFTMAX: tl.constexpr,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(dout * out) (softmax only) - dlse, per query token and head."""
    at = tl.program_id(0).to(tl.int64)
    h = at % heads
    n = at // heads * BLOCK_N + tl.arange(0, BLOCK_N)
    b, token, ok = n // n_q, n % n_q, n < n_tokens
    delta = tl.zeros((BLOCK_N,), ACC)
    if SOFTMAX:
        d = tl.arange(0, BLOCK_DV)
        mask = ok[:, None] & (d < DV)[None, :]
        out_at = Out.data + h * Out.stride_h + (b * Out.stride_b + token * Out.stride_n)[:, None] + d[None, :]
        dout_at = DOut.data + h * DOut.stride_h + d[None, :]
        dout_at += (b * DOut.stride_b + token * DOut.stride_n)[:, None]
        out = tl.load(out_at, mask=mask, other=0.0).to(ACC)
        delta = tl.sum(out * tl.load(dout_at, mask=mask, other=0.0).to(ACC), 1)
    if DLse is not None:
        delta -= load_scalars(DLse, b, h, token, ok, 0.0)
    store_scalars(Delta, b, h, token, ok, delta)


@triton.jit
def load_chunk(dbias, part):
    """first, listed, begin, end of a chunk."""
    at = dbias.chunks + part * 4
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)


@triton.jit(do_not_specialize=["n_rows", "heads", "n_extra"])
def attend_bwd_tile_kernel(
    x, DQ, grads, dbias, plan, terms, dropout,
    scale: tl.float64, mask_value: tl.float64, keep_scale: tl.float64, n_rows, heads, group, n_extra,
    WEIGHTS: tl.constexpr, SLOPE: tl.constexpr, SOFTMAX: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr, EDGE: tl.constexpr, APPENDED: tl.constexpr, REGIONS: tl.constexpr,
    RANGES: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """All gradients of windows of one tile each. `x.delta` holds dlse or None; dbias None: a program takes
    one window."""
    at = tl.program_id(0).to(tl.int64)
    h = at % heads
    kv = h // group
    part = at // heads
    scale = tl.full((1, 1), scale, ACC)
    mask_value = tl.full((1, 1), mask_value, ACC)

    total = tl.zeros((BLOCK_K, BLOCK_Q), ACC)
    first, listed, begin, end = 0, n_rows, part, part + 1
    if dbias is not None:
        first, listed, begin, end = load_chunk(dbias, part)
    for item in range(begin, end):
        b = (item // listed).to(tl.int64)
        row = item % listed
        if dbias is not None:
            row = tl.load(dbias.rows + first + row).to(tl.int64)
        window = b * n_rows + row
        flags = load_flags(plan, row)
        queries = query_slots(plan, load_box(plan, row, 0), tl.arange(0, BLOCK_Q), b, h, terms.q_scale, ACC)
        box, slot = load_box(plan, row, 1), tl.arange(0, BLOCK_K)
        keys = key_slots(plan, box, slot, b, h, terms, n_extra, EDGE, APPENDED, ACC)
        q = load_rows(x.q, b, h, queries.token, queries.ok, D, BLOCK_D)  # [BLOCK_Q, BLOCK_D]
        k = load_key_rows(x.k, x.extra_k, b, kv, keys, D, BLOCK_D)  # [BLOCK_K, BLOCK_D]
        seen = pairs_seen(across(queries), down(keys), flags, plan.guard, APPENDED, RANGES)
        added = load_added(across(queries), down(keys), seen, terms, window, h, APPENDED, RANGES)
        kq = tl.dot(k, tl.trans(q), input_precision=PRECISION, out_dtype=ACC)  # [BLOCK_K, BLOCK_Q]
        s = finish_scores(kq, added, seen, across(queries), down(keys), flags, scale, mask_value, REGIONS,
                          APPENDED, RANGES)  # fmt: skip
        lse = load_scalars(x.lse, b, h, queries.token, queries.ok, float("inf"))[None, :]
        weights = WEIGHTS(s, lse)
        if SOFTMAX:  # the rounding of lse, one factor per query, would not cancel in weights * (dp - rowsum)
            mass = tl.sum(weights, 0)
            weights *= tl.where(mass > 0.0, 1.0 / tl.where(mass > 0.0, mass, 1.0), 0.0)[None, :]

        dout = load_rows(x.dout, b, h, queries.token, queries.ok, DV, BLOCK_DV)  # [BLOCK_Q, BLOCK_DV]
        v = load_key_rows(x.v, x.extra_v, b, kv, keys, DV, BLOCK_DV)  # [BLOCK_K, BLOCK_DV]
        dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION, out_dtype=ACC)  # [BLOCK_K, BLOCK_Q]
        kept = weights
        if dropout is not None:
            keep = tl.trans(dropout_keep(dropout, b, h, queries.token, keys, 0, BLOCK_K))
            dp = tl.where(keep, dp * tl.full((1, 1), keep_scale, ACC), 0.0)
            kept = tl.where(keep, weights * tl.full((1, 1), keep_scale, ACC), 0.0)
        dv = tl.dot(kept.to(dout.dtype), dout, input_precision=PRECISION, out_dtype=ACC)
        store_key_rows(grads.dv, grads.part_v, window, b, h, keys, flags, dv, EDGE, DV, BLOCK_DV)

        delta = load_delta(x.delta, b, h, queries)
        delta = (tl.sum(weights * dp, 0) if SOFTMAX else 0.0) - delta
        ds = SLOPE(s, weights, dp, lse, delta[None, :], x.delta is not None)
        total += ds
        dk = tl.dot((ds * queries.factor[None, :]).to(q.dtype), q, input_precision=PRECISION, out_dtype=ACC)
        dk *= keys.factor[:, None] * scale
        store_key_rows(grads.dk, grads.part_k, window, b, h, keys, flags, dk, EDGE, D, BLOCK_D)
        # ds is a right operand here: a transposed result as left operand is what Triton miscompiles.
        dq = tl.trans(
            tl.dot(
                tl.trans(k), (ds * keys.factor[:, None]).to(k.dtype), input_precision=PRECISION, out_dtype=ACC
            )
        )  # [BLOCK_Q, BLOCK_D]
        store_rows(DQ, b, h, queries.token, queries.ok, dq * queries.factor[:, None] * scale, D, BLOCK_D)
    if dbias is not None:
        to = dbias.data + part * dbias.stride_c + h * dbias.stride_h
        to += tl.arange(0, BLOCK_Q)[None, :] * dbias.stride_q + tl.arange(0, BLOCK_K)[:, None]
        tl.store(to, total)


@triton.jit(do_not_specialize=["n_rows", "heads", "n_extra", "q_tiles"])
def attend_bwd_q_kernel(
    x, DQ, plan, terms, dropout,
    scale: tl.float64, mask_value: tl.float64, keep_scale: tl.float64, n_rows, heads, group, n_extra,
    q_tiles, WEIGHTS: tl.constexpr, SLOPE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    EDGE: tl.constexpr, APPENDED: tl.constexpr, REGIONS: tl.constexpr, RANGES: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dq = scale * q_scale * sum over keys of ds * k_scale * k; programs as in the forward."""
    at = tl.program_id(0).to(tl.int64)
    h = at % heads
    kv = h // group
    window = at // heads // q_tiles
    b = window // n_rows
    row = window % n_rows
    scale = tl.full((1, 1), scale, ACC)
    mask_value = tl.full((1, 1), mask_value, ACC)
    slot = (at // heads % q_tiles).to(tl.int32) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    queries = query_slots(plan, load_box(plan, row, 0), slot, b, h, terms.q_scale, ACC)
    q = load_rows(x.q, b, h, queries.token, queries.ok, D, BLOCK_D)  # [BLOCK_Q, BLOCK_D]
    dout = load_rows(x.dout, b, h, queries.token, queries.ok, DV, BLOCK_DV)  # [BLOCK_Q, BLOCK_DV]
    lse = load_scalars(x.lse, b, h, queries.token, queries.ok, float("inf"))[:, None]
    delta = load_delta(x.delta, b, h, queries)[:, None]
    box = load_box(plan, row, 1)
    flags = load_flags(plan, row)

    dq = tl.zeros((BLOCK_Q, BLOCK_D), ACC)
    for first in range(0, box.slots + n_extra - EDGE, BLOCK_K):
        keys = key_slots(plan, box, first + tl.arange(0, BLOCK_K), b, h, terms, n_extra, EDGE, APPENDED, ACC)
        k = load_key_rows(x.k, x.extra_k, b, kv, keys, D, BLOCK_D)  # [BLOCK_K, BLOCK_D]
        v = load_key_rows(x.v, x.extra_v, b, kv, keys, DV, BLOCK_DV)  # [BLOCK_K, BLOCK_DV]
        seen = pairs_seen(down(queries), across(keys), flags, plan.guard, APPENDED, RANGES)
        added = load_added(down(queries), across(keys), seen, terms, window, h, APPENDED, RANGES)
        qk = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC)  # [BLOCK_Q, BLOCK_K]
        s = finish_scores(qk, added, seen, down(queries), across(keys), flags, scale, mask_value, REGIONS,
                          APPENDED, RANGES)  # fmt: skip
        dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION, out_dtype=ACC)
        if dropout is not None:
            keep = dropout_keep(dropout, b, h, queries.token, keys, first, BLOCK_K)
            dp = tl.where(keep, dp * tl.full((1, 1), keep_scale, ACC), 0.0)
        ds = SLOPE(s, WEIGHTS(s, lse), dp, lse, delta, x.delta is not None) * keys.factor[None, :]
        dq += tl.dot(ds.to(k.dtype), k, input_precision=PRECISION, out_dtype=ACC)
    dq *= queries.factor[:, None] * scale
    store_rows(DQ, b, h, queries.token, queries.ok, dq, D, BLOCK_D)


@triton.jit(do_not_specialize=["n_rows", "heads", "n_extra", "q_tiles", "k_tiles"])
def attend_bwd_bias_kernel(
    x, dbias, plan, terms, dropout,
    scale: tl.float64, mask_value: tl.float64, keep_scale: tl.float64, n_rows, heads, group, n_extra,
    q_tiles, k_tiles, WEIGHTS: tl.constexpr, SLOPE: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr, EDGE: tl.constexpr, APPENDED: tl.constexpr, REGIONS: tl.constexpr,
    RANGES: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Sum of one tile of ds over a chunk of the (sample, listed row) pairs, in their order."""
    at = tl.program_id(0).to(tl.int64)
    h = at % heads
    kv = h // group
    q_slot = (at // heads % q_tiles).to(tl.int32) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    k_first = (at // heads // q_tiles % k_tiles).to(tl.int32) * BLOCK_K
    part = at // heads // q_tiles // k_tiles
    scale = tl.full((1, 1), scale, ACC)
    mask_value = tl.full((1, 1), mask_value, ACC)

    total = tl.zeros((BLOCK_Q, BLOCK_K), ACC)
    first, listed, begin, end = load_chunk(dbias, part)
    for item in range(begin, end):
        b = (item // listed).to(tl.int64)
        row = tl.load(dbias.rows + first + item % listed).to(tl.int64)
        flags = load_flags(plan, row)
        window = b * n_rows + row
        queries = query_slots(plan, load_box(plan, row, 0), q_slot, b, h, terms.q_scale, ACC)
        box = load_box(plan, row, 1)
        keys = key_slots(
            plan, box, k_first + tl.arange(0, BLOCK_K), b, h, terms, n_extra, EDGE, APPENDED, ACC
        )
        q = load_rows(x.q, b, h, queries.token, queries.ok, D, BLOCK_D)
        k = load_key_rows(x.k, x.extra_k, b, kv, keys, D, BLOCK_D)
        seen = pairs_seen(down(queries), across(keys), flags, plan.guard, APPENDED, RANGES)
        added = load_added(down(queries), across(keys), seen, terms, window, h, APPENDED, RANGES)
        qk = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC)  # [BLOCK_Q, BLOCK_K]
        s = finish_scores(qk, added, seen, down(queries), across(keys), flags, scale, mask_value, REGIONS,
                          APPENDED, RANGES)  # fmt: skip
        dout = load_rows(x.dout, b, h, queries.token, queries.ok, DV, BLOCK_DV)
        v = load_key_rows(x.v, x.extra_v, b, kv, keys, DV, BLOCK_DV)
        dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION, out_dtype=ACC)
        if dropout is not None:
            keep = dropout_keep(dropout, b, h, queries.token, keys, k_first, BLOCK_K)
            dp = tl.where(keep, dp * tl.full((1, 1), keep_scale, ACC), 0.0)
        lse = load_scalars(x.lse, b, h, queries.token, queries.ok, float("inf"))[:, None]
        delta = load_delta(x.delta, b, h, queries)[:, None]
        total += SLOPE(s, WEIGHTS(s, lse), dp, lse, delta, x.delta is not None)
    to = dbias.data + part * dbias.stride_c + h * dbias.stride_h
    to += q_slot.to(tl.int64)[:, None] * dbias.stride_q
    tl.store(to + (k_first + tl.arange(0, BLOCK_K))[None, :], total)
