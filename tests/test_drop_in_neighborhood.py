"""Accelerated models of neighborhood attention equal the models they were, and the fast path ran."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models_support import CountOps, assert_same, double, gradients, library, loss_curve, redraw, rms_ratio
from torch import Tensor, nn

import vicinal
from vicinal.models import (
    CausalLM,
    DFormer,
    DiNAT,
    Scope,
    causal_lm_test,
    dformer_test,
    dinat_test,
)
from vicinal.models.causal_lm import CausalAttention, rotation_of
from vicinal.models.dformer import GroupAttention
from vicinal.models.dinat import NeighborhoodAttention
from vicinal.neighborhood import neighborhood_attention


class _Embedded(nn.Module):
    """A language model on the embeddings of tokens, so that its input has a gradient; [B, T, C] ->
    [B, T, vocabulary]."""

    def __init__(self, model: CausalLM) -> None:
        super().__init__()
        self.blocks, self.norm, self.head = model.blocks, model.norm, model.head
        self.config = model.config

    def forward(self, x: Tensor) -> Tensor:
        config = self.config
        rotation = rotation_of(torch.arange(x.shape[1]), config.dim // config.num_heads, config.rope_base)
        for block in self.blocks:
            x = block(x, rotation)
        return self.head(self.norm(x))


class _Attention(nn.Module):
    """One attention of the language model with its rotation; [B, T, C] -> [B, T, C]."""

    def __init__(self, scope: Scope, **changes: Any) -> None:
        super().__init__()
        config = causal_lm_test(**changes)
        self.attn = CausalAttention(config, scope)
        self.head_dim = config.dim // config.num_heads

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x, rotation_of(torch.arange(x.shape[1]), self.head_dim, 100.0))


# name -> model, shape of its input, number of calls of the op in one forward
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "dinat": (lambda: DiNAT(dinat_test()), (2, 3, 64, 64), 5),
    "dinat-odd": (lambda: DiNAT(dinat_test(qkv_bias=False)), (2, 3, 60, 44), 5),
    "dinat-layer-scale": (lambda: DiNAT(dinat_test(layer_scale=1.0)), (2, 3, 64, 44), 5),
    "dformer": (lambda: DFormer(dformer_test()), (1, 1, 16, 32, 32), 6),
    "dformer-odd": (lambda: DFormer(dformer_test()), (1, 1, 9, 25, 31), 6),
    "causal-lm": (lambda: _Embedded(CausalLM(causal_lm_test())), (2, 37, 32), 4),
}
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "dinat": (lambda: NeighborhoodAttention(32, 4, 7, 1), (2, 15, 11, 32)),
    "dinat-dilated": (lambda: NeighborhoodAttention(32, 4, 5, 3), (2, 16, 19, 32)),
    "dinat-dense-groups": (lambda: NeighborhoodAttention(32, 4, 7, 2), (2, 14, 14, 32)),
    "dinat-small-map": (lambda: NeighborhoodAttention(32, 4, 7, 2), (2, 9, 15, 32)),
    "dinat-odd-head-dim": (lambda: NeighborhoodAttention(39, 3, 3, 1), (1, 7, 8, 39)),
    "dformer-local": (lambda: GroupAttention(24, 2, (2, 4, 4), False), (2, 9, 10, 11, 24)),
    "dformer-global": (lambda: GroupAttention(24, 2, (2, 4, 4), True), (2, 9, 10, 11, 24)),
    "dformer-thin": (lambda: GroupAttention(24, 2, (2, 4, 4), True), (2, 1, 3, 8, 24)),
    "lm-window": (lambda: _Attention(Scope(5)), (2, 37, 32)),
    "lm-block": (lambda: _Attention(Scope(8, 8)), (2, 37, 32)),
    "lm-two-blocks": (lambda: _Attention(Scope(16, 8), num_kv_heads=4), (2, 37, 32)),
    "lm-full": (lambda: _Attention(Scope(None), num_kv_heads=1), (2, 37, 32)),
}


def _make(name: str) -> tuple[nn.Module, Tensor]:
    make, shape, _ = MODELS[name]
    torch.manual_seed(0)
    return redraw(make()), torch.randn(shape)


@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_every_gradient_end_to_end(name: str) -> None:
    model, x = _make(name)
    expected = gradients(double(model), x.double())
    report = vicinal.accelerate(model)
    assert len(report.replaced) == MODELS[name][2]
    assert not report.left_alone
    assert_same(gradients(model, x), expected, 1e-4)


@pytest.mark.parametrize("name", LAYERS)
def test_outputs_and_every_gradient_of_a_layer(name: str) -> None:
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    layer = redraw(make())
    x = torch.randn(shape)
    expected = gradients(double(layer), x.double())
    assert len(vicinal.accelerate(layer).replaced) == 1
    assert_same(gradients(layer, x), expected, 1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_in_double_precision_nothing_but_rounding_differs(name: str) -> None:
    model, x = _make(name)
    model, x = double(model), x.double()
    with torch.no_grad():
        expected = model(x)
        vicinal.accelerate(model)
        assert rms_ratio(model(x), expected) < 1e-12


@pytest.mark.parametrize("name", MODELS)
def test_the_fast_path_ran_once_per_layer_and_direction(name: str) -> None:
    explanation = vicinal.explain(neighborhood_attention, *torch.zeros(3, 1, 8, 8, 2, 16).unbind(0), 3)
    if explanation.backend == "reference":
        pytest.skip(str(explanation))
    model, x = _make(name)
    with CountOps() as before:
        model(x).sum().backward()
    assert not before.calls
    vicinal.accelerate(model)
    with CountOps() as counter:
        model(x).sum().backward()
    layers = MODELS[name][2]
    overload = explanation.backend
    assert counter.calls == {
        f"vicinal.neighborhood_fwd.{overload}": layers,
        f"vicinal.neighborhood_bwd.{overload}": layers,
    }


@pytest.mark.parametrize("name", MODELS)
def test_state_dict_and_module_objects_stay(name: str) -> None:
    model, x = _make(name)
    original = copy.deepcopy(model)
    state = dict(model.state_dict(keep_vars=True))
    modules = {key: (module, type(module)) for key, module in model.named_modules()}
    vicinal.accelerate(model)
    now = model.state_dict(keep_vars=True)
    assert list(now) == list(state)
    assert all(now[key] is state[key] for key in state)
    model.load_state_dict(original.state_dict(), strict=True)
    vicinal.restore(model)
    for key, module in model.named_modules():
        assert (module, type(module)) == modules[key]
    assert torch.equal(model(x), original(x))


def test_training_takes_the_same_course() -> None:
    model, x = _make("dinat-layer-scale")
    x = torch.cat([x, x.flip(0) * 0.5])
    fast = copy.deepcopy(model)
    vicinal.accelerate(fast)
    expected = loss_curve(model, x, torch.arange(4), 20, F.cross_entropy)
    actual = loss_curve(fast, x, torch.arange(4), 20, F.cross_entropy)
    assert expected[-1] < 0.5 * expected[0]
    assert ((actual - expected).abs() <= 1e-3 * expected.abs()).all(), (actual, expected)


@pytest.mark.parametrize("name", ["dinat-odd", "dformer-odd", "causal-lm"])
def test_autocast_is_as_exact_as_the_original(name: str) -> None:
    model, x = _make(name)
    exact = gradients(double(model), x.double())

    def errors() -> dict[str, float]:
        with torch.autocast("cpu", torch.bfloat16):
            results = gradients(model, x)
        return {key: rms_ratio(value, exact[key]) for key, value in results.items()}

    before = errors()
    vicinal.accelerate(model)
    after = errors()
    for key, error in after.items():
        assert error <= 2 * before[key] + 4 * torch.finfo(torch.bfloat16).eps, key


@pytest.mark.parametrize("name", ["dinat-dilated", "dformer-global", "lm-two-blocks"])
def test_compiled_in_one_graph(name: str) -> None:
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    layer = redraw(make())
    vicinal.accelerate(layer)
    compiled: Any = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(shape)
    expected = gradients(double(layer), x.double())
    results = {key.replace("_orig_mod.", ""): value for key, value in gradients(compiled, x).items()}
    assert_same(results, expected, 1e-5)


@pytest.mark.parametrize("pieces", [[1] * 23, [5, 1, 1, 7, 2, 7], [23]], ids=str)
def test_decoding_equals_the_forward_pass(pieces: list[int]) -> None:
    model = double(redraw(CausalLM(causal_lm_test())))
    tokens = torch.randint(17, (2, 23))
    with torch.no_grad():
        expected = model(tokens)
        assert len(vicinal.accelerate(model).replaced) == 4
        caches = model.make_caches(2, 23)
        found = torch.cat([model(piece, caches) for piece in tokens.split(pieces, 1)], 1)
    assert rms_ratio(found, expected) < 1e-12


def test_generation_takes_the_same_tokens() -> None:
    model = redraw(CausalLM(causal_lm_test()))
    prompt = torch.randint(17, (2, 6))
    expected = model.generate(prompt, 20)
    assert expected.shape == (2, 26)
    vicinal.accelerate(model)
    assert torch.equal(model.generate(prompt, 20), expected)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_modules_of_natten(rank: int) -> None:
    natten = library("natten")
    torch.manual_seed(0)
    options: dict[str, Any] = {"kernel_size": 3, "dilation": 2, "stride": 2, "is_causal": True}
    module = redraw(getattr(natten, f"NeighborhoodAttention{rank}D")(16, 2, **options))
    x = torch.randn(2, *(7, 6, 8)[:rank], 16)
    with torch.no_grad():
        expected = module(x)
        report = vicinal.accelerate(module)
        assert [row.module for row in report.replaced] == [type(module).__mro__[1]]
        assert rms_ratio(module(x), expected) < 1e-5
    assert all(value.abs().max() > 0 for value in gradients(module, x).values())  # natten cannot on CPU


def test_own_modules_are_named_as_such() -> None:
    report = vicinal.accelerate(nn.ModuleDict({"a": vicinal.nn.NeighborhoodAttention2D(16, 2, 3)}))
    assert not report.replaced
    assert [row.note for row in report.left_alone] == ["it is vicinal's own"]


def test_families_are_obeyed() -> None:
    report = vicinal.accelerate(DiNAT(dinat_test()), families=["windowed"])
    assert not report.replaced
    assert {row.note for row in report.left_alone} == {"the neighborhood family was not asked for"}
