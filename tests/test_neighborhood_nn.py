"""The modules of neighborhood attention against attention by pairs of tokens, and their state dicts."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from models_support import assert_same, double, gradients, redraw, rms_ratio
from neighborhood_pairs import ByPairs
from torch import nn

from vicinal.nn import NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D

CLASSES: list[Any] = [NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D]


PROBLEMS: list[tuple[tuple[int, ...], Any, dict[str, Any]]] = [
    ((13,), 5, {"dilation": 2}),
    ((16,), (4,), {"stride": 2}),
    ((12,), 4, {"stride": 3, "is_causal": True, "qk_scale": 0.0}),
    ((9, 7), 3, {"dilation": (3, 2), "qkv_bias": False}),
    ((8, 7), (4, 7), {"is_causal": (True, False), "qk_scale": 0.4}),
    ((4, 5, 6), (3, 2, 3), {"dilation": (1, 2, 2), "is_causal": (False, False, True)}),
]


@pytest.mark.parametrize("rel_pos_bias", [False, True])
@pytest.mark.parametrize(("space", "kernel", "options"), PROBLEMS, ids=str)
def test_equals_attention_by_pairs(space: Any, kernel: Any, options: Any, rel_pos_bias: bool) -> None:
    torch.manual_seed(0)
    make = CLASSES[len(space) - 1]
    module = redraw(make(6, 2, kernel, rel_pos_bias=rel_pos_bias, **options))
    x = torch.randn(2, *space, 6)
    expected = gradients(ByPairs(double(module)), x.double())
    expected = {name.replace("m.", "", 1): value for name, value in expected.items()}
    if options.get("qk_scale") == 0.0 and not rel_pos_bias:  # every score is 0
        assert expected["qkv.weight.grad"][:12].abs().max() == 0
    assert_same(gradients(module, x), expected, 1e-5)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_names_shapes_and_initial_values(rank: int) -> None:
    module = CLASSES[rank - 1](32, 4, 3, rel_pos_bias=True)
    shapes = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    assert shapes == {
        "rpb": (4, *[5] * rank),
        "qkv.weight": (96, 32),
        "qkv.bias": (96,),
        "proj.weight": (32, 32),
        "proj.bias": (32,),
    }
    assert set(CLASSES[rank - 1](32, 4, 3, qkv_bias=False).state_dict()) == {
        "qkv.weight",
        "proj.weight",
        "proj.bias",
    }
    big = NeighborhoodAttention2D(32, 4, 33, rel_pos_bias=True).state_dict()["rpb"]
    assert abs(float(big.std()) - 0.02) < 0.001
    assert 0.05 < float(big.abs().max()) < 0.2


@pytest.mark.parametrize("kernel", [(2, 1), ((3, 0),), 4])
def test_truncated_borders_drop_what_hangs_over(kernel: Any) -> None:
    module = redraw(NeighborhoodAttention1D(8, 2, kernel, border="truncate", rel_pos_bias=True))
    assert module.rpb is not None
    assert module.rpb.shape == (2, 7)
    left, right = (2, 1) if kernel in (4, (2, 1)) else (3, 0)
    x = torch.randn(1, 9, 8, requires_grad=True)
    for i in range(9):
        (grad,) = torch.autograd.grad(module(x)[0, i].sum(), x)
        seen = grad[0].abs().sum(-1) > 0
        assert seen.nonzero().flatten().tolist() == list(range(max(i - left, 0), min(i + right, 8) + 1))


def test_small_inputs_are_padded_before_the_projection() -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"dilation": (2, 1), "rel_pos_bias": True}
    module = redraw(NeighborhoodAttention2D(8, 2, 5, pad_small_inputs=True, **options))
    x = torch.randn(2, 7, 3, 8)
    padded = nn.functional.pad(x, (0, 0, 0, 2, 0, 3))
    plain = NeighborhoodAttention2D(8, 2, 5, **options)
    plain.load_state_dict(module.state_dict(), strict=True)
    assert torch.equal(module(x), plain(padded)[:, :7, :3])
    assert torch.equal(module(padded), plain(padded))
    with pytest.raises(ValueError, match="kernel_size"):
        plain(x)

    ignored = torch.zeros(2, 7, 3, dtype=torch.bool)
    ignored[:, 2, 1] = True
    other = x.clone()
    other[:, 2, 1] = 9.0
    seen = ~ignored[0]
    assert torch.equal(module(x, ignored)[:, seen], module(other, ignored)[:, seen])
    assert rms_ratio(module(x)[:, seen], module(other)[:, seen]) > 0.01


def test_dropout_only_while_training() -> None:
    module = redraw(NeighborhoodAttention1D(16, 2, 4, attn_drop=0.5, proj_drop=0.5))
    x = torch.randn(2, 8, 16)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="embed_dim is 30, which num_heads = 4 does not divide"):
        NeighborhoodAttention2D(30, 4, 7)
    with pytest.raises(ValueError, match="kernel_size is \\(7, 7, 7\\)"):
        NeighborhoodAttention2D(32, 4, (7, 7, 7))
    with pytest.raises(ValueError, match="pad_small_inputs=True needs border"):
        NeighborhoodAttention2D(32, 4, 7, border="truncate", pad_small_inputs=True)
    with pytest.raises(ValueError, match="rel_pos_bias=True needs a limited kernel_size"):
        NeighborhoodAttention1D(32, 4, (-1, 0), border="truncate", rel_pos_bias=True)
    with pytest.raises(ValueError, match=r"x must be \[B, L1, L2, 32\], got \[1, 9, 32\]"):
        NeighborhoodAttention2D(32, 4, 7)(torch.zeros(1, 9, 32))


def test_copies_and_pickles() -> None:
    module = redraw(NeighborhoodAttention2D(8, 2, 3, dilation=(1, 2), rel_pos_bias=True))
    x = torch.randn(2, 7, 6, 8)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x), module(x))


def test_compiled_in_one_graph() -> None:
    module = redraw(NeighborhoodAttention2D(8, 2, 3, dilation=2, rel_pos_bias=True, pad_small_inputs=True))
    compiled: Any = torch.compile(module, backend="aot_eager", fullgraph=True)
    for space in ((9, 8), (4, 8)):  # the second is padded
        x = torch.randn(2, *space, 8)
        expected = gradients(module, x)
        results = gradients(compiled, x)
        assert_same({key.replace("_orig_mod.", ""): v for key, v in results.items()}, expected, 1e-5)
