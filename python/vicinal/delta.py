"""The delta rule: linear attention whose memory replaces what a key held before. In plain PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _linear_check as check
from .reference_linear import CHUNK

__all__ = ["delta_rule_attention", "delta_rule_step"]


def delta_rule_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention to a memory S that every token corrects by what it gets wrong.

    S_0 = initial_state or 0, and token by token::

        u_t = beta_t (v_t - S_{t-1}^T k_t)        S_t = S_{t-1} + k_t u_t^T        out_t = scale S_t^T q_t

    Computed in chunks of 64 tokens, whose u come from one triangular system each; in float32 (float64 for
    float64). There is no kernel: PyTorch's products and its autograd, on any device.

    Args:
        q: [B, N, Hq, dk], float32, float64, bfloat16 or float16.
        k: [B, N, Hq, dk]; the rule is stable where |k| <= 1 and beta <= 2 (not checked).
        v: [B, N, H, dv]; Hq divides H, and consecutive heads of v share one of q and k.
        beta: [B, N, H], how much of the error a token corrects; 0 leaves the memory as it is.
        scale: of the output. Default None: 1.
        initial_state: [B, H, dk, dv], float32 (float64 for float64).
        output_final_state: also return S after the last token.

    Returns:
        out [B, N, H, dv] in the dtype of v, and with output_final_state also S [B, H, dk, dv].

    Raises:
        TypeError: an argument has the wrong type or dtype. ValueError: a wrong shape or value.

    Example:
        >>> q, v = torch.randn(2, 100, 4, 16), torch.randn(2, 100, 4, 24)
        >>> k = torch.nn.functional.normalize(torch.randn(2, 100, 4, 16), dim=-1)
        >>> delta_rule_attention(q, k, v, torch.rand(2, 100, 4)).shape
        torch.Size([2, 100, 4, 24])

    Source: Yang et al., Parallelizing Linear Transformers with the Delta Rule (arXiv 2406.06484).
    """
    _check(q, k, v, beta, scale, initial_state)
    check.flag("output_final_state", output_final_state)
    wide = torch.float64 if v.dtype == torch.float64 else torch.float32
    shared = v.shape[2] // q.shape[2]
    factor = 1.0 if scale is None else float(scale)
    with torch.autocast(q.device.type, enabled=False):
        f, p = (x.to(wide).repeat_interleave(shared, 2).transpose(1, 2) for x in (q * factor, k))
        values, share = v.to(wide).transpose(1, 2), beta.to(wide).transpose(1, 2)[..., None]
        state = initial_state
        if state is None:
            state = f.new_zeros(*f.shape[:2], k.shape[-1], v.shape[-1])
        outs = []
        for at in (slice(b, b + CHUNK) for b in range(0, v.shape[1], CHUNK)):
            out, state = _chunk(f[:, :, at], p[:, :, at], values[:, :, at], share[:, :, at], state)
            outs.append(out)
    out = torch.cat(outs, 2).transpose(1, 2) if outs else v
    return (out.to(v.dtype), state) if output_final_state else out.to(v.dtype)


def _chunk(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """out and the state after the chunk; q, k [B, H, C, dk], v and out [B, H, C, dv], beta [B, H, C, 1].

    u_i + beta_i sum over j < i of (k_i . k_j) u_j = beta_i (v_i - S^T k_i), S being the state before."""
    known = (beta * (k @ k.mT)).tril(-1)
    u = torch.linalg.solve_triangular(known, beta * (v - k @ state), upper=False, unitriangular=True)
    return q @ state + (q @ k.mT).tril() @ u, state + k.mT @ u


def delta_rule_step(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, state: Tensor, *, scale: float | None = None
) -> Tensor:
    """One token of `delta_rule_attention`; the state is updated in place. No gradients.

    The state is read twice and written once: out = scale (S^T q + (q . k) u) with the S before the token.

    Args:
        q, k: [B, 1, Hq, dk]. v: [B, 1, H, dv]. beta: [B, 1, H].
        state: [B, H, dk, dv], float32 (float64 for float64). zeros for the start of a sequence.
        scale: of the output. Default None: 1.

    Returns:
        out [B, 1, H, dv].

    Example:
        >>> q = k = v = torch.randn(2, 1, 4, 16)
        >>> state = torch.zeros(2, 4, 16, 16)
        >>> delta_rule_step(q, k, v, torch.rand(2, 1, 4), state).shape
        torch.Size([2, 1, 4, 16])
    """
    _check(q, k, v, beta, scale, state)
    if state is None:
        raise TypeError("state is None; it must be a tensor [B, H, dk, dv]")
    if q.shape[1] != 1:
        raise ValueError(f"q has {q.shape[1]} tokens; a step takes 1")
    with torch.no_grad():
        shared = v.shape[2] // q.shape[2]
        f, p = (x[:, 0].to(state.dtype).repeat_interleave(shared, 1) for x in (q, k))
        held, asked = (torch.einsum("bhkv,bhk->bhv", state, x) for x in (p, f))
        u = beta[:, 0, :, None].to(state.dtype) * (v[:, 0].to(state.dtype) - held)
        state += p[..., None] * u[:, :, None]
        out = asked + (f * p).sum(-1, keepdim=True) * u
        return (out if scale is None else out * scale).to(v.dtype)[:, None]


def _check(q: Any, k: Any, v: Any, beta: Any, scale: Any, state: Any) -> None:
    check.check_qkv_types(q, k, v)
    batch, n, heads, dim = q.shape
    check.shape("k", k, (batch, n, heads, dim), "q's")
    if v.shape[:2] != (batch, n):
        raise ValueError(f"v has shape {list(v.shape)}; it must be [B, N, H, dv] with [B, N] = {[batch, n]}")
    if not heads or v.shape[2] % heads:
        raise ValueError(f"v has {v.shape[2]} heads, which q's {heads} heads must divide")
    check.floating("beta", beta)
    check.shape("beta", beta, tuple(v.shape[:3]), "[B, N, H]")
    if scale is not None:
        check.number("scale", scale)
    if state is not None:
        check.tensor("initial_state", state)
        check.shape("initial_state", state, (batch, v.shape[2], dim, v.shape[3]), "[B, H, dk, dv]")
        wide = torch.float64 if v.dtype == torch.float64 else torch.float32
        if state.dtype != wide:
            raise TypeError(f"initial_state is {state.dtype}; it must be {wide}")
