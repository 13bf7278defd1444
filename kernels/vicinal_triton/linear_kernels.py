"""Linear attention (csrc/linear.h has the formula): what tokens get from sums and from their own part.

Forward and backward are three kernels. Each takes a tile of tokens in its *own* role (of which features are
made, and which values go with: v for keys, dout for queries), and where pairs of one part see each other
loops over tiles of tokens in the *other* role:

    values    own queries: out and den               own keys: dv
    inner     own queries: d, the gradient of den
    features  own queries: dq (and d, see below)     own keys: dk

One text serves both roles because the formulas are mirror images: queries read the sums that enter their
part (linear_sums.py), keys the gradients of the sums that leave it. Without a mask (FULL) there are no
pairs, and all tokens read the sums of the sequence.

Everything is computed transposed, features or values [.., tokens]: weights of pairs come out of one product
and go into the next, and Triton 3.4 to 3.7.0 miscompiles such a result on Hopper where it is the left
operand, because ptxas reuses the registers that a product still reads. As the right operand it goes through
shared memory. Left operands are loaded, or made of what was loaded.

Not timed on a GPU. Compiled and dropped: 8 warps on tiles of 64 pairs (the compiler gives rows of pairs to
warps, so half of them repeat the others' work, at 240 registers), and summing 64 values at a time in
`features` (168 bytes of stack on sm_80; none at 32).

Numbers: sums over features and tokens in the accumulation type. Operands of pairs are bfloat16 for bfloat16,
otherwise float32 (as TF32 for float16, whose range neither weights of pairs nor values over denominators
keep); products with sums take TF32 where the tensors have 16 bits. d is exact (no rounded operand but the
features): where a token sees one key, it cancels.
"""

import triton
import triton.language as tl

from .linear_tokens import (
    as_operand,
    decayed,
    features,
    find_part,
    inverse,
    inverse_den,
    kept,
    load_line,
    load_x,
    pointers,
    sees,
)

LENGTHS = ["n", "heads", "group", "parts", "size", "tiles", "block", "slots_over"]


@triton.jit
def load_sums(sums, slot, h, heads, k, v, K: tl.constexpr, DV: tl.constexpr):
    """S at features k and values v, expanded against each other."""
    at = sums.s + (slot * heads + h) * sums.step_s + k * DV + v
    return tl.load(at, mask=(k < K) & (v < DV), other=0.0)


@triton.jit
def load_z(sums, slot, h, heads, k, K: tl.constexpr):
    return tl.load(sums.z + (slot * heads + h) * sums.step_z + k, mask=k < K, other=0.0)


@triton.jit
def pair_factor(own_b, other_b, seen, KEYS: tl.constexpr):
    """exp(b_i - b_j) of seen pairs [other, own], 0 of others."""
    power = own_b[None, :] - other_b[:, None]
    if KEYS:
        power = -power
    return tl.exp(tl.where(seen, power, float("-inf")))


@triton.jit(do_not_specialize=LENGTHS)
def linear_values_kernel(
    own, own_values, other, other_values, out, sums, lines, raw_den, table, own_param: tl.float64,
    own_scale: tl.float64, own_constant: tl.float64, other_param: tl.float64, other_scale: tl.float64,
    other_constant: tl.float64, eps: tl.float64, n, heads, group, parts, size, tiles, block, slots_over,
    OWN_PHI: tl.constexpr, OTHER_PHI: tl.constexpr, KEYS: tl.constexpr, MASK: tl.constexpr,
    PAIRS: tl.constexpr, DECAY: tl.constexpr, NORM: tl.constexpr, CONST: tl.constexpr, KIND: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, SUMS_PRECISION: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """out and den of a tile of queries, or dv of a tile of keys, and one tile of values.

    NORM: "" not normalised, "own" denominators of the same features, "given" raw_den has their sums."""
    at = tl.program_id(0).to(tl.int64)
    h, tile, part = at % heads, at // heads % tiles, at // heads // tiles
    shared = h // group
    b, r, begin, end = find_part(table, part, parts, size, n)
    token = begin + tile * BLOCK_T + tl.arange(0, BLOCK_T)
    in_range = token < end
    ok = in_range
    if KEYS:
        ok = kept(lines, b, n, token, in_range)
    v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    own_param, own_scale = tl.full((1, 1), own_param, ACC), tl.full((1, 1), own_scale, ACC)
    own_constant, other_constant = tl.full((1, 1), own_constant, ACC), tl.full((1, 1), other_constant, ACC)
    other_param, other_scale = tl.full((1, 1), other_param, ACC), tl.full((1, 1), other_scale, ACC)
    K: tl.constexpr = D + CONST

    slot = r if MASK == "full" else part + r + slots_over
    acc = tl.zeros((BLOCK_V, BLOCK_T), ACC)
    den = tl.zeros((BLOCK_T,), ACC)
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        x = features(own, b, shared, token[None, :], ok[None, :], k[:, None], own_param, own_scale,
                     own_constant, OWN_PHI, D, CONST, KIND, ACC).to(ACC)  # fmt: skip
        s = load_sums(sums, slot, h, heads, k[None, :], v[:, None], K, DV)
        acc += tl.dot(s, x, input_precision=SUMS_PRECISION, out_dtype=ACC)
        if NORM == "own" and not KEYS:
            den += tl.sum(x * load_z(sums, slot, h, heads, k, K)[:, None], 0)
    own_b = den
    if DECAY:
        own_b = decayed(lines, b, h, heads, n, token, begin, in_range)
        power = own_b
        if KEYS:
            power = decayed(lines, b, h, heads, n, end - 1, begin, end > begin) - own_b
        factor = tl.exp(tl.where(in_range, power, 0.0))
        acc, den = acc * factor[None, :], den * factor

    if PAIRS:
        low, high = tile * 0, tile + 1
        if KEYS:
            low, high = tile, tl.cdiv(end - begin, BLOCK_T)
        for j in range(low, high):
            other_token = begin + j * BLOCK_T + tl.arange(0, BLOCK_T)
            there = other_token < end
            other_ok = there
            if not KEYS:
                other_ok = kept(lines, b, n, other_token, there)
            w = tl.zeros((BLOCK_T, BLOCK_T), ACC)
            for first in range(0, K, BLOCK_K):
                k = first + tl.arange(0, BLOCK_K)
                y = features(other, b, shared, other_token[:, None], other_ok[:, None], k[None, :],
                             other_param, other_scale, other_constant, OTHER_PHI, D, CONST, KIND,
                             ACC)  # fmt: skip
                x = features(own, b, shared, token[None, :], ok[None, :], k[:, None], own_param, own_scale,
                             own_constant, OWN_PHI, D, CONST, KIND, ACC)  # fmt: skip
                w += tl.dot(y, x, input_precision=PRECISION, out_dtype=ACC)
            own_at, other_at = (
                (token - begin).to(tl.int32)[None, :],
                (other_token - begin).to(tl.int32)[:, None],
            )
            seen = sees(other_at, own_at, block, MASK) if KEYS else sees(own_at, other_at, block, MASK)
            seen = seen & in_range[None, :] & there[:, None]
            w = tl.where(seen, w, 0.0)
            if DECAY:
                other_b = decayed(lines, b, h, heads, n, other_token, begin, there)
                w *= pair_factor(own_b, other_b, seen, KEYS)
            if KEYS:
                if NORM != "":
                    w *= inverse_den(lines, b, h, heads, n, other_token, there)[:, None]
            elif NORM == "own":
                den += tl.sum(w, 0)
            y = load_x(other_values, b, h, other_token[None, :], other_ok[None, :], v[:, None], DV, ACC)
            acc += tl.dot(as_operand(y, KIND), as_operand(w, KIND), input_precision=PRECISION, out_dtype=ACC)

    if NORM != "" and not KEYS:
        line = (b * heads + h) * n + token
        if NORM == "given":
            den = tl.load(raw_den + line, mask=in_range, other=0.0)
        den += tl.full((1,), eps, ACC)
        acc *= inverse(den)[None, :]
        if tl.program_id(1) == 0:
            tl.store(lines.den + line, den, mask=in_range)
    to = pointers(out, b, h, token[None, :], v[:, None])
    tl.store(to, acc.to(out.data.dtype.element_ty), mask=in_range[None, :] & (v < DV)[:, None])


@triton.jit(do_not_specialize=LENGTHS)
def linear_inner_kernel(
    own, own_values, other, other_values, sums, lines, table, own_param: tl.float64,
    own_scale: tl.float64, own_constant: tl.float64, other_param: tl.float64, other_scale: tl.float64,
    other_constant: tl.float64, n, heads, group, parts, size, tiles, block, slots_over,
    OWN_PHI: tl.constexpr, OTHER_PHI: tl.constexpr, MASK: tl.constexpr, PAIRS: tl.constexpr,
    DECAY: tl.constexpr, CONST: tl.constexpr, KIND: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    SUMS_PRECISION: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """d_i = -(num_i . dout_i) / den_i^2 of a tile of queries."""
    at = tl.program_id(0).to(tl.int64)
    h, tile, part = at % heads, at // heads % tiles, at // heads // tiles
    shared = h // group
    b, r, begin, end = find_part(table, part, parts, size, n)
    token = begin + tile * BLOCK_T + tl.arange(0, BLOCK_T)
    ok = token < end
    own_param, own_scale = tl.full((1, 1), own_param, ACC), tl.full((1, 1), own_scale, ACC)
    own_constant, other_constant = tl.full((1, 1), own_constant, ACC), tl.full((1, 1), other_constant, ACC)
    other_param, other_scale = tl.full((1, 1), other_param, ACC), tl.full((1, 1), other_scale, ACC)
    K: tl.constexpr = D + CONST

    slot = r if MASK == "full" else part + r + slots_over
    total = tl.zeros((BLOCK_T,), ACC)
    for first_v in range(0, DV, BLOCK_V):
        v = first_v + tl.arange(0, BLOCK_V)
        num = tl.zeros((BLOCK_V, BLOCK_T), ACC)
        for first in range(0, K, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)
            x = features(own, b, shared, token[None, :], ok[None, :], k[:, None], own_param, own_scale,
                         own_constant, OWN_PHI, D, CONST, KIND, ACC).to(ACC)  # fmt: skip
            s = load_sums(sums, slot, h, heads, k[None, :], v[:, None], K, DV)
            num += tl.dot(s, x, input_precision=SUMS_PRECISION, out_dtype=ACC)
        total += tl.sum(num * load_x(own_values, b, h, token[None, :], ok[None, :], v[:, None], DV, ACC), 0)
    own_b = total
    if DECAY:
        own_b = decayed(lines, b, h, heads, n, token, begin, ok)
        total *= tl.exp(own_b)

    if PAIRS:
        for j in range(tile * 0, tile + 1):
            key = begin + j * BLOCK_T + tl.arange(0, BLOCK_T)
            there = key < end
            key_ok = kept(lines, b, n, key, there)
            w = tl.zeros((BLOCK_T, BLOCK_T), ACC)
            for first in range(0, K, BLOCK_K):
                k = first + tl.arange(0, BLOCK_K)
                y = features(other, b, shared, key[:, None], key_ok[:, None], k[None, :], other_param,
                             other_scale, other_constant, OTHER_PHI, D, CONST, KIND, ACC)  # fmt: skip
                x = features(own, b, shared, token[None, :], ok[None, :], k[:, None], own_param, own_scale,
                             own_constant, OWN_PHI, D, CONST, KIND, ACC)  # fmt: skip
                w += tl.dot(y, x, input_precision=PRECISION, out_dtype=ACC)
            g = tl.zeros((BLOCK_T, BLOCK_T), ACC)
            for first_v in range(0, DV, BLOCK_V):
                v = first_v + tl.arange(0, BLOCK_V)
                y = load_x(other_values, b, h, key[:, None], key_ok[:, None], v[None, :], DV, ACC)
                x = load_x(own_values, b, h, token[None, :], ok[None, :], v[:, None], DV, ACC)
                g += tl.dot(
                    as_operand(y, KIND), as_operand(x, KIND), input_precision=PRECISION, out_dtype=ACC
                )
            seen = sees(
                (token - begin).to(tl.int32)[None, :], (key - begin).to(tl.int32)[:, None], block, MASK
            )
            seen = seen & ok[None, :] & there[:, None]
            w = tl.where(seen, w * g, 0.0)
            if DECAY:
                w *= pair_factor(own_b, decayed(lines, b, h, heads, n, key, begin, there), seen, False)
            total += tl.sum(w, 0)

    scale = inverse_den(lines, b, h, heads, n, token, ok)
    tl.store(lines.d + (b * heads + h) * n + token, -total * scale * scale, mask=ok)


@triton.jit(do_not_specialize=[*LENGTHS, "slopes_step"])
def linear_features_kernel(
    own, own_values, other, other_values, out, sums, lines, slopes, table, own_param: tl.float64,
    own_scale: tl.float64, own_constant: tl.float64, other_param: tl.float64, other_scale: tl.float64,
    other_constant: tl.float64, n, heads, group, parts, size, tiles, block, slots_over, slopes_step,
    OWN_PHI: tl.constexpr, OTHER_PHI: tl.constexpr, OWN_SLOPE: tl.constexpr, KEYS: tl.constexpr,
    MASK: tl.constexpr, PAIRS: tl.constexpr, DECAY: tl.constexpr, NORM: tl.constexpr, OWN_D: tl.constexpr,
    CONST: tl.constexpr, KIND: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    SUMS_PRECISION: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """dq of a tile of queries or dk of a tile of keys, and one tile of features.

    OWN_D: of queries, without pairs and with one tile of features: d is made here. slopes [tiles of
    features, B, H, N], if there: features times their gradients."""
    at = tl.program_id(0).to(tl.int64)
    h, tile, part = at % heads, at // heads % tiles, at // heads // tiles
    shared = h // group
    b, r, begin, end = find_part(table, part, parts, size, n)
    token = begin + tile * BLOCK_T + tl.arange(0, BLOCK_T)
    in_range = token < end
    ok = in_range
    if KEYS:
        ok = kept(lines, b, n, token, in_range)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    own_param, own_scale = tl.full((1, 1), own_param, ACC), tl.full((1, 1), own_scale, ACC)
    own_constant, other_constant = tl.full((1, 1), own_constant, ACC), tl.full((1, 1), other_constant, ACC)
    other_param, other_scale = tl.full((1, 1), other_param, ACC), tl.full((1, 1), other_scale, ACC)
    K: tl.constexpr = D + CONST

    slot = r if MASK == "full" else part + r + slots_over
    acc = tl.zeros((BLOCK_K, BLOCK_T), ACC)
    for first in range(0, DV, BLOCK_V):
        v = first + tl.arange(0, BLOCK_V)
        x = load_x(own_values, b, h, token[None, :], ok[None, :], v[:, None], DV, ACC)
        s = load_sums(sums, slot, h, heads, k[:, None], v[None, :], K, DV)
        acc += tl.dot(s, x, input_precision=SUMS_PRECISION, out_dtype=ACC)
    f = features(own, b, shared, token[None, :], ok[None, :], k[:, None], own_param, own_scale,
                 own_constant, OWN_PHI, D, CONST, KIND, ACC).to(ACC)  # fmt: skip
    own_inverse = tl.full((BLOCK_T,), 1.0, ACC)
    own_d = own_inverse * 0.0
    if NORM != "" and not KEYS:
        own_inverse = inverse_den(lines, b, h, heads, n, token, in_range)
        if OWN_D:
            own_d = -tl.sum(f * acc, 0) * own_inverse * own_inverse
            tl.store(lines.d + (b * heads + h) * n + token, own_d, mask=in_range)
        elif NORM == "own":
            own_d = load_line(lines.d, b, h, heads, n, token, in_range, 0.0)
        acc *= own_inverse[None, :]
    if NORM == "own":
        z = load_z(sums, slot, h, heads, k, K)
        acc += z[:, None] if KEYS else z[:, None] * own_d[None, :]
    own_b = own_inverse
    if DECAY:
        own_b = decayed(lines, b, h, heads, n, token, begin, in_range)
        power = own_b
        if KEYS:
            power = decayed(lines, b, h, heads, n, end - 1, begin, end > begin) - own_b
        acc *= tl.exp(tl.where(in_range, power, 0.0))[None, :]

    if PAIRS:
        low, high = tile * 0, tile + 1
        if KEYS:
            low, high = tile, tl.cdiv(end - begin, BLOCK_T)
        for j in range(low, high):
            other_token = begin + j * BLOCK_T + tl.arange(0, BLOCK_T)
            there = other_token < end
            other_ok = there
            if not KEYS:
                other_ok = kept(lines, b, n, other_token, there)
            g = tl.zeros((BLOCK_T, BLOCK_T), ACC)
            for first in range(0, DV, BLOCK_V):
                v = first + tl.arange(0, BLOCK_V)
                y = load_x(other_values, b, h, other_token[:, None], other_ok[:, None], v[None, :], DV, ACC)
                x = load_x(own_values, b, h, token[None, :], ok[None, :], v[:, None], DV, ACC)
                g += tl.dot(
                    as_operand(y, KIND), as_operand(x, KIND), input_precision=PRECISION, out_dtype=ACC
                )
            if NORM != "" and KEYS:
                g *= inverse_den(lines, b, h, heads, n, other_token, there)[:, None]
                if NORM == "own":
                    g += load_line(lines.d, b, h, heads, n, other_token, there, 0.0)[:, None]
            elif NORM != "":
                g = g * own_inverse[None, :] + own_d[None, :]
            own_at, other_at = (
                (token - begin).to(tl.int32)[None, :],
                (other_token - begin).to(tl.int32)[:, None],
            )
            seen = sees(other_at, own_at, block, MASK) if KEYS else sees(own_at, other_at, block, MASK)
            seen = seen & in_range[None, :] & there[:, None]
            g = tl.where(seen, g, 0.0)
            if DECAY:
                other_b = decayed(lines, b, h, heads, n, other_token, begin, there)
                g *= pair_factor(own_b, other_b, seen, KEYS)
            y = features(other, b, shared, other_token[None, :], other_ok[None, :], k[:, None],
                         other_param, other_scale, other_constant, OTHER_PHI, D, CONST, KIND,
                         ACC)  # fmt: skip
            acc += tl.dot(y, as_operand(g, KIND), input_precision=PRECISION, out_dtype=ACC)

    acc = tl.where(ok[None, :], acc, 0.0)
    if slopes is not None:
        line = (b * heads + h) * n + token
        tl.store(slopes + tl.program_id(1) * slopes_step + line, tl.sum(f * acc, 0), mask=in_range)
    x = load_x(own, b, shared, token[None, :], ok[None, :], k[:, None], D, ACC)
    acc *= own_scale * OWN_SLOPE(x, OWN_PHI(x, own_param), own_param)
    to = pointers(out, b, h, token[None, :], k[:, None])
    tl.store(to, acc.to(out.data.dtype.element_ty), mask=in_range[None, :] & (k < D)[:, None])
