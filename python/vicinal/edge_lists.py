"""Attention over lists of rows: K keys for each query, given logits, weights of channels, the best keys.

`gather_attention` and `segment_softmax` are calls of `edge_attention` on its kernels. `vector_attention` and
`topk_attention` are plain PyTorch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _check as checks
from ._edge_graph import Graph
from ._segments_keys import expand
from ._segments_type import Segments
from .edge import edge_attention

__all__ = ["gather_attention", "segment_softmax", "topk_attention", "vector_attention"]


def gather_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    idx: Tensor | Graph,
    mask: Tensor | None = None,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Attention of every query to K keys of its own.

    ::

        p = softmax over j of scale * q[i].k[idx[i, j]]        out[i] = sum_j p[i, j] v[idx[i, j]]

    Args:
        q: [N, h, D], as `edge_attention`.
        k: [Nk, h, D].
        v: [Nk, h, Dv].
        idx: int [N, K], rows of k and v; or `Graph.from_knn(idx, mask, n_src=Nk)`, which is worth keeping
            where several layers use the same lists.
        mask: bool [N, K], which entries there are; the others are ignored. A query without any has out 0.
            Default: all.
        scale: default D ** -0.5.
        return_lse: also return the logarithm of the sums of exponentials [N, h].
        backend: as `edge_attention`.

    Returns:
        out [N, h, Dv]; with return_lse also lse.

    Raises:
        TypeError, ValueError, NotImplementedError: as `edge_attention` and `Graph.from_knn`.

    Example:
        >>> q, k = torch.randn(4, 2, 8), torch.randn(9, 2, 8)
        >>> gather_attention(q, k, k, torch.randint(0, 9, (4, 3))).shape
        torch.Size([4, 2, 8])
    """
    if isinstance(idx, Graph):
        if mask is not None:
            raise ValueError("mask is given; a Graph has its own, so it must be None")
        graph = idx
    else:
        checks.tensor("k", k)
        graph = Graph.from_knn(idx, mask, k.shape[0])
    return edge_attention(q, k, v, graph, scale=scale, return_lse=return_lse, backend=backend)


def segment_softmax(
    logits: Tensor, values: Tensor, segments: Segments, *, backend: str | None = None
) -> Tensor:
    """Sums of the rows of each segment, weighted by the softmax of given logits.

    For segment s with the rows j, and channel c of group g = c mod G::

        p[j, g] = exp(logits[j, g]) / sum over the rows of s        out[s, c] = sum_j p[j, g] values[j, c]

    Args:
        logits: [M, G], any float dtype; -inf leaves a row out.
        values: [M, C], C a multiple of G; float32, float64, bfloat16 or float16.
        segments: `Segments` whose keys are the M rows.
        backend: as `edge_attention`.

    Returns:
        [S, C] in values' dtype, a row for each segment; 0 for a segment without rows.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or value; the message names it.

    Example:
        >>> from vicinal import segments
        >>> made = segments.from_lengths(torch.tensor([3, 2]))
        >>> segment_softmax(torch.randn(5, 4), torch.randn(5, 32), made).shape
        torch.Size([2, 32])

    Source: Li et al., GridFormer (arXiv 2401.00260).
    """
    for name, x in (("logits", logits), ("values", values)):
        checks.floating(name, x)
        if x.dim() != 2:
            raise ValueError(f"{name} has shape {list(x.shape)}; it must have two dimensions")
    if not isinstance(segments, Segments):
        raise TypeError(f"segments is a {type(segments).__name__}; it must be Segments")
    for name, x in (("logits", logits), ("values", values)):
        if x.shape[0] != segments.n_k:
            raise ValueError(f"{name} has {x.shape[0]} rows; segments was built for {segments.n_k}")
    groups = logits.shape[1]
    if not groups or not values.shape[1] or values.shape[1] % groups:
        raise ValueError(
            f"values has {values.shape[1]} channels; they must be a multiple of {groups} as logits"
        )
    graph = _graph_of(segments)
    heads = values.unflatten(1, (-1, groups)).transpose(1, 2)  # [M, G, C / G]
    bias = logits.index_select(0, graph.col.long())
    q = values.new_zeros(()).expand(segments.count, groups, 1)
    k = values.new_zeros(()).expand(segments.n_k, groups, 1)
    out = edge_attention(q, k, heads, graph, edge_bias=bias, backend=backend)
    assert isinstance(out, Tensor)
    return out.transpose(1, 2).flatten(1)


def _graph_of(segments: Segments) -> Graph:
    """Edges from the rows of each segment to the segment, in the order of its slots."""
    if "rows" not in segments.kept:
        counts = (segments.k_end - segments.k_begin).long()
        owner, place = expand(counts, int(counts.sum()))
        row = segments.k_index[segments.k_begin[owner].long() + place]
        ptr = torch.cat([counts.new_zeros(1), torch.cumsum(counts, 0)])
        segments.kept["rows"] = Graph.from_csr(ptr, row, segments.n_k)
    found: Graph = segments.kept["rows"]
    return found


def vector_attention(logits: Tensor, values: Tensor) -> Tensor:
    """Weighted sums over K neighbours with a weight for each group of channels, in plain PyTorch.

    ::

        w = softmax over k of logits[n, k, g]        out[n, c] = sum_k w[n, k, c mod G] values[n, k, c]

    Args:
        logits: [N, K, G], float; -inf leaves a neighbour out.
        values: [N, K, C], C a multiple of G, in the dtype of logits.

    Returns:
        [N, C]; 0 where all neighbours are left out.

    Raises:
        TypeError, ValueError: an argument has the wrong type or shape; the message names it.

    Example:
        >>> vector_attention(torch.randn(5, 16, 4), torch.randn(5, 16, 32)).shape
        torch.Size([5, 32])

    Source: Zhao et al., Point Transformer (arXiv 2012.09164).
    """
    for name, x in (("logits", logits), ("values", values)):
        checks.floating(name, x)
        if x.dim() != 3:
            raise ValueError(f"{name} has shape {list(x.shape)}; it must be [N, K, channels]")
    if values.shape[:2] != logits.shape[:2]:
        raise ValueError(f"values has shape {list(values.shape)}; it must be {[*logits.shape[:2], 'C']}")
    if values.dtype != logits.dtype:
        raise TypeError(f"values is {values.dtype}; it must be {logits.dtype} as logits")
    groups = logits.shape[2]
    if not groups or values.shape[2] % groups:
        raise ValueError(
            f"values has {values.shape[2]} channels; they must be a multiple of {groups} as logits"
        )
    out_of_all = (logits == -torch.inf).all(1, keepdim=True) if logits.shape[1] else None
    x = logits if out_of_all is None else logits.masked_fill(out_of_all, 0)
    w = x.softmax(1)
    w = w if out_of_all is None else w.masked_fill(out_of_all, 0)
    return (w[:, :, None] * values.unflatten(2, (-1, groups))).sum(1).flatten(1)


def topk_attention(
    q: Tensor, k: Tensor, mask: Tensor | None = None, *, count: int = 1
) -> tuple[Tensor, Tensor]:
    """The keys with the largest q.k of every query and head, in plain PyTorch.

    The gradient goes through the rows that are returned; the choice has none. Normalise q and k before the
    call where a model compares directions.

    Args:
        q: [B, Nq, h, D].
        k: [B, Nk, h, D].
        mask: bool [B, Nq, Nk] or [B, Nq, h, Nk], True = ignore. A query whose keys are all ignored ignores
            none. Default: none.
        count: how many keys, at most Nk. Equal products: the order is that of torch.topk.

    Returns:
        rows [B, Nq, h, count, D] of k, and index int64 [B, Nq, h, count], largest product first.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or value; the message names it.

    Example:
        >>> rows, index = topk_attention(torch.randn(1, 5, 2, 8), torch.randn(1, 9, 2, 8), count=3)
        >>> rows.shape, index.shape
        (torch.Size([1, 5, 2, 3, 8]), torch.Size([1, 5, 2, 3]))

    Source: Cavagnero et al., PEM (arXiv 2402.19422), with count = 1.
    """
    for name, x in (("q", q), ("k", k)):
        checks.floating(name, x)
        if x.dim() != 4:
            raise ValueError(f"{name} has shape {list(x.shape)}; it must be [B, N, heads, head_dim]")
    checks.shape("k", k, (q.shape[0], k.shape[1], *q.shape[2:]), "[B, Nk, heads, head_dim]")
    if not checks.is_int(count):
        raise TypeError(f"count is {count!r}; it must be an int")
    if not 1 <= count <= k.shape[1]:
        raise ValueError(f"count is {count}; it must be 1 .. {k.shape[1]}, the number of keys")
    with torch.no_grad():
        scores = torch.einsum("bqhd,bkhd->bqhk", q, k)
        if mask is not None:
            scores = _ignored(scores, mask)
        index = scores.argmax(-1, keepdim=True) if count == 1 else scores.topk(count).indices
    batch = torch.arange(q.shape[0], device=q.device)[:, None, None, None]
    head = torch.arange(q.shape[2], device=q.device)[:, None]
    return k[batch, index, head], index


def _ignored(scores: Tensor, mask: Any) -> Tensor:
    """scores [B, Nq, h, Nk] with -inf at what is ignored."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask is {getattr(mask, 'dtype', type(mask).__name__)}; it must be a bool tensor")
    accepted = (scores.shape, scores[:, :, 0].shape)
    if mask.shape not in accepted:
        shapes = " or ".join(str(list(s)) for s in accepted)
        raise ValueError(f"mask has shape {list(mask.shape)}; it must be {shapes}")
    mask = mask if mask.dim() == 4 else mask[:, :, None]
    return scores.masked_fill(mask & ~mask.all(-1, keepdim=True), -torch.inf)
