"""The reference of hash attention against the published formula, pairs of codes, and gradients by hand."""

from __future__ import annotations

import pytest
import torch
from hash_problems import BY_NAME, make, run, upstream, wide, with_heads
from joint_problems import rms_ratio
from torch import Tensor

from vicinal._hash_reference import projections

NAMES = ("ecoformer-stage3", "self", "offset-self", "tokens-17", "dim-17-5", "shared-tables")


def released(t: dict[str, Tensor], itself: bool, offset: float) -> Tensor:
    """EcoFormer's formula: distances from a [B, H, N, m, D] difference, linear attention between signs."""
    x = t["qk"].transpose(1, 2)
    x = x / x.norm(dim=-1, keepdim=True)
    distance = (x.unsqueeze(3) - t["anchors"][:, None]).square().sum(-1)
    sigma = distance.mean(-1).mean(-1)[..., None, None]
    features = torch.exp(-distance / (2 * sigma)) - t["mean"][:, None]
    code = torch.sign(torch.einsum("bhnm,hkm->bhnk", features, t["weight"]))
    v = t["v"].transpose(1, 2)
    top = torch.einsum("bhnk,bhke->bhne", code, torch.einsum("bhnk,bhne->bhke", code, v))
    top = top + offset * (v if itself else v.sum(2, keepdim=True))
    bottom = torch.einsum("bhnk,bhk->bhn", code, code.sum(2)) + v.shape[2] * offset
    return (top / bottom[..., None]).transpose(1, 2)


@pytest.mark.parametrize("name", NAMES)
def test_the_published_formula(name: str) -> None:
    problem = BY_NAME[name]
    tensors = wide(make(problem, torch.float64))
    tables = dict(zip(("anchors", "weight", "mean"), with_heads(problem, tensors)))
    expected = released({**tensors, **tables}, problem.itself, problem.constant)
    assert rms_ratio(run(problem, tensors, "reference"), expected) < 1e-12


def test_the_weights_by_pairs() -> None:
    problem = BY_NAME["tokens-17"]
    tensors = wide(make(problem, torch.float64))
    y = projections(tensors["qk"], *with_heads(problem, tensors))
    code = torch.where(y >= 0, 1.0, -1.0).double()
    weights = code @ code.mT + 17  # [B, H, N, N]
    assert weights.min() >= 1
    hamming = (code[..., :, None, :] != code[..., None, :, :]).sum(-1)
    assert torch.equal(weights, 33.0 - 2 * hamming)
    expected = (weights / weights.sum(-1, keepdim=True)) @ tensors["v"].transpose(1, 2)
    assert rms_ratio(run(problem, tensors, "reference"), expected.transpose(1, 2)) < 1e-13


@pytest.mark.parametrize("name", NAMES)
def test_gradients_by_hand(name: str) -> None:
    """The formulas of docs/hash.md, written out, against autograd through the reference."""
    problem = BY_NAME[name]
    tensors = wide(make(problem, torch.float64))
    leaves = [tensors["qk"].requires_grad_(), tensors["v"].requires_grad_()]
    grad = upstream(problem, torch.float64, "cpu")
    dqk, dv = torch.autograd.grad(run(problem, tensors, "reference"), leaves, grad)

    anchors, weight, mean = with_heads(problem, tensors)
    qk, v, do = (x.detach().transpose(1, 2) for x in (*leaves, grad))
    c = problem.constant
    norm = qk.norm(dim=-1, keepdim=True)
    x = qk / norm
    d = 1 - 2 * x @ anchors.mT + anchors.square().sum(-1)[:, None]
    sigma = d.mean((-2, -1), keepdim=True)
    kernel = torch.exp(-d / (2 * sigma))
    y = (kernel - mean[:, None]) @ weight.mT
    code = torch.where(y >= 0, 1.0, -1.0).double()
    memory, z = code.mT @ v, code.sum(2, keepdim=True)
    den = (code * z).sum(-1, keepdim=True) + v.shape[2] * c
    out = (code @ memory + c * (v if problem.itself else v.sum(2, keepdim=True))) / den
    r, e = do / den, -(out * do).sum(-1, keepdim=True) / den
    dmemory, dz = code.mT @ r, (e * code).sum(2, keepdim=True)
    dcode = r @ memory.mT + e * z + v @ dmemory.mT + dz
    assert (
        rms_ratio(
            dv, (code @ dmemory + c * (r if problem.itself else r.sum(2, keepdim=True))).transpose(1, 2)
        )
        < 1e-12
    )
    t = (dcode * (y.abs() < 1)) @ weight * kernel
    count = d.shape[-1] * d.shape[-2]
    dd = -t / (2 * sigma) + (t * d).sum((-2, -1), keepdim=True) / (2 * sigma**2 * count)
    dx = 2 * (x * dd.sum(-1, keepdim=True) - dd @ anchors)
    expected = (dx - x * (x * dx).sum(-1, keepdim=True)) / norm
    assert rms_ratio(dqk, expected.transpose(1, 2)) < 1e-12


def test_second_derivatives_exist() -> None:
    problem = BY_NAME["tokens-17"]
    tensors = make(problem, torch.float64)
    (first,) = torch.autograd.grad(
        run(problem, tensors, "reference").square().sum(), tensors["v"], create_graph=True
    )
    (second,) = torch.autograd.grad(first.square().sum(), tensors["qk"])
    assert bool(second.isfinite().all())
    assert float(second.abs().sum()) > 0
