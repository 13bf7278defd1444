"""Small reference layers (Point SSM, LMUFormer, SReT, DLGSANet, IFactFormer): by loops, and accelerated."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from backends_support import reason_against
from models_support import CountOps, assert_same, double, gradients, redraw, rms_ratio
from torch import Tensor, nn

import vicinal
from vicinal import segments
from vicinal.models import (
    ChannelAttention,
    DLGSABlock,
    DynamicLocalAttention,
    FactorizedAttention,
    LegendreMemory,
    Mamba2Config,
    PointSSM,
    RecursiveBlock,
    SlicedAttention,
    SpikingSelfAttention,
)
from vicinal.models.mamba2 import Packing
from vicinal.models.point_ssm import backwards, inverse

ENDS = torch.tensor([0, 20, 21, 60], dtype=torch.int32)


def curves() -> list[Tensor]:
    """The points of three samples along two curves through space."""
    torch.manual_seed(7)
    places = torch.randperm(16**3)[:60]
    xyz = torch.stack([places // 256, places // 16 % 16, places % 16], 1)
    sample = Packing.of(ENDS, 60).sequence
    coords = torch.cat([sample[:, None], xyz], 1).int()
    orders = (segments.serialize(coords, (16, 16, 16), 3, curve).order for curve in ("z", "hilbert"))
    return [order.long() for order in orders]


class Points(nn.Module):
    """Point SSM on three clouds: [T, C] -> [T, C]."""

    def __init__(self) -> None:
        super().__init__()
        config = Mamba2Config(24, state=8, head_dim=12, chunk=16)
        self.model = PointSSM(config, depth=1, orders=2, both_ways=True)
        self.orders = curves()

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x, self.orders, ENDS)


class Loud(nn.Module):
    """Spiking attention of inputs at which many neurons fire: [T, B, N, C] -> same."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = SpikingSelfAttention(24, 3)
        self.eval()  # statistics of a batch would cancel the biases before them

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(4 * x)


class Recursive(nn.Module):
    """SReT's block, the second time on mixed tokens: [B, N, C] -> [B, N, C]."""

    def __init__(self) -> None:
        super().__init__()
        self.block = RecursiveBlock(42, 3, (4, 2), mlp_ratio=2)
        self.order = torch.randperm(36, generator=torch.Generator().manual_seed(0))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x, [None, self.order])


# name -> model, shape of its input, modules that are replaced, calls of ops in one forward
Case = tuple[Callable[[], nn.Module], tuple[int, ...], int, dict[str, int]]
MODELS: dict[str, Case] = {
    "point-ssm": (Points, (60, 24), 4, {"linear": 4}),
    "spiking": (Loud, (3, 2, 17, 24), 1, {"linear": 1}),
    "sret": (Recursive, (2, 36, 42), 1, {"windowed": 1, "voxel": 1}),
    "dlgsanet": (lambda: DLGSABlock(24, 4), (2, 24, 11, 9), 1, {}),
    "dlgsanet-small-map": (lambda: DLGSABlock(16, 2, 5), (1, 16, 3, 8), 1, {}),
}
needs_cpu = pytest.mark.skipif(bool(reason_against("cpu", family="linear")), reason="no cpu backend")


@needs_cpu
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_every_gradient_agree(name: str) -> None:
    build, shape, replaced, families = MODELS[name]
    torch.manual_seed(0)
    model = redraw(build())
    x = torch.randn(shape)
    original = copy.deepcopy(model)
    exact = gradients(double(model), x.double())
    report = vicinal.accelerate(model)
    assert len(report.replaced) == replaced
    with CountOps() as counter:
        found = gradients(model, x)
    ops = {f"vicinal.{family}_{way}.cpu": n for family, n in families.items() for way in ("fwd", "bwd")}
    if name.startswith("dlgsanet"):
        assert counter.calls
        assert all(op.startswith("vicinal.neighborhood") for op in counter.calls)
    else:
        assert counter.calls == ops
    assert_same(found, exact, 1e-4 if name == "point-ssm" else 1e-5)
    model.load_state_dict(original.state_dict(), strict=True)
    original.load_state_dict(model.state_dict(), strict=True)
    vicinal.restore(model)
    assert torch.equal(model(x), original(x))


def test_points_may_come_in_any_order() -> None:
    model: Any = redraw(Points()).double()
    x = torch.randn(60, 24, dtype=torch.float64)
    mix = torch.cat([torch.randperm(20), torch.tensor([20]), 21 + torch.randperm(39)])
    expected = model(x)
    model.orders = [inverse(mix)[order] for order in model.orders]
    torch.testing.assert_close(model(x[mix]), expected[mix])


def test_orders_stay_in_their_samples() -> None:
    packing = Packing.of(ENDS, 60)
    for order in curves():
        back = backwards(order, packing)
        for a, b in itertools.pairwise(ENDS.tolist()):
            assert sorted(order[a:b].tolist()) == list(range(a, b))
            assert back[a:b].tolist() == order[a:b].tolist()[::-1]
    with pytest.raises(ValueError, match="orders has 2 permutations; the layer has 4 mixers"):
        Points().model(torch.randn(60, 24), curves()[:1], ENDS)


def test_legendre_memory_by_its_recurrence() -> None:
    layer = LegendreMemory(5, 20.0, 50)
    u = torch.randn(2, 40, 3, dtype=torch.float64, requires_grad=True)
    got = layer(u)
    memory, rows = torch.zeros(2, 3, 5, dtype=torch.float64), []
    for t in range(40):
        memory = layer.step(u[:, t], memory)
        rows.append(memory)
    expected = torch.stack(rows, 1)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)  # the matrices are float32
    grads = [torch.autograd.grad(y.sin().sum(), u, retain_graph=True)[0] for y in (got, expected)]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="u has 51 tokens; length is 50"):
        layer(torch.randn(1, 51, 3))


def test_legendre_memory_remembers_a_constant() -> None:
    memory = LegendreMemory(6, 30.0, 300)(torch.ones(1, 300, 1))[0, -1, 0]
    torch.testing.assert_close(memory, torch.eye(6)[0], atol=1e-3, rtol=0)


def test_sret_by_loops() -> None:
    layer = redraw(SlicedAttention(12, 2, 3)).double()
    x, order = torch.randn(2, 15, 12, dtype=torch.float64), torch.randperm(15)
    got = layer(x, order)
    q, k, v = layer.qkv(x).unflatten(-1, (3, 2, 6)).unbind(2)
    out = torch.empty_like(v)
    for slot in order.view(3, 5):
        for i in slot:
            scores = torch.einsum("bhd,bjhd->bhj", q[:, i], k[:, slot]) * 6**-0.5
            out[:, i] = torch.einsum("bhj,bjhd->bhd", scores.softmax(-1), v[:, slot])
    torch.testing.assert_close(got, layer.proj(out.flatten(-2)))
    with pytest.raises(ValueError, match="x has 16 tokens, which slices = 3"):
        layer(torch.randn(1, 16, 12).double())


def test_dlgsanet_by_loops() -> None:
    layer = redraw(DynamicLocalAttention(6, 2, 3, reduction=2)).double()
    weights, v = torch.randn(1, 2, 9, 4, 5).double(), torch.randn(1, 6, 4, 5).double()
    expected = torch.zeros_like(v)
    for y in range(4):
        for x in range(5):
            for r in range(9):
                at_y, at_x = y + r // 3 - 1, x + r % 3 - 1
                if 0 <= at_y < 4 and 0 <= at_x < 5:
                    per_channel = weights[0, :, r, y, x].repeat_interleave(3)
                    expected[0, :, y, x] += per_channel * v[0, :, at_y, at_x]
    torch.testing.assert_close(layer.aggregate(weights, v), expected)
    vicinal.accelerate(layer)
    torch.testing.assert_close(layer.aggregate(weights, v), expected)


def test_channel_attention_by_its_formula() -> None:
    layer = redraw(ChannelAttention(6, 2)).double()
    x = torch.randn(2, 6, 4, 5, dtype=torch.float64)
    q, k, v = layer.dwconv(layer.qkv(x)).chunk(3, 1)
    out = torch.zeros_like(v)
    for head in range(2):
        for i in range(3 * head, 3 * head + 3):
            for j in range(3 * head, 3 * head + 3):
                a, b = (F.normalize(t.flatten(1), dim=1) for t in (q[:, i], k[:, j]))
                weight = F.relu((a * b).sum(1) * layer.temperature[head, 0, 0])
                out[:, i] += weight[:, None, None] * v[:, j]
    torch.testing.assert_close(layer(x), layer.proj(out))


@pytest.mark.parametrize("parallel", [True, False])
def test_factorised_attention_by_loops(parallel: bool) -> None:
    layer = redraw(FactorizedAttention(6, 2, 2, parallel=parallel, head_dim=4)).double()
    x = torch.randn(1, 3, 5, 6, dtype=torch.float64)
    kernels = [layer.kernel(x, axis)[0] for axis in range(2)]
    v = layer.value(x).unflatten(-1, (2, 3))[0]
    outs = []
    for axis in range(2):
        found = torch.zeros_like(v)
        for i in range(v.shape[axis]):
            for j in range(v.shape[axis]):
                part = kernels[axis][:, i, j, None] * v.select(axis, j)
                found.select(axis, i).add_(part)
        outs.append(found.flatten(-2))
        v = v if parallel else found
    joined = torch.cat(outs, -1) if parallel else outs[-1]
    torch.testing.assert_close(layer(x)[0], layer.proj(joined))


def test_factorised_kernels_come_from_means() -> None:
    layer = FactorizedAttention(6, 2, 3)
    x = torch.randn(1, 3, 4, 5, 6)
    other = x + torch.randn(1, 3, 1, 5, 6) * torch.tensor([1.0, -1.0, 2.0, -2.0])[:, None, None]
    assert rms_ratio(layer.kernel(other, 0), layer.kernel(x, 0)) < 1e-5
    assert rms_ratio(layer.kernel(other, 1), layer.kernel(x, 1)) > 1e-2
    assert layer(x).shape == x.shape


def test_bad_input() -> None:
    for build in (
        lambda: SlicedAttention(10, 3, 2),
        lambda: SpikingSelfAttention(10, 3),
        lambda: ChannelAttention(10, 3),
        lambda: FactorizedAttention(10, 3, 2),
    ):
        with pytest.raises(ValueError, match="dim is 10, which num_heads = 3 does not divide"):
            build()
    with pytest.raises(ValueError, match="groups = 3"):
        DynamicLocalAttention(10, 3)
    with pytest.raises(ValueError, match="axes is 5"):
        FactorizedAttention(8, 2, 5)
    with pytest.raises(ValueError, match="with 2 axes of space"):
        FactorizedAttention(8, 2, 2)(torch.randn(1, 3, 8))
