"""The executable specification: windowed attention in plain PyTorch, differentiable twice, any float dtype.

Windows are made as the published models make them - pad, roll, partition - but on a grid of token ids, so
nothing here reads a plan and a plan can be checked against it.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from . import philox
from .plan import AxisWindows


def partition_ids(ids: Tensor, windows: Sequence[int], grid: bool) -> Tensor:
    """[P1, .., Pr] with P_a divisible by windows[a] -> [number of windows, slots]; grid: slots at a
    stride."""
    rank = ids.dim()
    shape = []
    for size, w in zip(ids.shape, windows, strict=True):
        shape += [w, size // w] if grid else [size // w, w]
    outer = [2 * a + (1 if grid else 0) for a in range(rank)]
    inner = [2 * a + (0 if grid else 1) for a in range(rank)]
    return ids.view(shape).permute(outer + inner).reshape(-1, prod(windows))


def _pad_amounts(sizes: Sequence[int], windows: Sequence[int], center: bool) -> list[int]:
    amounts: list[int] = []
    for size, w in zip(reversed(sizes), reversed(windows), strict=True):
        total = -size % w
        before = total // 2 if center else 0
        amounts += [before, total - before]
    return amounts


def window_ids(
    lengths: Sequence[int],
    windows: Sequence[int],
    shifts: Sequence[int],
    partition: str,
    pad_order: str,
    pad_side: str,
) -> Tensor:
    """Token ids [number of windows, slots]; -1 where a slot is a pad."""
    rank = len(lengths)
    ids = torch.arange(prod(lengths)).view(*lengths)
    rolled = [-s for s in shifts]
    if pad_order == "roll_pad":
        ids = ids.roll(rolled, list(range(rank)))
    ids = F.pad(ids, _pad_amounts(lengths, windows, pad_side == "center"), value=-1)
    if pad_order == "pad_roll":
        ids = ids.roll(rolled, list(range(rank)))
    return partition_ids(ids, windows, partition == "grid")


def overlapping_ids(lengths: Sequence[int], windows: Sequence[int], kv: Sequence[int]) -> Tensor:
    """Token ids of key windows of size kv, centred on the query windows; -1 outside the grid."""
    ids = torch.arange(prod(lengths)).view(*lengths)
    amounts: list[int] = []
    for size, w, o in zip(reversed(lengths), reversed(windows), reversed(kv), strict=True):
        amounts += [(o - w) // 2, -size % w + (o - w) - (o - w) // 2]
    ids = F.pad(ids, amounts, value=-1)
    for a, (w, o) in enumerate(zip(windows, kv, strict=True)):
        ids = ids.unfold(a, o, w)
    return ids.reshape(-1, prod(kv))


def region_ids(lengths: Sequence[int], windows: Sequence[int], shifts: Sequence[int]) -> Tensor:
    """The published 9-region (27 in 3-D) labels [number of windows, slots] of a shifted grid."""
    label = torch.zeros([1] * len(lengths), dtype=torch.long)
    for a, (size, w, s) in enumerate(zip(lengths, windows, shifts, strict=True)):
        padded = size + -size % w
        one = torch.zeros(padded, dtype=torch.long)
        if s > 0:
            one[padded - w : padded - s] = 1
            one[padded - s :] = 2
        label = label * 3 + one.view([-1 if b == a else 1 for b in range(len(lengths))])
    return partition_ids(label, windows, False)


def relative_index(q_window: Sequence[int], k_window: Sequence[int], order: str) -> Tensor:
    """Index [Nq, Nk] into a table of prod(wq + wk - 1) rows (order "q-k" or "k-q"), or prod(wk) rows
    ("abs")."""
    q = torch.cartesian_prod(*[torch.arange(w) for w in q_window]).view(-1, len(q_window))
    k = torch.cartesian_prod(*[torch.arange(w) for w in k_window]).view(-1, len(k_window))
    index = torch.zeros(len(q), len(k), dtype=torch.long)
    for a, (n, m) in enumerate(zip(q_window, k_window, strict=True)):
        d = q[:, None, a] - k[None, :, a]
        if order == "abs":
            index = index * m + d.abs()
        else:
            index = index * (n + m - 1) + (d + m - 1 if order == "q-k" else n - 1 - d)
    return index


def _gather(x: Tensor, ids: Tensor, edge: Tensor | None) -> Tensor:
    """[B, N, h, d] -> [B, W, slots, h, d]; pads read `edge` [h, d] (zeros if None)."""
    b, _, h, d = x.shape
    row = x.new_zeros(b, 1, h, d) if edge is None else edge.to(x.dtype).expand(b, 1, h, d)
    padded = torch.cat([x, row], 1)
    return padded.index_select(1, ids.flatten().to(x.device) % padded.shape[1]).unflatten(1, ids.shape)


def _unit(x: Tensor) -> Tensor:
    smallest = max(1e-12, torch.finfo(x.dtype).tiny)  # 1e-12 is 0 in float16
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(smallest)


def _weights(s: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Scores with -inf = excluded -> (weights, log-sum-exp); a row without a finite score gives 0 and
    -inf."""
    dead = torch.isneginf(s).all(-1, keepdim=True)
    alive = s.masked_fill(dead, 0.0)
    lse = torch.logsumexp(alive, -1, keepdim=True)
    if activation == "softmax":
        p = torch.exp(alive - lse)
    else:
        finite = s.masked_fill(torch.isneginf(s), 0.0)
        p = finite if activation == "none" else torch.relu(finite)
        p = p * p if activation == "relu2" else p
    return p.masked_fill(dead, 0.0), lse.masked_fill(dead, -torch.inf).squeeze(-1)


def windowed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    axes: Sequence[AxisWindows],
    *,
    partition: str = "block",
    pad_order: str = "pad_roll",
    pad_side: str = "end",
    edge: str = "mask",
    mask_value: float = -100.0,
    scale: float | None = None,
    bias: Tensor | None = None,
    logit_scale: Tensor | None = None,
    edge_k: Tensor | None = None,
    edge_v: Tensor | None = None,
    extra_k: Tensor | None = None,
    extra_v: Tensor | None = None,
    extra_bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    attn_mask: Tensor | None = None,
    activation: str = "softmax",
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    head_offset: int = 0,
    head_total: int | None = None,
    compute_dtype: torch.dtype | None = None,
    rel_pos: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """q [B, Nq, h, dk], k [B, N, h, dk], v [B, N, h, dv] -> out [B, Nq, h, dv] in q's dtype, lse [B, Nq, h].

    bias is dense, [h, slots of q, slots of k]; key_bias [B, N] is added per key (-inf: ignored). Everything
    else as in `vicinal.windowed_attention`. Computes in float32 (float64 for float64 inputs) unless
    compute_dtype says otherwise.
    """
    dtype = compute_dtype or (torch.float64 if q.dtype == torch.float64 else torch.float32)
    windows = [a.window for a in axes]
    lengths, shifts = [a.length for a in axes], [a.shift for a in axes]
    q_ids = window_ids(
        [a.q_length for a in axes], [a.q_window for a in axes], shifts, partition, pad_order, pad_side
    )
    if any(a.kv for a in axes):
        k_ids = overlapping_ids(lengths, windows, [a.kv for a in axes])
    else:
        k_ids = window_ids(lengths, windows, shifts, partition, pad_order, pad_side)

    ignored = torch.isneginf(key_bias) if key_bias is not None else None
    if ignored is not None:  # an ignored key may hold NaN
        k = k.masked_fill(ignored[..., None, None], 0.0)
        v = v.masked_fill(ignored[..., None, None], 0.0)
    qw = _gather(q.to(dtype), q_ids, None)
    kw, vw = _gather(k.to(dtype), k_ids, edge_k), _gather(v.to(dtype), k_ids, edge_v)
    n_windows, k_slots = k_ids.shape
    if extra_k is not None and extra_v is not None:
        kw = torch.cat([kw, extra_k.to(dtype)[:, None].expand(-1, n_windows, -1, -1, -1)], 2)
        vw = torch.cat([vw, extra_v.to(dtype)[:, None].expand(-1, n_windows, -1, -1, -1)], 2)

    s = _scores(qw, kw, scale, logit_scale)
    s = s + _additive(s, k_slots, bias, extra_bias, attn_mask)
    if rel_pos is not None:
        q_window, k_window = [a.q_window for a in axes], [a.kv or a.window for a in axes]
        s = s + F.pad(_contextual(qw, rel_pos, q_window, k_window), (0, s.shape[-1] - k_slots))
    s = s.masked_fill(_excluded(q_ids, k_ids, kw.shape[2], edge).to(s.device)[:, None], -torch.inf)
    if key_bias is not None:
        with_pad = F.pad(key_bias.to(s.dtype), (0, 1))  # pads have no key bias
        per_slot = with_pad[:, k_ids.to(q.device) % with_pad.shape[1]]
        s = s + F.pad(per_slot, (0, kw.shape[2] - k_slots))[:, :, None, None]
    if any(shifts):
        region = region_ids(lengths, windows, shifts).to(s.device)
        crossing = F.pad(region[:, :, None] != region[:, None, :], (0, kw.shape[2] - k_slots))[:, None]
        if activation != "softmax":
            mask_value = -torch.inf
        if mask_value == -torch.inf:
            s = s.masked_fill(crossing, -torch.inf)
        else:
            s = s + mask_value * crossing.to(s.dtype)
    p, lse = _weights(s, activation)
    if dropout_p > 0.0 and seed is not None:
        p = p * _kept(p, q_ids, seed, dropout_p, head_offset, head_total or q.shape[2])
    out = torch.einsum("bwhnm,bwmhd->bwnhd", p, vw)
    return _scatter(out, q_ids, q.shape[1]).to(q.dtype), _scatter(lse.transpose(2, 3), q_ids, q.shape[1])


def _scores(qw: Tensor, kw: Tensor, scale: float | None, logit_scale: Tensor | None) -> Tensor:
    if logit_scale is None:
        return torch.einsum("bwnhd,bwmhd->bwhnm", qw, kw) * (qw.shape[-1] ** -0.5 if scale is None else scale)
    tau = logit_scale.to(qw.dtype).flatten().clamp(max=4.605170185988092).exp()
    return torch.einsum("bwnhd,bwmhd->bwhnm", _unit(qw), _unit(kw)) * tau[:, None, None]


def _contextual(
    qw: Tensor, tables: Sequence[Tensor], q_window: Sequence[int], k_window: Sequence[int]
) -> Tensor:
    """[B, W, h, Nq, slots]: q.R_a[row of q - row of k + slots - 1] of every axis, with q as it is."""
    q = torch.cartesian_prod(*[torch.arange(w) for w in q_window]).view(-1, len(q_window))
    k = torch.cartesian_prod(*[torch.arange(w) for w in k_window]).view(-1, len(k_window))
    total = qw.new_zeros(())
    for a, table in enumerate(tables):
        rows = (q[:, None, a] - k[None, :, a] + k_window[a] - 1).to(table.device)
        form = "nmd" if table.dim() == 2 else "hnmd"
        picked = table.to(qw.dtype)[..., rows, :]
        total = total + torch.einsum(f"bwnhd,{form}->bwhnm", qw, picked)
    return total


def _additive(
    s: Tensor, k_slots: int, bias: Tensor | None, extra_bias: Tensor | None, attn_mask: Tensor | None
) -> Tensor:
    """Bias, extra bias and window mask, broadcastable to s [B, W, h, Nq, slots + M]."""
    extra = s.shape[-1] - k_slots
    total = s.new_zeros(s.shape[2], 1, s.shape[-1])
    if bias is not None:
        total = total + F.pad(bias.to(s.dtype), (0, extra))
    if extra_bias is not None:
        total = total + F.pad(extra_bias.to(s.dtype), (k_slots, 0))[:, None]
    if attn_mask is None:
        return total
    mask = attn_mask.to(s.dtype) if attn_mask.dim() == 4 else attn_mask.to(s.dtype)[:, None]
    window = torch.arange(s.shape[0] * s.shape[1], device=s.device) % mask.shape[0]
    return total + F.pad(mask[window].unflatten(0, s.shape[:2]), (0, extra))


def _excluded(q_ids: Tensor, k_ids: Tensor, slots: int, edge: str) -> Tensor:
    """bool [W, 1, slots]: pads that do not take part."""
    pads = k_ids < 0 if edge == "mask" else torch.zeros_like(k_ids, dtype=torch.bool)
    return F.pad(pads, (0, slots - k_ids.shape[1]))[:, None]


def _kept(
    p: Tensor, q_ids: Tensor, seed: Tensor, dropout_p: float, head_offset: int, head_total: int
) -> Tensor:
    b, _, h, _, slots = p.shape
    heads = torch.arange(h, device=p.device) + head_offset
    batch_head = torch.arange(b, device=p.device)[:, None] * head_total + heads
    token = q_ids.clamp_min(0).to(p.device)[None, :, None, :]
    keep = philox.keep(seed.to(p.device), dropout_p, token, batch_head[:, None, :, None], slots)
    return keep.to(p.dtype) / (1.0 - dropout_p)


def _scatter(x: Tensor, ids: Tensor, tokens: int) -> Tensor:
    """[B, W, slots, ...] -> [B, tokens, ...]: each token from its slot."""
    slots = torch.argsort(ids.flatten(), stable=True)[ids.numel() - tokens :]  # the pads, -1, come first
    return x.flatten(1, 2).index_select(1, slots.to(x.device))
