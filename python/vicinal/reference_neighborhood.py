"""The executable specification of neighborhood attention in plain PyTorch, differentiable twice, any float
dtype.

Keys are gathered per query, slot by slot, from the definition of a window on each axis; nothing here reads a
plan, so a plan can be checked against it.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from . import philox
from ._neighborhood_plan import AxisNeighborhood
from .reference import _gather, _weights


def axis_slots(axis: AxisNeighborhood) -> tuple[Tensor, Tensor]:
    """Of every query and slot of an axis, int64 [q_length, slots]: the key there, -1 for a hole; and the
    place of the key less that of the query.

    Slots count from the start of the window, or with dropped overhang from where it would have started
    (from the first key where a side is unlimited).
    """
    d, s, left, right = axis.dilation, axis.stride, axis.left, axis.right
    token = torch.arange(axis.q_length) + (axis.length - axis.q_length)
    group, p = token % d, token // d
    n = (axis.length - group + d - 1) // d
    leader = p // s * s + (s - 1 if axis.causal else s // 2)
    if axis.shift:
        k = axis.kernel
        if axis.causal:
            first = (torch.minimum(leader, n - 1) - k + 1).clamp_min(0)
            end = p + 1
        else:
            first = torch.minimum((leader - k // 2).clamp_min(0), n - k)
            end = first + k
        start, slots = first, k
    else:
        first = torch.zeros_like(p) if left < 0 else (leader - left).clamp_min(0)
        end = n if right < 0 else torch.minimum(leader + right + 1, n)
        end = p + 1 if axis.causal else end
        limited = left >= 0 and right >= 0
        start, slots = (
            (leader - left, axis.kernel) if limited else (torch.zeros_like(p), -(-axis.length // d))
        )
    t = start[:, None] + torch.arange(slots)
    seen = (t >= first[:, None]) & (t < end[:, None])
    return torch.where(seen, group[:, None] + d * t, -1), t - p[:, None]


def grid_slots(axes: Sequence[AxisNeighborhood]) -> Tensor:
    """int64 [queries, slots]: the token of the key in every slot, -1 for a hole."""
    found = torch.zeros(1, 1, dtype=torch.long)
    for axis in axes:
        key, _ = axis_slots(axis)
        both = found[:, None, :, None] * axis.length + key[None, :, None, :]
        holes = (found < 0)[:, None, :, None] | (key < 0)[None, :, None, :]
        found = both.masked_fill(holes, -1).flatten(2).flatten(0, 1)
    return found


def bias_rows(axes: Sequence[AxisNeighborhood]) -> Tensor:
    """int64 [queries, slots]: which entry of a table [2 K - 1, ...], flat, each slot reads; of no meaning in
    holes."""
    found = torch.zeros(1, 1, dtype=torch.long)
    for axis in axes:
        _, offset = axis_slots(axis)
        entries = 2 * axis.kernel - 1
        index = (offset + axis.kernel - 1).clamp(0, entries - 1)
        found = (found[:, None, :, None] * entries + index[None, :, None, :]).flatten(2).flatten(0, 1)
    return found


def scores(
    q: Tensor,
    k: Tensor,
    axes: Sequence[AxisNeighborhood],
    scale: float,
    bias: Tensor | None = None,
    extra_k: Tensor | None = None,
) -> Tensor:
    """q [B, Nq, Hq, D], k [B, Nk, Hkv, D], bias [Hq, T], extra_k [B, E, Hkv, D] of one dtype -> [B, Nq, Hq, S
    + E]: scale * q.k + bias of every slot, -inf in holes, then of the extra keys, without a bias."""
    keys = grid_slots(axes)
    window = _gather(k, keys, None)
    if extra_k is not None:
        window = torch.cat([window, extra_k[:, None].expand(-1, len(keys), -1, -1, -1)], 2)
    extra = window.shape[2] - keys.shape[1]
    grouped = q.unflatten(2, (k.shape[2], -1))
    s = torch.einsum("bnkgd,bnskd->bnkgs", grouped, window).flatten(2, 3) * scale
    if bias is not None:
        per_slot = bias[:, bias_rows(axes).to(q.device)].transpose(0, 1)  # [Nq, Hq, S]
        s = s + F.pad(per_slot, (0, extra))
    holes = F.pad((keys < 0).to(q.device), (0, extra))
    return s.masked_fill(holes[:, None], -torch.inf)


def _contextual(q: Tensor, axes: Sequence[AxisNeighborhood], tables: Sequence[Tensor]) -> Tensor:
    """[B, Nq, Hq, S]: q.R_a[place of the key - place of the query + K - 1] of every axis and slot."""
    total = q.new_zeros(())
    flat_rows = torch.cartesian_prod(*[torch.arange(a.q_length) for a in axes]).view(-1, len(axes))
    for a, (axis, table) in enumerate(zip(axes, tables, strict=True)):
        _, offset = axis_slots(axis)
        rows = (offset + axis.kernel - 1).clamp(0, 2 * axis.kernel - 2)[flat_rows[:, a]]  # [Nq, K]
        form = "nsd" if table.dim() == 2 else "hnsd"
        made = torch.einsum(f"bnhd,{form}->bnhs", q, table.to(q.dtype)[..., rows.to(q.device), :])
        before, behind = (prod([x.kernel for x in part]) for part in (axes[:a], axes[a + 1 :]))
        shape = (*made.shape[:-1], before, axis.kernel, behind)
        total = total + made[..., None, :, None].expand(shape).flatten(-3)
    return total


def aggregate(
    weights: Tensor, v: Tensor, axes: Sequence[AxisNeighborhood], extra_v: Tensor | None = None
) -> Tensor:
    """weights [B, Nq, Hq, S + E], v [B, Nk, Hkv, Dv], extra_v [B, E, Hkv, Dv] -> [B, Nq, Hq, Dv]: the sum
    over the slots and the extra values; the weight of a hole does not matter."""
    keys = grid_slots(axes)
    window = _gather(v, keys, None)
    if extra_v is not None:
        window = torch.cat([window, extra_v[:, None].expand(-1, len(keys), -1, -1, -1)], 2)
    holes = F.pad((keys < 0).to(v.device), (0, window.shape[2] - keys.shape[1]))
    weights = weights.masked_fill(holes[:, None], 0.0).unflatten(2, (v.shape[2], -1))
    return torch.einsum("bnkgs,bnskd->bnkgd", weights, window).flatten(2, 3)


def neighborhood(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    axes: Sequence[AxisNeighborhood],
    *,
    scale: float,
    bias: Tensor | None = None,
    extra_k: Tensor | None = None,
    extra_v: Tensor | None = None,
    ignored: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
    rel_pos: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """q [B, Nq, Hq, D], k [B, Nk, Hkv, D], v [B, Nk, Hkv, Dv], bias [Hq, T], extra_k [B, E, Hkv, D], extra_v
    [B, E, Hkv, Dv], ignored bool [B, Nk] -> out [B, Nq, Hq, Dv] in q's dtype, lse [B, Nq, Hq].

    Computes in float32 (float64 for float64 inputs) unless compute_dtype says otherwise.
    """
    dtype = compute_dtype or (torch.float64 if q.dtype == torch.float64 else torch.float32)

    def wide(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(dtype)

    if ignored is not None:  # an ignored key may hold NaN
        k = k.masked_fill(ignored[..., None, None], 0.0)
        v = v.masked_fill(ignored[..., None, None], 0.0)
    s = scores(q.to(dtype), k.to(dtype), axes, scale, wide(bias), wide(extra_k))
    keys = grid_slots(axes).to(q.device)
    if rel_pos is not None:
        s = s + F.pad(_contextual(q.to(dtype), axes, rel_pos), (0, s.shape[-1] - keys.shape[1]))
    extra = s.shape[-1] - keys.shape[1]
    if ignored is not None:
        per_slot = F.pad(ignored, (0, 1))[:, keys % (ignored.shape[1] + 1)]
        s = s.masked_fill(F.pad(per_slot, (0, extra))[:, :, None], -torch.inf)
    p, lse = _weights(s, "softmax")
    if dropout_p > 0.0 and seed is not None:
        n_k = prod(a.length for a in axes)
        extras = torch.arange(n_k, n_k + extra, device=q.device).expand(len(keys), -1)
        slot = torch.cat([keys.clamp_min(0), extras], 1)
        p = p * _kept(p, slot, seed, dropout_p)
    return aggregate(p, v.to(dtype), axes, wide(extra_v)).to(q.dtype), lse


def _kept(p: Tensor, slot: Tensor, seed: Tensor, dropout_p: float) -> Tensor:
    """Factors of the weights p [B, Nq, H, slots]: decisions count key tokens, extra key e as n_k + e."""
    b, n, h, _ = p.shape
    batch_head = torch.arange(b * h, device=p.device).view(b, 1, h, 1)
    query = torch.arange(n, device=p.device).view(1, n, 1, 1)
    keep = philox.keep_at(seed.to(p.device), dropout_p, query, batch_head, slot[None, :, None, :])
    return keep.to(p.dtype) / (1.0 - dropout_p)
