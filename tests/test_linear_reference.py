"""The reference of linear attention against its definition written densely, finite differences, published
code, and the formulas of published layers.
"""

from __future__ import annotations

import importlib
import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from linear_problems import BY_NAME, PROBLEMS, Problem, arguments, make, run
from torch import Tensor

from vicinal import (
    FeatureMap,
    favor_projection,
    lightning_decay,
    linear_attention,
    linear_attention_step,
    retnet_decay,
)
from vicinal._linear_maps import ELEMENTWISE
from vicinal._linear_run import as_maps
from vicinal.linear import LinearState
from vicinal.reference_linear import delta_rule


def optional(name: str) -> Any:
    """A module of another library, or a skip that says why there is none."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"{name}: {error}")


def dense_weights(p: Problem, t: dict[str, Tensor], q: Tensor, k: Tensor, scale: float) -> Tensor:
    """w [B, H, N, M], from the definition."""
    q, k = (x.repeat_interleave(p.shared, 2) for x in (q, k))
    w = torch.einsum("bihk,bjhk->bhij", q * scale, k) + p.const
    n, m = w.shape[-2:]
    i, j = torch.arange(n)[:, None], torch.arange(m)
    if p.block_size:
        i, j = i // p.block_size, j // p.block_size
        w = w * ((j <= i) if p.block_mode == "inclusive" else (j < i))
    elif p.causal:
        w = w * (j <= i)
        if p.decay:
            decay = t["decay"].expand(p.batch, n, p.heads)
            b = decay.cumsum(1).movedim(2, 1)
            w = w * (b[..., :, None] - b[..., None, :]).clamp(max=0).exp()
    if "ignored" in t:
        w = w.masked_fill(t["ignored"][:, None, None], 0)
    return w


def dense(p: Problem, t: dict[str, Tensor]) -> Tensor:
    """The output of a problem without states and packed sequences, from the definition."""
    given = arguments(p, t)
    map_q, map_k = as_maps(given["feature_map"])
    phi_q, phi_k = (
        map_q(t["q"]),
        map_k(t["k"], keys=True, ignored=given["key_padding_mask"], streaming=p.causal),
    )
    scale = 1.0 if p.scale is None else p.scale
    w = dense_weights(p, t, phi_q, phi_k, scale)
    out = torch.einsum("bhij,bjhv->bihv", w, t["v"])
    if not p.normalize:
        return out
    if p.den:
        w = dense_weights(p, t, t["q_den"], t["k_den"], scale)
    den = w.sum(-1).transpose(1, 2)[..., None] + p.eps
    return torch.where(den.abs() < 1e-30, 0, out / den)


PLAIN = [p for p in PROBLEMS if not p.state and not p.ends]


@pytest.mark.parametrize("problem", PLAIN, ids=str)
def test_definition(problem: Problem) -> None:
    tensors = {n: x.detach() for n, x in make(problem, torch.float64).items()}
    got, expected = run(problem, tensors, "reference")["out"], dense(problem, tensors)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-11)


GRADCHECKED = (
    Problem("full", 5, keys=4, dim=3, dim_v=2, const=0.2, mask="some", state=True, heads=2, shared=2),
    Problem("den", 4, dim=3, dim_v=2, feature_map="identity", den=2),
    Problem("focused", 4, dim=3, dim_v=2, feature_map="focused", eps=1e-2),
    Problem("softmax", 4, dim=3, dim_v=2, feature_map="softmax", normalize=False, mask="some"),
    Problem("step decay", 5, dim=3, dim_v=2, causal=True, decay="step", state=True),
    Problem("head decay", 5, dim=3, dim_v=2, causal=True, decay="head", normalize=False, feature_map="exp"),
    Problem("blocks", 5, dim=3, dim_v=2, causal=True, block_size=2, block_mode="inclusive"),
)


@pytest.mark.parametrize("problem", GRADCHECKED, ids=str)
def test_gradients_are_finite_differences(problem: Problem) -> None:
    tensors = make(problem, torch.float64)
    names = [n for n, x in tensors.items() if x.requires_grad]

    def function(*leaves: Tensor) -> tuple[Tensor, ...]:
        return tuple(run(problem, {**tensors, **dict(zip(names, leaves))}, "reference").values())

    assert torch.autograd.gradcheck(function, [tensors[n] for n in names])


def test_second_derivatives() -> None:
    problem = Problem("twice", 4, batch=1, heads=1, dim=2, causal=True, decay="step")
    tensors = make(problem, torch.float64)
    names = [n for n, x in tensors.items() if x.requires_grad]

    def function(*leaves: Tensor) -> Tensor:
        return run(problem, dict(zip(names, leaves)), "reference")["out"]

    assert torch.autograd.gradgradcheck(function, [tensors[n] for n in names])


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_maps_at_their_ends(name: str) -> None:
    x = torch.tensor([-1e4, -88.0, -8.0, -1e-3, 0.0, 1e-3, 31.0, 33.0, 1e4], requires_grad=True)
    y = FeatureMap(name)(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert bool(y.isfinite().all())
    assert bool(slope.isfinite().all())


def test_elu1_keeps_small_values_in_bfloat16() -> None:
    x = torch.tensor([-8.0, -20.0], dtype=torch.bfloat16)
    assert bool((F.elu(x) + 1 == 0).all())
    torch.testing.assert_close(FeatureMap("elu1")(x), x.float().exp())


def test_favor_projection() -> None:
    w = favor_projection(16, 40, generator=torch.Generator().manual_seed(3))
    assert favor_projection(64).shape == (266, 64)
    unit = w / w.norm(dim=1, keepdim=True)
    for rows in (unit[:16], unit[16:32], unit[32:]):
        torch.testing.assert_close(rows @ rows.t(), torch.eye(len(rows)), atol=1e-5, rtol=0)
    regular = favor_projection(16, 5, scaling="regular")
    torch.testing.assert_close(regular.norm(dim=1), torch.full((5,), 4.0))


def test_favor_estimates_softmax() -> None:
    torch.manual_seed(0)
    q, k, v = (0.3 * torch.randn(1, 40, 1, 8, dtype=torch.float64) for _ in range(3))
    w = favor_projection(8, 4096, generator=torch.Generator().manual_seed(1))
    out = linear_attention(q, k, v, feature_map=FeatureMap("favor", projection=w), eps=0.0)
    assert isinstance(out, Tensor)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    expected = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    assert float((out - expected).norm() / expected.norm()) < 0.1


def test_packed_favor_is_separate_favor() -> None:
    torch.manual_seed(0)
    q, k, v = (3 * torch.randn(1, 60, 2, 8, dtype=torch.float64) for _ in range(3))
    maps = FeatureMap("favor", projection=favor_projection(8, 24))
    ends = [0, 1, 1, 23, 55]  # one token, none, and five after the last end
    ignored = torch.arange(60)[None] % 7 == 3

    def run(at: slice, **more: Any) -> Tensor:
        mask = ignored[:, at]
        return attend(q[:, at], k[:, at], v[:, at], feature_map=maps, eps=0.0, key_padding_mask=mask, **more)

    packed = run(slice(None), cu_seqlens=torch.tensor(ends, dtype=torch.int32))
    alone = [run(slice(a, b)) for a, b in itertools.pairwise(ends) if b > a]
    torch.testing.assert_close(packed[:, :55], torch.cat(alone, 1))
    assert not packed[:, 55:].any()


def inputs(
    n: int = 96, heads: int = 3, dim: int = 8, dim_v: int = 8, dtype: Any = torch.float64
) -> list[Tensor]:
    return [torch.randn(2, n, heads, d, dtype=dtype) for d in (dim, dim, dim_v)]


def attend(*args: Any, **options: Any) -> Tensor:
    out = linear_attention(*args, **options)
    assert isinstance(out, Tensor)
    return out


# Published layers, by their own formulas.


@pytest.mark.parametrize("causal", [False, True])
def test_linear_transformer(causal: bool) -> None:
    q, k, v = inputs()
    a, b = F.elu(q) + 1, F.elu(k) + 1
    if causal:
        s = torch.einsum("bnhk,bnhv->bnhkv", b, v).cumsum(1)
        z = 1 / (torch.einsum("bnhk,bnhk->bnh", a, b.cumsum(1)) + 1e-6)
        expected = torch.einsum("bnhk,bnhkv,bnh->bnhv", a, s, z)
    else:
        z = 1 / (torch.einsum("bnhk,bhk->bnh", a, b.sum(1)) + 1e-6)
        expected = torch.einsum("bnhk,bhkv,bnh->bnhv", a, torch.einsum("bnhk,bnhv->bhkv", b, v), z)
    torch.testing.assert_close(attend(q, k, v, is_causal=causal), expected)


@pytest.mark.parametrize("eps", [1e-15, 1e-8], ids=["LiteMLA", "SANA"])
def test_lite_mla(eps: float) -> None:
    qkv = torch.randn(2, 4, 3 * 16, 49, dtype=torch.float64)  # [B, heads, 3 D, H * W]
    q, k, v = qkv.chunk(3, 2)
    padded = F.pad(v, (0, 0, 0, 1), value=1.0)
    out = padded @ F.relu(k).transpose(-1, -2) @ F.relu(q)
    expected = out[:, :, :-1] / (out[:, :, -1:] + eps)
    tokens = [x.permute(0, 3, 1, 2) for x in (q, k, v)]
    got = attend(*tokens, feature_map="relu", eps=eps)
    assert got.permute(0, 2, 3, 1).is_contiguous()
    torch.testing.assert_close(got.permute(0, 2, 3, 1), expected)


@pytest.mark.parametrize("scope", ["head", "all"])
def test_flatten_transformer(scope: str) -> None:
    q, k, v = inputs(n := 49, heads := 2)
    scale = torch.randn(heads, 8, dtype=torch.float64)
    maps = FeatureMap("focused", power=3, scale=scale, norm_scope=scope)

    def phi(x: Tensor) -> Tensor:
        flat = (F.relu(x) + 1e-6) / F.softplus(scale)
        flat = flat if scope == "head" else flat.flatten(-2)
        norm, cubed = flat.norm(dim=-1, keepdim=True), flat**3
        return (cubed / cubed.norm(dim=-1, keepdim=True) * norm).view_as(x)

    a, b = phi(q), phi(k)
    z = 1 / (torch.einsum("bnhk,bhk->bnh", a, b.mean(1)) + 1e-6)
    expected = torch.einsum(
        "bnhk,bhkv,bnh->bnhv", a, torch.einsum("bnhk,bnhv->bhkv", b * n**-0.5, v * n**-0.5), z
    )
    torch.testing.assert_close(attend(q, k, v, feature_map=maps, eps=1e-6 * n), expected)


@pytest.mark.parametrize("causal", [False, True])
def test_performer(causal: bool) -> None:
    q, k, v = inputs()
    w = favor_projection(8, 24).double()

    def phi(x: Tensor, highest: tuple[int, ...]) -> Tensor:
        t = x * 8**-0.25 @ w.T
        shift = t.amax(highest, keepdim=True) if highest else 0
        return (torch.exp(t - x.square().sum(-1, keepdim=True) * 8**-0.5 / 2 - shift) + 1e-4) / 24**0.5

    a, b = phi(q, (-1,)), phi(k, () if causal else (1, 3))
    weights = torch.einsum("bihm,bjhm->bhij", a, b)
    weights = weights.tril() if causal else weights
    eps = 1e-6 if causal else 0.0
    expected = torch.einsum("bhij,bjhd->bihd", weights / (weights.sum(-1, keepdim=True) + eps), v)
    maps = FeatureMap("favor", projection=w)
    torch.testing.assert_close(attend(q, k, v, feature_map=maps, eps=eps, is_causal=causal), expected)


def rotated(x: Tensor) -> Tensor:
    """Rotary positions on pairs of channels."""
    n, d = x.shape[1], x.shape[-1] // 2
    angle = torch.arange(n, dtype=x.dtype)[:, None] * 10000 ** (-torch.arange(d, dtype=x.dtype) / d)
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], d, 2))
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)[:, None]).flatten(-2)


def test_mamba_like_linear_attention() -> None:
    q, k, v = inputs(n := 49)
    a, b = F.elu(q) + 1, F.elu(k) + 1
    z = 1 / (torch.einsum("bnhk,bhk->bnh", a, b.mean(1)) + 1e-6)
    context = torch.einsum("bnhk,bnhv->bhkv", rotated(b) * n**-0.5, v * n**-0.5)
    expected = torch.einsum("bnhk,bhkv,bnh->bnhv", rotated(a), context, z)
    options: Any = {"feature_map": "identity", "eps": 1e-6 * n, "q_den": a, "k_den": b}
    torch.testing.assert_close(attend(rotated(a), rotated(b), v, **options), expected)


def test_efficient_attention() -> None:
    q, k, v = inputs()
    context = torch.einsum("bnhk,bnhv->bhkv", k.softmax(1), v)
    expected = torch.einsum("bnhk,bhkv->bnhv", q.softmax(-1) * 8**-0.5, context)
    got = attend(q, k, v, feature_map="softmax", normalize=False, scale=8**-0.5)
    torch.testing.assert_close(got, expected)


def test_retention() -> None:
    q, k, v = inputs(heads=4)
    i = torch.arange(96)
    gamma = 1 - 2.0 ** (-5 - torch.arange(4, dtype=torch.float64))
    power = gamma[:, None, None] ** (i[:, None] - i).clamp(min=0) * (i[:, None] >= i)
    expected = torch.einsum("bihk,bjhk,hij,bjhv->bihv", q * 8**-0.5, k, power, v)
    options: Any = {"feature_map": "identity", "is_causal": True, "normalize": False, "scale": 8**-0.5}
    got = attend(q, k, v, decay=retnet_decay(4).double(), **options)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)  # the decay is float32


def test_lightning_attention() -> None:
    q, k, v = inputs(heads=4)
    decay = lightning_decay(4, 1, 4)
    assert decay.tolist() == [-(8 / 4) * (1 - 1 / 4) * h for h in range(4)]
    state, rows = torch.zeros(2, 4, 8, 8, dtype=torch.float64), []
    for t in range(96):
        state = state * decay.double().exp()[:, None, None] + k[:, t, :, :, None] * v[:, t, :, None]
        rows.append(torch.einsum("bhk,bhkv->bhv", q[:, t] * 8**-0.5, state))
    options: Any = {"feature_map": "identity", "is_causal": True, "normalize": False, "scale": 8**-0.5}
    torch.testing.assert_close(attend(q, k, v, decay=decay.double(), **options), torch.stack(rows, 1))


def test_mamba2() -> None:
    x, b, c = torch.randn(2, 80, 6, 8), torch.randn(2, 80, 1, 16), torch.randn(2, 80, 1, 16)
    dt, a = torch.rand(2, 80, 6), -torch.rand(6)
    x, b, c, dt, a = (t.double() for t in (x, b, c, dt, a))
    state, rows = torch.zeros(2, 6, 8, 16, dtype=torch.float64), []
    for t in range(80):
        inflow = (dt[:, t, :, None] * x[:, t])[..., None] * b[:, t, :, None]
        state = state * (dt[:, t] * a).exp()[..., None, None] + inflow
        rows.append((state * c[:, t, :, None]).sum(-1))
    options: Any = {"feature_map": "identity", "is_causal": True, "normalize": False}
    torch.testing.assert_close(attend(c, b, x * dt[..., None], decay=dt * a, **options), torch.stack(rows, 1))


def test_spiking_self_attention() -> None:
    q, k, v = (x.sign().clamp(min=0) for x in inputs())
    expected = torch.einsum("bihk,bjhk,bjhv->bihv", q, k, v) * 0.25
    got = attend(q, k, v, feature_map="identity", normalize=False, scale=0.25)
    torch.testing.assert_close(got, expected)


def test_gated_linear_attention_steps() -> None:
    q, k, v = inputs(n=40)
    decay = -torch.rand(2, 40, 3, 8, dtype=torch.float64)
    options: Any = {"feature_map": "identity", "normalize": False, "scale": 0.5}
    expected = attend(q, k, v, decay=decay, is_causal=True, **options)
    state, rows = LinearState(torch.zeros(2, 3, 8, 8, dtype=torch.float64)), []
    for t in range(40):
        at = slice(t, t + 1)
        rows.append(linear_attention_step(q[:, at], k[:, at], v[:, at], state, decay=decay[:, at], **options))
    torch.testing.assert_close(torch.cat(rows, 1), expected)


# Other people's code.


def test_against_performer_pytorch() -> None:
    theirs = optional("performer_pytorch.performer_pytorch")
    w = favor_projection(8, 24).double()
    q, k, v = inputs()
    first = [x.transpose(1, 2) for x in (q, k, v)]
    phi_q = theirs.softmax_kernel(first[0], projection_matrix=w, is_query=True)
    phi_k = theirs.softmax_kernel(first[1], projection_matrix=w, is_query=False)
    expected = theirs.linear_attention(phi_q, phi_k, first[2]).transpose(1, 2)
    got = attend(q, k, v, feature_map=FeatureMap("favor", projection=w), eps=0.0)
    torch.testing.assert_close(got, expected)


def test_against_linear_attention_transformer() -> None:
    theirs = optional("linear_attention_transformer.linear_attention_transformer")
    q, k, v = inputs()
    expected = theirs.linear_attn(*[x.transpose(1, 2) for x in (q, k, v)]).transpose(1, 2)
    torch.testing.assert_close(
        attend(q, k, v, feature_map="softmax", normalize=False, scale=8**-0.5), expected
    )


FLA: Any = {"rtol": 1e-4, "atol": 1e-5}  # computes in float32


def test_against_fla_retention() -> None:
    naive = optional("fla.ops.retention.naive")
    q, k, v = inputs(heads=4, dtype=torch.float32)
    expected = naive.naive_retention(*[x.transpose(1, 2) for x in (q, k, v)]).transpose(1, 2)
    options: Any = {"feature_map": "identity", "is_causal": True, "normalize": False, "scale": 8**-0.5}
    torch.testing.assert_close(attend(q, k, v, decay=retnet_decay(4), **options), expected, **FLA)


def test_against_fla_simple_gla() -> None:
    naive = optional("fla.ops.simple_gla.naive")
    q, k, v = inputs(dtype=torch.float32)
    decay = -torch.rand(2, 96, 3)
    expected = naive.naive_chunk_simple_gla(q, k, v, decay, chunk_size=32, scale=0.5)
    expected = (expected[0] if isinstance(expected, tuple) else expected).reshape(q.shape)
    options: Any = {"feature_map": "identity", "is_causal": True, "normalize": False, "scale": 0.5}
    torch.testing.assert_close(attend(q, k, v, decay=decay, **options), expected, **FLA)


def test_against_fla_gla() -> None:
    naive = optional("fla.ops.gla.naive")
    q, k, v = inputs(dtype=torch.float32)
    decay = -torch.rand(2, 96, 3, 8)
    expected, _ = naive.naive_recurrent_gla(q, k, v, decay)
    options: Any = {"feature_map": "identity", "is_causal": True, "normalize": False, "scale": 8**-0.5}
    torch.testing.assert_close(attend(q, k, v, decay=decay, **options), expected, **FLA)


def test_against_fla_linear_attention() -> None:
    naive = optional("fla.ops.linear_attn.naive")
    q, k, v = (x.abs() + 0.1 for x in inputs(n=40, dtype=torch.float32))
    expected, _ = naive.naive_recurrent_linear_attn(q, k, v, scale=0.5, normalize=True)
    got = attend(q, k, v, feature_map="identity", is_causal=True, scale=0.5, eps=1e-10)
    torch.testing.assert_close(got, expected, **FLA)


def test_against_fla_delta_rule() -> None:
    naive = optional("fla.ops.delta_rule.naive")
    q, k, v = inputs(n=40, dtype=torch.float32)
    k, beta = F.normalize(k, dim=-1), torch.rand(2, 40, 3)
    first = [x.transpose(1, 2) for x in (q, k, v)]
    expected = naive.delta_rule_recurrence(*first, beta.transpose(1, 2))
    expected = (expected[0] if isinstance(expected, tuple) else expected).transpose(1, 2)
    got, _ = delta_rule(q, k, v, beta, scale=1 / math.sqrt(8))
    torch.testing.assert_close(got, expected, **FLA)


def test_every_problem_has_a_name_of_its_own() -> None:
    assert len(BY_NAME) == len(PROBLEMS) > 60
