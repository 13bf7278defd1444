"""The reference CSWin model against dense attention with a mask, from the definition of the stripes."""

from __future__ import annotations

import pytest
import torch
from models_support import gradients, redraw, rms_ratio
from torch import Tensor

from vicinal.models import CSWinConfig, CSWinTransformer, cswin_base, cswin_small, cswin_test, cswin_tiny
from vicinal.models.cswin import CSWinBlock, LePEAttention, stripe_partition, stripe_reverse


def _dense_branch(attn: LePEAttention, qkv: Tensor) -> Tensor:
    """One branch as attention over all tokens of the padded map with a mask, and LePE by pairs of pixels."""
    H, W = qkv.shape[2:4]
    height, width = {0: (H, attn.split_size), 1: (attn.split_size, W), -1: (H, W)}[attn.axis]
    rows, cols = -(-H // height) * height, -(-W // width) * width
    top, left = (rows - H) // 2, (cols - W) // 2
    padded = qkv.new_zeros(3, qkv.shape[1], rows, cols, qkv.shape[-1])
    padded[:, :, top : top + H, left : left + W] = qkv
    y, x = torch.arange(rows * cols) // cols, torch.arange(rows * cols) % cols
    stripe = y // height * cols + x // width
    same = stripe[:, None] == stripe[None, :]
    q, k, v = padded.flatten(2, 3).unflatten(-1, (attn.num_heads, -1)).transpose(2, 3).unbind(0)
    logits = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    out = logits.masked_fill(~same, float("-inf")).softmax(-1) @ v
    out = out.transpose(1, 2).flatten(2)
    dy, dx = y[None, :] - y[:, None], x[None, :] - x[:, None]
    near = same & (dy.abs() <= 1) & (dx.abs() <= 1)
    kernel = attn.get_v.weight[:, 0][:, dy.clamp(-1, 1) + 1, dx.clamp(-1, 1) + 1] * near  # [C, N, N]
    lepe = torch.einsum("cnm,bmc->bnc", kernel, padded[2].flatten(1, 2)) + attn.get_v.bias
    return (out + lepe).unflatten(1, (rows, cols))[:, top : top + H, left : left + W]


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("size", [(8, 6), (5, 7), (7, 11), (3, 3)])
@pytest.mark.parametrize("split_size", [1, 2, 4])
def test_a_branch_is_masked_dense_attention(axis: int, size: tuple[int, int], split_size: int) -> None:
    attn = redraw(LePEAttention(6, axis, split_size, 2)).double()
    qkv = torch.randn(3, 2, *size, 6, dtype=torch.float64)
    assert rms_ratio(attn(qkv), _dense_branch(attn, qkv)) < 1e-12


def test_first_heads_use_vertical_stripes() -> None:
    """With stripes one token wide, the first half of the channels mixes columns, the second half rows."""
    block = redraw(CSWinBlock(8, 2, 1, False))
    block.proj.weight.data = torch.eye(8)
    x = torch.randn(1, 4, 5, 8, requires_grad=True)
    for channel, axis in ((0, 2), (7, 1)):
        (grad,) = torch.autograd.grad(block.attention(x)[0, 1, 2, channel], x)
        touched = grad[0].abs().sum(-1) > 0
        expected = torch.zeros(4, 5, dtype=torch.bool)
        expected[(slice(None), 2) if axis == 2 else (1, slice(None))] = True
        assert torch.equal(touched, expected)


def test_partition_and_reverse_are_inverse() -> None:
    x = torch.arange(2 * 6 * 8 * 3).view(2, 6, 8, 3)
    stripes = stripe_partition(x, 3, 4)
    assert stripes.shape == (8, 3, 4, 3)
    assert torch.equal(stripes[1], x[0, :3, 4:])
    assert torch.equal(stripe_reverse(stripes, 6, 8), x)


def test_names_are_the_official_ones() -> None:
    state = CSWinTransformer(cswin_test()).state_dict()
    names = list(state)
    assert names[:4] == [f"stage1_conv_embed.{n}" for n in ("0.weight", "0.bias", "2.weight", "2.bias")]
    block = [name.removeprefix("stage2.0.") for name in names if name.startswith("stage2.0.")]
    parts = ["qkv", "norm1", "proj", "attns.0.get_v", "attns.1.get_v", "mlp.fc1", "mlp.fc2", "norm2"]
    assert block == [f"{part}.{kind}" for part in parts for kind in ("weight", "bias")]
    assert state["stage2.0.attns.0.get_v.weight"].shape == (16, 1, 3, 3)
    assert "stage4.0.attns.1.get_v.weight" not in state  # one branch in the last stage
    assert state["merge1.conv.weight"].shape == (32, 16, 3, 3)
    order = [name.split(".")[0] for name in names]
    stages = ["stage1", "merge1", "stage2", "merge2", "stage3", "merge3", "stage4", "norm", "head"]
    assert list(dict.fromkeys(order)) == ["stage1_conv_embed", *stages]


@pytest.mark.parametrize(
    ("config", "millions"), [(cswin_tiny(), 23), (cswin_small(), 35), (cswin_base(), 78)], ids=["T", "S", "B"]
)
def test_published_parameter_counts(config: CSWinConfig, millions: float) -> None:
    with torch.device("meta"):
        model = CSWinTransformer(config)
    assert abs(sum(p.numel() for p in model.parameters()) / 1e6 - millions) < 1


@pytest.mark.parametrize("size", [(64, 64), (60, 44)])
def test_every_parameter_matters(size: tuple[int, int]) -> None:
    model = redraw(CSWinTransformer(cswin_test()))
    for name, value in gradients(model, torch.randn(2, 3, *size)).items():
        assert value.abs().max() > 1e-6, name
