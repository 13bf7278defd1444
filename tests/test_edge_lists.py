"""Attention over lists of rows, given logits, channel weights and best keys, against loops in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from vicinal import Graph, gather_attention, segment_softmax, segments, topk_attention, vector_attention


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("backend", [None, "reference"])
def test_gather_attention(masked: bool, backend: str | None) -> None:
    idx = torch.randint(0, 9, (12, 5), generator=torch.Generator().manual_seed(0))
    mask = normal(12, 5) > 0 if masked else torch.ones(12, 5, dtype=torch.bool)
    mask[3] = not masked
    q, k, v = (normal(n, 2, d).requires_grad_() for n, d in ((12, 8), (9, 8), (9, 6)))
    s = torch.einsum("nhd,nkhd->nkh", q, k[idx]) * 8**-0.5
    p = s.masked_fill(~mask[..., None], -torch.inf).softmax(1).nan_to_num(0)
    want = torch.einsum("nkh,nkhd->nhd", p, v[idx])
    graph = Graph.from_knn(idx, mask if masked else None, 9)
    for given in ((idx, mask if masked else None), (graph, None)):
        out = gather_attention(q, k, v, *given, backend=backend)
        assert isinstance(out, Tensor)
        torch.testing.assert_close(out, want)
        for a, b in zip(*(torch.autograd.grad(x.sin().sum(), v, retain_graph=True) for x in (out, want))):
            torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match="mask is given; a Graph has its own"):
        gather_attention(q, k, v, graph, mask)


@pytest.mark.parametrize("backend", [None, "reference"])
def test_segment_softmax(backend: str | None) -> None:
    made = segments.from_arrays(
        torch.arange(3), torch.tensor([0, 1, 1, 2, 3]), torch.tensor([4, 0, 2, 2, 1]),
        torch.tensor([0, 2, 3, 1]), torch.tensor([2, 2, 5, 4]), n_q=3, n_k=6,
    )  # fmt: skip
    logits, values = normal(6, 3).requires_grad_(), normal(6, 12).requires_grad_()
    rows: Any = ([4, 0], [], [2, 1], [0, 2, 2])
    want = torch.stack([_by_hand(logits[r], values[r]) for r in rows])
    out = segment_softmax(logits, values, made, backend=backend)
    torch.testing.assert_close(out, want)
    weights = normal(4, 12)
    for a, b in zip(*(torch.autograd.grad(x, (logits, values), weights) for x in (out, want))):
        torch.testing.assert_close(a, b)


def _by_hand(logits: Tensor, values: Tensor) -> Tensor:
    columns = [(logits[:, c % 3].softmax(0) * values[:, c]).sum() for c in range(12)]
    return torch.stack(columns)


def test_vector_attention() -> None:
    logits, values = normal(4, 5, 3).requires_grad_(), normal(4, 5, 12).requires_grad_()
    want = torch.stack([_by_hand(logits[n], values[n]) for n in range(4)])
    out = vector_attention(logits, values)
    torch.testing.assert_close(out, want)
    for a, b in zip(*(torch.autograd.grad(x.sin().sum(), (logits, values)) for x in (out, want))):
        torch.testing.assert_close(a, b)
    assert torch.autograd.gradcheck(vector_attention, (logits, values))
    nobody = logits.detach().masked_fill(torch.arange(4)[:, None, None] == 2, -torch.inf)
    out = vector_attention(nobody, values)
    assert not out[2].any()
    assert out.isfinite().all()


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_topk_attention(count: int, per_head: bool) -> None:
    q, k = normal(2, 5, 3, 8), normal(2, 9, 3, 8).requires_grad_()
    mask = normal(*(2, 5, 3, 9) if per_head else (2, 5, 9)) > 0
    mask[0, 1] = True
    rows, index = topk_attention(q, k, mask, count=count)
    dk = torch.autograd.grad(rows.sum(), k)[0]
    counted = torch.zeros_like(dk)
    for b in range(2):
        for i in range(5):
            for h in range(3):
                hidden = mask[b, i, h] if per_head else mask[b, i]
                scores = (k[b, :, h] @ q[b, i, h]).masked_fill(hidden & ~hidden.all(), -torch.inf)
                best = scores.argsort(descending=True, stable=True)[:count]
                seen = scores[best].isfinite()
                assert index[b, i, h][seen].tolist() == best[seen].tolist()
                assert torch.equal(rows[b, i, h], k[b, index[b, i, h], h])
                for j in index[b, i, h].tolist():
                    counted[b, j, h] += 1
    torch.testing.assert_close(dk, counted)


ERRORS: Any = [
    (lambda: segment_softmax(normal(5), normal(5, 2), None), "logits has shape"),  # type: ignore[arg-type]
    (lambda: segment_softmax(normal(4, 2), normal(5, 2), segments.chunks(5, 2)), "logits has 4 rows"),
    (lambda: segment_softmax(normal(5, 2), normal(5, 3), segments.chunks(5, 2)), "values has 3 channels"),
    (lambda: vector_attention(normal(5, 2), normal(5, 2, 2)), "logits has shape"),
    (lambda: vector_attention(normal(5, 2, 3), normal(5, 2, 4)), "values has 4 channels"),
    (lambda: vector_attention(normal(5, 2, 3), normal(5, 1, 3)), "values has shape"),
    (lambda: topk_attention(normal(1, 2, 1, 4), normal(1, 3, 1, 4), count=4), "count is 4"),
    (lambda: topk_attention(normal(1, 2, 1, 4), normal(1, 3, 2, 4)), "k has shape"),
    (
        lambda: topk_attention(normal(1, 2, 1, 4), normal(1, 3, 1, 4), torch.zeros(2, 3).bool()),
        "mask has shape",
    ),
]


@pytest.mark.parametrize(("call", "message"), ERRORS, ids=[str(i) for i in range(len(ERRORS))])
def test_errors(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
