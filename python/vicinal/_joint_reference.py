"""The executable specification of joint attention: plain PyTorch, differentiable any number of times."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import philox

LAPLACE_MEAN, LAPLACE_WIDTH = 0.5**0.5, 0.39894228040143267794  # sqrt(1 / (4 pi)) sqrt 2


def joint(
    quad_q: Tensor,
    quad_k: Tensor,
    lin_q: Tensor,
    lin_k: Tensor,
    v: Tensor,
    u: Tensor | None,
    bias: Tensor | None,
    ignored: Tensor | None,
    seed: Tensor | None,
    *,
    group: int,
    causal: bool,
    activation: str,
    quad_scale: float,
    lin_scale: float,
    dropout_p: float,
    gate: bool,
    compute_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    """quad_*, lin_* [B, N, d], v and u [B, N, V] -> (out, None) with a gate or without u, else (out of v,
    out of u).

    Everything else as in `vicinal.joint_attention`. Computes in float32 (float64 for float64 inputs) unless
    compute_dtype says otherwise.
    """
    dtype = compute_dtype or (torch.float64 if v.dtype == torch.float64 else torch.float32)
    tokens = v.shape[1]
    dead = torch.zeros(v.shape[:2], dtype=torch.bool, device=v.device) if ignored is None else ignored
    value = v if u is None else torch.cat([v, u], -1)
    value = value.to(dtype).masked_fill(dead[..., None], 0.0)
    queries, keys, reads, writes = (
        _grouped(x.to(dtype), group)
        for x in (
            quad_q,
            quad_k.masked_fill(dead[..., None], 0.0),
            lin_q,
            lin_k.masked_fill(dead[..., None], 0.0),
        )
    )
    value = _grouped(value, group)
    pads = -tokens % group
    excluded = F.pad(dead, (0, pads), value=True).unflatten(1, (-1, group))[:, :, None]  # [B, G, 1, g]
    scores = queries @ keys.transpose(-2, -1) * quad_scale
    if bias is not None:
        scores = scores + bias.to(dtype)
    weights = _activated(scores, activation)
    if dropout_p > 0.0 and seed is not None:
        weights = weights * _kept(weights, seed, dropout_p)
    weights = weights.masked_fill(excluded, 0.0)
    if causal:
        weights = weights.tril()
    memory = writes.transpose(-2, -1) @ value  # [B, G, d, W]
    if causal:
        memory = F.pad(memory.cumsum(1), (0, 0, 0, 0, 1, 0))[:, :-1]  # of the groups before
    else:
        memory = memory.sum(1, keepdim=True)
    out = weights @ value + lin_scale * (reads @ memory)
    out = out.flatten(1, 2)[:, :tokens]
    if u is None:
        return out.to(v.dtype), None
    of_v, of_u = out.chunk(2, -1)
    if not gate:
        return of_v.to(v.dtype), of_u.to(v.dtype)
    return (of_u * v.to(dtype) * torch.sigmoid(of_v * u.to(dtype))).to(v.dtype), None


def _grouped(x: Tensor, group: int) -> Tensor:
    """[B, N, D] -> [B, groups, group, D], padded with zeros."""
    return F.pad(x, (0, 0, 0, -x.shape[1] % group)).unflatten(1, (-1, group))


def _activated(scores: Tensor, activation: str) -> Tensor:
    if activation == "relu2":
        return torch.relu(scores).square()
    return 0.5 * torch.erfc((LAPLACE_MEAN - scores) / LAPLACE_WIDTH)


def _kept(weights: Tensor, seed: Tensor, dropout_p: float) -> Tensor:
    batch, groups, group, slots = weights.shape
    token = torch.arange(groups * group, device=weights.device).view(1, groups, group)
    sample = torch.arange(batch, device=weights.device).view(batch, 1, 1)
    keep = philox.keep(seed.to(weights.device), dropout_p, token, sample, slots)
    return keep.to(weights.dtype) / (1.0 - dropout_p)
