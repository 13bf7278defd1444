"""DiT-3D, the window block of Segment Anything and ConDaFormer's stage: accelerated equals reference, in
outputs and every gradient, and the references equal other forms of their definition.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dispatch_modes import Recorded
from models_support import assert_same, double, gradients, library, redraw, rms_ratio
from torch import Tensor, nn

from vicinal import accelerate, restore
from vicinal.models import ConDaFormerConfig, ConDaFormerStage, DiT3D, DiT3DConfig, WindowBlock
from vicinal.models.condaformer import PlaneAttention, pairs
from vicinal.models.vitdet import RelPosAttention


class Bound(nn.Module):
    """A model as a function of its first argument."""

    def __init__(self, model: nn.Module, *rest: Any) -> None:
        super().__init__()
        self.model, self.rest = model, rest

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x, *self.rest)


def points(n: int, size: int = 12) -> tuple[Tensor, Tensor]:
    """One point in each of n voxels of two samples, and the samples."""
    generator = torch.Generator().manual_seed(0)
    cells = torch.randperm(2 * size**3, generator=generator)[:n]
    voxel = torch.stack([cells // size**2 % size, cells // size % size, cells % size], 1)
    return voxel + torch.rand(n, 3, generator=generator) * 0.99, cells // size**3


def models() -> dict[str, tuple[nn.Module, Tensor]]:
    p, batch = points(500)
    dit = DiT3D(DiT3DConfig(input_size=16, patch_size=2, dim=48, depth=4, num_heads=3, window_blocks=(0, 3)))
    odd = DiT3D(DiT3DConfig(input_size=12, patch_size=2, dim=48, depth=2, num_heads=3, window_blocks=(0, 1)))
    stage = ConDaFormerStage(ConDaFormerConfig(dim=48, num_heads=3, window=4.0))
    return {
        "dit3d": (Bound(dit, torch.tensor([7, 500]), torch.tensor([0, 1])), torch.randn(2, 3, 16, 16, 16)),
        "dit3d-odd": (Bound(odd, torch.tensor([7]), torch.tensor([0])), torch.randn(1, 3, 12, 12, 12)),
        "window-block": (WindowBlock(32, 2, 7), torch.randn(2, 15, 10, 32)),
        "condaformer": (Bound(stage, p, batch, 2), torch.randn(500, 48)),
    }


CALLS = {
    "dit3d": ("windowed", 2),
    "dit3d-odd": ("windowed", 2),
    "window-block": ("windowed", 1),
    "condaformer": ("voxel_context", 2),
}


@pytest.mark.parametrize("name", CALLS)
def test_accelerated_equals_reference(name: str) -> None:
    torch.manual_seed(0)
    model, x = models()[name]
    redraw(model)
    expected = gradients(double(model), x.double())
    before = list(model.state_dict())
    report = accelerate(model)
    assert len(report.replaced) == CALLS[name][1]
    with Recorded() as mode:
        actual = gradients(model, x)
    family, count = CALLS[name]
    names = [str(func) for func, _ in mode.calls]
    for direction in ("fwd", "bwd"):
        assert sum(f"{family}_{direction}" in n for n in names) == count
    unseen = {n for n, g in expected.items() if g.abs().max() == 0}  # rows of labels and offsets not in use
    assert not any(n.endswith("weight.grad") for n in unseen)
    actual, expected = ({n: g for n, g in x.items() if n not in unseen} for x in (actual, expected))
    assert_same(actual, expected, 1e-4)
    assert list(model.state_dict()) == before
    restore(model)
    assert len(accelerate(model, dry_run=True).replaced) == CALLS[name][1]


def test_window_block_is_that_of_segment_anything() -> None:
    sam = library("timm.models.vision_transformer_sam")
    theirs = sam.Block(32, 2, window_size=7, use_rel_pos=True, input_size=(7, 7))
    redraw(theirs)
    ours = WindowBlock(32, 2, 7)
    ours.load_state_dict(
        {n.replace("mlp.lin", "mlp.fc"): t for n, t in theirs.state_dict().items()}, strict=True
    )
    x = torch.randn(2, 15, 10, 32)
    assert rms_ratio(ours(x), theirs(x)) < 1e-5
    accelerate(ours)
    assert rms_ratio(ours(x), theirs(x)) < 1e-5


def test_a_window_of_the_whole_volume_is_dense_attention() -> None:
    attn = RelPosAttention(24, 2, (3, 4, 2), ("rel_pos_x", "rel_pos_y", "rel_pos_z")).double()
    redraw(attn)
    of_x, of_y, of_z = attn.tables()
    x = torch.randn(2, 3, 4, 2, 24, dtype=torch.float64)
    q, k, v = attn.qkv(x).flatten(1, 3).unflatten(-1, (3, 2, 12)).unbind(2)
    place = torch.cartesian_prod(torch.arange(3), torch.arange(4), torch.arange(2))
    s = torch.einsum("bnhd,bmhd->bhnm", q, k) * 12**-0.5
    for n in range(24):
        for m in range(24):
            d = place[n] - place[m]
            row = of_x[d[0] + 2] + of_y[d[1] + 3] + of_z[d[2] + 1]
            s[:, :, n, m] += q[:, n] @ row
    out = attn.proj(torch.einsum("bhnm,bmhd->bnhd", s.softmax(-1), v).flatten(2)).view(x.shape)
    assert rms_ratio(attn(x), out) < 1e-12


def test_plane_attention_is_dense_attention_with_a_mask() -> None:
    p, batch = points(120, 6)
    config = ConDaFormerConfig(dim=12, num_heads=3, window=4.0)
    stage = ConDaFormerStage(config).double()
    attn = PlaneAttention(config).double()
    redraw(attn)
    x = torch.randn(120, 12, dtype=torch.float64)
    q, k, v = attn.qkv(x).unflatten(-1, (3, 3, 4)).unbind(1)
    for shifted in (False, True):
        planes = stage.planes(p, batch, 2, shifted)
        outs = []
        for h, ((plane, _), cells) in enumerate(zip(planes.groups.groups, planes.cells)):
            seen = torch.zeros(120, 120, dtype=torch.bool)
            seen[pairs(plane)] = True
            offset = (cells[:, None] - cells[None]).long() + planes.offsets // 2
            tq, tk, tv = (
                sum(t[offset[..., a], a, 0] for a in range(3))
                for t in (attn.q_table, attn.k_table, attn.v_table)
            )
            s = 0.5 * torch.einsum("nd,nmd->nm", q[:, h], k[:, h] + tq) + torch.einsum(
                "md,nmd->nm", k[:, h], tk
            )
            w = s.masked_fill(~seen, -torch.inf).softmax(-1)
            outs.append(torch.einsum("nm,nmd->nd", w, v[:, h] + tv))
        assert rms_ratio(attn(x, planes), attn.proj(torch.cat(outs, 1))) < 1e-12
