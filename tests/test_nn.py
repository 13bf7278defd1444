"""The modules against the window attention of Swin and against dense attention, and their state dicts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models_support import assert_same, double, gradients, library, redraw, rms_ratio
from torch import nn

from vicinal.models.swin import SwinTransformerBlock, WindowAttention, WindowAttentionV2
from vicinal.nn import WindowedAttention


@pytest.mark.parametrize("cosine", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("size", [(14, 21), (15, 11)])
@pytest.mark.parametrize("shift", [0, 3])
def test_equals_the_attention_of_a_swin_block(cosine: bool, size: tuple[int, int], shift: int) -> None:
    torch.manual_seed(0)
    block = SwinTransformerBlock(32, (28, 28), 2, 7, shift, version=2 if cosine else 1)
    redraw(block)
    module = WindowedAttention(32, (7, 7), 2, shift, cosine=cosine)
    module.load_state_dict(block.attn.state_dict(), strict=True)

    class Whole(nn.Module):
        """The block's attention alone, with the module's names of parameters."""

        def __init__(self) -> None:
            super().__init__()
            self.attn = block.attn

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return block.window_attention(x)

    x = torch.randn(2, *size, 32)
    block.double()
    expected = gradients(Whole(), x.double())
    actual = {
        name if name in expected else f"attn.{name}": value for name, value in gradients(module, x).items()
    }
    assert_same(actual, expected, 1e-5)


@pytest.mark.parametrize("cosine", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("qkv_bias", [False, True])
def test_state_dicts_load_both_ways(cosine: bool, qkv_bias: bool) -> None:
    official = WindowAttentionV2(32, 7, 2, qkv_bias) if cosine else WindowAttention(32, 7, 2, qkv_bias)
    module = WindowedAttention(32, (7, 7), 2, cosine=cosine, qkv_bias=qkv_bias)
    assert list(module.state_dict()) == list(official.state_dict())
    module.load_state_dict(official.state_dict(), strict=True)
    official.load_state_dict(module.state_dict(), strict=True)

    swin = library("timm.models.swin_transformer_v2" if cosine else "timm.models.swin_transformer")
    theirs = swin.WindowAttention(32, num_heads=2, window_size=(7, 7), qkv_bias=qkv_bias)
    module.load_state_dict(theirs.state_dict(), strict=True)
    module = WindowedAttention(32, (7, 7), 2, cosine=cosine, qkv_bias=qkv_bias, persistent_buffers=False)
    assert list(module.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(module.state_dict(), strict=True)
    module.load_state_dict(official.state_dict(), strict=True)


def test_a_missing_parameter_is_still_missing() -> None:
    module = WindowedAttention(32, (7, 7), 2)
    state = module.state_dict()
    del state["qkv.weight"]
    with pytest.raises(RuntimeError, match=r"qkv\.weight"):
        module.load_state_dict(state)


def _dense(module: WindowedAttention, x: torch.Tensor) -> torch.Tensor:
    """Attention over all tokens with the rules of windows, shift and bias by pairs; divisible sizes."""
    space = x.shape[1:-1]
    rank, h = len(space), module.num_heads
    coords = torch.cartesian_prod(*(torch.arange(L) for L in space)).view(-1, rank)
    window = torch.tensor(module.window_size)
    shift = torch.tensor(module.windows.shift)
    rolled = (coords - shift) % torch.tensor(space)
    same = (rolled // window)[:, None] == (rolled // window)[None, :]
    wrapped = coords < shift
    region = (wrapped[:, None] == wrapped[None, :]).all(-1)
    offset = (rolled % window)[:, None] - (rolled % window)[None, :] + window - 1
    index = torch.zeros(offset.shape[:2], dtype=torch.long)
    for axis in range(rank):
        index = index * (2 * module.window_size[axis] - 1) + offset[..., axis].clamp(
            0, 2 * module.window_size[axis] - 2
        )
    q, k, v = module.qkv(x).flatten(1, -2).unflatten(-1, (3, h, -1)).permute(2, 0, 3, 1, 4)
    logits = module.scale * q @ k.transpose(-2, -1)
    if module.relative_bias:
        logits = logits + module.relative_position_bias_table[index].permute(2, 0, 1)
    logits = logits + torch.where(region, 0.0, -100.0)
    logits = logits.masked_fill(~same.all(-1), float("-inf"))
    out = (logits.softmax(-1) @ v).transpose(1, 2).flatten(-2).view_as(x)
    return module.proj(out)


@pytest.mark.parametrize("relative_bias", [False, True])
@pytest.mark.parametrize(
    ("space", "window", "shift"),
    [((12,), (4,), 1), ((6, 8), (3, 2), (1, 0)), ((4, 6, 4), (2, 3, 2), (1, 1, 0))],
    ids=str,
)
def test_any_rank_against_dense_attention(space: Any, window: Any, shift: Any, relative_bias: bool) -> None:
    torch.manual_seed(0)
    module = redraw(WindowedAttention(10, window, 2, shift, relative_bias=relative_bias, qk_scale=0.3))
    x = torch.randn(2, *space, 10)

    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.m = double(module)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return _dense(self.m, x)

    expected = {name.replace("m.", "", 1): value for name, value in gradients(Dense(), x.double()).items()}
    assert_same(gradients(module, x), expected, 1e-5)


def test_key_padding_mask_hides_keys() -> None:
    module = redraw(WindowedAttention(16, (4,), 2, mask_value=float("-inf")))
    x = torch.randn(1, 8, 16)
    ignored = torch.zeros(1, 8, dtype=torch.bool)
    ignored[0, 1] = True
    other = x.clone()
    other[0, 1] = 9.0
    seen = torch.arange(8) != 1
    assert torch.equal(module(x, ignored)[:, seen], module(other, ignored)[:, seen])
    assert rms_ratio(module(x)[:, seen], module(other)[:, seen]) > 0.01


def test_dropout_only_while_training() -> None:
    module = redraw(WindowedAttention(16, (4,), 2, attn_drop=0.5, proj_drop=0.5))
    x = torch.randn(2, 8, 16)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="dim is 30, which num_heads = 4 does not divide"):
        WindowedAttention(30, (7, 7), 4)
    with pytest.raises(ValueError, match="qk_scale must be None with cosine=True"):
        WindowedAttention(32, (7, 7), 4, cosine=True, qk_scale=1.0)


@pytest.mark.parametrize("size", [(14, 21), (15, 11)])
def test_contextual_tables_are_those_of_segment_anything(size: tuple[int, int]) -> None:
    """timm pads the map with zeros, partitions it and adds the products with the tables to the scores."""
    sam = library("timm.models.vision_transformer_sam")
    theirs = sam.Attention(32, num_heads=2, use_rel_pos=True, input_size=(7, 7))
    redraw(theirs)
    ours = WindowedAttention(32, (7, 7), 2, relative_bias=False, contextual=True)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict(), strict=True)

    class Partitioned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = theirs

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            parts, padded = sam.window_partition(x, 7)
            return sam.window_unpartition(self.attn(parts), 7, x.shape[1:3], padded)

    x = torch.randn(2, *size, 32)
    actual = {n if n in ("input", "output") else f"attn.{n}": t for n, t in gradients(ours, x).items()}
    expected = gradients(Partitioned().double(), x.double())
    assert_same(
        {n if n in expected else n.removeprefix("attn."): t for n, t in actual.items()}, expected, 1e-5
    )
    theirs.float().load_state_dict(ours.state_dict(), strict=True)
