"""Dropout bits: Philox 4x32-10 (Salmon, Moraes, Dror, Shaw, SC 2011) in PyTorch integers. The C++ twin is
csrc/philox.h.

A decision depends on (seed, batch and head, query token, key slot) alone, so every backend and both passes
agree.
"""

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * b, both below 2**32, in int64 without overflow."""
    low = (b & 0xFFFF) * a
    high = (b >> 16) * a + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(
    seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four 32-bit words of each counter (int64 tensors that broadcast against each other)."""
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        a_high, a_low = _multiply(_MULTIPLIERS[0], c0)
        b_high, b_low = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = b_high ^ c1 ^ k0, b_low, a_high ^ c3 ^ k1, a_low
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def threshold(dropout_p: float) -> int:
    """Words below this are dropped."""
    return min(int(dropout_p * 4294967296.0), _LOW)


def keep(seed: Tensor, dropout_p: float, query_token: Tensor, batch_head: Tensor, slots: int) -> Tensor:
    """bool [..., slots]: which key slots each query keeps. query_token and batch_head broadcast to [...]."""
    groups = torch.arange((slots + 3) // 4, device=query_token.device)
    q, bh = query_token.long()[..., None], batch_head.long()[..., None]
    q, bh, group = torch.broadcast_tensors(q, bh, groups)
    words = torch.stack(philox(seed.long(), group, q, bh, torch.zeros_like(q)), dim=-1)
    return (words >= threshold(dropout_p)).flatten(-2)[..., :slots]


def keep_at(seed: Tensor, dropout_p: float, query_token: Tensor, batch_head: Tensor, slot: Tensor) -> Tensor:
    """bool: whether each query keeps each of these slots; the three int64 tensors broadcast."""
    q, bh, slot = torch.broadcast_tensors(query_token.long(), batch_head.long(), slot.long())
    words = torch.stack(philox(seed.long(), slot // 4, q, bh, torch.zeros_like(q)), dim=-1)
    return words.gather(-1, (slot % 4)[..., None]).squeeze(-1) >= threshold(dropout_p)
