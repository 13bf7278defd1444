"""The reference models of neighborhood attention against loops over pairs, their names and sizes."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from models_support import double, gradients, redraw, rms_ratio
from neighborhood_pairs import ByPairs
from torch import Tensor, nn

from vicinal.models import (
    CausalLM,
    DFormer,
    DiNAT,
    Scope,
    causal_lm_test,
    dformer_base,
    dformer_test,
    dinat_base,
    dinat_large,
    dinat_large_384,
    dinat_mini,
    dinat_small,
    dinat_test,
    dinat_tiny,
    masformer,
    meshtron,
    nat_base,
    nat_mini,
    nat_small,
    nat_tiny,
    official_dinat_state_dict,
)
from vicinal.models.causal_lm import rotate, rotation_of
from vicinal.models.dformer import GroupAttention
from vicinal.models.dinat import NeighborhoodAttention


@pytest.mark.parametrize("size", [(9, 7), (6, 11), (6, 6)])
@pytest.mark.parametrize("dilation", [1, 2])
def test_dinat_attention_by_pairs(size: tuple[int, int], dilation: int) -> None:
    attn: Any = double(redraw(NeighborhoodAttention(6, 2, 3, dilation)))
    attn.stride, attn.is_causal = 1, False
    x = torch.randn(2, *size, 6, dtype=torch.float64)
    assert rms_ratio(attn(x), ByPairs(attn)(x)) < 1e-12


def test_dinat_pads_small_maps_before_the_projection() -> None:
    attn: Any = double(redraw(NeighborhoodAttention(6, 2, 3, 2)))
    attn.stride, attn.is_causal = 1, False
    x = torch.randn(2, 4, 7, 6, dtype=torch.float64)
    padded = nn.functional.pad(x, (0, 0, 0, 0, 0, 2))
    assert rms_ratio(attn(x), ByPairs(attn)(padded)[:, :4]) < 1e-12


@pytest.mark.parametrize(
    ("config", "millions"),
    [
        (dinat_mini(), 20),
        (dinat_tiny(), 28),
        (dinat_small(), 51),
        (dinat_base(), 90),
        (dinat_large(), 200),
        (nat_mini(), 20),
        (nat_tiny(), 28),
        (nat_small(), 51),
        (nat_base(), 90),
    ],
    ids=["mini", "tiny", "small", "base", "large", "nat-mini", "nat-tiny", "nat-small", "nat-base"],
)
def test_published_parameter_counts(config: Any, millions: float) -> None:
    with torch.device("meta"):
        model = DiNAT(config)
    assert abs(sum(p.numel() for p in model.parameters()) / 1e6 - millions) < 1


def test_dinat_names_are_the_official_ones() -> None:
    state = DiNAT(dinat_test(layer_scale=0.1)).state_dict()
    names = list(state)
    both = ("weight", "bias")
    assert names[:6] == [f"patch_embed.{n}.{k}" for n in ("proj.0", "proj.1", "norm") for k in both]
    block = {n.removeprefix("levels.1.blocks.1.") for n in names if n.startswith("levels.1.blocks.1.")}
    parts = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    linears = {f"{n}.{k}" for n in parts for k in both}
    assert block == linears | {"attn.rpb", "gamma1", "gamma2"}
    assert {f"levels.0.downsample.{n}" for n in ("reduction.weight", "norm.bias")} <= set(names)
    assert "levels.2.downsample.reduction.weight" not in names
    assert state["levels.1.blocks.1.attn.rpb"].shape == (4, 5, 5)
    assert not [n for n in DiNAT(dinat_test()).state_dict() if "gamma" in n]


def test_dinat_dilations_are_the_published_ones() -> None:
    with torch.device("meta"):
        model = DiNAT(dinat_large_384())
    found = [[block.attn.dilation for block in level.blocks] for level in model.levels]
    assert found == [[1, 13, 1], [1, 6, 1, 6], [1, 3] * 9, [1] * 5]


def test_a_dinat_state_dict_that_does_not_fit_is_named() -> None:
    model = DiNAT(dinat_test())
    state = dict(model.state_dict())
    assert list(official_dinat_state_dict(state, model)) == list(state)
    del state["norm.bias"]
    state["extra.weight"] = torch.zeros(1)
    with pytest.raises(KeyError, match=r"missing \['norm.bias'\], unknown \['extra.weight'\]"):
        official_dinat_state_dict(state, model)


def _groups(space: tuple[int, ...], sizes: tuple[int, ...], dilated: bool) -> Tensor:
    """bool [N, N]: whether two tokens of a volume are in one group."""
    tokens = list(product(*(range(L) for L in space)))
    counts = [-(-L // g) for L, g in zip(space, sizes)]

    def group(token: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(i % n if dilated else i // g for i, n, g in zip(token, counts, sizes))

    names = [group(token) for token in tokens]
    return torch.tensor([[a == b for b in names] for a in names])


@pytest.mark.parametrize("dilated", [False, True])
@pytest.mark.parametrize("space", [(4, 8, 8), (5, 6, 7), (1, 3, 9)])
def test_dformer_attention_by_pairs(space: tuple[int, int, int], dilated: bool) -> None:
    attn = double(redraw(GroupAttention(6, 2, (2, 4, 4), dilated)))
    x = torch.randn(2, *space, 6, dtype=torch.float64)
    q, k, v = attn.qkv(x).flatten(1, 3).unflatten(-1, (3, 2, 3)).permute(2, 0, 3, 1, 4)
    scores = (q @ k.transpose(-2, -1) / 3**0.5).masked_fill(~_groups(space, (2, 4, 4), dilated), -torch.inf)
    expected = attn.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2).view_as(x))
    assert rms_ratio(attn(x), expected) < 1e-12


@pytest.mark.parametrize("size", [(16, 32, 32), (9, 25, 31)])
def test_dformer_keeps_the_size_of_a_volume(size: tuple[int, int, int]) -> None:
    model = redraw(DFormer(dformer_test()))
    with torch.no_grad():
        assert model(torch.randn(1, 1, *size)).shape == (1, 3, *size)
    with torch.device("meta"):
        assert len(DFormer(dformer_base()).encoder) == 4


def test_dformer_voxels_lie_where_their_patch_lies() -> None:
    model = DFormer(dformer_test())
    depth, height, width = model.config.patch_size
    x = torch.zeros(1, 2, 3, 2, 3 * depth * height * width)
    x.view(1, 2, 3, 2, 3, depth, height, width)[0, 1, 2, 0, 2, 1, 3, 2] = 1
    (place,) = model.voxels(x).nonzero()
    assert place.tolist() == [0, 2, depth + 1, 2 * height + 3, 2]


@pytest.mark.parametrize("scope", [Scope(3), Scope(8, 4), Scope(4, 4), Scope(5, 2), Scope(None)], ids=str)
def test_what_a_scope_sees(scope: Scope) -> None:
    places = torch.arange(14)
    seen = scope.visible(places, places)
    for i in range(14):
        if scope.window is None:
            first = 0
        else:
            end_of_block = i // scope.block * scope.block + scope.block - 1
            first = max(0, end_of_block - scope.window + 1)
        assert seen[i].nonzero().flatten().tolist() == list(range(first, i + 1))


def test_scopes_are_checked() -> None:
    with pytest.raises(ValueError, match="block is 4; it must be >= 1, and 1 where the window is None"):
        Scope(None, 4)
    with pytest.raises(ValueError, match="window is 3; it must be >= block = 4"):
        Scope(3, 4)


def test_rotary_scores_depend_on_distance_alone() -> None:
    rotation = rotation_of(torch.arange(20), 8, 100.0)
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64).expand(-1, 1, 20, 1, 8).unbind(0)
    scores = torch.einsum("bqhd,bkhd->qk", rotate(q, rotation), rotate(k, rotation))
    for distance in range(-19, 20):
        diagonal = scores.diagonal(distance)
        assert (diagonal - diagonal[0]).abs().max() < 1e-12
    assert scores.std() > 0.01


@pytest.mark.parametrize("pieces", [[1] * 23, [5, 1, 1, 7, 2, 7], [23]], ids=str)
def test_decoding_equals_the_forward_pass(pieces: list[int]) -> None:
    model = double(redraw(CausalLM(causal_lm_test())))
    tokens = torch.randint(17, (2, 23))
    with torch.no_grad():
        expected = model(tokens)
        caches = model.make_caches(2, 23)
        found = torch.cat([model(piece, caches) for piece in tokens.split(pieces, 1)], 1)
    assert rms_ratio(found, expected) < 1e-12


def test_a_token_does_not_see_the_future() -> None:
    model = redraw(CausalLM(causal_lm_test()))
    tokens = torch.randint(17, (1, 23))
    other = tokens.clone()
    other[0, 12] = (other[0, 12] + 1) % 17
    with torch.no_grad():
        change = (model(tokens) - model(other)).abs().amax(-1)[0]
    assert change[:12].max() == 0
    assert (change[12:] > 0).all()


def test_published_sizes_of_language_models() -> None:
    with torch.device("meta"):
        sliding, mixed = CausalLM(meshtron()), CausalLM(masformer())
    assert {block.attn.scope for block in sliding.blocks} == {Scope(512)}
    assert [block.attn.scope.window for block in mixed.blocks][:4] == [2048, 2048, 2048, None]


class _OnTokens(nn.Module):
    """A language model as a function of embeddings."""

    def __init__(self, model: CausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.arange(x.shape[1]) % 17
        self.model.embed.weight.grad = None
        return self.model(tokens[None]) + 0 * x.sum()


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: DiNAT(dinat_test(layer_scale=0.5)), (2, 3, 60, 44)),
        (lambda: DFormer(dformer_test()), (1, 1, 16, 32, 32)),
        (lambda: _OnTokens(CausalLM(causal_lm_test())), (1, 23)),
    ],
    ids=["dinat", "dformer", "causal_lm"],
)
def test_every_parameter_matters(make: Any, shape: tuple[int, ...]) -> None:
    model = redraw(make())
    for name, value in gradients(model, torch.randn(shape)).items():
        assert name == "input.grad" or value.abs().max() > 1e-6, name
