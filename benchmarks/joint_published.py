"""Joint and hash attention as published layers write them in PyTorch: the baselines."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 256


def mossformer(qq: Tensor, qk: Tensor, lq: Tensor, lk: Tensor, v: Tensor, u: Tensor) -> Tensor:
    """MossFormer's gated attention: padded groups, einsum, separate sums for v and u."""
    n = v.shape[1]
    split = [F.pad(x, (0, 0, 0, -n % GROUP)).unflatten(1, (-1, GROUP)) for x in (qq, qk, lq, lk, v, u)]
    qq, qk, lq, lk, wide_v, wide_u = split
    attn = F.relu(torch.einsum("...id,...jd->...ij", qq, qk) / GROUP) ** 2
    outs = []
    for w in (wide_v, wide_u):
        memory = torch.einsum("bgnd,bgne->bde", lk, w) / n
        out = torch.einsum("...ij,...jd->...id", attn, w) + torch.einsum("bgnd,bde->bgne", lq, memory)
        outs.append(out.flatten(1, 2)[:, :n])
    return outs[1] * v * torch.sigmoid(outs[0] * u)


class Sign(torch.autograd.Function):
    """EcoFormer's binary quantiser."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        ctx.save_for_backward(y)
        return torch.sign(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * (ctx.saved_tensors[0].abs() < 1)


def _attend(distance: Tensor, v: Tensor, weight: Tensor, mean: Tensor) -> Tensor:
    sigma = distance.mean(-1).mean(-1)[..., None, None]
    features = torch.exp(-distance / (2 * sigma)) - mean[:, None]
    code = Sign.apply(torch.einsum("bhnm,hkm->bhnk", features, weight))
    offset, v = weight.shape[1] + 1, v.transpose(1, 2)
    bottom = torch.einsum("...nd,...d->...n", code, code.sum(-2)) + v.shape[2] * offset
    context = torch.einsum("...nd,...ne->...de", code, v)
    top = torch.einsum("...de,...nd->...ne", context, code) + offset * v.sum(-2, keepdim=True)
    return torch.einsum("...ne,...n->...ne", top, 1.0 / bottom).transpose(1, 2)


def _unit(qk: Tensor) -> Tensor:
    x = qk.transpose(1, 2)
    return x / torch.norm(x, 2, dim=-1, keepdim=True)


def ecoformer(qk: Tensor, v: Tensor, anchors: Tensor, weight: Tensor, mean: Tensor) -> Tensor:
    """The released formula: distances from a [B, H, N, anchors, D] difference."""
    distance = ((_unit(qk).unsqueeze(3) - anchors[:, None]) ** 2).sum(-1)
    return _attend(distance, v, weight, mean)


def ecoformer_gemm(qk: Tensor, v: Tensor, anchors: Tensor, weight: Tensor, mean: Tensor) -> Tensor:
    """The same with distances from a product."""
    distance = 1 - 2 * _unit(qk) @ anchors.mT + anchors.square().sum(-1)[:, None]
    return _attend(distance, v, weight, mean)
