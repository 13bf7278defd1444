"""Linear attention as published layers write it in PyTorch, on [B, N, H, D] inputs: the baselines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Layer = Callable[..., Tensor]  # q, k, v, decay or None -> out [B, N, H, dv]
CHUNK = 128


def elu1(x: Tensor) -> Tensor:
    return F.elu(x) + 1


def matmul(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None) -> Tensor:
    """elu + 1, normalised, in two batched products on heads-first tensors."""
    q, k, v = (x.transpose(1, 2) for x in (elu1(q), elu1(k), v))
    out = q @ (k.transpose(-1, -2) @ v)
    den = q @ k.sum(-2, keepdim=True).transpose(-1, -2)
    return (out / (den + 1e-6)).transpose(1, 2)


def einsum(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None) -> Tensor:
    """The same as fast-transformers writes it."""
    q, k = elu1(q), elu1(k)
    context = torch.einsum("nshd,nshm->nhmd", k, v)
    z = 1 / (torch.einsum("nlhd,nhd->nlh", q, k.sum(1)) + 1e-6)
    return torch.einsum("nlhd,nhmd,nlh->nlhm", q, context, z)


def lite_mla(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None) -> Tensor:
    """EfficientViT's ReLU attention on NCHW tensors: a channel of ones in v makes the denominator."""
    q, k, v = (x.permute(0, 2, 3, 1) for x in (q, k, v))  # [B, H, D, N], contiguous rows
    padded = F.pad(v, (0, 0, 0, 1), value=1.0)
    out = padded @ F.relu(k).transpose(-1, -2) @ F.relu(q)
    return (out[:, :, :-1] / (out[:, :, -1:] + 1e-15)).permute(0, 3, 1, 2)


def chunked(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None) -> Tensor:
    """Causal, by chunks: states by a cumulative sum (a loop with a decay), squares inside the chunks."""
    batch, n, heads, _ = q.shape
    count = n // CHUNK

    def split(x: Tensor) -> Tensor:
        return x.reshape(batch, count, CHUNK, heads, -1).permute(0, 3, 1, 2, 4)

    q, k, v = split(elu1(q)), split(elu1(k)), split(F.pad(v, (0, 1), value=1.0))
    weights = q @ k.transpose(-1, -2)
    if decay is None:
        below = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).tril()
        inner = weights.masked_fill(~below, 0) @ v
        states = (k.transpose(-1, -2) @ v).cumsum(2)
        out = inner + q @ F.pad(states[:, :, :-1], (0, 0, 0, 0, 1, 0))
    else:
        out = _with_decay(q, k, v, weights, split(decay[..., None])[..., 0].cumsum(-1))
    out = out.permute(0, 2, 3, 1, 4).reshape(batch, n, heads, -1)
    return out[..., :-1] / (out[..., -1:] + 1e-6)


def _with_decay(q: Tensor, k: Tensor, v: Tensor, weights: Tensor, b: Tensor) -> Tensor:
    power = (b[..., :, None] - b[..., None, :]).tril().exp().tril()
    inner = (weights * power.to(weights.dtype)) @ v
    rise, left = b.exp()[..., None].to(q.dtype), (b[..., -1:] - b).exp()[..., None].to(q.dtype)
    added = (k * left).transpose(-1, -2) @ v
    keep = b[..., -1].exp().to(q.dtype)
    state, states = torch.zeros_like(added[:, :, 0]), []
    for i in range(added.shape[2]):
        states.append(state)
        state = state * keep[:, :, i, None, None] + added[:, :, i]
    return inner + (q * rise) @ torch.stack(states, 2)


def sdpa(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None) -> Tensor:
    """Causal softmax attention: another function, for the same place in a model."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def performer(projection: Tensor) -> Layer:
    """performer-pytorch's own functions."""
    from performer_pytorch import performer_pytorch as theirs

    def run(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        options: Any = {"projection_matrix": projection}
        q, k = (theirs.softmax_kernel(x, is_query=x is q, **options) for x in (q, k))
        out: Tensor = theirs.linear_attention(q, k, v)
        return out.transpose(1, 2)

    return run


def step(q: Tensor, k: Tensor, v: Tensor, s: Tensor, z: Tensor) -> Tensor:
    """One token of causal attention as fast-transformers' recurrent layer has it, with states in place."""
    q, k = elu1(q)[:, 0], elu1(k)[:, 0]
    z += k
    s += torch.einsum("nhd,nhm->nhdm", k, v[:, 0])
    den = 1.0 / (torch.einsum("nhd,nhd->nh", q, z) + 1e-6)
    return torch.einsum("nhd,nhdm,nh->nhm", q, s, den)[:, None]
