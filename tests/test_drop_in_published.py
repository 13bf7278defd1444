"""Models of timm, torchvision and transformers compute the same accelerated, in training and evaluation."""

from __future__ import annotations

import copy

import pytest
import torch
from models_support import CountOps, assert_same_in_double_precision, gradients, redraw, rms_ratio
from published_models import PUBLISHED as TIMM_AND_TORCHVISION
from published_transformers import TRANSFORMERS
from torch import Tensor, nn

import vicinal

PUBLISHED = {**TIMM_AND_TORCHVISION, **TRANSFORMERS}
COMPILED = ["torchvision-swin3d", "timm-maxvit-tf", "transformers-swinv2-odd"]


def _make(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    case = PUBLISHED[name]
    return redraw(case.make()).double(), torch.randn(case.shape, dtype=torch.float64)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_report_names_every_module(name: str) -> None:
    case = PUBLISHED[name]
    report = vicinal.accelerate(case.make())
    assert len(report.replaced) == case.replaced, report
    assert tuple(row.module.__name__ for row in report.left_alone) == case.left, report


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_outputs_and_every_gradient_in_double_precision(name: str, training: bool) -> None:
    model, x = _make(name)
    fast = copy.deepcopy(model)
    model.train(training)
    fast.train(training)
    vicinal.accelerate(fast)
    torch.manual_seed(3)  # networks of positions drop entries in training
    expected = gradients(model, x)
    torch.manual_seed(3)
    with CountOps() as counter:
        actual = gradients(fast, x)
    calls = PUBLISHED[name].calls or PUBLISHED[name].replaced
    assert sum(n for op, n in counter.calls.items() if "_fwd" in op) == calls
    assert sum(n for op, n in counter.calls.items() if "_bwd" in op) == calls
    assert_same_in_double_precision(actual, expected, PUBLISHED[name].limit)
    for key, buffer in model.named_buffers():
        assert torch.allclose(buffer, fast.get_buffer(key)), key


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_buffers_stay(name: str) -> None:
    model, x = _make(name)
    model.eval()
    original = copy.deepcopy(model)
    state, types = dict(model.state_dict(keep_vars=True)), [type(m) for m in model.modules()]
    vicinal.accelerate(model)
    now = model.state_dict(keep_vars=True)
    assert list(now) == list(state)
    assert all(now[key] is state[key] for key in state)
    model.load_state_dict(original.state_dict(), strict=True)
    original.load_state_dict(model.state_dict(), strict=True)
    vicinal.restore(model)
    assert [type(m) for m in model.modules()] == types
    with torch.no_grad():
        assert torch.equal(model(x), original(x))


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_in_one_graph(name: str) -> None:
    model, x = _make(name)
    fast = copy.deepcopy(model)
    vicinal.accelerate(fast)
    compiled: nn.Module = torch.compile(fast, backend="aot_eager", fullgraph=True)  # type: ignore[assignment]
    torch._dynamo.reset()
    model.eval(), fast.eval()
    actual = {key.replace("_orig_mod.", ""): value for key, value in gradients(compiled, x).items()}
    assert_same_in_double_precision(actual, gradients(model, x))


def test_loaded_weights_are_used_in_evaluation_mode() -> None:
    """LeViT keeps an expanded bias from its first call in evaluation mode on; an accelerated one does not."""
    model, x = _make("timm-levit")
    model.eval()
    vicinal.accelerate(model)
    with torch.no_grad():
        model(x)
    other = redraw(copy.deepcopy(model), seed=7)
    model.load_state_dict(other.state_dict())
    vicinal.restore(other)
    with torch.no_grad():
        assert rms_ratio(model(x), other(x)) < 1e-10


def test_training_after_inference_mode() -> None:
    """What is remembered of a first call under inference_mode serves calls with gradients."""
    model, x = _make("timm-efficientformer")
    vicinal.accelerate(model)
    with torch.inference_mode():
        expected = model(x)
    assert rms_ratio(gradients(model, x)["output"], expected) < 1e-10
