"""One token of causal linear attention on states that are updated in place (csrc/linear.h, LinearStep).

A program has one sample and head: it reads and writes S once, tile by tile, in float32 without tensor cores,
which the products of one row could not use. Without denominators the values are divided over programs too;
with them one program has all, since each value needs the new z and z is overwritten."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from . import launch
from .linear_maps import MAPS
from .linear_tokens import features, inverse, load_x, pointers
from .tiles import power_of_two

if TYPE_CHECKING:
    from vicinal._linear_op import LinearCall, LinearResults

FEATURES, VALUES, WARPS = 64, 64, 4  # of a tile, at most; not timed on a GPU


@triton.jit(do_not_specialize=["heads", "group"])
def linear_step_kernel(
    q, k, v, out, s, z, decay, q_param: tl.float64, k_param: tl.float64, scale: tl.float64,
    constant: tl.float64, eps: tl.float64, heads, group, decay_b, decay_h,
    Q_PHI: tl.constexpr, K_PHI: tl.constexpr, CONST: tl.constexpr, ACC: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, STEP_V: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64)
    b, h = at // heads, at % heads
    one = tl.full((1, 1), 1.0, ACC)
    q_param, k_param = tl.full((1, 1), q_param, ACC), tl.full((1, 1), k_param, ACC)
    scale, constant = tl.full((1, 1), scale, ACC), tl.full((1, 1), constant, ACC)
    K: tl.constexpr = D + CONST
    token = tl.zeros((1, 1), tl.int64)
    ok = token == 0
    kept = tl.full((1, 1), 1.0, ACC)
    if decay is not None:
        kept = tl.exp(tl.load(decay + b * decay_b + h * decay_h)) * kept
    den = tl.zeros((1, BLOCK_V), ACC)
    if z is not None:
        for first in range(0, K, BLOCK_K):
            column = first + tl.arange(0, BLOCK_K)[:, None]
            f = features(q, b, h // group, token, ok, column, q_param, scale, one, Q_PHI, D, CONST, "", ACC)
            p = features(
                k, b, h // group, token, ok, column, k_param, one, constant, K_PHI, D, CONST, "", ACC
            )
            sums = z + at * K + column
            new = tl.load(sums, mask=column < K, other=0.0) * kept + p
            tl.store(sums, new, mask=column < K)
            den += tl.sum(f * new, 0)[:, None]
        den += tl.full((1, 1), eps, ACC)
    for first_v in range(tl.program_id(1) * BLOCK_V, DV, STEP_V):
        value = first_v + tl.arange(0, BLOCK_V)[None, :]
        x = load_x(v, b, h, token, ok, value, DV, ACC)
        acc = tl.zeros((1, BLOCK_V), ACC)
        for first in range(0, K, BLOCK_K):
            column = first + tl.arange(0, BLOCK_K)[:, None]
            f = features(q, b, h // group, token, ok, column, q_param, scale, one, Q_PHI, D, CONST, "", ACC)
            p = features(
                k, b, h // group, token, ok, column, k_param, one, constant, K_PHI, D, CONST, "", ACC
            )
            sums = s + (at * K + column) * DV + value
            inside = (column < K) & (value < DV)
            new = tl.load(sums, mask=inside, other=0.0) * kept + p * x
            tl.store(sums, new, mask=inside)
            acc += tl.sum(f * new, 0)[None, :]
        if z is not None:
            acc *= inverse(den)
        to = pointers(out, b, h, token, value)
        tl.store(to, acc.to(out.data.dtype.element_ty), mask=value < DV)


def step(call: LinearCall, results: LinearResults) -> None:
    from .linear import strided

    batch, _, heads, dim_v = call.v.shape
    dim, decay, z = call.k.shape[3], call.decay, results.final_z
    if results.out.numel() == 0:
        return
    decay_b, decay_h = 0, 0
    if decay is not None:
        decay_b, decay_h = (0, decay.stride(0)) if decay.dim() == 1 else (decay.stride(0), decay.stride(2))
    block_v = min(VALUES, power_of_two(dim_v))
    programs = 1 if z is not None else -(-dim_v // block_v)
    args = {
        "q": strided(call.q), "k": strided(call.k), "v": strided(call.v), "out": strided(results.out),
        "s": results.final_s, "z": z, "decay": decay, "q_param": float(call.param_q),
        "k_param": float(call.param_k), "scale": float(call.scale), "constant": float(call.constant),
        "eps": float(call.eps), "heads": heads, "group": heads // call.q.shape[2], "decay_b": decay_b,
        "decay_h": decay_h, "Q_PHI": MAPS[call.map_q].phi, "K_PHI": MAPS[call.map_k].phi,
        "CONST": int(call.constant != 0), "D": dim, "DV": dim_v,
        "ACC": tl.float64 if results.final_s.dtype == torch.float64 else tl.float32,
        "BLOCK_K": min(FEATURES, power_of_two(dim + (call.constant != 0))), "BLOCK_V": block_v,
        "STEP_V": block_v * programs,
    }  # fmt: skip
    launch.run(linear_step_kernel, (batch * heads, programs), args, WARPS)
