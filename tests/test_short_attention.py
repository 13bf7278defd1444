"""Linformer and Agent attention against their formulas, written with explicit matrices."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from models_support import gradients, redraw, rms_ratio
from torch import Tensor

from vicinal.nn import AgentAttention, LinformerAttention


@pytest.mark.parametrize("tokens", [1, 50, 64])
@pytest.mark.parametrize("options", [{}, {"share_kv": True}, {"one_kv_head": True, "bias": True}])
def test_linformer(options: dict[str, bool], tokens: int) -> None:
    layer = redraw(LinformerAttention(24, 3, max_len=64, k=10, **options)).double()
    x = torch.randn(2, tokens, 24, dtype=torch.float64)
    keys, values = layer.to_k(x), layer.to_v(x)
    e = layer.proj_k[:tokens]
    f = e if layer.proj_v is None else layer.proj_v[:tokens]
    outs = []
    for h in range(3):
        part = slice(8 * h, 8 * h + 8)
        own = slice(0, 8) if "one_kv_head" in options else part
        weights = layer.to_q(x)[..., part] @ (e.T @ keys[..., own]).mT / math.sqrt(8)
        outs.append(weights.softmax(-1) @ (f.T @ values[..., own]))
    assert rms_ratio(layer(x), layer.to_out(torch.cat(outs, -1))) < 1e-12


def test_linformer_starts_within_its_bounds() -> None:
    layer = LinformerAttention(16, 2, max_len=1000, k=256)
    assert float(layer.proj_k.detach().abs().max()) <= 1 / 16
    assert float(layer.proj_k.detach().std()) == pytest.approx(1 / 16 / math.sqrt(3), rel=0.01)


@pytest.mark.parametrize("size", [(7, 7), (9, 13), (3, 4)])
def test_agent(size: tuple[int, int]) -> None:
    layer = redraw(AgentAttention(24, 3, agents=2, bias_size=4)).double()
    H, W = size
    x = torch.randn(2, H, W, 24, dtype=torch.float64)
    q, k, v = layer.qkv(x).chunk(3, -1)
    rows = [slice(i * H // 2, -(-(i + 1) * H // 2)) for i in range(2)]
    cols = [slice(i * W // 2, -(-(i + 1) * W // 2)) for i in range(2)]
    agents = torch.stack([q[:, r, c].mean((1, 2)) for r in rows for c in cols], 1)  # [2, 4, 24]
    outs = []
    for h in range(3):
        part = slice(8 * h, 8 * h + 8)

        def bias(table: Tensor, head: int = h) -> Tensor:
            return F.interpolate(table, size, mode="bilinear")[head].flatten(1)

        queries, keys, values = (y.flatten(1, 2)[..., part] for y in (q, k, v))
        a = agents[..., part]
        gathered = (a @ keys.mT / math.sqrt(8) + bias(layer.agent_bias)).softmax(-1) @ values
        weights = (queries @ a.mT / math.sqrt(8) + bias(layer.token_bias).mT).softmax(-1)
        outs.append(weights @ gathered)
    local = layer.dwc(v.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    expected = layer.proj(torch.cat(outs, -1).view(2, H, W, 24) + local)
    assert rms_ratio(layer(x), expected) < 1e-12


@pytest.mark.parametrize("name", ["linformer", "agent"])
def test_every_parameter_matters(name: str) -> None:
    if name == "linformer":
        layer, x = LinformerAttention(16, 2, max_len=20, k=6), torch.randn(2, 20, 16)
    else:
        layer, x = AgentAttention(16, 2), torch.randn(2, 9, 11, 16)  # type: ignore[assignment]
    for key, value in gradients(redraw(layer), x).items():
        assert value.abs().max() > 0, key


def test_refusals() -> None:
    with pytest.raises(ValueError, match="dim is 10, which num_heads = 3 does not divide"):
        LinformerAttention(10, 3, max_len=4)
    with pytest.raises(ValueError, match="max_len and k are 0 and 4"):
        LinformerAttention(8, 2, max_len=0, k=4)
    with pytest.raises(ValueError, match="x has 5 tokens; max_len is 4"):
        LinformerAttention(8, 2, max_len=4)(torch.zeros(1, 5, 8))
    with pytest.raises(ValueError, match="agents and bias_size are 0 and 7"):
        AgentAttention(8, 2, agents=0)
