"""The reference models MossFormer2 and EcoFormer: names, parts, and that accelerating changes nothing."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from backends_support import reason_against
from models_support import assert_same, double, gradients, loss_curve, redraw, rms_ratio
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from vicinal import accelerate, restore
from vicinal.models import (
    EcoFormer,
    MossFormer2,
    ecoformer_pvt_v2_b0,
    ecoformer_test,
    mossformer2,
    mossformer2_test,
)
from vicinal.models.ecoformer import HashAttentionLayer
from vicinal.models.mossformer2 import JointAttentionLayer, Rotary


class Called(TorchDispatchMode):
    """Names of vicinal's ops that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "vicinal":
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class Masked(nn.Module):
    """A MossFormer2 whose last tokens are ignored."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        keep = torch.arange(x.shape[1]) < x.shape[1] - torch.tensor([[0], [77]])
        return self.model(x, keep)


def moss(**changes: Any) -> nn.Module:
    return redraw(MossFormer2(mossformer2_test(**changes))).eval()


def eco(**changes: Any) -> nn.Module:
    torch.manual_seed(3)
    model = redraw(EcoFormer(ecoformer_test(**changes)))
    model.calibrate(torch.randn(2, 3, 64, 64), torch.Generator().manual_seed(0))  # type: ignore[operator]
    return model.eval()


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "moss-300": (moss, (2, 300, 32), "joint"),
    "moss-512": (moss, (2, 512, 32), "joint"),
    "moss-causal": (lambda: moss(causal=True), (2, 300, 32), "joint"),
    "moss-masked": (lambda: Masked(moss()), (2, 300, 32), "joint"),
    "eco": (eco, (2, 3, 64, 64), "hash"),
    "eco-self": (lambda: eco(numerator="self"), (2, 3, 56, 72), "hash"),
}
needs_cpu = pytest.mark.skipif(bool(reason_against("cpu", family="joint")), reason="no cpu backend")


@needs_cpu
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_every_gradient_agree(name: str) -> None:
    make, shape, family = MODELS[name]
    model, x = make(), torch.randn(shape)
    expected = gradients(double(model), x.double())
    fused = copy.deepcopy(model)
    assert len(accelerate(fused).replaced) == 2
    with Called() as mode:
        found = gradients(fused, x)
    forward, backward = f"vicinal.{family}_fwd.cpu", f"vicinal.{family}_bwd.cpu"
    assert mode.names == [forward, forward, backward, backward]
    assert_same(found, expected, 1e-4)
    assert list(fused.state_dict()) == list(model.state_dict())
    restore(fused)
    assert_same(gradients(fused, x), gradients(model, x), 0.0)


@needs_cpu
@pytest.mark.parametrize("kind", [JointAttentionLayer, HashAttentionLayer])
def test_layers_agree(kind: type[nn.Module]) -> None:
    model = (moss if kind is JointAttentionLayer else eco)()
    layer = next(m for m in model.modules() if isinstance(m, kind))
    x = torch.randn(2, 200, 32)
    expected, plain = gradients(double(layer), x.double()), gradients(layer, x)
    accelerate(layer)
    for name, found in gradients(layer, x).items():  # to_qk's gain is one number: a sum that cancels
        limit = max(1e-5, 2 * rms_ratio(plain[name], expected[name]))
        assert rms_ratio(found, expected[name]) <= limit, name


@needs_cpu
@pytest.mark.parametrize("name", ["moss-300", "eco"])
def test_compiled_and_autocast(name: str) -> None:
    make, shape, _ = MODELS[name]
    model, x = make(), torch.randn(shape)
    accelerate(model)
    with torch.no_grad():
        plain = model(x)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
        with torch.autocast("cpu", torch.bfloat16):
            low = model(x)
    assert rms_ratio(compiled, plain) < 1e-5
    assert low.isfinite().all()
    assert rms_ratio(low, plain) < 0.2  # codes flip, and every linear layer rounds


@needs_cpu
@pytest.mark.parametrize("name", ["moss-300", "eco"])
def test_training_takes_the_same_path(name: str) -> None:
    make, shape, _ = MODELS[name]
    model, x = make(), torch.randn(shape)
    target = torch.randn(model(x).shape)
    fused = copy.deepcopy(model)
    accelerate(fused)
    curves = [loss_curve(m.train(), x, target, 20, nn.functional.mse_loss) for m in (model, fused)]
    assert curves[0][-1] < curves[0][0]
    torch.testing.assert_close(curves[1], curves[0], rtol=1e-3, atol=0.0)


def test_names_of_mossformer2() -> None:
    names = list(MossFormer2(mossformer2_test(depth=1)).state_dict())
    layer = [n.removeprefix("mossformerM.layers.0.") for n in names if ".layers.0." in n]
    projections = [
        f"{part}.mdl.{name}"
        for part in ("to_hidden", "to_qk", "to_out")
        for name in ("0.g", "1.weight", "1.bias", "3.sequential.1.conv.weight")
    ]
    assert set(layer) == {
        *projections,
        "qk_offset_scale.gamma",
        "qk_offset_scale.beta",
        "rotary_pos_emb.freqs",
    }
    memory = [n.removeprefix("mossformerM.fsmn.0.") for n in names if ".fsmn.0." in n]
    assert {"conv1.0.weight", "conv1.1.weight", "norm1.weight", "conv2.bias"} < set(memory)
    assert {"gated_fsmn.fsmn.linear.bias", "gated_fsmn.fsmn.project.weight"} < set(memory)
    assert "gated_fsmn.fsmn.conv.conv2.weight" in memory


def test_names_of_ecoformer() -> None:
    state = EcoFormer(ecoformer_pvt_v2_b0()).state_dict()
    attn = [n.removeprefix("block2.1.attn.") for n in state if n.startswith("block2.1.attn.")]
    tables = [f"fast_attention.{n}" for n in ("projection_matrix", "ksh.A", "ksh.mvec", "ksh.anchor")]
    linear = [f"{part}.{kind}" for part in ("to_qk", "to_v", "proj") for kind in ("weight", "bias")]
    assert sorted(attn) == sorted(tables + linear)
    assert state["block3.0.attn.fast_attention.ksh.anchor"].shape == (1, 5, 25, 32)
    assert state["block1.0.attn.fast_attention.projection_matrix"].shape == (110, 32)
    assert state["block4.0.attn.qkv.weight"].shape == (768, 256)


def test_published_parameter_counts() -> None:
    with torch.device("meta"):
        counts = [
            sum(p.numel() for p in model.parameters()) / 1e6
            for model in (EcoFormer(ecoformer_pvt_v2_b0()), MossFormer2(mossformer2()))
        ]
    assert 3.0 < counts[0] < 3.8  # PVTv2-B0 has 3.7 with spatial reduction, which this one has not
    assert 50 < counts[1] < 60  # MossFormer2 has 55.7 with its encoder and decoder


def test_rotary_turns_pairs() -> None:
    rotary, x = Rotary(4), torch.randn(1, 5, 6)
    turned = rotary(x)
    assert torch.equal(turned[..., 4:], x[..., 4:])
    assert torch.equal(turned[:, 0], x[:, 0])
    angle = 3 * 10000 ** (-2 / 4)
    first = x[0, 3, 2] * math.cos(angle) - x[0, 3, 3] * math.sin(angle)
    torch.testing.assert_close(turned[0, 3, 2], first)


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_matters(name: str) -> None:
    make, shape, _ = MODELS[name]
    for key, value in gradients(make(), torch.randn(shape)).items():
        assert value.abs().max() > 0, key
