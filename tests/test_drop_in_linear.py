"""Linear attention, and attention of graphs, of other libraries' models: accelerating changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from backends_support import reason_against
from models_support import CountOps, assert_same, double, gradients, library, redraw, rms_ratio
from torch import Tensor, nn

import vicinal
from vicinal.drop_in.adapter import Row


class Mamba(nn.Module):
    """A model of transformers on embeddings, the first sample padded on the left: [B, N, C] -> [B, N, C]."""

    def __init__(self, pads: int = 0, **sizes: Any) -> None:
        super().__init__()
        library("regex")  # without it transformers fails with another error than ImportError
        transformers = library("transformers")
        given = {"hidden_size": 32, "head_dim": 8, "num_heads": 8, "state_size": 12, "n_groups": 2}
        more = {"chunk_size": 16, "num_hidden_layers": 2, "vocab_size": 11, "use_cache": False, **sizes}
        self.model = transformers.Mamba2Model(transformers.Mamba2Config(**given, **more))
        del self.model.embeddings
        self.pads = pads

    def forward(self, x: Tensor) -> Tensor:
        mask = None
        if self.pads:
            mask = torch.arange(x.shape[1]) >= torch.tensor([[self.pads], [0]])
        return self.model(inputs_embeds=x, attention_mask=mask).last_hidden_state


class Graphs(nn.Module):
    """A layer of torch_geometric on graphs of 1 to 9 nodes with a ring of edges: [N, C] -> [N, C]."""

    def __init__(self, attn_type: str = "multihead", **options: Any) -> None:
        super().__init__()
        geometric = library("torch_geometric.nn")
        conv = geometric.GraphConv(24, 24)
        options = {"norm": "layer_norm", **options}
        self.layer = geometric.GPSConv(24, conv, heads=3, attn_type=attn_type, **options)
        self.batch = torch.repeat_interleave(torch.arange(4), torch.tensor([3, 1, 9, 4]))

    def forward(self, x: Tensor) -> Tensor:
        nodes = torch.arange(len(x))
        return self.layer(x, torch.stack([nodes, nodes.roll(1)]), self.batch)


def efficientvit(**changes: Any) -> nn.Module:
    library("timm")
    sizes = {"widths": (8, 16, 16, 16), "depths": (1, 1, 2, 2), "head_dim": 8, "head_widths": (32, 32)}
    model = library("timm.models.efficientvit_mit").EfficientVit(num_classes=10, **sizes, **changes)
    return model.eval()  # statistics of a batch would cancel the biases before them


# name -> model, shape of its input, modules that are replaced, calls of ops in one forward
Case = tuple[Callable[[], nn.Module], tuple[int, ...], int, dict[str, int]]
MODELS: dict[str, Case] = {
    "mamba2": (Mamba, (2, 37, 32), 2, {"linear": 2}),
    "mamba2-padded": (lambda: Mamba(pads=9), (2, 37, 32), 2, {"linear": 2}),
    "mamba2-limits": (lambda: Mamba(time_step_limit=(0.3, 0.9)), (2, 5, 32), 2, {"linear": 2}),
    "efficientvit": (efficientvit, (2, 3, 64, 96), 2, {"linear": 2}),
    "gps": (Graphs, (17, 24), 1, {"voxel": 1}),
    "gps-eval": (lambda: Graphs(norm="batch_norm").eval(), (17, 24), 1, {"voxel": 1}),
    "gps-performer": (
        lambda: Graphs("performer", attn_kwargs={"head_channels": 8, "qkv_bias": True}),
        *((17, 24), 1, {"linear": 1}),
    ),
}
needs_cpu = pytest.mark.skipif(bool(reason_against("cpu", family="linear")), reason="no cpu backend")


def make(name: str) -> tuple[nn.Module, Tensor]:
    build, shape, _, _ = MODELS[name]
    torch.manual_seed(0)
    model = redraw(build())
    return model, torch.randn(shape)


def packed(results: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the gradient of a key's bias, which a softmax does not see."""
    joined = dict(results)
    for name in results:
        if name.endswith("attn.in_proj_bias.grad"):
            q, _, v = joined[name].chunk(3)
            joined[name] = torch.cat([q, v])
    return joined


@needs_cpu
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_every_gradient_end_to_end(name: str) -> None:
    model, x = make(name)
    original = copy.deepcopy(model)
    exact, plain = packed(gradients(double(model), x.double())), packed(gradients(model, x))
    report = vicinal.accelerate(model)
    assert len(report.replaced) == MODELS[name][2]
    assert not report.left_alone
    with CountOps() as counter:
        found = packed(gradients(model, x))
    ops = {
        f"vicinal.{family}_{way}.cpu": n for family, n in MODELS[name][3].items() for way in ("fwd", "bwd")
    }
    assert counter.calls == ops
    if name.startswith("mamba2"):  # the original's sums are in float32 also in a float64 model
        for key, value in exact.items():
            assert value.abs().max() > 0, key
            assert rms_ratio(found[key], value) <= max(1e-4, 2 * rms_ratio(plain[key], value)), key
    else:
        assert_same(found, exact, 1e-4)
    assert list(model.state_dict()) == list(original.state_dict())
    model.load_state_dict(original.state_dict(), strict=True)
    original.load_state_dict(model.state_dict(), strict=True)
    assert vicinal.restore(model).rows
    assert [type(m) for m in model.modules()] == [type(m) for m in original.modules()]
    assert torch.equal(model(x), original(x))


@needs_cpu
def test_a_prompt_fills_the_cache_of_transformers() -> None:
    model: Any = redraw(Mamba(use_cache=True)).eval()
    x = torch.randn(2, 21, 32)

    def run() -> Tensor:
        first = model.model(inputs_embeds=x[:, :20], use_cache=True)
        cache = getattr(first, "cache_params", None) or first.past_key_values
        found = model.model(inputs_embeds=x[:, 20:], cache_params=cache, use_cache=True)
        return torch.cat([first.last_hidden_state, found.last_hidden_state], 1)

    with torch.no_grad():
        expected = run()
        assert len(vicinal.accelerate(model).replaced) == 2
        with CountOps() as counter:
            found = run()
    assert counter.calls == {"vicinal.linear_fwd.cpu": 2}
    assert rms_ratio(found, expected) < 1e-5
    assert rms_ratio(found[:, 20:], expected[:, 20:]) < 1e-5


@needs_cpu
def test_autocast_of_efficientvit_is_as_exact_as_the_original() -> None:
    model, x = make("efficientvit")
    exact = gradients(double(model), x.double())

    def errors() -> dict[str, float]:
        with torch.autocast("cpu", torch.bfloat16):
            results = gradients(model, x)
        return {key: rms_ratio(value, exact[key]) for key, value in results.items()}

    before = errors()
    vicinal.accelerate(model)
    for key, error in errors().items():
        assert error <= 2 * before[key] + 4 * torch.finfo(torch.bfloat16).eps, key


def only_row(module: nn.Module, **options: Any) -> Row:
    (row,) = vicinal.accelerate(module, **options).rows
    return row


def test_what_is_left_alone_and_why() -> None:
    layer: Any = Graphs(attn_kwargs={"add_bias_kv": True})
    assert only_row(layer).note == "its MultiheadAttention has bias_k"
    layer = Graphs("performer", attn_kwargs={"kernel": nn.Tanh()})
    assert only_row(layer).note == "its feature map is not a ReLU"
    assert only_row(Graphs(), families=["linear"]).note == "the voxel family was not asked for"
    lite: Any = library("timm.models.efficientvit_mit").LiteMLA(16, 16, kernel_func=nn.ReLU6)
    assert only_row(lite).note == "its feature map is a ReLU6, not a ReLU"


@needs_cpu
def test_dropout_of_weights_runs_as_it_was() -> None:
    layer: Any = redraw(Graphs(attn_kwargs={"dropout": 0.5}))
    x = torch.randn(17, 24)
    torch.manual_seed(5)
    expected = layer(x)
    assert vicinal.accelerate(layer).replaced
    torch.manual_seed(5)
    assert torch.equal(layer(x), expected)
    with CountOps() as counter:
        layer.eval()(x)
    assert counter.calls == {"vicinal.voxel_fwd.cpu": 1}
