"""The executable specification of hash attention: plain PyTorch, differentiable any number of times."""

from __future__ import annotations

import torch
from torch import Tensor

BITS = 16  # of a packed code: bit i where y_i >= 0, bit BITS + i where |y_i| < 1


def projections(qk: Tensor, anchors: Tensor, weight: Tensor, mean: Tensor) -> Tensor:
    """y [B, H, N, bits] of qk [B, N, H, D], anchors [H, m, D], weight [H, bits, m], mean [H, m]."""
    norm = torch.linalg.vector_norm(qk, dim=-1, keepdim=True)
    zero = norm == 0
    x = (qk / norm.masked_fill(zero, 1.0)).masked_fill(zero, 0.0).transpose(1, 2)
    distance = 1.0 - 2.0 * x @ anchors.transpose(-2, -1) + anchors.square().sum(-1)[:, None]  # [B, H, N, m]
    sigma = distance.mean((-2, -1), keepdim=True)
    return (torch.exp(-distance / (2.0 * sigma)) - mean[:, None]) @ weight.transpose(-2, -1)


def unpack(words: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """code (+1, -1) and the mask of the straight-through gradient, [B, H, N, bits], of int32 [B, H, N]."""
    place = torch.arange(bits, device=words.device, dtype=torch.int32)
    code = ((words[..., None] >> place) & 1) * 2 - 1
    return code, ((words[..., None] >> (place + BITS)) & 1).bool()


def hash_(
    qk: Tensor,
    v: Tensor,
    anchors: Tensor,
    weight: Tensor,
    mean: Tensor,
    *,
    itself: bool,
    offset: float,
    words: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """qk [B, N, H, D], v [B, N, H, dv], anchors [H, m, D], weight [H, bits, m], mean [H, m] -> [B, N, H, dv].

    Everything else as in `vicinal.hash_attention`. words: packed codes to use instead of the signs of y.
    Computes in float32 (float64 for float64 inputs) unless compute_dtype says otherwise.
    """
    dtype = compute_dtype or (torch.float64 if v.dtype == torch.float64 else torch.float32)
    y = projections(*(t.to(dtype) for t in (qk, anchors, weight, mean)))
    if words is None:
        code, near = torch.where(y >= 0, 1.0, -1.0), y.abs() < 1
    else:
        code, near = unpack(words, weight.shape[-2])
    passed = y * near
    features = code.to(dtype) + (passed - passed.detach())  # the signs, with the gradient of y where near
    value = v.to(dtype).transpose(1, 2)
    memory = features.transpose(-2, -1) @ value
    total = value if itself else value.sum(-2, keepdim=True)
    sums = features @ features.sum(-2).unsqueeze(-1) + v.shape[1] * offset
    return ((features @ memory + offset * total) / sums).transpose(1, 2).to(v.dtype)
