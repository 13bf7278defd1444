"""Transformer-XL's score as windowed attention, against its published form: a padded and reshaped matrix."""

from __future__ import annotations

import pytest
import torch
from backends_support import device_of, op_backends
from torch import Tensor

from vicinal import RelativeBias, transformer_xl, windowed_attention


def published(q: Tensor, k: Tensor, v: Tensor, u: Tensor, w: Tensor, positions: Tensor) -> Tensor:
    """softmax(((q + u) k + shift((q + w) p)) / sqrt(d)) v, p of the offsets N - 1, .., -(N - 1)."""
    n, d = q.shape[1], q.shape[-1]
    content = torch.einsum("bnhd,bmhd->bhnm", q + u, k)
    position = torch.einsum("bnhd,thd->bhnt", q + w, positions)  # [B, h, N, 2 N - 1]
    padded = torch.nn.functional.pad(position, (1, 0)).flatten(2).unflatten(2, (2 * n, n))
    shifted = padded[:, :, 1:].flatten(2).unflatten(2, (n, 2 * n - 1))[..., :n]
    return torch.einsum("bhnm,bmhd->bnhd", ((content + shifted) * d**-0.5).softmax(-1), v)


@pytest.mark.parametrize("backend", [*op_backends(), "reference"])
@pytest.mark.parametrize(("n", "dim"), [(1, 4), (13, 9), (40, 36)])
def test_score_and_gradients(backend: str, n: int, dim: int) -> None:
    generator = torch.Generator().manual_seed(n)
    shapes = ((2, n, 3, dim), (2, n, 3, dim), (2, n, 3, dim), (3, dim), (3, dim), (2 * n - 1, 3, dim))
    drawn = [torch.randn(s, generator=generator, dtype=torch.float64).to(device_of(backend)) for s in shapes]
    leaves = [x.requires_grad_() for x in drawn]
    q, k, v, u, w, descending = leaves
    query, rel_pos, bias = transformer_xl(q, u, w, descending.flip(0))
    table = RelativeBias(bias)
    out = windowed_attention(query, k, v, -1, rel_pos=rel_pos, bias=table, backend=backend)
    assert isinstance(out, Tensor)
    expected = published(*leaves)
    torch.testing.assert_close(out, expected)
    dout = torch.randn_like(expected)
    for x, y in zip(torch.autograd.grad(out, leaves, dout), torch.autograd.grad(expected, leaves, dout)):
        torch.testing.assert_close(x, y)


def test_wrong_arguments() -> None:
    q, u, p = torch.randn(2, 5, 3, 4), torch.randn(3, 4), torch.randn(9, 3, 4)
    for wrong, words in (
        ((q[0], u, u, p), r"q has shape \[5, 3, 4\]"),
        ((q, u[0], u, p), r"u has shape \[4\]"),
        ((q, u, u[:2], p), r"w has shape \[2, 4\]"),
        ((q, u, u, p[1:]), r"positions has shape \[8, 3, 4\].*\[9, 3, 4\]"),
    ):
        with pytest.raises(ValueError, match=words):
            transformer_xl(*wrong)
