"""The weights that nn.MultiheadAttention returns, rebuilt from the log-sum-exp of each row.

    e[n, h, i, j] = exp(scale q[n, i, h] . k[n, j, h] + key_bias[n, j] + pairs[n, h, i, j] - lse[n, i, h])
    p = e / sum_j e

The sum is 1 but for the rounding of lse, which is of lse's own magnitude; a row without a key has e = p = 0.
torch.softmax, which would need no lse, takes up to twice as long on tiles of the cache's size.

Their mean over heads is formed tile by tile, so that [N, heads, L, S] is never in memory; so are the
gradients. A tile is as many samples, or heads of one sample, as fit the caches, and ends where the last of
its keys that is not padding does.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import philox
from ._attend import accumulator
from ._family import Family, autograd_function, define

TENSORS = ("q", "k", "lse", "key_bias?", "pairs?", "seed?")
OPTIONS = ("float scale", "bool average", "float dropout_p")
TILE = 1 << 19  # scores: 2 MB of float32; half as many take up to 1.3 times as long, twice as many as long


def _fake_forward(tensors: tuple[Any, ...], options: tuple[Any, ...]) -> Tensor:
    q, k, *_ = tensors
    n, n_q, heads, _ = q.shape
    shape = (n, n_q, k.shape[1]) if options[1] else (n, heads, n_q, k.shape[1])
    return q.new_empty(shape)


def _fake_backward(
    outputs: tuple[Any, ...], tensors: tuple[Any, ...], options: tuple[Any, ...], packed: bool
) -> tuple[Tensor, ...]:
    return tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in tensors[:2])


WEIGHTS = Family(
    name="weights",
    tensors=TENSORS,
    options=OPTIONS,
    outputs=("weights",),
    gradients=("q", "k"),
    fake_fwd=_fake_forward,
    fake_bwd=_fake_backward,
    reads=(),
)


def _tiles(tensors: tuple[Any, ...]) -> Iterator[tuple[slice, slice, int]]:
    """Slices of samples and of heads, and how many keys they have up to the last one that is not padding."""
    q, k, _, key_bias, *_ = tensors
    (n, n_q, heads, _), n_k = q.shape, k.shape[1]
    scores = n_q * n_k
    whole = max(1, TILE // max(1, heads * scores))
    some = heads if heads * scores <= TILE else max(1, TILE // scores)
    ends = [n_k] * n
    if key_bias is not None and key_bias.device.type == "cpu":  # elsewhere the host would wait
        places = torch.arange(1, n_k + 1).expand(n, -1)
        ends = places.masked_fill(torch.isneginf(key_bias), 0).amax(1).tolist()
    for first in range(0, n, whole):
        last = min(n, first + whole)
        for head in range(0, heads, some):
            yield slice(first, last), slice(head, min(heads, head + some)), max(ends[first:last])


class _Tile:
    """Scores of some samples and heads: q, k [n, h, L or S, d] in the accumulation type, p before dropout."""

    def __init__(
        self, tensors: tuple[Any, ...], options: tuple[Any, ...], n: slice, h: slice, keys: int
    ) -> None:
        q, k, lse, key_bias, pairs, seed = tensors
        scale, _, dropout_p = options
        acc = accumulator(q.dtype)
        self.q, self.k = (x.transpose(1, 2).to(acc) for x in (q[n, :, h], k[n, :keys, h]))
        s = (self.q * scale) @ self.k.mT
        if key_bias is not None:
            s += key_bias[n, None, None, :keys]
        if pairs is not None:
            of_tile = pairs[n if len(pairs) > 1 else slice(None), h if pairs.shape[1] > 1 else slice(None)]
            s += of_tile[..., :keys]
        row = lse[n, :, h].transpose(1, 2)[..., None]
        self.p = s.sub_(row.masked_fill(torch.isneginf(row), torch.inf)).exp_()
        self.p.div_(self.p.sum(-1, keepdim=True).clamp_min_(0.5))
        self.kept = None
        if seed is not None:
            self.kept = _kept(seed, dropout_p, q, keys, n, h).to(acc) / (1.0 - dropout_p)


def _kept(seed: Tensor, dropout_p: float, q: Tensor, slots: int, n: slice, h: slice) -> Tensor:
    """bool [n, h, L, S]: what the attend kernels keep."""
    samples, heads = (torch.arange(s.start, s.stop, device=q.device) for s in (n, h))
    batch_head = samples[:, None] * q.shape[2] + heads
    tokens = torch.arange(q.shape[1], device=q.device)
    return philox.keep(seed, dropout_p, tokens, batch_head[..., None], slots)


def _forward(*args: Any) -> Tensor:
    tensors, options = args[: len(TENSORS)], args[len(TENSORS) :]
    weights, heads = _fake_forward(tensors, options), tensors[0].shape[2]
    parts: list[Tensor] = []  # the sum over the heads of a sample so far
    for n, h, keys in _tiles(tensors):
        tile = _Tile(tensors, options, n, h, keys)
        p = tile.p if tile.kept is None else tile.p.mul_(tile.kept)
        out = weights[n] if options[1] else weights[n, h]
        out[..., keys:] = 0
        if not options[1]:
            out[..., :keys] = p
            continue
        parts = [p.sum(1)] if h.start == 0 else [parts[0] + p.sum(1)]
        if h.stop == heads:
            out[..., :keys] = parts[0] / heads
    return weights


def _backward(*args: Any) -> tuple[Tensor, ...]:
    given, tensors, options = args[0], args[1 : 1 + len(TENSORS)], args[1 + len(TENSORS) : -1]
    results = _fake_backward((), tensors, options, False)
    if given is None:
        return tuple(r.zero_() for r in results)
    dq, dk = results
    scale, average, _ = options
    for n, h, keys in _tiles(tensors):
        tile = _Tile(tensors, options, n, h, keys)
        dp = given[n, None, :, :keys] / tensors[0].shape[2] if average else given[n, h, :, :keys]
        dp = dp if tile.kept is None else dp * tile.kept
        ds = tile.p * (dp - (tile.p * dp).sum(-1, keepdim=True))
        dq[n, :, h] = (scale * (ds @ tile.k)).transpose(1, 2)
        dk[n, :keys, h] = (scale * (ds.mT @ tile.q)).transpose(1, 2)
        dk[n, keys:, h] = 0
    return results


define(WEIGHTS, "torch", _forward, _backward)


def _finish(grads: list[Tensor | None], tensors: tuple[Any, ...], packed: bool) -> list[Tensor | None]:
    return [*grads, *[None] * (len(TENSORS) - 2)]


_apply = autograd_function(WEIGHTS, _finish)


def rebuilt(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    key_bias: Tensor | None,
    pairs: Tensor | None,
    seed: Tensor | None,
    scale: float,
    average: bool,
    dropout_p: float,
) -> Tensor:
    """Weights [N, L, S], the mean over heads, or [N, h, L, S], as they were applied: after dropout.

    Args:
        q: [N, L, h, d]. k: [N, S, h, d]. lse: [N, L, h] in the accumulation type, of the scores with masks.
        key_bias: [N, S], pairs: [1 or N, 1 or h, L, S], both in the accumulation type and without gradient.
        seed: of the dropout of the attend kernels, or None.

    Returns:
        In q's dtype; differentiable once by q and k.
    """
    (weights,) = _apply("torch", False, (scale, average, dropout_p), q, k, lse, key_bias, pairs, seed)
    return weights
