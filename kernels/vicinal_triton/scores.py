"""The scores of a tile (csrc/attend.h has the formula) and its dropout bits.

`finish_scores` serves both orientations: the forward and the dq pass have queries down and keys across, the
dk/dv pass has keys down and queries across, so that no dot product needs the transpose of another one's
result.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Bias(NamedTuple):
    """Table [H, size] indexed by code of the query slot + code of the key slot; its last entries are the
    extra rows'."""

    data: Any
    stride_h: Any
    size: Any


class Mask(NamedTuple):
    """[M, 1 or H, q_slots, k_slots], added to the key box of window (b * n_rows + row) % M."""

    data: Any
    count: Any
    stride_m: Any
    stride_h: Any
    stride_q: Any
    stride_k: Any


class Terms(NamedTuple):
    """What shapes the scores besides q . k; None switches a term off. The scales and key_bias are `Rows`."""

    bias: Any
    q_scale: Any
    k_scale: Any
    key_bias: Any
    mask: Any


class Dropout(NamedTuple):
    """seed: pointer to one int64; threshold: bits of the uint32 below which a word drops its pair; n_k:
    tokens of k where the words are those of key tokens, None where they are those of key slots."""

    seed: Any
    threshold: Any
    head_offset: Any
    head_total: Any
    n_k: Any


@triton.jit
def pairs_seen(queries, keys, flags, guard, APPENDED: tl.constexpr, RANGES: tl.constexpr):
    """bool: the pairs that are not excluded by the ranges of their row (`visible` of pattern.py); `queries`,
    `keys` expanded against each other. Slots outside the box are like its last one, whose bias index is valid
    for the queries that see it."""
    seen = tl.full((1, 1), 1, tl.int1)
    if RANGES:
        last, coord = queries.coord | guard, keys.coord
        inside = ((coord | guard) - queries.region) & (last - coord) & guard
        seen = (inside == guard) | ((flags & 8) == 0)
        if APPENDED:
            seen = seen | ((keys.extra >= 0) & ~keys.boxed)
    return seen


@triton.jit
def load_added(
    queries, keys, seen, terms, window, h, APPENDED: tl.constexpr, RANGES: tl.constexpr
):  # fmt: skip
    """What is added to the scaled scores per pair, bias and mask; `queries`, `keys` expanded against each
    other.

    To be called before the product of q and k: the compiler gives row sums and maxima the layout of
    whichever comes first, and with that of these loads it computes the softmax twice."""
    added = tl.full((1, 1), -0.0, keys.shift.dtype)  # x + -0.0 is x: the compiler drops it
    if terms.bias is not None:
        index = (tl.where(keys.boxed, queries.code, 0) if APPENDED else queries.code) + keys.code
        at = terms.bias.data + h * terms.bias.stride_h + index
        if RANGES:  # the index of other pairs may lie outside the table
            added += tl.load(at, mask=seen, other=0.0)
        else:
            added += tl.load(at)
    if terms.mask is not None:
        at = terms.mask.data + (window % terms.mask.count) * terms.mask.stride_m + h * terms.mask.stride_h
        at += queries.slot.to(tl.int64) * terms.mask.stride_q + keys.slot * terms.mask.stride_k
        added += tl.load(at, mask=queries.ok & keys.boxed, other=0.0)
    return added


@triton.jit
def finish_scores(
    qk, added, seen, queries, keys, flags, scale, mask_value, REGIONS: tl.constexpr, APPENDED: tl.constexpr,
    RANGES: tl.constexpr,
):  # fmt: skip
    """Scores from the dot products qk; -inf for keys that are not ok, or not seen.

    Queries that are not ok get scores of no meaning: their outputs are not stored, and lse = inf makes their
    weights 0."""
    s = qk * (queries.factor * scale) * keys.factor + added
    if REGIONS:  # noqa: SIM102  (the first is decided by the compiler)
        if flags & 1:
            crosses = queries.region != keys.region
            s = tl.where(crosses & keys.boxed if APPENDED else crosses, s + mask_value, s)
    s += keys.shift
    return tl.where(seen, s, float("-inf")) if RANGES else s


@triton.jit
def dropout_keep(dropout, b, h, query_token, keys, first_slot, BLOCK_K: tl.constexpr):
    """bool [Q, BLOCK_K]: the pairs that are kept, as in csrc/philox.h. Four neighbouring slots share a
    counter, and first_slot is a multiple of 4; key tokens have no order: each pair computes its own."""
    if dropout.n_k is not None:
        keep = _keep_tokens(dropout, b, h, query_token, keys)
    else:
        keep = _keep_slots(dropout, b, h, query_token, first_slot, BLOCK_K)
    return keep


@triton.jit
def _keep_tokens(dropout, b, h, query_token, keys):
    key = tl.where(keys.extra >= 0, dropout.n_k + keys.extra, keys.token)[None, :] + query_token[:, None] * 0
    token = (key * 0 + query_token[:, None]).to(tl.uint32)
    batch_head = (key * 0).to(tl.uint32) + (b * dropout.head_total + dropout.head_offset + h).to(tl.uint32)
    group = (key >> 2).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(tl.load(dropout.seed), group, token, batch_head, group * 0)
    low, high = tl.where(key & 1 == 0, w0, w1), tl.where(key & 1 == 0, w2, w3)
    threshold = tl.full((1, 1), dropout.threshold, tl.int32).to(tl.uint32, bitcast=True)
    return tl.where(key & 2 == 0, low, high) >= threshold


@triton.jit
def _keep_slots(dropout, b, h, query_token, first_slot, BLOCK_K: tl.constexpr):
    group = first_slot // 4 + tl.arange(0, BLOCK_K // 4)[None, :]
    group = (group + query_token[:, None] * 0).to(tl.uint32)
    token = (group * 0).to(tl.int32) + query_token[:, None]
    batch_head = group * 0 + (b * dropout.head_total + dropout.head_offset + h).to(tl.uint32)
    seed = tl.load(dropout.seed)
    w0, w1, w2, w3 = tl.philox(seed, group, token.to(tl.uint32), batch_head, group * 0)
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    threshold = tl.full((1,), dropout.threshold, tl.int32).to(tl.uint32, bitcast=True)
    return words >= threshold[:, None]
