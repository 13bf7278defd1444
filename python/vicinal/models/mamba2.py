"""The Mamba-2 mixer in plain PyTorch, on packed sequences, and its recurrent step.

A state-space layer whose state decays by one number per head and token (Dao and Gu, Transformers are SSMs,
arXiv:2405.21060): in chunks of tokens it is causal attention with the weights q_i . k_j exp(b_i - b_j).

Parameters carry the names of the mamba_ssm release."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["GatedRMSNorm", "Mamba2Config", "Mamba2Mixer", "Packing"]


@dataclass(frozen=True)
class Packing:
    """Sequences one after the other: `ends` [S + 1] as of `cu_seqlens`, int32, from 0 to the number of
    tokens T; per token the number of its sequence and its place in it, [T] each."""

    ends: Tensor
    sequence: Tensor
    position: Tensor

    @staticmethod
    def of(ends: Tensor, tokens: int) -> Packing:
        """The packing of `tokens` tokens with these ends."""
        places = torch.arange(tokens, device=ends.device)
        sequence = torch.searchsorted(ends[1:], places, right=True)
        return Packing(ends, sequence, places - ends[sequence])

    @property
    def count(self) -> int:
        """S, the number of sequences."""
        return len(self.ends) - 1


@dataclass(frozen=True)
class Mamba2Config:
    """Sizes of a Mamba-2 mixer."""

    dim: int
    state: int = 128
    head_dim: int = 64
    expand: int = 2
    taps: int = 4
    chunk: int = 256

    @property
    def inner(self) -> int:
        """Channels of the values."""
        return self.expand * self.dim


class GatedRMSNorm(nn.Module):
    """RMS norm of y silu(z): [..., C] twice -> [..., C]."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        return F.rms_norm(y * F.silu(z), self.weight.shape, self.weight, self.eps)


class Mamba2Mixer(nn.Module):
    """out_proj(norm(scan(v, decay, k, q) + D v', z)) with all of them projected from x; [T, C] -> [T, C].

    z, x', B, C, dt = in_proj(x); x', B, C pass a short causal convolution and SiLU; then per head, with
    t = softplus(dt + dt_bias): v = x' t, k = B, q = C, decay = -exp(A_log) t.
    """

    def __init__(self, config: Mamba2Config) -> None:
        super().__init__()
        c = config
        self.config = c
        if c.inner % c.head_dim:
            raise ValueError(f"head_dim is {c.head_dim}, which does not divide expand * dim = {c.inner}")
        heads, mixed = c.inner // c.head_dim, c.inner + 2 * c.state
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.A_log = nn.Parameter(torch.empty(heads))
        self.D = nn.Parameter(torch.ones(heads))
        self.in_proj = nn.Linear(c.dim, c.inner + mixed + heads, bias=False)
        self.conv1d = nn.Conv1d(mixed, mixed, c.taps, groups=mixed, padding=c.taps - 1)
        self.norm = GatedRMSNorm(c.inner)
        self.out_proj = nn.Linear(c.inner, c.dim, bias=False)
        with torch.no_grad():
            self.A_log.copy_(torch.empty(heads).uniform_(1, 16).log())
            steps = torch.exp(torch.empty(heads).uniform_(-6.9, -2.3))  # 0.001 to 0.1
            self.dt_bias.copy_(steps + torch.log(-torch.expm1(-steps)))

    def forward(self, x: Tensor, packing: Packing) -> Tensor:
        z, mixed, dt = self.split(x)
        mixed = F.silu(self.convolution(mixed, packing.position))
        v, decay, k, q, skip = self.parts(mixed, dt)
        y = self.scan(v, decay, k, q, packing).to(x.dtype) + skip
        return self.out_proj(self.norm(y.flatten(-2), z))

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gate z [T, inner], what the convolution mixes [T, inner + 2 state], and dt [T, H]."""
        c = self.config
        sizes = [c.inner, c.inner + 2 * c.state, len(self.D)]
        z, mixed, dt = self.in_proj(x).split(sizes, -1)
        return z, mixed, dt

    def parts(self, mixed: Tensor, dt: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """v [T, H, P], decay [T, H], k and q [T, state], and D times the values [T, H, P]."""
        c = self.config
        values, k, q = mixed.split([c.inner, c.state, c.state], -1)
        values = values.unflatten(-1, (-1, c.head_dim))
        wide = torch.promote_types(dt.dtype, torch.float32)
        time = F.softplus(dt.to(wide) + self.dt_bias)
        skip = values * self.D[:, None]
        return values * time[..., None].to(values.dtype), -self.A_log.to(wide).exp() * time, k, q, skip

    def convolution(self, x: Tensor, position: Tensor) -> Tensor:
        """The causal depth-wise convolution inside each sequence: [T, channels] -> [T, channels]."""
        taps = self.conv1d.weight[:, 0].to(x.dtype)  # [channels, taps], the last one meets the token itself
        out = x * taps[:, -1]
        for back in range(1, taps.shape[1]):
            shifted = F.pad(x, (0, 0, back, 0))[: len(x)].masked_fill((position < back)[:, None], 0.0)
            out = out + shifted * taps[:, -1 - back]
        return out if self.conv1d.bias is None else out + self.conv1d.bias.to(x.dtype)

    def scan(self, v: Tensor, decay: Tensor, k: Tensor, q: Tensor, packing: Packing) -> Tensor:
        """y_i = sum over its sequence's j <= i of (q_i . k_j) exp(decay_{j+1} + .. + decay_i) v_j, [T, H, P].

        Chunk by chunk; the state holds what earlier chunks of the sequence sum to."""
        sequence, outs = packing.sequence, []
        wide = decay.dtype
        v, k, q = v.to(wide), k.to(wide), q.to(wide)
        state = v.new_zeros(v.shape[1], k.shape[1], v.shape[2])  # [H, state, P]
        before = torch.full_like(sequence[:1], -1)  # the sequence that the state belongs to
        for begin in range(0, len(v), self.config.chunk):
            at = slice(begin, begin + self.config.chunk)
            own, b = sequence[at], decay[at].cumsum(0)
            seen = (own[:, None] == own).tril()
            powers = (b[:, None] - b).masked_fill(~seen[..., None], -torch.inf).exp()  # [C, C, H]
            inside = torch.einsum("in,jn,ijh,jhp->ihp", q[at], k[at], powers, v[at])
            reach = b.exp() * (own == before)[:, None]
            outs.append(inside + torch.einsum("in,hnp->ihp", q[at], state) * reach[..., None])
            rest = (b[-1] - b).exp() * (own == own[-1])[:, None]
            inflow = torch.einsum("jn,jhp->hnp", k[at], v[at] * rest[..., None])
            state = state * reach[-1, :, None, None] + inflow
            before = own[-1:]
        return torch.cat(outs) if outs else v

    def make_state(self, batch: int, length: int) -> dict[str, Tensor]:
        """What `step` carries on: the last inputs of the convolution and the sums, [batch, ...]."""
        c, weight = self.config, self.in_proj.weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        heads = len(self.D)
        return {
            "inputs": weight.new_zeros(batch, c.taps - 1, c.inner + 2 * c.state),
            "sums": weight.new_zeros(batch, heads, c.state, c.head_dim, dtype=wide),
        }

    def step(self, x: Tensor, state: dict[str, Tensor], rows: Tensor) -> Tensor:
        """One more token for the samples `rows`: [rows, C] -> [rows, C]; their state is updated in place."""
        z, mixed, dt = self.split(x)
        window = torch.cat([state["inputs"][rows], mixed[:, None]], 1)  # [rows, taps, channels]
        state["inputs"][rows] = window[:, 1:]
        mixed = (window * self.conv1d.weight[:, 0].T).sum(1)
        if self.conv1d.bias is not None:
            mixed = mixed + self.conv1d.bias
        v, decay, k, q, skip = self.parts(F.silu(mixed), dt)
        y, state["sums"][rows] = self.scan_step(v, decay, k, q, state["sums"][rows])
        return self.out_proj(self.norm((y.to(x.dtype) + skip).flatten(-2), z))

    def scan_step(
        self, v: Tensor, decay: Tensor, k: Tensor, q: Tensor, sums: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One token of `scan`, a row per sample, from and to sums [rows, H, state, P]."""
        v, k, q = v.to(sums.dtype), k.to(sums.dtype), q.to(sums.dtype)
        sums = decay.exp()[..., None, None] * sums + k[:, None, :, None] * v[:, :, None]
        return torch.einsum("bn,bhnp->bhp", q, sums), sums
