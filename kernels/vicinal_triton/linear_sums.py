"""Sums over tokens of linear attention: of parts, over parts in a fixed order, and those of the decay."""

import triton
import triton.language as tl

from .linear_tokens import as_operand, decayed, features, find_part, inverse_den, kept, load_line, load_x


@triton.jit(do_not_specialize=["n", "heads", "group", "parts", "size", "slots_over"])
def linear_state_kernel(
    own, own_values, sums, lines, table, own_param: tl.float64, own_scale: tl.float64,
    own_constant: tl.float64, n, heads, group, parts, size, slots_over,
    OWN_PHI: tl.constexpr, KEYS: tl.constexpr, DECAY: tl.constexpr, NORM: tl.constexpr, CONST: tl.constexpr,
    KIND: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, TILES_V: tl.constexpr,
):  # fmt: skip
    """Of one part, a tile of S and of z: of keys p_j v_j^T and p_j as they leave the part, of queries f_i
    r_i^T and d_i f_i as they enter it."""
    at = tl.program_id(0).to(tl.int64)
    h, part = at % heads, at // heads
    b, r, begin, end = find_part(table, part, parts, size, n)
    k = tl.program_id(1) // TILES_V * BLOCK_K + tl.arange(0, BLOCK_K)
    v = tl.program_id(1) % TILES_V * BLOCK_V + tl.arange(0, BLOCK_V)
    own_param, own_scale = tl.full((1, 1), own_param, ACC), tl.full((1, 1), own_scale, ACC)
    own_constant = tl.full((1, 1), own_constant, ACC)
    K: tl.constexpr = D + CONST
    s, z = tl.zeros((BLOCK_K, BLOCK_V), ACC), tl.zeros((BLOCK_K,), ACC)
    for first in range(begin, end, BLOCK_T):
        token = first + tl.arange(0, BLOCK_T)
        in_range = token < end
        ok = in_range
        if KEYS:
            ok = kept(lines, b, n, token, in_range)
        x = features(own, b, h // group, token[None, :], ok[None, :], k[:, None], own_param, own_scale,
                     own_constant, OWN_PHI, D, CONST, KIND, ACC)  # fmt: skip
        factor = tl.full((BLOCK_T,), 1.0, ACC)
        if DECAY:
            power = decayed(lines, b, h, heads, n, token, begin, in_range)
            if KEYS:
                power = decayed(lines, b, h, heads, n, end - 1, begin, end > begin) - power
            factor = tl.exp(tl.where(in_range, power, 0.0))
        of_z = factor
        if NORM != "" and not KEYS:
            if NORM == "own":
                of_z *= load_line(lines.d, b, h, heads, n, token, in_range, 0.0)
            factor *= inverse_den(lines, b, h, heads, n, token, in_range)
        y = load_x(own_values, b, h, token[:, None], ok[:, None], v[None, :], DV, ACC) * factor[:, None]
        s += tl.dot(x, as_operand(y, KIND), input_precision=PRECISION, out_dtype=ACC)
        if NORM == "own":
            z += tl.sum(x.to(ACC) * of_z[None, :], 1)
    slot = (part + r + slots_over) * heads + h
    inside = (k < K)[:, None] & (v < DV)[None, :]
    tl.store(sums.s + slot * sums.step_s + k[:, None] * DV + v[None, :], s, mask=inside)
    if NORM == "own":
        first_tile = tl.program_id(1) % TILES_V == 0
        tl.store(sums.z + slot * sums.step_z + k, z, mask=(k < K) & first_tile)


@triton.jit
def load_pair(s, z, at, element, SIZE_S: tl.constexpr, SIZE_Z: tl.constexpr):
    """Elements of one (sequence, head) of S [.., SIZE_S] and z [.., SIZE_Z], one after the other; 0 where
    there is none."""
    of_s = element < SIZE_S
    found = element * 0.0
    if s is not None:
        found = tl.load(s + at * SIZE_S + element, mask=of_s, other=0.0)
    if z is not None:
        of_z = (element >= SIZE_S) & (element < SIZE_S + SIZE_Z)
        found = tl.where(of_s, found, tl.load(z + at * SIZE_Z + (element - SIZE_S), mask=of_z, other=0.0))
    return found


@triton.jit(do_not_specialize=["n", "heads", "parts", "size", "slots_over"])
def linear_scan_kernel(
    states, leaving, initial_s, initial_z, final_s, final_z, dots, lines, table, firsts, n, heads, parts,
    size, slots_over, BACKWARD: tl.constexpr, EACH: tl.constexpr, DECAY: tl.constexpr, SIZE_S: tl.constexpr,
    SIZE_Z: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums over the parts of one sequence and head, first to last, or last to first for gradients.

    With EACH, `states` [slots, heads, SIZE_S + SIZE_Z] gets what enters each part and leaves the last in
    place of the parts' own sums (gradients: what the sums entering and leaving have). dots [parts, heads,
    blocks], if there: products of the gradients of what leaves a part and `leaving`, what leaves it."""
    at, of_block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    r, h = at // heads, at % heads
    element = of_block * BLOCK + tl.arange(0, BLOCK)
    inside = element < SIZE_S + SIZE_Z
    first, count = r * parts, parts + r * 0
    if firsts is not None:
        first = tl.load(firsts + r).to(tl.int64)
        count = tl.load(firsts + r + 1).to(tl.int64) - first
    running = load_pair(initial_s, initial_z, at, element, SIZE_S, SIZE_Z).to(ACC)
    step: tl.constexpr = SIZE_S + SIZE_Z
    if EACH:
        slot = first + r + count if BACKWARD else first + r
        tl.store(states + (slot * heads + h) * step + element, running, mask=inside)
    for i in range(count):
        part = first + count - 1 - i if BACKWARD else first + i
        if DECAY:
            b, _, begin, end = find_part(table, part, parts, size, n)
            factor = tl.exp(decayed(lines, b, h, heads, n, end - 1, begin, end > begin))
            if dots is not None:
                after = leaving + ((part + r + 1) * heads + h) * step + element
                product = tl.sum(running * tl.load(after, mask=inside, other=0.0), 0)
                tl.store(dots + (part * heads + h) * tl.num_programs(1) + of_block, product)
            running *= factor
        own = states + ((part + r + slots_over) * heads + h) * step + element
        running += tl.load(own, mask=inside, other=0.0)
        if EACH:
            tl.store(own, running, mask=inside)
    if final_s is not None:
        tl.store(final_s + at * SIZE_S + element, running, mask=element < SIZE_S)
    if final_z is not None:
        of_z = (element >= SIZE_S) & inside
        tl.store(final_z + at * SIZE_Z + (element - SIZE_S), running, mask=of_z)


@triton.jit(do_not_specialize=["n", "heads", "parts", "size"])
def linear_decay_kernel(
    decay, b_out, table, n, heads, parts, size, stride_b, stride_n, stride_h, ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """b_out [B, H, N]: sums of the decay from the start of each part."""
    at = tl.program_id(0).to(tl.int64)
    h, part = at % heads, at // heads
    b, _, begin, end = find_part(table, part, parts, size, n)
    token = begin + tl.arange(0, BLOCK)
    ok = token < end
    x = tl.load(decay + b * stride_b + token * stride_n + h * stride_h, mask=ok, other=0.0).to(ACC)
    tl.store(b_out + (b * heads + h) * n + token, tl.cumsum(x, 0), mask=ok)


@triton.jit(do_not_specialize=["n", "heads", "parts", "size", "tokens", "tiles", "blocks"])
def linear_bwd_decay_kernel(
    of_queries, of_keys, dots, ddecay, table, n, heads, parts, size, tokens, tiles, blocks,
    BLOCK_DOTS: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ddecay [B, N, H]: sums to the end of the part of f . df - p . dp ([tiles, B, H, N], `tokens` = B H N),
    and of the part's dots [parts, heads, blocks]."""
    at = tl.program_id(0).to(tl.int64)
    h, part = at % heads, at // heads
    b, _, begin, end = find_part(table, part, parts, size, n)
    token = begin + tl.arange(0, BLOCK)
    ok = token < end
    line = (b * heads + h) * n + token
    x = tl.zeros((BLOCK,), ACC)
    for i in range(tiles):
        x += tl.load(of_queries + i * tokens + line, mask=ok, other=0.0)
        x -= tl.load(of_keys + i * tokens + line, mask=ok, other=0.0)
    block = tl.arange(0, BLOCK_DOTS)
    total = tl.sum(tl.load(dots + at * blocks + block, mask=block < blocks, other=0.0), 0)
    x = tl.where(token == end - 1, x + total, x)
    tl.store(ddecay + (b * n + token) * heads + h, tl.cumsum(x, 0, reverse=True), mask=ok)
