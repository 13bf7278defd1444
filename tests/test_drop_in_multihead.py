"""accelerate and restore on torch's own attention, and on models in any state: all of it or nothing."""

from __future__ import annotations

import copy
import time
from typing import Any

import pytest
import torch
from models_support import redraw
from multihead_support import padding
from torch import Tensor, nn
from torch.nn.utils import parametrize

import vicinal
from vicinal import drop_in
from vicinal.drop_in.torch_multihead import FusedMultiheadAttention
from vicinal.models import SwinTransformer, swin_test
from vicinal.nn import MultiheadAttention

C, H = 16, 4


class Block(nn.Module):
    """A block with torch's attention, of which it drops the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(C, H, batch_first=True)
        self.norm = nn.LayerNorm(C)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.attn(x, x, x)[0])


class Special(nn.MultiheadAttention):
    pass


def classes(model: nn.Module) -> list[type]:
    return [type(m) for m in model.modules()]


def test_exact_instances_are_swapped_and_put_back() -> None:
    model: Any = nn.ModuleDict({"known": Block(), "special": Special(C, H), "own": MultiheadAttention(C, H)})
    before, state = classes(model), dict(model.state_dict(keep_vars=True))
    x = torch.randn(2, 5, C)
    expected = model["known"](x)
    planned = vicinal.accelerate(model, dry_run=True)
    assert classes(model) == before
    report = vicinal.accelerate(model)
    assert report == planned
    assert [(row.name, row.became) for row in report.replaced] == [("known.attn", FusedMultiheadAttention)]
    notes = {row.name: row.note for row in report.left_alone}
    assert "a subclass of torch.nn.modules.activation.MultiheadAttention" in notes["special"]
    assert notes["own"] == "it is vicinal's own"
    assert (model["known"](x) - expected).abs().max() < 1e-5
    assert all(v is state[k] for k, v in model.state_dict(keep_vars=True).items())
    assert not vicinal.accelerate(model).replaced
    assert len(vicinal.restore(model).rows) == 1
    assert classes(model) == before


def test_families_choose() -> None:
    model = nn.Sequential(Block(), SwinTransformer(swin_test()))
    assert len(vicinal.accelerate(model, families=["windowed"], dry_run=True).replaced) == 4
    assert len(vicinal.accelerate(model, families=["multihead"], dry_run=True).replaced) == 1
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(C, H, batch_first=True), 1)
    assert not vicinal.accelerate(encoder, families=["windowed"]).replaced
    assert encoder.use_nested_tensor


def test_nothing_to_swap_is_an_empty_report() -> None:
    report = vicinal.accelerate(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    assert not report.rows
    assert "0 replaced, 0 left alone" in str(report)


def test_what_is_no_module_or_scripted_is_refused() -> None:
    with pytest.raises(TypeError, match="model is a dict; it must be a torch"):
        vicinal.accelerate({"a": Block()})
    scripted = torch.jit.script(nn.MultiheadAttention(C, H))
    for function in (vicinal.accelerate, vicinal.restore):
        with pytest.raises(ValueError, match="model is scripted; accelerate it before"):
            function(scripted)
    mixed = nn.ModuleList([scripted, nn.MultiheadAttention(C, H)])
    report = vicinal.accelerate(mixed)
    assert [row.note for row in report.left_alone] == ["it is scripted; accelerate it before"]
    assert len(report.replaced) == 1


def test_meta_modules_are_swapped_and_filled_later() -> None:
    with torch.device("meta"):
        model = Block()
    assert len(vicinal.accelerate(model).replaced) == 1
    real = redraw(Block())
    model.load_state_dict(real.state_dict(), strict=True, assign=True)
    x = torch.randn(2, 5, C)
    assert (model(x) - real(x)).abs().max() < 1e-5


def test_half_converted_models_are_finished_and_put_back() -> None:
    model = nn.Sequential(Block(), Block())
    vicinal.accelerate(model[0])
    report = vicinal.accelerate(model)
    assert [row.name for row in report.replaced] == ["1.attn"]
    assert [row.note for row in report.left_alone] == ["it is accelerated already"]
    assert len(vicinal.restore(model).rows) == 2


def test_hooks_stay_and_fire() -> None:
    model, calls = Block(), []
    model.attn.register_forward_pre_hook(lambda *_: calls.append("before"))
    model.attn.register_forward_hook(lambda *_: calls.append("after"))
    model.attn.in_proj_weight.register_hook(lambda g: calls.append("gradient"))
    vicinal.accelerate(model)
    model(torch.randn(2, 5, C)).sum().backward()
    assert calls == ["before", "after", "gradient"]


class Doubled(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return 2 * w


def test_parametrizations_before_and_after() -> None:
    single = Block()
    parametrize.register_parametrization(single.attn, "in_proj_weight", Doubled())
    report = vicinal.accelerate(single)
    assert not report.replaced
    assert [row.note.startswith("it has parametrizations") for row in report.left_alone] == [True]
    model: Any = nn.Sequential(Block(), redraw(Block()))
    x = torch.randn(2, 5, C)
    vicinal.accelerate(model)
    parametrize.register_parametrization(model[1].attn, "in_proj_weight", Doubled())
    doubled: Any = redraw(Block())
    with torch.no_grad():
        doubled.attn.in_proj_weight.mul_(2)
    assert (model[1](x) - doubled(x)).abs().max() < 1e-5
    with pytest.raises(ValueError, match=r"1\.attn is a ParametrizedFused.*; remove its parametrizations"):
        vicinal.restore(model)
    assert type(model[0].attn) is FusedMultiheadAttention
    parametrize.remove_parametrizations(model[1].attn, "in_proj_weight")
    assert len(vicinal.restore(model).rows) == 2
    inner = Block()  # of the output's projection: its weight is read as usual
    parametrize.register_parametrization(inner.attn.out_proj, "weight", Doubled())
    expected = inner(x)
    assert not vicinal.accelerate(inner).replaced
    assert torch.equal(inner(x), expected)


def test_tied_modules_and_tied_weights() -> None:
    shared = Block()
    other = Block()
    other.attn.in_proj_weight = shared.attn.in_proj_weight
    model = nn.ModuleList([shared, shared, other])
    assert len(vicinal.accelerate(model).replaced) == 2
    assert model[0] is model[1]
    assert other.attn.in_proj_weight is shared.attn.in_proj_weight


def test_compiled_models_are_compiled_anew() -> None:
    torch._dynamo.reset()
    model = redraw(Block())
    x = torch.randn(2, 5, C)
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(str(graph.graph))
        return graph.forward

    compiled = torch.compile(model, backend=backend)
    expected = compiled(x)
    assert len(vicinal.accelerate(compiled).replaced) == 1
    assert (compiled(x) - expected).abs().max() < 1e-5
    assert len(graphs) == 2
    vicinal.restore(compiled)
    assert torch.equal(compiled(x), expected)


def test_an_error_on_the_way_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(Block(), Block())

    class Slotted(nn.Module):
        __slots__ = ("more",)

    before = classes(model)
    planned = drop_in._planned

    def with_a_bad_one(*args: Any) -> Any:
        rows, changes = planned(*args)
        return rows, [*changes, (model[1].norm, Slotted)]

    monkeypatch.setattr(drop_in, "_planned", with_a_bad_one)
    with pytest.raises(TypeError, match="object layout differs"):
        vicinal.accelerate(model)
    assert classes(model) == before


def test_copies_stay_accelerated_and_load_state_dicts() -> None:
    model: Any = redraw(Block())
    fast = copy.deepcopy(model)
    vicinal.accelerate(fast)
    twin = copy.deepcopy(fast)
    assert type(twin.attn) is FusedMultiheadAttention
    twin.load_state_dict(model.state_dict(), strict=True)
    x, hidden = torch.randn(2, 5, C), padding(2, 5)
    expected = model.attn(x, x, x, hidden, False)[0]
    assert (twin.attn(x, x, x, hidden, False)[0] - expected).abs().max() < 1e-5


def test_three_hundred_modules_take_less_than_a_second() -> None:
    model = nn.Sequential(*[Block() for _ in range(300)])
    vicinal.accelerate(Block())  # imports
    start = time.process_time()
    assert len(vicinal.accelerate(model).replaced) == 300
    assert time.process_time() - start < 1.0
