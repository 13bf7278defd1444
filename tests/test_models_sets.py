"""DSVT and FlatFormer: the padded reference against the definition, and accelerated models against it."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from models_support import CountOps, assert_same, double, loss_curve, redraw, rms_ratio
from torch import Tensor, nn

import vicinal
from vicinal.models import DSVT, DSVTConfig, FlatFormer, dsvt_test, flatformer_test
from vicinal.models.dsvt import padded_sets
from vicinal.models.flatformer import serpentine

POOLED = DSVTConfig(
    grid=(24, 20, 8),
    embed_dim=48,
    num_heads=4,
    feedforward=96,
    windows=(((12, 12, 8), (24, 24, 8)), ((6, 6, 4), (12, 12, 4))),
    shift=(6, 6, 0),
    set_sizes=(12, 7),
    blocks=(1, 1),
    strides=((1, 1, 2),),
)


def voxels(counts: tuple[int, ...], grid: tuple[int, int, int], seed: int = 0) -> Tensor:
    """int64 [N, 4] (sample, z, y, x), in no order."""
    generator = torch.Generator().manual_seed(seed)
    x, y, z = grid
    parts = []
    for sample, n in enumerate(counts):
        cell = torch.randperm(x * y * z, generator=generator)[:n]
        parts.append(torch.stack([torch.full_like(cell, sample), cell % z, cell // z % y, cell // z // y], 1))
    coords = torch.cat(parts)
    return coords[torch.randperm(len(coords), generator=generator)]


CASES: dict[str, tuple[Any, tuple[int, ...], int, str]] = {
    "dsvt": (lambda: DSVT(dsvt_test()), (350, 250), 4, "stage_0"),
    "dsvt-pooled": (lambda: DSVT(POOLED), (300, 200), 4, "stage_1"),
    "dsvt-one-voxel": (lambda: DSVT(dsvt_test()), (1, 40), 4, "stage_0"),
    "flatformer": (lambda: FlatFormer(flatformer_test()), (70, 205), 4, "block_list.0"),
    "flatformer-small-samples": (lambda: FlatFormer(flatformer_test()), (3, 0, 16, 33), 4, "block_list.0"),
}


def make(name: str) -> tuple[nn.Module, Tensor, Tensor, int]:
    """Model in eval, features, coordinates, number of samples. Position embeddings' norms have statistics."""
    build, counts, _, _ = CASES[name]
    torch.manual_seed(0)
    model = redraw(build()).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean.normal_()
            module.running_var.uniform_(5, 20)
    grid = POOLED.grid if name == "dsvt-pooled" else (60, 60, 1)
    coords = voxels(counts, grid)
    return model, torch.randn(len(coords), model.config.embed_dim), coords, len(counts)


class Rows(nn.Module):
    """A model with its coordinates, from features to features."""

    def __init__(self, model: nn.Module, coords: Tensor, batch: int) -> None:
        super().__init__()
        self.model, self.coords, self.batch = model, coords, batch

    def forward(self, x: Tensor) -> Tensor:
        out = self.model(x, self.coords, self.batch)
        return out[0] if isinstance(out, tuple) else out


def results(model: nn.Module, x: Tensor, coords: Tensor, batch: int) -> dict[str, Tensor]:
    """Output, and the gradients of a random projection of it, without those that no forward reaches."""
    model.zero_grad()
    x = x.detach().clone().requires_grad_()
    out = Rows(model, coords, batch)(x)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    (out * weights).sum().backward()
    assert x.grad is not None
    found = {"output": out.detach(), "input.grad": x.grad}
    for name, parameter in model.named_parameters():
        grad = parameter.grad  # that of a bias before a batch norm is rounding
        if grad is not None and grad.abs().max() > 1e-9:
            found[f"{name}.grad"] = parameter.grad.clone()
    model.zero_grad()
    return found


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", CASES)
def test_in_double_precision_values_and_gradients_are_the_padded_models(name: str, training: bool) -> None:
    if training and name == "dsvt-one-voxel":
        pytest.skip("batch norm of one voxel")
    model, x, coords, batch = make(name)
    model, x = double(model), x.double()
    fast = copy.deepcopy(model)
    report = vicinal.accelerate(fast)
    assert [row.name for row in report.replaced] == [""]
    expected = results(model.train(training), x, coords, batch)
    actual = results(fast.train(training), x, coords, batch)
    assert len(expected) > 0.9 * len(list(model.parameters()))
    assert_same({key: actual[key] for key in expected}, expected, 1e-9)


@pytest.mark.parametrize("name", ["dsvt", "flatformer"])
def test_errors_in_single_precision_are_small(name: str) -> None:
    model, x, coords, batch = make(name)
    expected = results(double(model), x.double(), coords, batch)
    vicinal.accelerate(model)
    assert_same({k: v for k, v in results(model, x, coords, batch).items() if k in expected}, expected, 1e-4)


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_ran_once_a_layer_and_direction(name: str) -> None:
    model, x, coords, batch = make(name)
    q = torch.zeros(4, 2, 8)
    groups = vicinal.segments.from_lengths(torch.tensor([4]))
    explanation = vicinal.explain(vicinal.voxel.voxel_attention, q, q, q, groups)
    if explanation.backend == "reference":
        pytest.skip(str(explanation))
    layers = CASES[name][2]
    vicinal.accelerate(model)
    with CountOps() as counter:
        Rows(model, coords, batch)(x).sum().backward()
    backend = explanation.backend
    assert counter.calls[f"vicinal.voxel_fwd.{backend}"] == layers
    assert counter.calls[f"vicinal.voxel_bwd.{backend}"] == layers


@pytest.mark.parametrize("name", ["dsvt", "flatformer"])
def test_weights_stay_and_the_models_go_back(name: str) -> None:
    model, x, coords, batch = make(name)
    state = dict(model.state_dict(keep_vars=True))
    run = Rows(model, coords, batch)
    with torch.no_grad():
        expected = run(x)
        vicinal.accelerate(model)
        assert all(value is state[key] for key, value in model.state_dict(keep_vars=True).items())
        actual = run(x)
        assert torch.equal(Rows(pickle.loads(pickle.dumps(model)), coords, batch)(x), actual)
        assert rms_ratio(actual, expected) < 1e-5
        vicinal.restore(model)
        assert torch.equal(run(x), expected)


@pytest.mark.parametrize("name", ["dsvt", "flatformer"])
def test_training_takes_the_same_course(name: str) -> None:
    model, x, coords, batch = make(name)
    fast = copy.deepcopy(model)
    vicinal.accelerate(fast)
    target = torch.randn_like(x)
    curves = [
        loss_curve(Rows(m.train(), coords, batch), x, target, 20, nn.functional.mse_loss)
        for m in (model, fast)
    ]
    assert curves[0][-1] < 0.9 * curves[0][0]
    assert ((curves[1] - curves[0]).abs() <= 1e-3 * curves[0]).all()


@pytest.mark.parametrize("name", ["dsvt", "flatformer"])
def test_a_sample_does_not_see_its_batch(name: str) -> None:
    model, x, coords, batch = make(name)
    vicinal.accelerate(model)
    with torch.no_grad():
        whole = Rows(model, coords, batch)(x)
        for sample in range(batch):
            rows = coords[:, 0] == sample
            alone = coords[rows].clone()
            alone[:, 0] = 0
            assert rms_ratio(Rows(model, alone, 1)(x[rows]), whole[rows]) < 1e-5


def test_padded_sets_are_an_exact_partition() -> None:
    coords = voxels((300, 120), (60, 60, 1))
    sets = padded_sets(coords, (60, 60, 1), (12, 12, 1), (6, 6, 0), 12, "x")
    kept = sets.rows[~sets.hidden]
    assert torch.equal(kept.sort()[0], torch.arange(420))
    window = torch.stack([coords[:, 0], (coords[:, 2] + 6) // 12, (coords[:, 3] + 6) // 12], 1)
    assert all((window[rows] == window[rows[0]]).all() for rows in sets.rows)
    assert torch.equal(sets.rows.flatten()[sets.source], torch.arange(420))


def test_serpentine_order_of_a_small_grid() -> None:
    coords = torch.cartesian_prod(torch.tensor([0]), torch.tensor([0]), torch.arange(4), torch.arange(4))
    order = serpentine(coords, (2, 2), "x", False)
    walk = [(int(coords[i, 3]), int(coords[i, 2])) for i in order]
    assert walk[:8] == [(0, 0), (0, 1), (1, 1), (1, 0), (2, 0), (2, 1), (3, 1), (3, 0)]
    assert walk[8:12] == [(3, 2), (3, 3), (2, 3), (2, 2)]  # the next row of windows goes back


def test_parameters_have_the_published_names() -> None:
    names = set(DSVT(dsvt_test()).state_dict())
    for name in (
        "stage_0.1.encoder_list.0.win_attn.self_attn.in_proj_weight",
        "stage_0.0.encoder_list.1.norm.weight",
        "residual_norm_stage_0.1.weight",
        "input_layer.posembed_layers.0.1.0.position_embedding_head.1.running_mean",
    ):
        assert name in names
    assert "block_list.0.block.3.attn.attn.in_proj_weight" in FlatFormer(flatformer_test()).state_dict()


def test_attention_that_is_not_torchs_is_left_alone() -> None:
    model: Any = DSVT(dsvt_test())
    vicinal.accelerate(model.stage_0)
    report = vicinal.accelerate(model)
    assert "not a MultiheadAttention" in report.left_alone[0].note
    with pytest.raises(ValueError, match="strides must have one entry less "):
        DSVTConfig(blocks=(1, 1))
