"""Layers of graph transformers: accelerated equals reference in outputs and every gradient."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models_support import CountOps, redraw, rms_ratio
from torch import Tensor, nn

from vicinal import Graph, accelerate, restore
from vicinal.models import GPSLayer, GraphTransformerLayer, HCMTEdgeLayer


def graph_of(nodes: int, edges: int, dim: int, seed: int = 0) -> tuple[Graph, Tensor, Tensor]:
    """A graph whose last node has no edges, and features of nodes and edges."""
    generator = torch.Generator().manual_seed(seed)
    src, dst = torch.randint(0, nodes - 1, (2, edges), generator=generator)
    h, e = (torch.randn(n, dim, generator=generator) for n in (nodes, edges))
    return Graph.from_coo(src, dst, nodes), h, e


def graph_transformer() -> tuple[nn.Module, Callable[..., Any], list[Tensor], int]:
    graph, h, e = graph_of(60, 400, 80)
    return GraphTransformerLayer(80, 8), lambda m, h, e: m(h, e, graph), [h, e], 1


def hcmt() -> tuple[nn.Module, Callable[..., Any], list[Tensor], int]:
    (mesh, h, e), (contact, _, c) = graph_of(40, 200, 32), graph_of(40, 90, 32, 1)
    return HCMTEdgeLayer(32, 4), lambda m, h, e, c: (m(h, (mesh, e), (contact, c)),), [h, e, c], 2


def gps() -> tuple[nn.Module, Callable[..., Any], list[Tensor], int]:
    """Six graphs of 3 to 40 nodes, their rows in any order."""
    sizes = torch.tensor([3, 40, 7, 12, 25, 9])
    batch = torch.repeat_interleave(torch.arange(6), sizes)
    batch = batch[torch.randperm(len(batch), generator=torch.Generator().manual_seed(2))]
    graph, h, e = graph_of(len(batch), 300, 52)
    return GPSLayer(52, 4), lambda m, h, e: m(h, e, graph, batch), [h, e], 1


def results(model: nn.Module, call: Callable[..., Any], given: list[Tensor]) -> dict[str, Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in given]
    outputs = call(model, *leaves)
    generator = torch.Generator().manual_seed(5)
    loss = sum((x * torch.randn(x.shape, generator=generator).to(x)).sum() for x in outputs)
    named = dict(model.named_parameters())
    grads = torch.autograd.grad(loss, [*leaves, *named.values()])
    found = {f"out{i}": x.detach() for i, x in enumerate(outputs)}
    names = [*(f"input{i}" for i in range(len(leaves))), *named]
    return found | dict(zip(names, grads))


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("make", [graph_transformer, hcmt, gps])
def test_accelerated_equals_reference(make: Callable[[], Any], train: bool) -> None:
    model, call, given, launches = make()
    redraw(model).train(train)
    exact = results(copy.deepcopy(model).double(), call, [x.double() for x in given])
    plain = results(model, call, given)
    fused = copy.deepcopy(model)
    assert len(accelerate(fused).replaced) == 1
    assert list(fused.state_dict()) == list(model.state_dict())
    with CountOps() as ops:
        found = results(fused, call, given)
    assert sum(ops.calls.values()) == 2 * launches
    assert found.keys() == exact.keys() == plain.keys()
    for name, want in exact.items():
        assert found[name].isfinite().all()
        if rms(want) < 1e-9:  # a bias before a batch norm that learns
            continue
        assert rms_ratio(found[name], want) <= max(1e-5, 2 * rms_ratio(plain[name], want)), name
    assert len(restore(fused).replaced) == 1
    torch.testing.assert_close(results(fused, call, given)["out0"], plain["out0"])


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def test_global_attention_of_gps_may_be_another_module() -> None:
    class Mean(nn.Module):
        def forward(self, h: Tensor, batch: Tensor) -> Tensor:
            return h.mean(0, keepdim=True).expand_as(h)

    graph, h, e = graph_of(20, 60, 16)
    out, _ = GPSLayer(16, 4, global_attention=Mean())(h, e, graph, torch.zeros(20).long())
    assert out.shape == (20, 16)


def test_training_curves_agree() -> None:
    curves = []
    for fused in (False, True):
        torch.manual_seed(0)
        model, call, given, _ = graph_transformer()
        if fused:
            accelerate(model)
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses = []
        for _ in range(20):
            optimiser.zero_grad()
            loss = call(model, *given)[0].square().mean()
            loss.backward()
            optimiser.step()
            losses.append(float(loss.detach()))
        curves.append(torch.tensor(losses))
    torch.testing.assert_close(curves[0], curves[1], rtol=1e-3, atol=0)


def test_layer_norm_and_no_residual() -> None:
    graph, h, e = graph_of(20, 60, 16)
    layer = GraphTransformerLayer(16, 4, layer_norm=True, batch_norm=False, residual=False)
    assert [n for n, _ in layer.named_parameters() if "norm" in n][:2] == [
        "layer_norm1_h.weight",
        "layer_norm1_h.bias",
    ]
    out, edge = layer(h, e, graph)
    assert out.shape == h.shape
    assert edge.shape == e.shape
