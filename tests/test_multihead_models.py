"""The drop-in inside small models: a DiT block, a DETR-style decoder, an encoder and a decoder."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from models_support import CountOps, assert_same, double, redraw
from torch import Tensor, nn

import vicinal


class DiTBlock(nn.Module):
    """Peebles and Xie (arXiv:2212.09748): attention and MLP, shifted, scaled and gated by a condition."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False)
        self.attn = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False)
        self.mlp = nn.Sequential(
            nn.Linear(dim, 4 * dim), nn.GELU(approximate="tanh"), nn.Linear(4 * dim, dim)
        )
        self.modulation = nn.Linear(dim, 6 * dim)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        parts = self.modulation(nn.functional.silu(condition))[:, None].chunk(6, -1)
        shift1, scale1, gate1, shift2, scale2, gate2 = parts
        h = self.norm1(x) * (1 + scale1) + shift1
        x = x + gate1 * self.attn(h, h, h)[0]
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class DETRLayer(nn.Module):
    """Carion et al. (arXiv:2005.12872): positions are added to queries and keys, not to values."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(dim, heads)
        self.multihead_attn = nn.MultiheadAttention(dim, heads)
        self.norms = nn.ModuleList([nn.LayerNorm(dim) for _ in range(3)])
        self.linear1, self.linear2 = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor, memory: Tensor, query_pos: Tensor, pos: Tensor, padding: Tensor) -> Tensor:
        q = x + query_pos
        x = self.norms[0](x + self.self_attn(q, q, value=x)[0])
        found = self.multihead_attn(
            query=x + query_pos, key=memory + pos, value=memory, key_padding_mask=padding
        )
        x = self.norms[1](x + found[0])
        return self.norms[2](x + self.linear2(torch.relu(self.linear1(x))))


class DETRDecoder(nn.Module):
    """Two such layers over learned queries; [S, N, C] memory to [Q, N, C]."""

    def __init__(self, dim: int, heads: int, queries: int) -> None:
        super().__init__()
        self.query_embed = nn.Embedding(queries, dim)
        self.layers = nn.ModuleList([DETRLayer(dim, heads) for _ in range(2)])

    def forward(self, memory: Tensor, pos: Tensor, padding: Tensor) -> Tensor:
        query_pos = self.query_embed.weight[:, None].expand(-1, memory.shape[1], -1)
        x = query_pos  # from zeros, the first attention to oneself would have no gradient to its scores
        for layer in self.layers:
            x = layer(x, memory, query_pos, pos, padding)
        return x


def _lengths(n: int, length: int) -> Tensor:
    return torch.arange(length)[None] >= torch.tensor([length, length // 2, 1])[:n, None]


def _dit() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return DiTBlock(24, 3), (torch.randn(2, 20, 24), torch.randn(2, 24))


def _detr() -> tuple[nn.Module, tuple[Tensor, ...]]:
    memory, pos = torch.randn(30, 3, 32), torch.randn(30, 3, 32)
    return DETRDecoder(32, 4, 10), (memory, pos, _lengths(3, 30))


class Translator(nn.Module):
    """torch's own nn.Transformer with padded source and causal target."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Transformer(32, 4, 2, 2, 64, 0.0, batch_first=True)

    def forward(self, source: Tensor, target: Tensor, padding: Tensor) -> Tensor:
        causal = nn.Transformer.generate_square_subsequent_mask(target.shape[1], dtype=target.dtype)
        return self.model(
            source,
            target,
            tgt_mask=causal,
            src_key_padding_mask=padding,
            memory_key_padding_mask=padding,
            tgt_is_causal=True,
        )


def _translator() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Translator(), (torch.randn(3, 18, 32), torch.randn(3, 7, 32), _lengths(3, 18))


# name -> model and inputs, attention modules in it
MODELS: dict[str, tuple[Callable[[], tuple[nn.Module, tuple[Tensor, ...]]], int]] = {
    "dit": (_dit, 1),
    "detr": (_detr, 4),
    "encoder-decoder": (_translator, 6),
}


def results(model: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    model.zero_grad()
    leaves = [x.clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
    out = model(*leaves)
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)).sum().backward()
    found = {"output": out.detach()}
    found |= {f"input{i}": x.grad for i, x in enumerate(leaves) if x.grad is not None}
    return found | {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_every_gradient(name: str) -> None:
    torch.manual_seed(0)
    model, inputs = MODELS[name][0]()
    redraw(model)
    wide = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    expected = results(double(model), wide)
    fast = copy.deepcopy(model)
    report = vicinal.accelerate(fast)
    assert sum(row.module is nn.MultiheadAttention for row in report.replaced) == MODELS[name][1]
    assert_same(results(fast, inputs), expected, 1e-4)
    exact = copy.deepcopy(fast).double()
    assert_same(results(exact, wide), expected, 1e-11)
    with torch.no_grad(), CountOps() as counter:
        fast.eval()(*inputs)
    attention = vicinal.explain(vicinal.windowed_attention, *torch.zeros(3, 1, 4, 1, 4).unbind(0), 4)
    if attention.backend != "reference":
        assert counter.calls
