"""A causal language model whose layers see different stretches of the past, in plain PyTorch.

Sliding windows as in Meshtron (Hao et al., 2024, arXiv:2412.09548), blocks of tokens that share their past
and a few layers that see all of it as in MASFormer (Zhang et al., 2023, arXiv:2310.12442). Rotary positions,
grouped key heads, gated MLPs, no biases. The parameters' names are our own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["CausalAttention", "CausalLM", "CausalLMConfig", "KVCache", "Scope"]


@dataclass(frozen=True)
class Scope:
    """The past that a layer sees: `window` keys up to the token's own or, with `block` > 1, up to the end of
    its block of that many tokens (never past the token itself); None: all."""

    window: int | None
    block: int = 1

    def __post_init__(self) -> None:
        if self.block < 1 or (self.window is None and self.block > 1):
            raise ValueError(f"block is {self.block}; it must be >= 1, and 1 where the window is None")
        if self.window is not None and self.window < self.block:
            raise ValueError(f"window is {self.window}; it must be >= block = {self.block}")

    def visible(self, queries: Tensor, keys: Tensor) -> Tensor:
        """bool [queries, keys] of positions: whether the query sees the key."""
        past = keys <= queries[:, None]
        if self.window is None:
            return past
        leader = queries // self.block * self.block + self.block - 1
        return past & (keys > leader[:, None] - self.window)


@dataclass(frozen=True)
class CausalLMConfig:
    """Sizes of a causal language model; `scopes` of its layers, in turn until there are `depth`."""

    vocab_size: int = 256
    dim: int = 512
    depth: int = 12
    num_heads: int = 16
    num_kv_heads: int = 16
    scopes: tuple[Scope, ...] = (Scope(512),)
    mlp_ratio: float = 8 / 3
    rope_base: float = 10000.0


class KVCache:
    """The keys and values [B, L, h, d] of one layer so far, all of them."""

    def __init__(self) -> None:
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    @property
    def length(self) -> int:
        return 0 if self.k is None else self.k.shape[1]

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add [B, T, h, d] at the end; everything so far."""
        self.k = k if self.k is None else torch.cat([self.k, k], 1)
        self.v = v if self.v is None else torch.cat([self.v, v], 1)
        return self.k, self.v


class CausalAttention(nn.Module):
    """softmax(q k^T / sqrt(d)) v over the past within `scope`; [B, T, C] -> [B, T, C]."""

    def __init__(self, config: CausalLMConfig, scope: Scope) -> None:
        super().__init__()
        self.scope = scope
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim = config.dim // config.num_heads
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(
            config.dim, (config.num_heads + 2 * config.num_kv_heads) * self.head_dim, bias=False
        )
        self.proj = nn.Linear(config.num_heads * self.head_dim, config.dim, bias=False)

    def forward(self, x: Tensor, rotation: Tensor, cache: Any = None) -> Tensor:
        heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        q, k, v = self.qkv(x).unflatten(-1, (-1, self.head_dim)).split(heads, dim=2)
        q, k = rotate(q, rotation), rotate(k, rotation)
        out = self.attention(q, k, v) if cache is None else self.decode(q, k, v, cache)
        return self.proj(out.flatten(-2))

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [B, T, h, d], k and v [B, L, hkv, d], the queries being the last T of L tokens -> [B, T, h, d],
        with a dense mask."""
        groups = self.num_heads // self.num_kv_heads
        keys = torch.arange(k.shape[1], device=q.device)
        mask = self.scope.visible(keys[-q.shape[1] :], keys)
        k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
        scores = self.scale * torch.einsum("bqhd,bkhd->bhqk", q, k)
        weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        return torch.einsum("bhqk,bkhd->bqhd", weights, v)

    def make_cache(self, batch: int, length: int) -> Any:
        """An empty cache for sequences of at most `length` tokens."""
        return KVCache()

    def decode(self, q: Tensor, k: Tensor, v: Tensor, cache: Any) -> Tensor:
        """`attention` of T more tokens after those of the cache, which takes theirs up."""
        return self.attention(q, *cache.append(k, v))


def rotation_of(positions: Tensor, dim: int, base: float) -> Tensor:
    """[T, 1, dim / 2, 2] cosines and sines of the rotary positions."""
    rates = base ** (-torch.arange(0, dim, 2, device=positions.device, dtype=torch.float64) / dim)
    angles = positions[:, None, None].double() * rates
    return torch.stack([angles.cos(), angles.sin()], -1)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn the halves of x [B, T, h, d] against each other by the angles of their positions."""
    cos, sin = rotation.to(x.dtype).unbind(-1)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class GatedMlp(nn.Module):
    """down(silu(gate(x)) * up(x)); [..., C] -> [..., C]."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, hidden, bias=False)
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class CausalBlock(nn.Module):
    """Attention and a gated MLP with residuals; [B, T, C] -> [B, T, C]."""

    def __init__(self, config: CausalLMConfig, scope: Scope) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(config.dim, eps=1e-6)
        self.attn = CausalAttention(config, scope)
        self.norm2 = nn.RMSNorm(config.dim, eps=1e-6)
        self.mlp = GatedMlp(config.dim, int(config.dim * config.mlp_ratio))

    def forward(self, x: Tensor, rotation: Tensor, cache: Any = None) -> Tensor:
        x = x + self.attn(self.norm1(x), rotation, cache)
        return x + self.mlp(self.norm2(x))


class CausalLM(nn.Module):
    """Next-token logits; token ids [B, T] -> [B, T, vocab_size].

    With a list of caches from `make_caches`, the T tokens continue those of earlier calls.
    """

    def __init__(self, config: CausalLMConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        scopes = [config.scopes[i % len(config.scopes)] for i in range(config.depth)]
        self.blocks = nn.ModuleList(CausalBlock(config, scope) for scope in scopes)
        self.norm = nn.RMSNorm(config.dim, eps=1e-6)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def make_caches(self, batch: int, length: int) -> list[Any]:
        """An empty cache per layer, for sequences of at most `length` tokens."""
        return [block.attn.make_cache(batch, length) for block in self.blocks]  # type: ignore[operator, union-attr]

    def forward(self, tokens: Tensor, caches: list[Any] | None = None) -> Tensor:
        start = 0 if caches is None else caches[0].length
        positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        config = self.config
        rotation = rotation_of(positions, config.dim // config.num_heads, config.rope_base)
        x = self.embed(tokens)
        for i, block in enumerate(self.blocks):
            x = block(x, rotation, None if caches is None else caches[i])
        return self.head(self.norm(x))

    @torch.no_grad()
    def generate(self, tokens: Tensor, count: int) -> Tensor:
        """Append the `count` most likely tokens, one at a time; [B, T] -> [B, T + count]."""
        caches = self.make_caches(tokens.shape[0], tokens.shape[1] + count)
        last = tokens
        for _ in range(count):
            last = self(last, caches)[:, -1].argmax(-1, keepdim=True)
            tokens = torch.cat([tokens, last], 1)
        return tokens
