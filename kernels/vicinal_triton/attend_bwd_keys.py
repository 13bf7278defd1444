"""Attention of each plan row, backward, the passes that own keys: dk and dv of key tiles, and the gradients
of extra rows where keys have a plan of their own.

Both sum over the query heads that share a key head, so that every gradient has one owner.
"""

import triton
import triton.language as tl

from .attend_bwd import load_delta, store_key_rows
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
)
from .scores import dropout_keep, finish_scores, load_added, pairs_seen


@triton.jit
def key_gradients(
    dk, dv, x, plan, terms, dropout, box, flags, keys, k, v, window, b, h, first_q, first, scale, mask_value,
    keep_scale, WEIGHTS: tl.constexpr, SLOPE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    APPENDED: tl.constexpr, REGIONS: tl.constexpr, RANGES: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dk, dv plus what one tile of queries of a head adds; dk yet without its factors."""
    queries = query_slots(plan, box, first_q + tl.arange(0, BLOCK_Q), b, h, terms.q_scale, ACC)
    q = load_rows(x.q, b, h, queries.token, queries.ok, D, BLOCK_D)  # [BLOCK_Q, BLOCK_D]
    dout = load_rows(x.dout, b, h, queries.token, queries.ok, DV, BLOCK_DV)  # [BLOCK_Q, BLOCK_DV]
    lse = load_scalars(x.lse, b, h, queries.token, queries.ok, float("inf"))[None, :]
    delta = load_delta(x.delta, b, h, queries)[None, :]
    seen = pairs_seen(across(queries), down(keys), flags, plan.guard, APPENDED, RANGES)
    added = load_added(across(queries), down(keys), seen, terms, window, h, APPENDED, RANGES)
    kq = tl.dot(k, tl.trans(q), input_precision=PRECISION, out_dtype=ACC)  # [BLOCK_K, BLOCK_Q]
    s = finish_scores(kq, added, seen, across(queries), down(keys), flags, scale, mask_value, REGIONS,
                      APPENDED, RANGES)  # fmt: skip
    weights = WEIGHTS(s, lse)
    dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION, out_dtype=ACC)
    kept = weights
    if dropout is not None:
        keep = tl.trans(dropout_keep(dropout, b, h, queries.token, keys, first, BLOCK_K))
        dp = tl.where(keep, dp * tl.full((1, 1), keep_scale, ACC), 0.0)
        kept = tl.where(keep, weights * tl.full((1, 1), keep_scale, ACC), 0.0)
    dv += tl.dot(kept.to(dout.dtype), dout, input_precision=PRECISION, out_dtype=ACC)
    ds = SLOPE(s, weights, dp, lse, delta, x.delta is not None) * queries.factor[None, :]
    dk += tl.dot(ds.to(q.dtype), q, input_precision=PRECISION, out_dtype=ACC)
    return dk, dv


@triton.jit(do_not_specialize=["n_rows", "heads", "n_extra", "k_tiles"])
def attend_bwd_kv_kernel(
    x, grads, plan, terms, dropout,
    scale: tl.float64, mask_value: tl.float64, keep_scale: tl.float64, n_rows, heads, group, n_extra,
    k_tiles, WEIGHTS: tl.constexpr, SLOPE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    EDGE: tl.constexpr, APPENDED: tl.constexpr, REGIONS: tl.constexpr, RANGES: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dv = (keep * weights)^T dout and dk = scale * k_scale * (ds * q_scale)^T q of one key tile, over all
    query tiles and the heads that read it; `heads` are those of k."""
    at = tl.program_id(0).to(tl.int64)
    kv = at % heads
    tile = at // heads
    window = tile // k_tiles
    b = window // n_rows
    row = window % n_rows
    scale = tl.full((1, 1), scale, ACC)
    mask_value = tl.full((1, 1), mask_value, ACC)
    first = (tile % k_tiles).to(tl.int32) * BLOCK_K
    box, slot = load_box(plan, row, 1), first + tl.arange(0, BLOCK_K)
    keys = key_slots(plan, box, slot, b, kv * group, terms, n_extra, EDGE, APPENDED, ACC)
    k = load_key_rows(x.k, x.extra_k, b, kv, keys, D, BLOCK_D)  # [BLOCK_K, BLOCK_D]
    v = load_key_rows(x.v, x.extra_v, b, kv, keys, DV, BLOCK_DV)  # [BLOCK_K, BLOCK_DV]
    box = load_box(plan, row, 0)
    flags = load_flags(plan, row)

    dk = tl.zeros((BLOCK_K, BLOCK_D), ACC)
    dv = tl.zeros((BLOCK_K, BLOCK_DV), ACC)
    for member in range(group):
        h = kv * group + member
        for first_q in range(0, box.slots, BLOCK_Q):
            dk, dv = key_gradients(
                dk, dv, x, plan, terms, dropout, box, flags, keys, k, v, window, b, h, first_q, first, scale,
                mask_value, keep_scale, WEIGHTS, SLOPE, ACC, PRECISION, APPENDED, REGIONS, RANGES, D, DV,
                BLOCK_D, BLOCK_DV, BLOCK_Q, BLOCK_K,
            )  # fmt: skip
    dk *= keys.factor[:, None] * scale
    store_key_rows(grads.dk, grads.part_k, tile, b, kv, keys, flags, dk, EDGE, D, BLOCK_D)
    store_key_rows(grads.dv, grads.part_v, tile, b, kv, keys, flags, dv, EDGE, DV, BLOCK_DV)


@triton.jit(do_not_specialize=["n_rows", "heads", "n_extra", "k_tiles", "chunks", "chunk"])
def attend_bwd_extra_kernel(
    x, grads, plan, terms, dropout,
    scale: tl.float64, mask_value: tl.float64, keep_scale: tl.float64, n_rows, heads, group, n_extra,
    k_tiles, chunks, chunk, WEIGHTS: tl.constexpr, SLOPE: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr, EDGE: tl.constexpr, APPENDED: tl.constexpr, REGIONS: tl.constexpr,
    RANGES: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The extra rows' gradients alone, of one tile of them over the queries of a chunk of plan rows of a
    sample."""
    at = tl.program_id(0).to(tl.int64)
    kv = at % heads
    part = at // heads // k_tiles  # b * chunks + chunk of rows
    first = (at // heads % k_tiles).to(tl.int32) * BLOCK_K
    b = part // chunks
    begin = (part % chunks).to(tl.int32) * chunk
    scale = tl.full((1, 1), scale, ACC)
    mask_value = tl.full((1, 1), mask_value, ACC)
    row = begin.to(tl.int64)
    box = load_box(plan, row, 1)
    slot = box.slots + first + tl.arange(0, BLOCK_K)
    keys = key_slots(plan, box, slot, b, kv * group, terms, n_extra, EDGE, APPENDED, ACC)
    k = load_key_rows(x.k, x.extra_k, b, kv, keys, D, BLOCK_D)  # [BLOCK_K, BLOCK_D]
    v = load_key_rows(x.v, x.extra_v, b, kv, keys, DV, BLOCK_DV)  # [BLOCK_K, BLOCK_DV]

    dk = tl.zeros((BLOCK_K, BLOCK_D), ACC)
    dv = tl.zeros((BLOCK_K, BLOCK_DV), ACC)
    for at_row in range(begin, tl.minimum(begin + chunk, n_rows)):
        row = b * 0 + at_row  # in 64 bits
        box = load_box(plan, row, 0)
        flags = load_flags(plan, row)
        for member in range(group):
            h = kv * group + member
            for first_q in range(0, box.slots, BLOCK_Q):
                dk, dv = key_gradients(
                    dk, dv, x, plan, terms, dropout, box, flags, keys, k, v, b * n_rows + row, b, h, first_q,
                    first, scale, mask_value, keep_scale, WEIGHTS, SLOPE, ACC, PRECISION, APPENDED, REGIONS,
                    RANGES, D, DV, BLOCK_D, BLOCK_DV, BLOCK_Q, BLOCK_K,
                )  # fmt: skip
    there = keys.extra >= 0
    if grads.part_k is not None:
        store_rows(grads.part_k, part, kv, keys.extra, there, dk * scale, D, BLOCK_D)
    if grads.part_v is not None:
        store_rows(grads.part_v, part, kv, keys.extra, there, dv, DV, BLOCK_DV)
