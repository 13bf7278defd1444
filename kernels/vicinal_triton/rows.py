"""Tensors, boxes and slots inside the kernels: what a plan row says, and the rows of q, k and v that it
names.

A *slot* is a position of a box; it adds up the entries of its axes (csrc/attend.h). The key slots of a plan
row are those of its key box, then the appended extra rows. Everything here is plain loads with masks and
int64 addresses.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Rows(NamedTuple):
    """A tensor [B, N, H, D] with D contiguous, or [B, N, H]: pointer and strides in elements."""

    data: Any
    stride_b: Any
    stride_n: Any
    stride_h: Any


class Plan(NamedTuple):
    """`axes` int32 [A, 4] of (token, region, code, coord); `rows` int32 [R, 16]; `guard`: the bit above each
    field of the ranges."""

    axes: Any
    rows: Any
    guard: Any


class Box(NamedTuple):
    """One box of a plan row: where its three axis lists begin, the extents of the last two, and its slots."""

    begin0: Any
    begin1: Any
    begin2: Any
    extent1: Any
    extent2: Any
    slots: Any


class Slots(NamedTuple):
    """Slots of one side of a tile, as vectors [S], or [S, 1] or [1, S] where they meet the other side.

    `token` is negative for a pad; `extra` is the row of extra_k and extra_v (negative: none); `ok`: takes
    part; `boxed`: lies in the box (an appended row does not); `factor`: q_scale or k_scale; `shift`:
    key_bias, -inf where not ok.
    """

    slot: Any
    token: Any
    extra: Any
    ok: Any
    boxed: Any
    region: Any
    code: Any
    coord: Any
    factor: Any
    shift: Any


@triton.jit
def load_box(plan, row, SIDE: tl.constexpr):
    """The query box (SIDE 0) or the key box (SIDE 1) of a plan row."""
    at = plan.rows + row * 16 + SIDE * 6
    extent1 = tl.load(at + 4)
    extent2 = tl.load(at + 5)
    slots = tl.load(at + 3) * extent1 * extent2
    return Box(tl.load(at), tl.load(at + 1), tl.load(at + 2), extent1, extent2, slots)


@triton.jit
def load_flags(plan, row):
    return tl.load(plan.rows + row * 16 + 12)


@triton.jit
def slot_entries(plan, box, slot):
    """token (-1 outside the box), region, code, coord [S] of slots: sums over the three axes; boxed [S]: the
    slot lies in the box.

    A field is loaded as one tile [S, 4], its last column entry 0, and summed: the compiler repeats smaller
    loads, and the divisions before them, in every layout that needs a field. Slots outside the box read its
    last one, so that every code is a valid one."""
    boxed = slot < box.slots
    inside = tl.minimum(slot, box.slots - 1)
    rest = inside // box.extent2
    axis = tl.arange(0, 4)[None, :]
    entry = tl.where(axis == 2, (box.begin2 + inside % box.extent2)[:, None], 0)
    entry = tl.where(axis == 1, (box.begin1 + rest % box.extent1)[:, None], entry)
    at = plan.axes + tl.where(axis == 0, (box.begin0 + rest // box.extent1)[:, None], entry) * 4
    token = tl.sum(tl.load(at), 1)
    region, code, coord = tl.sum(tl.load(at + 1), 1), tl.sum(tl.load(at + 2), 1), tl.sum(tl.load(at + 3), 1)
    return tl.where(boxed, token, -1), region, code, coord, boxed


@triton.jit
def load_scalars(X, b, h, token, ok, OTHER: tl.constexpr):
    """Elements [S] of a tensor [B, N, H] at the given tokens."""
    at = X.data + b * X.stride_b + token.to(tl.int64) * X.stride_n + h * X.stride_h
    return tl.load(at, mask=ok, other=OTHER)


@triton.jit
def store_scalars(X, b, h, token, ok, values):
    tl.store(X.data + b * X.stride_b + token.to(tl.int64) * X.stride_n + h * X.stride_h, values, mask=ok)


@triton.jit
def tile_pointers(X, b, h, token, ok, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Pointers and mask [S, BLOCK_D] of whole rows of a tensor [B, N, H, D]."""
    d = tl.arange(0, BLOCK_D)
    at = X.data + b * X.stride_b + h * X.stride_h + token.to(tl.int64)[:, None] * X.stride_n + d[None, :]
    ok = ok[:, None] & (d < D)[None, :]
    return at, ok


@triton.jit
def load_rows(X, b, h, token, ok, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows [S, BLOCK_D] of a tensor [B, N, H, D]; zeros where not ok and beyond D."""
    at, mask = tile_pointers(X, b, h, token, ok, D, BLOCK_D)
    return tl.load(at, mask=mask, other=0.0)


@triton.jit
def store_rows(X, b, h, token, ok, values, D: tl.constexpr, BLOCK_D: tl.constexpr):
    at, mask = tile_pointers(X, b, h, token, ok, D, BLOCK_D)
    tl.store(at, values.to(X.data.dtype.element_ty), mask=mask)


@triton.jit
def load_key_rows(X, EXTRA, b, h, keys, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Key or value rows [S, BLOCK_D] of key slots: tokens, and extra rows where the slot names one.

    One load through chosen pointers: to choose between two loaded tiles costs a second load, and Triton
    3.7.1 fails to compile it with some other options."""
    at = X.data + b * X.stride_b + h * X.stride_h + keys.token.to(tl.int64) * X.stride_n
    if EXTRA is not None:
        extra_at = (
            EXTRA.data + b * EXTRA.stride_b + h * EXTRA.stride_h + keys.extra.to(tl.int64) * EXTRA.stride_n
        )
        at = tl.where(keys.extra >= 0, extra_at, at)
    d = tl.arange(0, BLOCK_D)
    return tl.load(at[:, None] + d[None, :], mask=keys.ok[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def query_slots(plan, box, slot, b, h, q_scale, ACC: tl.constexpr):
    """The query slots [S] of a box."""
    token, region, code, coord, boxed = slot_entries(plan, box, slot)
    ok = token >= 0
    factor = tl.full(slot.shape, 1.0, ACC)
    if q_scale is not None:
        factor = load_scalars(q_scale, b, h, token, ok, 1.0)
    return Slots(slot, token, token * 0 - 1, ok, boxed, region, code, coord, factor, factor * 0)


@triton.jit
def key_slots(
    plan, box, slot, b, h, terms, n_extra, EDGE: tl.constexpr, APPENDED: tl.constexpr, ACC: tl.constexpr
):
    """The key slots [S] of a plan row: its key box, then the extra rows from EDGE on."""
    token, region, code, coord, boxed = slot_entries(plan, box, slot)
    extra = token * 0 - 1
    if APPENDED:
        extra = tl.where(boxed, -1, EDGE + slot - box.slots)
        extra = tl.where(extra < n_extra, extra, -1)
        if terms.bias is not None:
            appended_code = tl.minimum(tl.maximum(terms.bias.size - n_extra + extra, 0), terms.bias.size - 1)
            code = tl.where(boxed, code, appended_code)
    if EDGE:
        extra = tl.where(boxed & (token < 0), 0, extra)
    ok = (token >= 0) | (extra >= 0)
    factor = tl.full(slot.shape, 1.0, ACC)
    if terms.k_scale is not None:
        factor = load_scalars(terms.k_scale, b, h, token, token >= 0, 1.0)
    shift = tl.where(ok, tl.full(slot.shape, 0.0, ACC), float("-inf"))
    if terms.key_bias is not None:
        shift += load_scalars(terms.key_bias, b, 0, token, token >= 0, 0.0)
        ok = ok & (shift != float("-inf"))  # never read: an ignored key may hold NaN
    return Slots(slot, token, extra, ok, boxed, region, code, coord, factor, shift)


@triton.jit
def down(s):
    """Slots as a column [S, 1]."""
    return Slots(
        s.slot[:, None],
        s.token[:, None],
        s.extra[:, None],
        s.ok[:, None],
        s.boxed[:, None],
        s.region[:, None],
        s.code[:, None],
        s.coord[:, None],
        s.factor[:, None],
        s.shift[:, None],
    )


@triton.jit
def across(s):
    """Slots as a row [1, S]."""
    return Slots(
        s.slot[None, :],
        s.token[None, :],
        s.extra[None, :],
        s.ok[None, :],
        s.boxed[None, :],
        s.region[None, :],
        s.code[None, :],
        s.coord[None, :],
        s.factor[None, :],
        s.shift[None, :],
    )
