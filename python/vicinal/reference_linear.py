"""Linear attention in plain PyTorch: the executable specification of csrc/linear.h, differentiable at will.

Every mask is a loop over chunks of tokens: a chunk reads the sums of what came before it, and its own tokens
through a square of weights. Without a mask the sums of all tokens come first and there is no square.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

MOST_EXPONENT = 32.0
SMALLEST_DEN = 1e-30
CHUNK = 64
CHANNEL_CHUNK = 16  # of a decay per channel, whose square has a dimension more


def elementwise(name: str, x: Tensor, param: float = 0.0) -> Tensor:
    """phi(x) of the maps that act on each element; of the dtype of x."""
    if name == "elu1":
        return torch.where(x >= 0, x + 1, x.clamp(max=0).exp())
    if name == "relu":
        return F.relu(x) + param
    if name == "relu2":
        return F.relu(x).square()
    if name == "exp":
        return (x - param).clamp(max=MOST_EXPONENT).exp()
    assert name == "identity", name
    return x


@dataclass(frozen=True)
class Options:
    """What besides tensors decides the function. mask: "full", "causal", "previous" or "inclusive" (blocks of
    block_size tokens)."""

    map_q: str = "identity"
    param_q: float = 0.0
    map_k: str = "identity"
    param_k: float = 0.0
    mask: str = "full"
    block_size: int = 0
    normalize: bool = True
    scale: float = 1.0
    eps: float = 0.0
    constant: float = 0.0


def linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: Options,
    *,
    q_den: Tensor | None = None,
    k_den: Tensor | None = None,
    decay: Tensor | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    initial_s: Tensor | None = None,
    initial_z: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """out [B, N, H, dv], and the final S [R, H, K, dv] and z [R, H, Kd], all in the compute dtype
    (default: float32, float64 for float64).

    q, k [B, N, Hq, dk], v [B, M, H, dv], q_den, k_den [B, N, Hq, dd], decay [H], [B, N, H] or [B, N, H, K],
    key_mask bool [B, M] (True = ignored), cu_seqlens int [R + 1] (then B = 1), initial_s, initial_z as the
    final ones.
    """
    dtype = compute_dtype or (torch.float64 if v.dtype == torch.float64 else torch.float32)
    heads, batch = v.shape[2], v.shape[0]
    f = _features(q, options.map_q, options.param_q, heads, dtype) * options.scale
    p = _features(k, options.map_k, options.param_k, heads, dtype)
    fd = f if q_den is None else _shared(q_den.to(dtype), heads) * options.scale
    pd = p if k_den is None else _shared(k_den.to(dtype), heads)
    v = v.to(dtype)
    if options.constant:
        f, fd = _both(f, fd, lambda x: F.pad(x, (0, 1), value=1.0))
        p, pd = _both(p, pd, lambda x: F.pad(x, (0, 1), value=options.constant))
    if key_mask is not None:
        ignored = key_mask[..., None, None]
        p, pd = _both(p, pd, lambda x: x.masked_fill(ignored, 0))
        v = v.masked_fill(ignored, 0)
    if decay is not None:
        decay = decay.to(dtype)
        decay = decay.expand(batch, v.shape[1], heads) if decay.dim() == 1 else decay
    parts = _Parts(f, p, v, fd, pd, decay, options)
    sequences = [(slice(b, b + 1), slice(None)) for b in range(batch)]
    if cu_seqlens is not None:
        ends = cu_seqlens.tolist()
        sequences = [(slice(0, 1), slice(a, b)) for a, b in itertools.pairwise(ends)]
    else:
        sequences = [(slice(None), slice(None))]  # all samples at once
    results, first = [], 0
    for samples, tokens in sequences:
        count = parts.v[samples].shape[0]
        state = _initial(parts, initial_s, initial_z, first, count)
        results.append(_sequence(parts.of(samples, tokens), *state))
        first += count
    return _joined(parts, results, cu_seqlens)


@dataclass(frozen=True)
class _Parts:
    """Features and values of some tokens: f, p [B, N, H, K], v [B, N, H, dv], fd, pd [B, N, H, Kd], decay [B,
    N, H] or [B, N, H, K]."""

    f: Tensor
    p: Tensor
    v: Tensor
    fd: Tensor
    pd: Tensor
    decay: Tensor | None
    options: Options

    def of(self, samples: slice, tokens: slice) -> _Parts:
        decay = None if self.decay is None else self.decay[samples, tokens]
        f, p, v = (x[samples, tokens] for x in (self.f, self.p, self.v))
        fd = f if self.fd is self.f else self.fd[samples, tokens]
        pd = p if self.pd is self.p else self.pd[samples, tokens]
        return _Parts(f, p, v, fd, pd, decay, self.options)


def _both(x: Tensor, y: Tensor, function: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """function of both; of one where they are the same tensor."""
    changed = function(x)
    return changed, changed if y is x else function(y)


def _shared(x: Tensor, heads: int) -> Tensor:
    """Heads that several heads of v share, repeated for each."""
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], 2)


def _features(x: Tensor, name: str, param: float, heads: int, dtype: torch.dtype) -> Tensor:
    return _shared(elementwise(name, x.to(dtype), param), heads)


def _initial(x: _Parts, s: Tensor | None, z: Tensor | None, first: int, count: int) -> tuple[Tensor, Tensor]:
    heads, dim_v = x.v.shape[2:]
    if s is None:
        s = x.v.new_zeros(count, heads, x.p.shape[-1], dim_v)
    else:
        s = s[first : first + count].to(x.v.dtype)
    if z is None:
        z = x.v.new_zeros(count, heads, x.pd.shape[-1])
    else:
        z = z[first : first + count].to(x.v.dtype)
    return s, z


def _joined(
    x: _Parts, results: list[tuple[Tensor, Tensor, Tensor]], cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    if not results:
        return x.v.new_zeros(x.f.shape[:-1] + x.v.shape[-1:]), *_initial(x, None, None, 0, 0)
    out = torch.cat([r[0] for r in results], 0 if cu_seqlens is None else 1)
    out = F.pad(out, (0, 0, 0, 0, 0, x.f.shape[1] - out.shape[1]))  # tokens after the last sequence
    return out, torch.cat([r[1] for r in results]), torch.cat([r[2] for r in results])


def _sequence(x: _Parts, s: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """out, and the sums after the last token."""
    mask = x.options.mask
    if mask == "full":
        s, z = _add(x, s, z, None)
        return _finish(*_read(x, s, z, None), x.options), s, z
    chunk = x.options.block_size if mask != "causal" else CHUNK
    if x.decay is not None and x.decay.dim() == 4:
        chunk = CHANNEL_CHUNK
    outs = []
    for begin in range(0, x.v.shape[1], chunk):
        now = x.of(slice(None), slice(begin, begin + chunk))
        b = None if now.decay is None else now.decay.cumsum(1)
        if mask == "inclusive":
            s, z = _add(now, s, z, b)
        num, den = _read(now, s, z, b)
        if mask == "causal":
            w = _weights(now.f, now.p, b)
            num = num + torch.einsum("bhij,bjhv->bihv", w, now.v)
            den = den + (w if now.fd is now.f else _weights(now.fd, now.pd, b)).sum(-1).transpose(1, 2)
        if mask != "inclusive":
            s, z = _add(now, s, z, b)
        outs.append(_finish(num, den, x.options))
    if not outs:  # no tokens: the sums depend on them nevertheless
        return x.v, *_add(x, s, z, None)
    return torch.cat(outs, 1), s, z


def _weights(f: Tensor, p: Tensor, b: Tensor | None) -> Tensor:
    """(f_i . p_j) exp(b_i - b_j) for j <= i: [B, H, C, C]."""
    causal = torch.ones(f.shape[1], f.shape[1], dtype=torch.bool, device=f.device).tril()
    if b is None:
        return torch.einsum("bihk,bjhk->bhij", f, p) * causal
    if b.dim() == 3:
        power = (b[:, :, None] - b[:, None]).movedim(-1, 1)
        return torch.einsum("bihk,bjhk->bhij", f, p) * power.masked_fill(~causal, -torch.inf).exp()
    power = b[:, :, None] - b[:, None]  # [B, C, C, H, K]
    power = power.masked_fill(~causal[:, :, None, None], -torch.inf).exp()
    return torch.einsum("bihk,bjhk,bijhk->bhij", f, p, power)


def _read(x: _Parts, s: Tensor, z: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor]:
    """What the tokens get from the sums: num [B, N, H, dv], den [B, N, H]."""
    f, fd = x.f, x.fd
    if b is not None:
        e = (b if b.dim() == 4 else b[..., None]).exp()
        f, fd = f * e, fd * e
    return torch.einsum("bihk,bhkv->bihv", f, s), torch.einsum("bihk,bhk->bih", fd, z)


def _add(x: _Parts, s: Tensor, z: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor]:
    """The sums after these tokens."""
    p, pd = x.p, x.pd
    if b is not None and b.shape[1]:
        b = b if b.dim() == 4 else b[..., None]
        left = (b[:, -1:] - b).exp()
        p, pd = p * left, pd * left
        kept = b[:, -1].exp()
        s, z = s * kept[..., None], z * kept
    return s + torch.einsum("bjhk,bjhv->bhkv", p, x.v), z + pd.sum(1)


def _finish(num: Tensor, den: Tensor, options: Options) -> Tensor:
    if not options.normalize:
        return num
    den = (den + options.eps)[..., None]
    seen = den.abs() >= SMALLEST_DEN
    return torch.where(seen, num / torch.where(seen, den, 1), 0)


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, scale: float, initial_s: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """S_t = S_{t-1} + k_t u_t^T with u_t = beta_t (v_t - S_{t-1}^T k_t), out_t = scale S_t^T q_t, token by
    token: out [B, N, H, dv] and the final S [B, H, dk, dv] (float32, float64 for float64)."""
    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    heads = v.shape[2]
    q, k, v, beta = _shared(q.to(dtype), heads), _shared(k.to(dtype), heads), v.to(dtype), beta.to(dtype)
    s = v.new_zeros(v.shape[0], heads, k.shape[-1], v.shape[-1]) if initial_s is None else initial_s.to(dtype)
    outs = []
    for t in range(v.shape[1]):
        u = beta[:, t, :, None] * (v[:, t] - torch.einsum("bhkv,bhk->bhv", s, k[:, t]))
        s = s + k[:, t, :, :, None] * u[:, :, None]
        outs.append(scale * torch.einsum("bhkv,bhk->bhv", s, q[:, t]))
    return torch.stack(outs, 1) if outs else torch.zeros_like(v), s
