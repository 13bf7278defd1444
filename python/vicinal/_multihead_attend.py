"""Attention behind nn.MultiheadAttention: which kernel runs, by one table of reasons, and the four ways.

segments: a row of the attend kernels per sample over the keys that are not padding; windows: the same
kernels over whole sequences; sdpa: torch's scaled_dot_product_attention; dense: plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _choice, _windowed_run
from . import _multihead_check as check
from ._attend import accumulator
from ._attend_run import draw_seed
from ._multihead_weights import rebuilt
from ._segments_type import Segments
from ._voxel_run import run as run_segments
from ._windowed_types import Windows

# Measured on Zen 3 (AVX2), two threads, against SDPA in the same process: docs/multihead.md has the figures.
LONG = 384  # keys; above, SDPA's blocked forward is faster in float32
FEW = 0.2  # share of padding below which a long sequence is better off with it
WHOLE, WHOLE_CROSS = Windows(-1), Windows(-1, q_size=-1)


class Facts(NamedTuple):
    """What decides the kernel of a call."""

    wide: bool  # float32 or float64
    measured: bool  # on CPUs
    fused: bool  # there is a kernel, not only the reference
    forced: bool  # a backend was asked for
    n_k: int
    padding: float  # share of keys that are known to be padding; 0 if that is not known
    pairs: bool  # there is an attn_mask
    trained: bool  # a mask wants a gradient
    dropout: float
    weights: bool  # lse is wanted


Rule = tuple[str, Callable[[Facts], bool], str]

# kernel, whether it may not run or would be slower, and why
RULES: tuple[Rule, ...] = (
    ("segments", lambda f: not f.fused, "no backend but the reference takes the tensors"),
    (
        "segments",
        lambda f: f.padding == 0,
        "no key is known to be padding (masks are read on CPUs alone)",
    ),
    ("segments", lambda f: f.pairs, "attn_mask is given"),
    ("segments", lambda f: f.dropout > 0, "attention weights are dropped"),
    (
        "segments",
        lambda f: f.wide and f.n_k > LONG and f.padding < FEW and not (f.weights or f.forced),
        f"above {LONG} keys with less than {FEW:.0%} padding SDPA is faster",
    ),
    ("windows", lambda f: not f.fused, "no backend but the reference takes the tensors"),
    ("windows", lambda f: f.trained, "a mask wants a gradient"),
    ("windows", lambda f: f.dropout >= 1, "every weight is dropped"),
    (
        "windows",
        lambda f: not (f.measured or f.weights or f.dropout or f.forced),
        "nobody has measured it against SDPA on this device",
    ),
    (
        "windows",
        lambda f: f.wide and f.pairs and f.measured and not (f.weights or f.dropout or f.forced),
        "with attn_mask in float32 SDPA is faster",
    ),
    (
        "windows",
        lambda f: f.wide and f.n_k > LONG and f.measured and not (f.weights or f.dropout or f.forced),
        f"above {LONG} keys in float32 SDPA is faster",
    ),
    ("sdpa", lambda f: f.weights, "weights are wanted, and it does not return log-sum-exps"),
    ("sdpa", lambda f: f.forced, "a backend of vicinal was asked for"),
)
KERNELS = ("segments", "windows", "sdpa", "dense")


def reasons(facts: Facts) -> dict[str, list[str]]:
    """Per kernel, in order of preference, everything against it."""
    return {k: [why for name, against, why in RULES if name == k and against(facts)] for k in KERNELS}


def choose(facts: Facts) -> str:
    """The first kernel with nothing against it."""
    refused = {name for name, against, _ in RULES if against(facts)}
    return next(kernel for kernel in KERNELS if kernel not in refused)


@dataclass(slots=True)
class Problem:
    """q, k, v in the caller's layout, [N, L, h, d] or by batch_dim [L, N, h, d], and what is added.

    `packed` is the tensor [.., 3, h, d] whose views they are, or None. keys: bool or float [N, S]; hidden:
    bool [N, S], the padding, where it is known to be all that keys says. pairs: [1 or N, 1 or h, L, S].
    """

    q: Tensor
    k: Tensor
    v: Tensor
    packed: Tensor | None
    batch_dim: int
    keys: Tensor | None
    hidden: Tensor | None
    pairs: Tensor | None
    causal: bool
    dropout_p: float
    weights: bool
    average: bool
    backend: str | None

    def samples_first(self, x: Tensor) -> Tensor:
        return x if self.batch_dim == 0 else x.transpose(0, 1)

    @property
    def scale(self) -> float:
        return float(self.q.shape[-1]) ** -0.5


def facts_of(p: Problem) -> Facts:
    features = ["dropout"] if p.dropout_p > 0 else []
    key = _choice.problem_key("windowed", p.q, p.v, features)
    forced = p.backend is not None
    masks = [m for m in (p.keys, p.pairs) if m is not None]
    return Facts(
        wide=p.q.dtype in (torch.float32, torch.float64),
        measured=p.q.device.type == "cpu",
        fused=_choice.choose(key, p.backend) != "reference" or forced,
        forced=forced,
        n_k=p.k.shape[1 - p.batch_dim],
        padding=0.0 if p.hidden is None else float(p.hidden.sum()) / max(1, p.hidden.numel()),
        pairs=p.pairs is not None,
        trained=torch.is_grad_enabled() and any(m.requires_grad for m in masks),
        dropout=p.dropout_p,
        weights=p.weights,
    )


def without_idle_masks(p: Problem) -> Problem:
    """The same problem without a key mask that hides nothing."""
    p.hidden = check.hidden_keys(p.keys)
    if p.hidden is not None and not bool(p.hidden.any()):
        p.keys = p.hidden = None
    return p


def attend(p: Problem) -> tuple[Tensor, Tensor | None]:
    """The context in the caller's layout [.., h, d], and the weights [N, L, S] or [N, h, L, S] if wanted."""
    if p.q.numel() == 0 or p.k.numel() == 0:
        return _nothing(p)
    p = without_idle_masks(p)
    kernel = choose(facts_of(p))
    if kernel == "sdpa":
        return _sdpa(p), None
    if kernel == "dense":
        return _dense(p)
    seed = draw_seed(p.dropout_p, p.q.device)
    out, lse = _segments(p) if kernel == "segments" else _windows(p, seed)
    if not p.weights:
        return out, None
    acc = accumulator(p.q.dtype)
    weights = rebuilt(
        p.samples_first(p.q),
        p.samples_first(p.k),
        p.samples_first(lse),
        key_bias=None if p.keys is None else check.added(p.keys, acc),
        pairs=None if p.pairs is None else check.added(p.pairs, acc),
        seed=seed,
        scale=p.scale,
        average=p.average,
        dropout_p=p.dropout_p,
    )
    return out, weights


def _nothing(p: Problem) -> tuple[Tensor, Tensor | None]:
    """No query or no key: a context of zeros, which still depends on the queries."""
    n, heads, n_q = p.q.shape[p.batch_dim], p.q.shape[2], p.q.shape[1 - p.batch_dim]
    shape = (n, n_q, p.k.shape[1 - p.batch_dim])
    weights = p.q.new_zeros(shape if p.average else (n, heads, *shape[1:])) if p.weights else None
    return p.q * 0 + p.v.sum() * 0, weights


def _windows(p: Problem, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    q, k, v = (p.samples_first(x) for x in (p.q, p.k, p.v))
    acc = accumulator(q.dtype)
    keys, pairs = p.keys, None if p.pairs is None else check.added(p.pairs, acc).detach()
    same = q.shape[1] == k.shape[1]
    packed = None if p.packed is None else p.samples_first(p.packed)
    options = (*[None] * 8, None if keys is None else keys.detach(), pairs, "softmax", p.dropout_p, None)
    windows = WHOLE if same else WHOLE_CROSS
    out, lse = _windowed_run.run(q, k, v, packed, windows, options, p.backend, seed)
    return p.samples_first(out), p.samples_first(lse)


@lru_cache(maxsize=64)
def _rows(n: int, length: int, batch_dim: int) -> tuple[Tensor, Tensor]:
    """int32 rows of [N, L] or [L, N], sample after sample, and the bounds of the samples."""
    rows = torch.arange(n * length, dtype=torch.int32)
    if batch_dim == 1:
        rows = rows.view(length, n).t().flatten()
    return rows, torch.arange(0, n * length + 1, length, dtype=torch.int32)


def padded_segments(hidden: Tensor, n_q: int, batch_dim: int) -> Segments:
    """A segment per sample: all its queries, and the keys that are not hidden.

    Args:
        hidden: bool [N, S]. n_q: queries of a sample. batch_dim: of the tensors whose rows are meant.
    """
    n, n_k = hidden.shape
    q_index, q_ptr = _rows(n, n_q, batch_dim)
    k_rows, _ = _rows(n, n_k, batch_dim)
    seen = ~hidden
    counts = seen.sum(1)
    bounds = torch.zeros(n + 1, dtype=torch.int32)
    torch.cumsum(counts, 0, out=bounds[1:])
    k_index = k_rows[seen.flatten()]
    covers_q, longest = bool(counts.all()), int(counts.max())
    traits = (covers_q, k_index.shape[0] == n * n_k, False, True, True)
    return Segments(q_index, k_index, q_ptr, bounds[:-1], bounds[1:], n * n_q, n * n_k, n_q, longest, *traits)


def _segments(p: Problem) -> tuple[Tensor, Tensor]:
    assert p.hidden is not None
    segments = padded_segments(p.hidden, p.q.shape[1 - p.batch_dim], p.batch_dim)
    q, k, v = (x.flatten(0, 1) for x in (p.q, p.k, p.v))
    out, lse = run_segments(q, k, v, segments, None, None, p.backend)
    return out.view(p.q.shape), lse.view(p.q.shape[:-1])


def _mask(p: Problem, dtype: torch.dtype) -> Tensor | None:
    """Both masks as one additive one [1 or N, 1 or h, 1 or L, S]; a key mask alone is not expanded."""
    pairs = None if p.pairs is None else check.added(p.pairs, dtype)
    if p.keys is None:
        return pairs
    keys = check.added(p.keys, dtype)[:, None, None]
    return keys if pairs is None else pairs + keys


def _sdpa(p: Problem) -> Tensor:
    """torch's attention. The causal hint replaces a mask of its shape, as upstream."""
    q, k, v = (p.samples_first(x).transpose(1, 2) for x in (p.q, p.k, p.v))
    causal = p.causal and p.keys is None and q.shape[2] == k.shape[2]
    mask = None if causal else _mask(p, q.dtype)
    out = F.scaled_dot_product_attention(q, k, v, mask, p.dropout_p, causal)
    return p.samples_first(out.transpose(1, 2))


def _dense(p: Problem) -> tuple[Tensor, Tensor | None]:
    """Every step in plain PyTorch: weights of a trained mask, whose gradient is as large as they are."""
    q, k, v = (p.samples_first(x).transpose(1, 2) for x in (p.q, p.k, p.v))
    s = (q * p.scale) @ k.mT
    mask = _mask(p, s.dtype)
    if mask is not None:
        s = s + mask
        empty = torch.isneginf(s).all(-1, keepdim=True)
        s = s.masked_fill(empty, 0.0)
        weights = s.softmax(-1).masked_fill(empty, 0.0)
    else:
        weights = s.softmax(-1)
    weights = F.dropout(weights, p.dropout_p).to(v.dtype)
    out = p.samples_first((weights @ v).transpose(1, 2))
    return out, weights.mean(1) if p.average else weights


def explained(p: Problem) -> tuple[str, dict[str, list[str]]]:
    """The kernel that `attend` would run, and everything against the others."""
    found = reasons(facts_of(without_idle_masks(replace(p))))
    return next(kernel for kernel in KERNELS if not found[kernel]), found
