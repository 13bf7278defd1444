"""Performer attention in plain PyTorch: random features whose products estimate softmax weights, and the
layer with its projections, on graphs packed one after the other (Choromanski et al., arXiv:2009.14794;
as the global attention of GPS: Rampasek et al., arXiv:2205.12454).

Every graph is attended by itself. The released code pads graphs to one size and zeroes the values of the
padding alone, so that a graph's result depends on the others of its batch; this one does not.

Parameters and buffers of the layer carry the names of the performer-pytorch release."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vicinal.linear import favor_projection

__all__ = ["PerformerAttention", "favor_attention", "favor_features"]


def favor_features(x: Tensor, projection: Tensor, highest: tuple[int, ...], keep: Tensor | None) -> Tensor:
    """m^-1/2 (exp(t - |x|^2 / 2 - max t) + 1e-4) of x / d^(1/4), t = projection x: [B, N, h, d] -> [B, N, h,
    m]. The maximum over the dimensions `highest` is a constant; keep [B, N], True = a token that counts, in
    it and at all."""
    x = x * x.shape[-1] ** -0.25
    t = x @ projection.T.to(x.dtype)
    seen = t.detach() if keep is None else t.detach().masked_fill(~keep[..., None, None], -torch.inf)
    most = seen.amax(highest, keepdim=True).nan_to_num(neginf=0.0)
    features = len(projection) ** -0.5 * (torch.exp(t - x.square().sum(-1, keepdim=True) / 2 - most) + 1e-4)
    return features if keep is None else features.masked_fill(~keep[..., None, None], 0.0)


def favor_attention(q: Tensor, k: Tensor, v: Tensor, projection: Tensor, keep: Tensor | None) -> Tensor:
    """phi(q) (sum phi(k) v^T) / (phi(q) . sum phi(k)): q, k [B, N, h, d], v [B, N, h, D] -> [B, N, h, D]."""
    f = favor_features(q, projection, (-1,), None)
    p = favor_features(k, projection, (1, 3), keep)
    v = v if keep is None else v.masked_fill(~keep[..., None, None], 0.0)
    sums = torch.einsum("bjhm,bjhd->bhmd", p, v)
    return torch.einsum("bihm,bhmd->bihd", f, sums) / torch.einsum("bihm,bhm->bih", f, p.sum(1))[..., None]


class FastAttention(nn.Module):
    """Holds the random projection [m, d] of the features."""

    projection_matrix: Tensor

    def __init__(self, head_dim: int, features: int | None) -> None:
        super().__init__()
        self.register_buffer("projection_matrix", favor_projection(head_dim, features))


class PerformerAttention(nn.Module):
    """Global attention of the nodes of every graph to each other; [T, C] -> [T, C].

    Args:
        dim: C. num_heads: h. head_dim: of queries, keys and values, whatever C and h.
        features: m, default int(head_dim log(head_dim)).
    """

    def __init__(self, dim: int, num_heads: int, *, head_dim: int = 64, features: int | None = None) -> None:
        super().__init__()
        self.num_heads = num_heads
        inner = num_heads * head_dim
        self.fast_attention = FastAttention(head_dim, features)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_k = nn.Linear(dim, inner, bias=False)
        self.to_v = nn.Linear(dim, inner, bias=False)
        self.to_out = nn.Linear(inner, dim)

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """x: [T, C]. ends: int32 [S + 1], as of `cu_seqlens`: 0, the end of every graph, the last being T."""
        q, k, v = (f(x).unflatten(-1, (self.num_heads, -1)) for f in (self.to_q, self.to_k, self.to_v))
        return self.to_out(self.attention(q, k, v, ends).flatten(-2))

    def attention(self, q: Tensor, k: Tensor, v: Tensor, ends: Tensor) -> Tensor:
        """[T, h, d] -> [T, h, d], graph by graph."""
        sizes, projection = ends.diff().tolist(), self.fast_attention.projection_matrix
        graphs = zip(q.split(sizes), k.split(sizes), v.split(sizes))
        outs = [v[:0]]
        for q, k, v in graphs:
            if len(q):
                outs += favor_attention(q[None], k[None], v[None], projection, None)
        return torch.cat(outs)
