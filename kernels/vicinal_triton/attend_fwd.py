"""Attention of each plan row, forward.

One program per (sample, plan row, query tile, head), heads fastest because the heads of a token share cache
lines, all on grid axis 0: samples times windows exceed the 65535 of the other axes. Windows of up to
BLOCK_K key slots are one pass over one tile; larger ones loop over key tiles with the online softmax.
"""

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
    query_slots,
    store_rows,
    store_scalars,
)
from .scores import dropout_keep, finish_scores, load_added, pairs_seen


@triton.jit(do_not_specialize=["n_rows", "heads", "n_extra", "q_tiles"])
def attend_fwd_kernel(
    Q, K, V, ExtraK, ExtraV, Out, Lse, plan, terms, dropout,
    scale: tl.float64, mask_value: tl.float64, keep_scale: tl.float64, n_rows, heads, group, n_extra,
    q_tiles,
    STEP: tl.constexpr, FINISH: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    EDGE: tl.constexpr, APPENDED: tl.constexpr, REGIONS: tl.constexpr, RANGES: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64)
    h = at % heads
    kv = h // group  # the head of k and v
    window = at // heads // q_tiles  # b * n_rows + row
    b = window // n_rows
    row = window % n_rows
    scale = tl.full((1, 1), scale, ACC)
    mask_value = tl.full((1, 1), mask_value, ACC)

    slot = (at // heads % q_tiles).to(tl.int32) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    queries = query_slots(plan, load_box(plan, row, 0), slot, b, h, terms.q_scale, ACC)
    q = load_rows(Q, b, h, queries.token, queries.ok, D, BLOCK_D)  # [BLOCK_Q, BLOCK_D]
    box = load_box(plan, row, 1)
    flags = load_flags(plan, row)

    m = tl.full((BLOCK_Q,), float("-inf"), ACC)
    l = tl.zeros((BLOCK_Q,), ACC)
    acc = tl.zeros((BLOCK_Q, BLOCK_DV), ACC)
    for first in range(0, box.slots + n_extra - EDGE, BLOCK_K):
        keys = key_slots(plan, box, first + tl.arange(0, BLOCK_K), b, h, terms, n_extra, EDGE, APPENDED, ACC)
        k = load_key_rows(K, ExtraK, b, kv, keys, D, BLOCK_D)  # [BLOCK_K, BLOCK_D]
        v = load_key_rows(V, ExtraV, b, kv, keys, DV, BLOCK_DV)  # [BLOCK_K, BLOCK_DV]
        seen = pairs_seen(down(queries), across(keys), flags, plan.guard, APPENDED, RANGES)
        added = load_added(down(queries), across(keys), seen, terms, window, h, APPENDED, RANGES)
        qk = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC)  # [BLOCK_Q, BLOCK_K]
        s = finish_scores(qk, added, seen, down(queries), across(keys), flags, scale, mask_value, REGIONS,
                          APPENDED, RANGES)  # fmt: skip
        weights, m, l, rescale = STEP(s, m, l)
        if dropout is not None:
            keep = dropout_keep(dropout, b, h, queries.token, keys, first, BLOCK_K)
            weights = tl.where(keep, weights, 0.0)
        acc = acc * rescale[:, None]
        acc += tl.dot(weights.to(v.dtype), v, input_precision=PRECISION, out_dtype=ACC)

    inverse, lse = FINISH(m, l)
    acc = acc * inverse[:, None]
    if dropout is not None:
        acc = acc * tl.full((1, 1), keep_scale, ACC)
    store_rows(Out, b, h, queries.token, queries.ok, acc, DV, BLOCK_DV)
    store_scalars(Lse, b, h, queries.token, queries.ok, lse)
