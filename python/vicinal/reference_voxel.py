"""Segment attention in plain PyTorch: gathered, padded, masked. It reads the segments and never a plan."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._segments_type import Segments


class Terms(NamedTuple):
    """What is added: key_bias [Nk, 1 or H]; rel: (cells [N, A], table [A, 2 b + 1, H]); context: (cells
    [N, A], Tq, Tk [L, A, H, D], Tv [L, A, H, Dv])."""

    key_bias: Tensor | None = None
    rel: tuple[Tensor, Tensor] | None = None
    context: tuple[Tensor, Tensor, Tensor, Tensor] | None = None


def segment_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    scale: float,
    terms: Terms,
    compute_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """out [Nq, H, Dv] in q's dtype and lse [Nq, H]. compute_dtype: default float32, float64 for float64."""
    acc = compute_dtype or (torch.float64 if q.dtype == torch.float64 else torch.float32)
    nothing = sum(x[:0].to(acc).sum() for x in (q, k, v))  # 0, and gradients of 0 where there is no segment
    out = nothing + torch.zeros(*q.shape[:2], v.shape[-1], dtype=acc, device=q.device)
    lse = nothing + torch.full(q.shape[:2], -torch.inf, dtype=acc, device=q.device)
    for chosen, q_most, k_most in _classes(segments):
        q_rows, q_there = _slots(segments.q_ptr[:-1], segments.q_ptr[1:], segments.q_index, chosen, q_most)
        k_rows, k_there = _slots(segments.k_begin, segments.k_end, segments.k_index, chosen, k_most)
        made, sums = _padded(q.to(acc), k.to(acc), v.to(acc), q_rows, k_rows, k_there, scale, terms)
        rows = q_rows[q_there]
        out = out.index_put((rows,), made[q_there])
        lse = lse.index_put((rows,), sums[q_there])
    return out.to(q.dtype), lse


def _classes(s: Segments) -> list[tuple[Tensor, int, int]]:
    """Segments of similar size, and their longest lists: one class if that is not much padding, or if the
    sizes may not be looked at."""
    everything = torch.arange(s.count, device=s.device)
    if torch.compiler.is_compiling():
        return [(everything, s.max_q, s.max_k)]
    n_q, n_k = s.q_ptr[1:] - s.q_ptr[:-1], s.k_end - s.k_begin
    size = torch.maximum(n_q, n_k) * ((n_q > 0) & (n_k > 0))
    found, most = [], 0
    while most < int(size.max() if len(size) else 0):
        least, most = most, max(2 * most, 64)
        chosen = torch.nonzero((size > least) & (size <= most)).flatten()
        if len(chosen):
            found.append((chosen, int(n_q[chosen].max()), int(n_k[chosen].max())))
    return found


def _slots(begin: Tensor, end: Tensor, index: Tensor, chosen: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Rows int64 [S, most] of the chosen segments, and which of them there are."""
    slot = begin[chosen, None].long() + torch.arange(most, device=index.device)
    there = slot < end[chosen, None]
    if not len(index):
        return torch.zeros_like(slot), there
    return index[slot.clamp_max(len(index) - 1)].long(), there


def _padded(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_rows: Tensor,
    k_rows: Tensor,
    k_there: Tensor,
    scale: float,
    terms: Terms,
) -> tuple[Tensor, Tensor]:
    """out [S, q slots, H, Dv] and lse [S, q slots, H]."""
    qs, ks, vs = q[q_rows], k[k_rows], v[k_rows]
    s = torch.einsum("snhd,smhd->shnm", qs, ks) * scale
    if terms.key_bias is not None:
        s = s + terms.key_bias.to(s.dtype)[k_rows].movedim(-1, 1)[:, :, None]
    if terms.rel is not None:
        cells, table = terms.rel
        bound = table.shape[1] // 2
        for a in range(cells.shape[1]):
            axis = cells[:, a].long()  # the difference of two int32 may not be one
            offset = (axis[q_rows][:, :, None] - axis[k_rows][:, None]).clamp(-bound, bound) + bound
            s = s + _looked_up(table[a], offset, s.dtype).movedim(-1, 1)
    value_tables = None
    if terms.context is not None:
        cells, q_table, k_table, v_table = terms.context
        offset = cells[q_rows][:, :, None] - cells[k_rows][:, None] + q_table.shape[0] // 2  # [S, n, m, A]
        offset = offset.clamp(0, q_table.shape[0] - 1).long()  # of slots that there are not
        axis = torch.arange(cells.shape[1], device=cells.device)
        q_terms, k_terms, value_tables = (
            _looked_up(t, (offset, axis), s.dtype).sum(3) for t in (q_table, k_table, v_table)
        )
        s = s + scale * torch.einsum("snhd,snmhd->shnm", qs, q_terms)
        s = s + torch.einsum("smhd,snmhd->shnm", ks, k_terms)
    s = s.masked_fill(~k_there[:, None, None], -torch.inf)
    p, lse = _softmax(s)
    out = torch.einsum("shnm,smhd->snhd", p, vs)
    if value_tables is not None:
        out = out + torch.einsum("shnm,snmhd->snhd", p, value_tables)
    return out, lse.movedim(1, -1)


def _looked_up(table: Tensor, index: Tensor | tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
    """table[index]; the gradient of an entry, a sum over many pairs, is accumulated in float64."""
    return table.double()[index].to(dtype)


def _softmax(s: Tensor) -> tuple[Tensor, Tensor]:
    """Weights over the last dimension, 0 where nothing is finite, and lse."""
    some = (s > -torch.inf).any(-1, keepdim=True)
    top = torch.where(some, s.detach().amax(-1, keepdim=True), 0) if s.shape[-1] else some.to(s.dtype)
    e = torch.exp(s - top)
    total = e.sum(-1, keepdim=True)
    safe = torch.where(some, total, 1)
    lse = torch.where(some, top + torch.log(safe), -torch.inf)
    return e / safe, lse.squeeze(-1)
