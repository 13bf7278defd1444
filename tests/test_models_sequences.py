"""The reference models of sequences (H-Net, the Long Range Arena's classifier, Performer attention): names,
their parts by loops, and that accelerating changes nothing."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from backends_support import reason_against
from models_support import CountOps, assert_same, double, gradients, library, loss_curve, redraw, rms_ratio
from torch import Tensor, nn

import vicinal
from vicinal.models import (
    HNet,
    Mamba2Config,
    Mamba2Mixer,
    PerformerAttention,
    TextClassifier,
    hnet_test,
    hnet_two_stage,
    lra_test,
    lra_text,
)
from vicinal.models.hnet import DeChunkLayer, HNetAttention, RoutingModule, ratio_loss
from vicinal.models.lra import ATTENTIONS
from vicinal.models.mamba2 import Packing

ENDS = (0, 37, 37, 130, 200)  # the second of four sequences is empty
WORST_FLIPS = 0.01  # of the boundaries that float32 may decide otherwise than float64


def ends_of(ends: tuple[int, ...] = ENDS) -> Tensor:
    return torch.tensor(ends, dtype=torch.int32)


class Packed(nn.Module):
    """A layer that takes a packing, on embedded sequences: [T, C] -> [T, C]."""

    def __init__(self, layer: nn.Module, ends: tuple[int, ...] = ENDS) -> None:
        super().__init__()
        self.layer, self.ends = layer, ends

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, Packing.of(ends_of(self.ends), len(x)))


class Averaged(nn.Module):
    """The moving average of x with the shares that a channel of it says: [T, C] -> [T, C]."""

    def __init__(self) -> None:
        super().__init__()
        self.dechunk_layer = DeChunkLayer()

    def forward(self, x: Tensor) -> Tensor:
        return self.dechunk_layer(x, x[:, 0].sigmoid(), Packing.of(ends_of(), len(x)))


class Graphs(nn.Module):
    """Performer attention of packed graphs: [T, C] -> [T, C]."""

    def __init__(self, ends: tuple[int, ...] = ENDS) -> None:
        super().__init__()
        self.self_attn, self.ends = PerformerAttention(52, 4, head_dim=16), ends

    def forward(self, x: Tensor) -> Tensor:
        return self.self_attn(x, ends_of(self.ends))


class Bytes(nn.Module):
    """An H-Net on embedded bytes, with the boundaries of `record` where they are given: [T, C] -> [T,
    vocabulary]."""

    def __init__(self, model: HNet, ends: tuple[int, ...] = ENDS) -> None:
        super().__init__()
        self.backbone, self.lm_head, self.ends = model.backbone, model.lm_head, ends

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.backbone(x, Packing.of(ends_of(self.ends), len(x)))
        return self.lm_head(y)


class Texts(nn.Module):
    """A classifier on embedded texts of which the second ends early: [B, N, C] -> [B, classes]."""

    def __init__(self, model: TextClassifier, ignored: int) -> None:
        super().__init__()
        self.model, self.ignored = model, ignored
        del model.embed

    def forward(self, x: Tensor) -> Tensor:
        if not self.ignored:
            return self.model.classify(x)
        lengths = torch.tensor([x.shape[1], x.shape[1] - self.ignored])
        return self.model.classify(x, torch.arange(x.shape[1]) >= lengths[:, None])


def hnet(ends: tuple[int, ...] = ENDS) -> Bytes:
    torch.manual_seed(0)
    return Bytes(redraw(HNet(hnet_test())), ends)


def lra(attention: str, ignored: int = 61) -> Texts:
    torch.manual_seed(0)
    model = redraw(TextClassifier(lra_test(attention=attention)))
    model.calibrate(torch.randint(256, (2, 200)))
    return Texts(model, 0 if attention == "hash" else ignored)


def attention_of(name: str) -> Any:
    """The first attention of a classifier."""
    return lra(name).model.blocks[0].attn


def freeze_boundaries(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Run the model and make it and its copies decide the same again; what it decided, outermost first."""
    routers: list[Any] = [m for m in model.modules() if isinstance(m, RoutingModule)]
    kept: dict[Any, Tensor] = {}
    hooks = [
        m.register_forward_hook(lambda m, _, routing: kept.__setitem__(m, routing.boundary)) for m in routers
    ]
    with torch.no_grad():
        model(x)
    for router, hook in zip(routers, hooks):
        hook.remove()
        router.decide = functools.partial(decided, kept[router])
    return sorted(kept.values(), key=len, reverse=True)


def decided(boundary: Tensor, probability: Tensor) -> Tensor:
    """What was decided before."""
    return boundary


# name -> model, shape of its input, calls of ops in one forward
Case = tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, int]]
MODELS: dict[str, Case] = {
    "hnet": (hnet, (200, 64), {"linear": 6, "neighborhood": 4}),
    "hnet-one": (lambda: hnet((0, 67)), (67, 64), {"linear": 6, "neighborhood": 4}),
    "lra-elu1": (lambda: lra("elu1"), (2, 256, 64), {"linear": 2}),
    "lra-favor": (lambda: lra("favor"), (2, 256, 64), {"linear": 2}),
    "lra-linformer": (lambda: lra("linformer"), (2, 200, 64), {}),  # PyTorch's attention serves it
    "lra-local": (lambda: lra("local"), (2, 256, 64), {"windowed": 2}),
    "lra-longformer": (lambda: lra("longformer"), (2, 256, 64), {"neighborhood": 2}),
    "lra-whole": (lambda: lra("longformer", 0), (2, 11, 64), {"neighborhood": 2}),
    "lra-hash": (lambda: lra("hash"), (2, 200, 64), {"hash": 2}),
    "performer": (Graphs, (200, 52), {"linear": 1}),
}
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mamba2": (lambda: Packed(Mamba2Mixer(Mamba2Config(48, 16, 12, chunk=16))), (200, 48)),
    "mamba2-odd": (lambda: Packed(Mamba2Mixer(Mamba2Config(33, 7, 11, chunk=64)), (0, 1, 80)), (80, 33)),
    "mamba2-one-token": (lambda: Packed(Mamba2Mixer(Mamba2Config(32, 8, 16)), (0, 1)), (1, 32)),
    "window": (lambda: Packed(HNetAttention(64, 4, 8, 15)), (200, 64)),
    "window-odd": (lambda: Packed(HNetAttention(39, 3, 6, 4), (0, 21)), (21, 39)),
    "past": (lambda: Packed(HNetAttention(96, 4, 12, None)), (200, 96)),
    "average": (Averaged, (200, 20)),
    "performer-alone": (lambda: Graphs((0, 1, 8, 9)), (9, 52)),
    **{f"lra-{name}": (functools.partial(attention_of, name), (2, 150, 64)) for name in ATTENTIONS},
}
needs_cpu = pytest.mark.skipif(bool(reason_against("cpu", family="linear")), reason="no cpu backend")


def make(name: str) -> tuple[nn.Module, Tensor]:
    build, shape, _ = MODELS[name]
    model = build()
    torch.manual_seed(1)
    x = torch.randn(shape)
    if name == "performer":
        redraw(model)
    return model, x


@needs_cpu
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_every_gradient_end_to_end(name: str) -> None:
    model, x = make(name)
    freeze_boundaries(model, x)
    original = copy.deepcopy(model)
    exact = gradients(double(model), x.double())
    report = vicinal.accelerate(model)
    assert report.replaced
    assert not report.left_alone
    with CountOps() as counter:
        found = gradients(model, x)
    wanted = {
        f"vicinal.{family}_{way}.cpu": n for family, n in MODELS[name][2].items() for way in ("fwd", "bwd")
    }
    assert counter.calls == wanted
    assert_same(found, exact, 1e-4)
    assert list(model.state_dict()) == list(original.state_dict())
    model.load_state_dict(original.state_dict(), strict=True)
    vicinal.restore(model)
    assert_same(gradients(model, x), gradients(original, x), 0.0)


@needs_cpu
@pytest.mark.parametrize("name", LAYERS)
def test_outputs_and_every_gradient_of_a_layer(name: str) -> None:
    build, shape = LAYERS[name]
    torch.manual_seed(0)
    layer = build()
    if not name.startswith("lra"):  # those were redrawn before their codes were fitted
        redraw(layer)
    x = torch.randn(shape)
    exact, plain = gradients(double(layer), x.double()), gradients(layer, x)
    assert len(vicinal.accelerate(layer).replaced) == 1
    found = gradients(layer, x)
    for key, value in exact.items():
        if not value.any():  # the decay of a sequence's only token
            assert name == "mamba2-one-token"
            assert found[key].abs().max() < 1e-6
            continue
        limit = max(1e-5, 2 * rms_ratio(plain[key], value))  # sums that cancel round in any order
        assert rms_ratio(found[key], value) <= limit, key


@needs_cpu
@pytest.mark.parametrize("name", MODELS)
def test_in_double_precision_nothing_but_rounding_differs(name: str) -> None:
    model, x = make(name)
    model, x = double(model), x.double()
    with torch.no_grad():
        expected = model(x)
        vicinal.accelerate(model)
        assert rms_ratio(model(x), expected) < 1e-11


@needs_cpu
@pytest.mark.parametrize("name", ["hnet", "lra-elu1", "lra-longformer"])
def test_training_takes_the_same_course(name: str) -> None:
    model, x = make(name)
    with torch.no_grad():  # at the weights of `redraw` 20 steps of H-Net in float32 and float64 part by 4e-3
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(0.6)
    freeze_boundaries(model, x)
    fast = copy.deepcopy(model)
    assert vicinal.accelerate(fast).replaced
    target = torch.randn(model(x).shape)
    curves = [loss_curve(m, x, target, 20, F.mse_loss) for m in (model, fast)]
    assert curves[0][-1] < 0.9 * curves[0][0]
    torch.testing.assert_close(curves[1], curves[0], rtol=1e-3, atol=0.0)


@needs_cpu
@pytest.mark.parametrize("name", ["mamba2", "window", "average", "lra-elu1", "lra-local"])
def test_autocast_is_as_exact_as_the_original(name: str) -> None:
    build, shape = LAYERS[name]
    torch.manual_seed(0)
    layer = redraw(build())
    x = torch.randn(shape)
    exact = gradients(double(layer), x.double())

    def errors() -> dict[str, float]:
        with torch.autocast("cpu", torch.bfloat16):
            results = gradients(layer, x)
        return {key: rms_ratio(value, exact[key]) for key, value in results.items()}

    before = errors()
    vicinal.accelerate(layer)
    for key, error in errors().items():
        assert error <= 2 * before[key] + 4 * torch.finfo(torch.bfloat16).eps, key


@needs_cpu
@pytest.mark.parametrize("name", ["mamba2", "past", "average", "lra-elu1", "performer-alone"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_short_types_are_as_exact_as_the_original(name: str, dtype: torch.dtype) -> None:
    build, shape = LAYERS[name]
    torch.manual_seed(0)
    layer = redraw(build()).to(dtype)
    x = torch.randn(shape, dtype=dtype)
    exact, plain = gradients(double(layer), x.double()), gradients(layer, x)
    assert vicinal.accelerate(layer).replaced
    for key, value in gradients(layer, x).items():
        if plain[key].isnan().any():  # the features' sums leave the range of the plain ones
            assert (name, dtype) == ("performer-alone", torch.float16)
            assert rms_ratio(value, exact[key]) <= 2e-3, key
            continue
        bound = 2 * rms_ratio(plain[key], exact[key]) + 4 * torch.finfo(dtype).eps
        assert rms_ratio(value, exact[key]) <= bound, key


@needs_cpu
@pytest.mark.parametrize("name", ["lra-favor", "lra-longformer"])
def test_compiled_in_one_graph(name: str) -> None:
    model, x = make(name)
    exact = gradients(double(model), x.double())
    vicinal.accelerate(model)
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = {key.replace("_orig_mod.", ""): value for key, value in gradients(compiled, x).items()}
    assert_same(found, exact, 1e-4)


def test_boundaries_flip_rarely() -> None:
    """The share of boundaries that the accelerated model decides otherwise, given identical inputs."""
    model, x = hnet(), torch.randn(200, 64)
    slow, fast = copy.deepcopy(model).double(), copy.deepcopy(model)
    vicinal.accelerate(fast)
    outermost, other = (freeze_boundaries(m, x.to(m.lm_head.weight.dtype))[0] for m in (slow, fast))
    assert 0.1 < outermost.float().mean() < 0.9
    assert (outermost != other).float().mean() <= WORST_FLIPS


@pytest.mark.parametrize("fast", [False, pytest.param(True, marks=needs_cpu)])
def test_packed_sequences_are_separate(fast: bool) -> None:
    model = redraw(HNet(hnet_test())).double()
    if fast:
        vicinal.accelerate(model)
    tokens = torch.randint(256, (200,))
    with torch.no_grad():
        packed = model(tokens, ends_of())
        alone = [model(tokens[None, a:b])[0] for a, b in itertools.pairwise(ENDS) if b > a]
    torch.testing.assert_close(packed, torch.cat(alone))


@pytest.mark.parametrize("fast", [False, pytest.param(True, marks=needs_cpu)])
def test_decoding_equals_the_forward_pass(fast: bool) -> None:
    model: Any = redraw(HNet(hnet_test())).double()
    tokens = torch.randint(256, (3, 50))  # more than a window, and boundaries at other places in each
    with torch.no_grad():
        expected = model(tokens)
        if fast:
            vicinal.accelerate(model)
        state = model.make_state(3, 50)
        with CountOps() as counter:
            found = torch.stack([model.step(tokens[:, t], state) for t in range(50)], 1)
    torch.testing.assert_close(found, expected)
    assert bool(counter.calls) == fast


def test_mamba2_by_its_recurrence() -> None:
    layer = redraw(Mamba2Mixer(Mamba2Config(24, 5, 6, chunk=4))).double()
    v, k, q = torch.randn(11, 8, 6).double(), torch.randn(11, 5).double(), torch.randn(11, 5).double()
    decay = -torch.rand(11, 8).double()
    packing = Packing.of(ends_of((0, 7, 11)), 11)
    got: Any = layer.scan(v, decay, k, q, packing)
    for t in range(11):
        if t in (0, 7):
            sums = torch.zeros(8, 5, 6).double()
        sums = sums * decay[t].exp()[:, None, None] + k[t, :, None] * v[t, :, None]
        torch.testing.assert_close(got[t], torch.einsum("n,hnp->hp", q[t], sums))


def test_mamba2_against_transformers() -> None:
    library("regex")
    modeling = library("transformers.models.mamba2.modeling_mamba2")
    sizes = {"hidden_size": 24, "state_size": 5, "head_dim": 6, "num_heads": 8, "n_groups": 1, "expand": 2}
    config = library("transformers").Mamba2Config(chunk_size=4, num_hidden_layers=1, **sizes)
    theirs = redraw(modeling.Mamba2Mixer(config, 0)).eval()
    ours = Mamba2Mixer(Mamba2Config(24, 5, 6, chunk=4))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(1, 13, 24)
    with torch.no_grad():
        assert rms_ratio(ours(x[0], Packing.of(ends_of((0, 13)), 13)), theirs(x)[0]) < 1e-5


def test_names_of_hnet() -> None:
    names = list(HNet(hnet_test()).state_dict())
    inner = "backbone.main_network."
    for name in (
        "embeddings.weight",
        "backbone.encoder.layers.0.norm1.weight",
        "backbone.encoder.layers.0.mixer.in_proj.weight",
        "backbone.encoder.rmsnorm.weight",
        f"{inner}encoder.layers.0.mixer.Wqkv.weight",
        f"{inner}encoder.layers.0.mixer.out_proj.weight",
        f"{inner}encoder.layers.0.norm2.weight",
        f"{inner}encoder.layers.0.mlp.fc1.weight",
        f"{inner}routing_module.q_proj_layer.weight",
        f"{inner}residual_proj.weight",
        f"{inner}main_network.pad_dimension",
        f"{inner}main_network.main_network.layers.1.mlp.fc2.weight",
        "lm_head.weight",
    ):
        assert name in names
    mixer = [n.split("mixer.")[1] for n in names if n.startswith("backbone.encoder.layers.0.mixer")]
    parts = ["dt_bias", "A_log", "D", "in_proj.weight", "conv1d.weight", "conv1d.bias", "norm.weight"]
    assert mixer == [*parts, "out_proj.weight"]


def test_published_sizes() -> None:
    with torch.device("meta"):
        count = sum(p.numel() for p in HNet(hnet_two_stage()).parameters()) / 1e6
        lengths = {name: len(TextClassifier(lra_text(attention=name)).state_dict()) for name in ATTENTIONS}
        performer = PerformerAttention(52, 4)
    assert 650 < count < 900
    assert lengths["elu1"] < lengths["longformer"]
    assert performer.fast_attention.projection_matrix.shape == (266, 64)


def test_performer_against_its_release() -> None:
    theirs = library("performer_pytorch")
    layer = theirs.SelfAttention(dim=52, heads=4, dim_head=16, causal=False).eval()
    ours = PerformerAttention(52, 4, head_dim=16)
    ours.load_state_dict(layer.state_dict(), strict=True)
    x = torch.randn(200, 52)
    with torch.no_grad():
        alone = [layer(x[None, a:b])[0] for a, b in itertools.pairwise(ENDS) if b > a]
        assert rms_ratio(ours(x, ends_of()), torch.cat(alone)) < 1e-5


@needs_cpu
def test_many_graphs_go_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = redraw(Graphs())
    x = torch.randn(200, 52)
    exact = gradients(double(layer), x.double())
    monkeypatch.setattr("vicinal.drop_in.performer.IN_CACHE", 50)
    vicinal.accelerate(layer)
    with CountOps() as counter:
        found = gradients(layer, x)
    assert counter.calls == {"vicinal.linear_fwd.cpu": 3, "vicinal.linear_bwd.cpu": 3}
    assert_same(found, exact, 1e-4)


def test_ratio_loss_is_least_at_its_ratio() -> None:
    model = redraw(HNet(hnet_test()))
    _, (outer, inner) = model.route(torch.randint(256, (200,)), ends_of())
    assert len(inner.boundary) == int(outer.boundary.sum())
    assert bool(outer.boundary[[0, 37, 130]].all())
    loss = ratio_loss(outer, 6.0)
    loss.backward()
    query: Any = model.backbone.routing_module
    assert query.q_proj_layer.weight.grad.abs().max() > 0
    with pytest.raises(ValueError, match="per_chunk is 1"):
        ratio_loss(outer, 1)


def test_a_text_is_not_changed_by_its_padding() -> None:
    for name in ("elu1", "favor", "linformer", "local", "longformer"):
        model: Any = redraw(TextClassifier(lra_test(attention=name))).eval()
        vicinal.accelerate(model)
        tokens = torch.randint(256, (1, 90))
        padded = F.pad(tokens, (0, 40), value=7)
        with torch.no_grad():
            out = model(padded, torch.arange(130)[None] >= 90)
        assert rms_ratio(out, model(tokens)) < 1e-5, name


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="attention is 'elu2'"):
        TextClassifier(lra_test(attention="elu2"))
    with pytest.raises(ValueError, match="num_heads = 5"):
        TextClassifier(lra_test(num_heads=5))
    with pytest.raises(ValueError, match="max_len is 256"):
        TextClassifier(lra_test())(torch.zeros(1, 257, dtype=torch.long))
    with pytest.raises(NotImplementedError, match="ignored"):
        TextClassifier(lra_test(attention="hash"))(
            torch.zeros(1, 9, dtype=torch.long), torch.zeros(1, 9, dtype=torch.bool)
        )
    with pytest.raises(ValueError, match="head_dim is 10"):
        Mamba2Mixer(Mamba2Config(32, head_dim=10))
