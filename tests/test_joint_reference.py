"""The reference of joint attention against loops over pairs, and its derivatives."""

from __future__ import annotations

import math

import pytest
import torch
from joint_problems import BY_NAME, PROBLEMS, Problem, make, rms_ratio, run
from torch import Tensor

from vicinal import joint_attention


def by_pairs(p: Problem, t: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """The definition, a pair of tokens at a time."""
    group = p.tokens if p.group is None else p.group
    quad = 1 / group if p.quad_scale is None else p.quad_scale
    lin = p.lin_scale
    if lin is None:
        lin = 1 / group if p.causal else 1 / p.tokens
    values = [t["v"], *([t["u"]] if p.with_u else [])]
    outs = [torch.zeros_like(w) for w in values]
    for b in range(p.batch):
        for i in range(p.tokens):
            for j in range(p.tokens):
                if "key_padding_mask" in t and bool(t["key_padding_mask"][b, j]):
                    continue
                weight = 0.0
                if i // group == j // group and not (p.causal and j > i):
                    s = quad * float(t["quad_q"][b, i] @ t["quad_k"][b, j])
                    s += float(t["bias"][i % group, j % group]) if p.bias else 0.0
                    if p.activation == "relu2":
                        weight = max(s, 0.0) ** 2
                    else:
                        weight = 0.5 * (1 + math.erf((s - math.sqrt(0.5)) / math.sqrt(2 / (4 * math.pi))))
                if not p.causal or j // group < i // group:
                    weight += lin * float(t["lin_q"][b, i] @ t["lin_k"][b, j])
                for out, w in zip(outs, values):
                    out[b, i] += weight * w[b, j]
    if p.gate:
        return (outs[1] * t["v"] * torch.sigmoid(outs[0] * t["u"]),)
    return tuple(outs)


SMALL = [p for p in PROBLEMS if p.tokens <= 60 and not p.dropout_p]


@pytest.mark.parametrize("problem", SMALL, ids=str)
def test_the_definition_pair_by_pair(problem: Problem) -> None:
    tensors = {k: x.detach() for k, x in make(problem, torch.float64).items()}
    for x, y in zip(run(problem, tensors, "reference"), by_pairs(problem, tensors)):
        assert x.shape == y.shape
        assert rms_ratio(x, y) < 1e-12


def published(qq: Tensor, qk: Tensor, lq: Tensor, lk: Tensor, v: Tensor, u: Tensor, group: int) -> Tensor:
    """MossFormer's gated attention as its papers write it: padded groups, two sums each for v and u."""
    n = v.shape[1]
    whole = torch.nn.functional.pad
    split = [whole(x, (0, 0, 0, -n % group)).unflatten(1, (-1, group)) for x in (qq, qk, lq, lk, v, u)]
    attn = torch.relu(split[0] @ split[1].mT / group).square()
    outs = []
    for w in split[4:]:
        memory = torch.einsum("bgnd,bgne->bde", split[3], w) / n
        outs.append((attn @ w + torch.einsum("bgnd,bde->bgne", split[2], memory)).flatten(1, 2)[:, :n])
    return outs[1] * v * torch.sigmoid(outs[0] * u)


@pytest.mark.parametrize("tokens", [256, 300, 1000])
def test_the_published_layer(tokens: int) -> None:
    v, u = torch.randn(2, tokens, 48, dtype=torch.float64).chunk(2, -1)
    a, b, c, d = (torch.randn(2, tokens, 16, dtype=torch.float64) for _ in range(4))
    ours = joint_attention(a, b, c, d, v, u, gate=True, backend="reference")
    assert isinstance(ours, Tensor)
    assert rms_ratio(ours, published(a, b, c, d, v, u, 256)) < 1e-13


@pytest.mark.parametrize("name", ["laplace-mask-causal", "bias-laplace"])
def test_derivatives_of_first_and_second_order(name: str) -> None:
    problem = BY_NAME[name]
    tensors = make(problem, torch.float64)
    leaves = {
        k: x[:1, :20].detach().requires_grad_()
        for k, x in tensors.items()
        if k not in ("bias", "key_padding_mask")
    }
    rest = {
        k: x[:1, :20] if k == "key_padding_mask" else x.detach()
        for k, x in tensors.items()
        if k not in leaves
    }

    def function(*given: Tensor) -> tuple[Tensor, ...]:
        return run(problem, {**dict(zip(leaves, given)), **rest}, "reference")

    inputs = tuple(leaves.values())
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def test_dropout_keeps_the_mean() -> None:
    x, v = torch.ones(1, 512, 4), torch.ones(1, 512, 1)
    plain = joint_attention(x, x, x, x, v, lin_scale=0.0, backend="reference")
    dropped = joint_attention(x, x, x, x, v, lin_scale=0.0, dropout_p=0.4, backend="reference")
    assert isinstance(plain, Tensor)
    assert isinstance(dropped, Tensor)
    assert abs(float(dropped.mean() / plain.mean()) - 1) < 0.01
    assert float(dropped.std()) > 0
