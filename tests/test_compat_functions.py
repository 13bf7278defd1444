"""The functions of released natten versions against loops over the definition and against natten itself."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from models_support import library, rms_ratio
from neighborhood_pairs import keys_of, per_axis
from torch import Tensor

from vicinal.compat.natten0144 import functional as f0144
from vicinal.compat.natten015 import functional as f015
from vicinal.compat.natten017 import functional as f017
from vicinal.compat.natten020 import functional as f020


def _unfused(
    q: Tensor, k: Tensor, kernel: Any, dilation: Any, causal: Any, rpb: Tensor | None, extra: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Scores [B, h, *space, S + E] by loops in the order of the window, holes -inf; [N, S] keys of slots."""
    space, rank = q.shape[2:-1], q.dim() - 3
    options = list(zip(*(per_axis(o, rank) for o in (kernel, dilation, causal))))
    slots = list(product(*(range(o[0]) for o in options)))
    tokens = list(product(*(range(L) for L in space)))
    scores = torch.full((*q.shape[:-1], len(slots)), -torch.inf, dtype=q.dtype)
    places = torch.full((len(tokens), len(slots)), -1)
    key: Any
    entry: Any
    for n, token in enumerate(tokens):
        axes = [list(keys_of(i, L, k_, d, 1, c).items()) for i, L, (k_, d, c) in zip(token, space, options)]
        for s, slot in enumerate(slots):
            if any(r >= len(axis) for r, axis in zip(slot, axes)):
                continue
            key = tuple(axis[r][0] for r, axis in zip(slot, axes))
            entry = tuple(axis[r][1] for r, axis in zip(slot, axes))
            value = (q[(..., *token, slice(None))] * k[(..., *key, slice(None))]).sum(-1)
            scores[(..., *token, s)] = value + (0 if rpb is None else rpb[(slice(None), *entry)])
            places[n, s] = tokens.index(key)
    if extra is not None:
        scores = torch.cat([scores, torch.einsum("bh...d,bhed->bh...e", q, extra)], -1)
    return scores, places


PROBLEMS: list[tuple[tuple[int, ...], Any, Any, Any]] = [
    ((11,), (4,), 2, False),
    ((7,), 3, 2, True),
    ((6, 7), (3, 5), (2, 1), False),
    ((5, 6), 3, 1, (True, False)),
    ((3, 5, 4), (3, 2, 3), (1, 2, 1), (False, True, True)),
]


@pytest.mark.parametrize(("space", "kernel", "dilation", "causal"), PROBLEMS, ids=str)
@pytest.mark.parametrize("extra", [0, 3])
def test_unfused_functions_of_0_17(space: Any, kernel: Any, dilation: Any, causal: Any, extra: int) -> None:
    torch.manual_seed(0)
    rank = len(space)
    q, k, v = torch.randn(3, 2, 2, *space, 4, dtype=torch.float64, requires_grad=True).unbind(0)
    rpb = torch.randn(2, *(2 * n - 1 for n in per_axis(kernel, rank)), dtype=torch.float64)
    more = torch.randn(2, 2, 2, extra, 4, dtype=torch.float64).unbind(0) if extra else (None, None)
    expected, places = _unfused(q, k, kernel, dilation, causal, rpb, more[0])
    qk, av = getattr(f017, f"na{rank}d_qk"), getattr(f017, f"na{rank}d_av")
    scores = qk(q, k, kernel, dilation, more[0], causal, rpb)
    assert torch.equal(scores.isneginf(), expected.isneginf())
    seen = ~expected.isneginf()
    assert (scores[seen] - expected[seen]).abs().max() < 1e-12

    weights = expected.softmax(-1)
    out = av(weights, v, kernel, dilation, more[1], causal)
    window = v.flatten(2, -2)[:, :, places.clamp_min(0)]  # [B, h, N, S, d]
    kept = weights.flatten(2, -2)
    summed = torch.einsum("bhns,bhnsd->bhnd", kept[..., : places.shape[1]], window)
    if more[1] is not None:
        summed = summed + kept[..., places.shape[1] :] @ more[1]
    assert (out.flatten(2, -2) - summed).abs().max() < 1e-12
    fused = getattr(f017, f"na{rank}d")(
        *(x.movedim(1, -2) for x in (q, k, v)),
        kernel,
        dilation,
        causal,
        rpb,
        1.0,
        *(None if x is None else x.transpose(1, 2) for x in more),
    )
    assert (fused.movedim(-2, 1) - out).abs().max() < 1e-12
    (grad,) = torch.autograd.grad(out.sum(), v)
    assert grad.abs().sum() > 0


@pytest.mark.parametrize("functions", [f0144, f015, f017])
@pytest.mark.parametrize("rank", [1, 2])
def test_both_argument_counts(functions: Any, rank: int) -> None:
    q, k, v = torch.randn(3, 1, 2, *(8, 7)[:rank], 4).unbind(0)
    rpb = torch.randn(2, *[5] * rank)
    qkrpb, av = getattr(functions, f"natten{rank}dqkrpb"), getattr(functions, f"natten{rank}dav")
    sizes_of_both = (3, 2)
    expected, _ = _unfused(q, k, 3, 2, False, rpb, None)
    for scores in (
        qkrpb(q, k, rpb, 2),
        qkrpb(q, k, rpb, 3, 2),
        qkrpb(q, k, rpb, kernel_size=3, dilation=2),
        qkrpb(q, k, rpb, dilation=2),
    ):
        assert (scores - expected).abs().max() < 1e-5
    weights = expected.softmax(-1)
    outs = [av(weights, v, 2), av(weights, v, 3, 2), av(weights, v, kernel_size=3, dilation=2)]
    assert all(torch.equal(out, outs[0]) for out in outs)
    assert (qkrpb(q, k, None, 3, 2) - _unfused(q, k, 3, 2, False, None, None)[0]).abs().max() < 1e-5
    assert (qkrpb(q, k, None, 3, None) - _unfused(q, k, 3, 1, False, None, None)[0]).abs().max() < 1e-5
    with pytest.raises(TypeError, match="kernel_size is missing"):
        qkrpb(q, k, None, 2)
    with pytest.raises(TypeError, match="expected 1 or 2 sizes after the tensors, got 3"):
        qkrpb(q, k, rpb, 3, 2, 1)
    with pytest.raises(ValueError, match="weights has shape" if rank == 1 else "attn has 2 weights"):
        av(weights[..., :2], v, *sizes_of_both[: 3 - rank])


def test_functions_of_0_15() -> None:
    q, k, v = torch.randn(3, 1, 2, 4, 5, 6, 4).unbind(0)
    bias, extra = torch.randn(2, 3, 5, 5), torch.randn(1, 2, 3, 4)
    expected, _ = _unfused(q, k, (2, 3, 3), (2, 1, 1), False, bias, extra)
    scores = f015.na3d_qk_with_bias(q, k, bias, 2, 3, 2, 1, extra)
    assert (scores - expected).abs().max() < 1e-5
    assert (f015.natten3dqkrpb(q, k, bias, 2, 3, 2, 1) - expected[..., :-3]).abs().max() < 1e-5
    plain, _ = _unfused(q, k, (2, 3, 3), (2, 1, 1), False, None, None)
    assert (f015.na3d_qk(q, k, 2, 3, 2, 1) - plain).abs().max() < 1e-5
    assert (f015.natten3dqk(q, k, 2, 3, 2, 1) - plain).abs().max() < 1e-5
    weights = scores.softmax(-1)
    assert f015.na3d_av(weights, v, 2, 3, 2, 1, extra).shape == v.shape
    q2, k2, bias2 = q[:, :, 0], k[:, :, 0], bias[:, 0]
    expected, _ = _unfused(q2, k2, 3, 1, False, bias2, None)
    assert (f015.na2d_qk_with_bias(q2, k2, bias2, 3, 1) - expected).abs().max() < 1e-5
    assert torch.equal(f015.na2d_qk(q2, k2, 3, 1), f015.natten2dqk(q2, k2, 3, 1))
    q1, k1 = q2[:, :, 0], k2[:, :, 0]
    assert torch.equal(f015.na1d_qk(q1, k1, 3, 2), f015.natten1dqk(q1, k1, 3, 2))
    assert torch.equal(f015.na1d_qk_with_bias(q1, k1, None, 3, 2), f015.na1d_qk(q1, k1, 3, 2))


ORACLE: list[tuple[tuple[int, ...], dict[str, Any]]] = [
    ((13,), {"kernel_size": 4, "stride": 2, "dilation": 3}),
    ((13,), {"kernel_size": 5, "is_causal": True, "stride": 2}),
    ((9, 12), {"kernel_size": (3, 6), "dilation": (3, 1), "is_causal": (False, True), "scale": 0.3}),
    ((5, 6, 7), {"kernel_size": (5, 2, 3), "stride": (1, 2, 3), "is_causal": (False, True, False)}),
    ((9, 12), {"kernel_size": (3, 6), "dilation": None, "scale": 0.0}),
]


@pytest.mark.parametrize(("space", "options"), ORACLE, ids=str)
@pytest.mark.parametrize("extra", [0, 8])
def test_functions_of_0_20_against_natten(space: Any, options: dict[str, Any], extra: int) -> None:
    name = f"na{len(space)}d"
    theirs = getattr(library("natten.functional"), name)
    q, k, v = torch.randn(3, 2, *space, 2, 16).unbind(0)
    keywords: dict[str, Any] = {**options, "return_lse": True}
    if extra:
        more = torch.randn(2, 2, extra, 2, 16)
        keywords |= {"additional_keys": more[0], "additional_values": more[1]}
    given = {key: 1 if value is None else value for key, value in keywords.items()}
    expected, lse = theirs(q, k, v, **given)
    out, ours = getattr(f020, name)(q, k, v, backend="flex-fna", torch_compile=False, **keywords)
    assert rms_ratio(out, expected) < 1e-5
    assert rms_ratio(ours, lse) < 1e-5
    with pytest.raises(TypeError, match=r"unexpected keyword arguments \['tile'\]"):
        getattr(f020, name)(q, k, v, 3, tile=4)
    with pytest.raises(ValueError, match="dimensions; na"):
        getattr(f020, name)(q[0], k[0], v[0], 3)


@pytest.mark.parametrize("lengths", [(9, 9), (5, 12), (12, 5)])
def test_attention_and_merging_of_0_20(lengths: tuple[int, int]) -> None:
    q = torch.randn(2, lengths[0], 4, 8, dtype=torch.float64, requires_grad=True)
    k, v = torch.randn(2, 2, lengths[1], 2, 8, dtype=torch.float64).unbind(0)
    out, lse = f020.attention(q, k, v, return_lse=True)
    kk, vv = (x.repeat_interleave(2, 2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, kk) / 8**0.5
    expected = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), vv)
    assert (out - expected).abs().max() < 1e-12
    assert (lse - scores.logsumexp(-1).transpose(1, 2)).abs().max() < 1e-12

    parts = [f020.attention(q, k[:, s], v[:, s], return_lse=True) for s in (slice(3), slice(3, None))]
    merged, total = f020.merge_attentions([p[0] for p in parts], [p[1] for p in parts])
    assert (merged - expected).abs().max() < 1e-12
    assert (total - lse).abs().max() < 1e-12
    grads = [torch.autograd.grad(x.square().sum(), q, retain_graph=True)[0] for x in (merged, expected)]
    assert (grads[0] - grads[1]).abs().max() < 1e-11
    nothing = torch.zeros_like(merged), torch.full_like(total, -torch.inf)
    empty, unseen = f020.merge_attentions([nothing[0]] * 2, [nothing[1]] * 2)
    assert empty.abs().max() == 0
    assert unseen.isneginf().all()
    with pytest.raises(ValueError, match="two or more each, got 1 and 1"):
        f020.merge_attentions([out], [lse])
    with pytest.raises(NotImplementedError, match="packed sequences"):
        f020.attention(q, k, v, seqlens_Q=torch.tensor([3]))


def test_causal_attention_of_0_20() -> None:
    q, k, v = torch.randn(3, 2, 9, 4, 8).unbind(0)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / 8**0.5
    scores = scores.masked_fill(torch.ones(9, 9).triu(1) > 0, -torch.inf)
    expected = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)
    assert rms_ratio(f020.attention(q, k, v, True), expected) < 1e-5
    with pytest.raises(NotImplementedError, match="causal attention of 9 queries and 5 keys"):
        f020.attention(q, k[:, :5], v[:, :5], True)
