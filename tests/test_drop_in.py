"""An accelerated model equals the model it was: weights, outputs, gradients, training; the fast path ran."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models_support import CountOps, assert_same, double, gradients, library, loss_curve, redraw, rms_ratio
from torch import Tensor, nn

import vicinal
from vicinal.models import (
    CSWinTransformer,
    SwinTransformer,
    cswin_test,
    swin_test,
    swin_v2_test,
)
from vicinal.models.cswin import CSWinBlock
from vicinal.models.swin import SwinTransformerBlock

ODD = (60, 44)


def _swin(**changes: Any) -> nn.Module:
    return SwinTransformer(swin_test(**changes))


def _swin_v2(**changes: Any) -> nn.Module:
    return SwinTransformer(swin_v2_test(**changes))


def _cswin(**changes: Any) -> nn.Module:
    return CSWinTransformer(cswin_test(**changes))


def _timm(version: int, size: tuple[int, int], **options: Any) -> nn.Module:
    library("timm")
    sizes = {"img_size": size, "embed_dim": 32, "depths": (2, 2), "num_heads": (2, 4), "num_classes": 10}
    options = {**sizes, "drop_path_rate": 0.0, **options}
    if version == 1:
        return library("timm.models.swin_transformer").SwinTransformer(window_size=7, **options)
    return library("timm.models.swin_transformer_v2").SwinTransformerV2(window_size=8, **options)


def _torchvision(version: int, **options: Any) -> nn.Module:
    swin = library("torchvision.models.swin_transformer")
    block = swin.SwinTransformerBlock if version == 1 else swin.SwinTransformerBlockV2
    merging = swin.PatchMerging if version == 1 else swin.PatchMergingV2
    options = {
        "num_classes": 10,
        "stochastic_depth_prob": 0.0,
        "block": block,
        "downsample_layer": merging,
        **options,
    }
    return swin.SwinTransformer([4, 4], 32, [2, 2], [2, 4], [7, 7] if version == 1 else [8, 8], **options)


class _Logits(nn.Module):
    """A model of transformers that returns its logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).logits


def _transformers(size: tuple[int, int]) -> nn.Module:
    library("regex")  # without it transformers fails with another error than ImportError
    transformers = library("transformers")
    sizes = {
        "image_size": list(size),
        "embed_dim": 32,
        "depths": [2, 2],
        "num_heads": [2, 4],
        "num_labels": 10,
    }
    config = transformers.SwinConfig(patch_size=4, window_size=7, drop_path_rate=0.0, **sizes)
    return _Logits(transformers.SwinForImageClassification(config))


# name -> model, size of its images, number of calls of the op in one forward
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int], int]] = {
    "swin": (_swin, (56, 56), 4),
    "swin-odd": (lambda: _swin(image_size=112), ODD, 4),
    "swin-v2": (_swin_v2, (64, 64), 4),
    "swin-v2-odd": (lambda: _swin_v2(image_size=128), ODD, 4),
    "swin-no-bias": (lambda: _swin_v2(image_size=128, qkv_bias=False), ODD, 4),
    "cswin": (_cswin, (64, 64), 4),
    "cswin-odd": (_cswin, ODD, 4),
    "timm": (lambda: _timm(1, (56, 56)), (56, 56), 4),
    "timm-odd": (lambda: _timm(1, ODD), ODD, 4),
    "timm-v2-odd": (lambda: _timm(2, ODD), ODD, 4),
    "torchvision": (lambda: _torchvision(1), ODD, 4),
    "torchvision-v2": (lambda: _torchvision(2), ODD, 4),
    "transformers": (lambda: _transformers((56, 56)), (56, 56), 4),
    "transformers-odd": (lambda: _transformers((120, 88)), (120, 88), 4),
}
OWN = [name for name in MODELS if name.startswith(("swin", "cswin"))]
FEW = ["swin-odd", "swin-v2", "cswin-odd"]


def _packed(results: dict[str, Tensor]) -> dict[str, Tensor]:
    """Join the gradients of separate q, k, v biases.

    A bias that all keys share drops out of the softmax: the gradient of a key bias alone is rounding.
    """
    joined = dict(results)
    for name in results:
        if name.endswith(".k_proj.bias.grad"):
            parts = [joined.pop(name.replace("k_proj", f"{part}_proj")) for part in "qkv"]
            joined[name.replace("k_proj", "qkv_proj")] = torch.cat(parts)
    return joined


def _make(name: str) -> tuple[nn.Module, Tensor]:
    make, size, _ = MODELS[name]
    torch.manual_seed(0)
    return redraw(make()), torch.randn(2, 3, *size)


@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_every_gradient_end_to_end(name: str) -> None:
    model, x = _make(name)
    expected = gradients(double(model), x.double())
    report = vicinal.accelerate(model)
    assert len(report.replaced) == MODELS[name][2]
    assert not report.left_alone
    assert_same(_packed(gradients(model, x)), _packed(expected), 1e-4)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_in_double_precision_nothing_but_rounding_differs(name: str, training: bool) -> None:
    model, x = _make(name)
    model, x = double(model).train(training), x.double()
    with torch.no_grad():
        expected = model(x)
        vicinal.accelerate(model)
        assert rms_ratio(model(x), expected) < 1e-12


BLOCKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "swin": (lambda: SwinTransformerBlock(32, (15, 11), 2, 7, 3), (2, 15, 11, 32)),
    "swin-divisible": (lambda: SwinTransformerBlock(32, (14, 21), 2, 7, 3), (2, 14, 21, 32)),
    "swin-one-window-high": (lambda: SwinTransformerBlock(30, (20, 20), 3, 7, 3), (2, 5, 16, 30)),
    "swin-one-token": (lambda: SwinTransformerBlock(32, (20, 20), 2, 7, 3), (2, 1, 1, 32)),
    "swin-odd-head-dim": (lambda: SwinTransformerBlock(39, (14, 14), 3, 7, 3), (1, 14, 14, 39)),
    "swin-v2": (lambda: SwinTransformerBlock(32, (15, 11), 2, 8, 4, version=2), (2, 15, 11, 32)),
    "cswin": (lambda: CSWinBlock(32, 4, 3, False), (2, 11, 7, 32)),
    "cswin-width-1": (lambda: CSWinBlock(32, 4, 1, False), (2, 6, 9, 32)),
    "cswin-whole-map": (lambda: CSWinBlock(32, 4, 7, True), (2, 5, 4, 32)),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_outputs_and_every_gradient_of_a_layer(name: str) -> None:
    make, shape = BLOCKS[name]
    torch.manual_seed(0)
    block = redraw(make())
    x = torch.randn(shape)
    expected = gradients(double(block), x.double())
    assert vicinal.accelerate(block).replaced
    actual = gradients(block, x)
    if (
        name == "swin-one-token"
    ):  # one real token among pads that are all alike: rounding is all that most weights see
        assert rms_ratio(actual["output"], expected["output"]) <= 1e-5
        assert rms_ratio(actual["input.grad"], expected["input.grad"]) <= 1e-5
    else:
        assert_same(actual, expected, 1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_the_fast_path_ran_once_per_layer_and_direction(name: str) -> None:
    explanation = vicinal.explain(vicinal.windowed_attention, *torch.zeros(3, 1, 8, 8, 2, 16).unbind(0), 4)
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
        f"vicinal.windowed_fwd.{overload}": layers,
        f"vicinal.windowed_bwd.{overload}": layers,
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
    original.load_state_dict(model.state_dict(), strict=True)

    vicinal.restore(model)
    for key, module in model.named_modules():
        assert (module, type(module)) == modules[key]
    assert torch.equal(model(x), original(x))


@pytest.mark.parametrize("name", MODELS)
def test_copies_and_pickles_stay_accelerated(name: str) -> None:
    model, x = _make(name)
    vicinal.accelerate(model)
    expected = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), expected)
        assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
        assert len(vicinal.restore(twin).rows) == MODELS[name][2]
        assert rms_ratio(twin(x), expected) < 1e-4


@pytest.mark.parametrize("name", FEW)
def test_training_takes_the_same_course(name: str) -> None:
    model, x = _make(name)
    x = torch.cat([x, x.flip(0) * 0.5])
    target = torch.arange(4)
    fast = copy.deepcopy(model)
    vicinal.accelerate(fast)
    expected = loss_curve(model, x, target, 20, F.cross_entropy)
    actual = loss_curve(fast, x, target, 20, F.cross_entropy)
    assert expected[-1] < 0.5 * expected[0]
    assert ((actual - expected).abs() <= 1e-3 * expected.abs()).all(), (actual, expected)


@pytest.mark.parametrize("name", FEW)
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


@pytest.mark.parametrize("name", ["swin", "swin-v2", "cswin"])
def test_compiled_in_one_graph(name: str) -> None:
    make, shape = BLOCKS[name]
    torch.manual_seed(0)
    block = redraw(make())
    vicinal.accelerate(block)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    for height in (shape[1], 9):  # the second size compiles once more, with dynamic extents
        x = torch.randn(shape[0], height, *shape[2:])
        expected = gradients(double(block), x.double())
        results = gradients(compiled, x)
        assert_same({key.replace("_orig_mod.", ""): value for key, value in results.items()}, expected, 1e-5)


@pytest.mark.parametrize("name", FEW)
def test_a_sample_does_not_see_its_batch(name: str) -> None:
    model, x = _make(name)
    vicinal.accelerate(model)
    with torch.no_grad():
        assert rms_ratio(torch.cat([model(x[:1]), model(x[1:])]), model(x)) < 1e-5


def test_dropout_of_weights_and_of_the_projection() -> None:
    model = redraw(_timm(1, (56, 56), attn_drop_rate=0.5))
    x = torch.randn(2, 3, 56, 56)
    vicinal.accelerate(model)
    model.train()
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))
    original = copy.deepcopy(model)
    vicinal.restore(original)
    assert rms_ratio(model(x), original(x)) < 1e-5

    # the mean over many draws of one layer is what the original layer's mean is
    block = model.layers[0].blocks[0].train()
    tokens = torch.randn(1, 7, 7, 32).expand(2000, -1, -1, -1)
    with torch.no_grad():
        fast = block._attn(tokens)
        vicinal.restore(block)
        slow = block._attn(tokens)
    scale = slow.std(0) * (2 / len(tokens)) ** 0.5
    assert ((fast.mean(0) - slow.mean(0)) / scale).abs().max() < 5.5
    assert rms_ratio(fast.std(0), slow.std(0)) < 0.1


def test_timm_changes_its_input_size() -> None:
    model = redraw(_timm(1, (56, 56)))
    vicinal.accelerate(model)
    model.set_input_size(img_size=(112, 56))
    original = copy.deepcopy(model)
    vicinal.restore(original)
    x = torch.randn(1, 3, 112, 56)
    assert rms_ratio(model(x), original(x)) < 1e-5


def test_transformers_returns_attention_weights_when_asked() -> None:
    model = _transformers((56, 56)).eval().model
    model.set_attn_implementation("eager")
    x = torch.randn(1, 3, 56, 56)
    expected = model(x, output_attentions=True)
    vicinal.accelerate(model)
    actual = model(x, output_attentions=True)
    assert all(torch.equal(a, b) for a, b in zip(actual.attentions, expected.attentions, strict=True))
    assert torch.equal(actual.logits, expected.logits)


def test_dry_run_changes_nothing_and_reports_the_same() -> None:
    model = _swin()
    types = [type(m) for m in model.modules()]
    planned = vicinal.accelerate(model, dry_run=True)
    assert [type(m) for m in model.modules()] == types
    assert planned == vicinal.accelerate(model)
    again = vicinal.accelerate(model)
    assert not again.replaced
    assert [row.note for row in again.left_alone] == ["it is accelerated already"] * 4
    assert len(vicinal.restore(model).rows) == 4
    assert not vicinal.restore(model).rows


class _Special(SwinTransformerBlock):
    pass


class _WrappedLinear(nn.Linear):
    pass


class OtherAttention(nn.Linear):
    pass


def test_the_report_names_what_is_left_alone_and_why() -> None:
    wrapped = SwinTransformerBlock(32, (14, 14), 2, 7, 3)
    wrapped.attn.qkv = _WrappedLinear(32, 96)
    parts = {
        "known": SwinTransformerBlock(32, (14, 14), 2, 7, 3),
        "subclass": _Special(32, (14, 14), 2, 7, 3),
        "wrapped": wrapped,
        "other": OtherAttention(32, 2),
        "mlp": nn.Linear(3, 3),
    }
    report = vicinal.accelerate(nn.ModuleDict(parts))
    notes = {row.name: row.note for row in report.left_alone}
    assert [row.name for row in report.replaced] == ["known"]
    assert "a subclass of vicinal.models.swin.SwinTransformerBlock" in notes["subclass"]
    assert notes["wrapped"] == "its attention's qkv is a _WrappedLinear, not a Linear"
    assert notes["other"].startswith("no adapter for ")
    assert "mlp" not in notes
    text = str(report)
    assert "1 replaced" in text
    assert all(name in text for name in ("known", "FusedSwinTransformerBlock", "other", "OtherAttention"))


def test_families_are_checked_and_obeyed() -> None:
    model = _swin()
    with pytest.raises(ValueError, match=r"families names \['windows'\], it may name \['windowed', "):
        vicinal.accelerate(model, families=["windows"])
    report = vicinal.accelerate(model, families=[])
    assert not report.replaced
    assert {row.note for row in report.left_alone} == {"the windowed family was not asked for"}
