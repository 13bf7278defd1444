"""One run of the attend kernels: the tensors of csrc/attend.h, on the way from an op to a launcher."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .plan import Plan, copied_keys, readers


@dataclass(slots=True)
class AttendCall:
    """The fields of csrc/attend.h as tensors: q [B, Nq, H, D], k [B, Nk, H, D], v [B, Nk, H, Dv] with D
    contiguous; bias acc [H, T]; q_scale, k_scale acc [B, N, H]; extra_k, extra_v [B, E, H, D]; key_bias acc
    [B, Nk]; mask acc [M, 1 or H, q_slots, k_slots]; seed int64 [1]; out [B, Nq, H, Dv]; lse acc [B, Nq,
    H]. Grouped queries: k and v have fewer heads than q. drop_by_token: what the dropout counter counts.
    q_coords, k_coords int32 [N, 3] and rel acc [H, 3, 2 bound + 1]: a bias by clipped offsets."""

    plan: Plan
    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    q_scale: Tensor | None
    k_scale: Tensor | None
    extra_k: Tensor | None
    extra_v: Tensor | None
    key_bias: Tensor | None
    mask: Tensor | None
    seed: Tensor | None
    scale: float
    mask_value: float
    edge_row: int
    activation: str
    dropout_p: float
    head_offset: int
    head_total: int
    out: Tensor
    lse: Tensor
    drop_by_token: bool = False
    q_coords: Tensor | None = None
    k_coords: Tensor | None = None
    rel: Tensor | None = None


@dataclass(slots=True)
class AttendGrads:
    """What the backward reads (dout, dlse) and writes (the rest, shaped like their tensors; dbias, dextra_*
    in acc)."""

    dout: Tensor
    dlse: Tensor | None
    dq: Tensor
    dk: Tensor
    dv: Tensor
    dbias: Tensor | None
    dextra_k: Tensor | None
    dextra_v: Tensor | None
    drel: Tensor | None = None


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def flat(x: Tensor) -> Tensor:
    """[B, *space, H, D] -> [B, N, H, D] with D contiguous; a view unless the strides of the space do not
    collapse."""
    if x.stride(-1) != 1 and x.shape[-1] != 1:
        x = x.contiguous()
    return x if x.dim() == 4 else x.flatten(1, -3)


def heads(x: Tensor | None, first: int, last: int, dim: int) -> Tensor | None:
    return None if x is None else x.narrow(dim, first, last - first)


def slice_call(call: AttendCall, plan: Plan, first: int, last: int) -> AttendCall:
    """The same call for heads first..last-1 and their plan."""
    mask = call.mask
    return AttendCall(
        plan=plan,
        q=call.q[:, :, first:last],
        k=call.k[:, :, first:last],
        v=call.v[:, :, first:last],
        bias=heads(call.bias, first, last, 0),
        q_scale=heads(call.q_scale, first, last, 2),
        k_scale=heads(call.k_scale, first, last, 2),
        extra_k=heads(call.extra_k, first, last, 2),
        extra_v=heads(call.extra_v, first, last, 2),
        key_bias=call.key_bias,
        mask=mask if mask is None or mask.shape[1] == 1 else heads(mask, first, last, 1),
        seed=call.seed,
        scale=call.scale,
        mask_value=call.mask_value,
        edge_row=call.edge_row,
        activation=call.activation,
        dropout_p=call.dropout_p,
        head_offset=first,
        head_total=call.head_total,
        out=call.out[:, :, first:last],
        lse=call.lse[:, :, first:last],
        drop_by_token=call.drop_by_token,
        q_coords=call.q_coords,
        k_coords=call.k_coords,
        rel=heads(call.rel, first, last, 0),
    )


def slice_grads(grads: AttendGrads, first: int, last: int) -> AttendGrads:
    return AttendGrads(
        dout=grads.dout[:, :, first:last],
        dlse=heads(grads.dlse, first, last, 2),
        dq=grads.dq[:, :, first:last],
        dk=grads.dk[:, :, first:last],
        dv=grads.dv[:, :, first:last],
        dbias=heads(grads.dbias, first, last, 0),
        dextra_k=heads(grads.dextra_k, first, last, 2),
        dextra_v=heads(grads.dextra_v, first, last, 2),
        drel=heads(grads.drel, first, last, 0),
    )


def with_copied_keys(call: AttendCall) -> AttendCall:
    """A call whose key boxes overlap, over gathered copies of the keys (gradients: `sum_copies`)."""
    tokens = copied_key_tokens(call.plan)
    copies = {name: _take(getattr(call, name), tokens) for name in ("k", "v", "k_scale", "key_bias")}
    fields = {name: getattr(call, name) for name in AttendCall.__slots__}
    return AttendCall(**{**fields, **copies, "plan": copied_keys(call.plan)})


def copied_key_tokens(plan: Plan) -> Tensor:
    """int64 [row slots]: the token behind every copy (0 for a pad: its copy is never read)."""
    table = readers(plan)
    tokens = torch.zeros(plan.n_rows * plan.k_slots, dtype=torch.long, device=table.device)
    for column in table.unbind(1):
        there = column >= 0
        tokens[column[there]] = torch.nonzero(there).flatten()
    return tokens


def _take(x: Tensor | None, tokens: Tensor) -> Tensor | None:
    return None if x is None else x.index_select(1, tokens)


def sum_copies(copies: Tensor, plan: Plan, total: Tensor) -> None:
    """total[b, n] = the sum of the copies [B, row slots, ...] of token n, in ascending order of slots."""
    table = readers(plan)
    acc = torch.zeros_like(total, dtype=accumulator(total.dtype))
    for column in table.unbind(1):
        there = (column >= 0).view(1, -1, *[1] * (copies.dim() - 2))
        acc += torch.where(there, copies.index_select(1, column.clamp_min(0)), 0).to(acc.dtype)
    total.copy_(acc)
