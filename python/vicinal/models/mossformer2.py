"""The MossFormer2 stack in plain PyTorch: gated joint attention and gated dilated memory, alternating.

Each layer adds two sublayers to a sequence of features. The first (Zhao and Ma, MossFormer, arXiv:2302.11824;
after FLASH, arXiv:2202.10447) attends quadratically inside groups of tokens and linearly over all of them,
with one set of weights for two matrices of values that then gate each other. The second (Zhao et al.,
MossFormer2, arXiv:2312.11825) is a feed-forward memory: two depth-wise convolutions of 39 taps, gated.

Parameters carry the names of the official release below `mask_net.mdl.intra_mdl`; the rotary frequencies are
buffers here."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["JointAttentionLayer", "MossFormer2", "MossFormer2Config"]


@dataclass(frozen=True)
class MossFormer2Config:
    """Sizes of a MossFormer2 stack."""

    dim: int = 512
    depth: int = 24
    group_size: int = 256
    query_key_dim: int = 128
    memory_dim: int = 256
    causal: bool = False
    dropout: float = 0.1


class ScaleNorm(nn.Module):
    """x / max(|x| / sqrt(C), 1e-5) * g with one trained number g."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = dim**-0.5
        self.g = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.norm(dim=-1, keepdim=True) * self.scale).clamp(min=1e-5) * self.g


class DepthwiseConv(nn.Module):
    """Depth-wise convolution over tokens without bias: [B, C, N] -> [B, C, N]."""

    def __init__(self, dim: int, taps: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(dim, dim, taps, padding=taps // 2, groups=dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class ChannelsFirst(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


class ConvModule(nn.Module):
    """x plus a depth-wise convolution of 17 taps: [B, N, C] -> [B, N, C]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.sequential = nn.Sequential(ChannelsFirst(), DepthwiseConv(dim, 17))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.sequential(x).transpose(1, 2)


class Projection(nn.Module):
    """Norm, linear layer, SiLU, convolution, dropout: [B, N, C] -> [B, N, out]."""

    def __init__(self, dim: int, out: int, norm: nn.Module, dropout: float) -> None:
        super().__init__()
        parts = (norm, nn.Linear(dim, out), nn.SiLU(), ConvModule(out), nn.Dropout(dropout))
        self.mdl = nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Tensor:
        return self.mdl(x)


class OffsetScale(nn.Module):
    """gamma * x + beta, `heads` times: [B, N, C] -> heads tensors of the same shape."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(0.02 * torch.randn(heads, dim))
        self.beta = nn.Parameter(torch.zeros(heads, dim))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (x[..., None, :] * self.gamma + self.beta).unbind(-2)


class Rotary(nn.Module):
    """Rotates pairs (2i, 2i + 1) of the first channels by token * freqs[i]: [.., N, C] -> [.., N, C]."""

    freqs: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("freqs", 1.0 / 10000 ** (torch.arange(0, dim, 2)[: dim // 2].float() / dim))

    def forward(self, x: Tensor) -> Tensor:
        angle = torch.arange(x.shape[-2], device=x.device, dtype=self.freqs.dtype)[:, None] * self.freqs
        turned, rest = x.split([2 * len(self.freqs), x.shape[-1] - 2 * len(self.freqs)], -1)
        even, odd = turned.unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = angle.cos(), angle.sin()
        turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)
        return torch.cat([turned, rest], -1).to(x.dtype)


class JointAttentionLayer(nn.Module):
    """MossFormer's gated joint attention with its projections, plus its input: [B, N, C] -> [B, N, C]."""

    def __init__(self, config: MossFormer2Config, rotary: Rotary) -> None:
        super().__init__()
        c = config
        self.group_size = c.group_size
        self.causal = c.causal
        self.rotary_pos_emb = rotary
        self.dropout = nn.Dropout(c.dropout)
        self.to_hidden = Projection(c.dim, 4 * c.dim, ScaleNorm(c.dim), c.dropout)
        self.to_qk = Projection(c.dim, c.query_key_dim, ScaleNorm(c.dim), c.dropout)
        self.qk_offset_scale = OffsetScale(c.query_key_dim, 4)
        self.to_out = Projection(2 * c.dim, c.dim, ScaleNorm(2 * c.dim), c.dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """mask: [B, N] bool, True = a token that counts (the opposite of a key padding mask)."""
        shifted, passed = x.chunk(2, -1)
        mixed = torch.cat([F.pad(shifted, (0, 0, 1, -1)), passed], -1)
        v, u = self.to_hidden(mixed).chunk(2, -1)
        quad_q, lin_q, quad_k, lin_k = map(self.rotary_pos_emb, self.qk_offset_scale(self.to_qk(mixed)))
        return x + self.to_out(self.attention(quad_q, quad_k, lin_q, lin_k, v, u, mask))

    def attention(
        self,
        quad_q: Tensor,
        quad_k: Tensor,
        lin_q: Tensor,
        lin_k: Tensor,
        v: Tensor,
        u: Tensor,
        mask: Tensor | None,
    ) -> Tensor:
        """The gated result [B, N, 2C]: u attended times v, times the sigmoid of v attended times u."""
        n, g = v.shape[1], self.group_size
        if mask is not None:
            lin_k = lin_k.masked_fill(~mask[..., None], 0.0)
        keep = torch.ones(v.shape[:2], dtype=torch.bool, device=v.device) if mask is None else mask
        keep = F.pad(keep, (0, -n % g)).unflatten(1, (-1, 1, g))
        padded = (F.pad(x, (0, 0, 0, -n % g)).unflatten(1, (-1, g)) for x in (quad_q, quad_k, lin_q, lin_k))
        quad_q, quad_k, lin_q, lin_k = padded
        weights = self.dropout(F.relu(quad_q @ quad_k.mT / g).square()).masked_fill(~keep, 0.0)
        if self.causal:
            weights = weights.tril()
        outs = []
        for w in (v, u):
            w = F.pad(w, (0, 0, 0, -n % g)).unflatten(1, (-1, g))
            memory = lin_k.mT @ w / (g if self.causal else n)
            if self.causal:
                memory = F.pad(memory.cumsum(1), (0, 0, 0, 0, 1, -1))
            else:
                memory = memory.sum(1, keepdim=True)
            outs.append((weights @ w + lin_q @ memory).flatten(1, 2)[:, :n])
        return outs[1] * v * torch.sigmoid(outs[0] * u)


class DilatedMemory(nn.Module):
    """Two depth-wise convolutions of 39 taps, dilations 1 and 2, the second of both: [B, C, N, 1] -> same."""

    taps = 39

    def __init__(self, dim: int) -> None:
        super().__init__()
        for i in range(2):
            taps = (self.taps, 1)
            conv = nn.Conv2d((i + 1) * dim, dim, taps, dilation=(i + 1, 1), groups=dim, bias=False)
            setattr(self, f"conv{i + 1}", conv)
            setattr(self, f"norm{i + 1}", nn.InstanceNorm2d(dim, affine=True))
            setattr(self, f"prelu{i + 1}", nn.PReLU(dim))

    def forward(self, x: Tensor) -> Tensor:
        out, seen = x, x
        for i in range(2):
            reach = (self.taps // 2) * (i + 1)
            out = getattr(self, f"conv{i + 1}")(F.pad(seen, (0, 0, reach, reach)))
            out = getattr(self, f"prelu{i + 1}")(getattr(self, f"norm{i + 1}")(out))
            seen = torch.cat([out, seen], 1)
        return out


class Memory(nn.Module):
    """x plus a dilated memory of a bottleneck of x: [B, N, C] -> [B, N, C]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim)
        self.project = nn.Linear(dim, dim, bias=False)
        self.conv = DilatedMemory(dim)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.project(F.relu(self.linear(x)))
        return x + self.conv(hidden.mT[..., None])[..., 0].mT


class GatedMemory(nn.Module):
    """x + to_v(x) * memory(to_u(x)): [B, N, C] -> [B, N, C]."""

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.to_u = Projection(dim, dim, nn.LayerNorm(dim), dropout)
        self.to_v = Projection(dim, dim, nn.LayerNorm(dim), dropout)
        self.fsmn = Memory(dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.to_v(x) * self.fsmn(self.to_u(x))


class MemoryBlock(nn.Module):
    """The gated memory between two point-wise convolutions, plus its input: [B, N, C] -> [B, N, C]."""

    def __init__(self, config: MossFormer2Config) -> None:
        super().__init__()
        inner = config.memory_dim
        self.conv1 = nn.Sequential(nn.Conv1d(config.dim, inner, 1), nn.PReLU())
        self.norm1 = nn.LayerNorm(inner)
        self.gated_fsmn = GatedMemory(inner, config.dropout)
        self.norm2 = nn.LayerNorm(inner)
        self.conv2 = nn.Conv1d(inner, config.dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm1(self.conv1(x.mT).mT)
        return x + self.conv2(self.norm2(self.gated_fsmn(hidden)).mT).mT


class MossFormer2Layers(nn.Module):
    """Attention and memory, `depth` times."""

    def __init__(self, config: MossFormer2Config) -> None:
        super().__init__()
        rotary = Rotary(min(32, config.query_key_dim))
        self.fsmn = nn.ModuleList(MemoryBlock(config) for _ in range(config.depth))
        self.layers = nn.ModuleList(JointAttentionLayer(config, rotary) for _ in range(config.depth))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for attention, memory in zip(self.layers, self.fsmn):
            x = memory(attention(x, mask))
        return x


class MossFormer2(nn.Module):
    """The stack and a final norm; [B, N, C] -> [B, N, C].

    Any number of tokens N. `mask` [B, N], True = a token that counts, keeps others from being attended to.
    """

    def __init__(self, config: MossFormer2Config) -> None:
        super().__init__()
        self.config = config
        self.mossformerM = MossFormer2Layers(config)
        self.norm = nn.LayerNorm(config.dim, eps=1e-6)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.norm(self.mossformerM(x, mask))
