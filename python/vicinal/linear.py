"""Linear attention: weights that are products of features, so that cost grows with N, not with N^2."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor

from . import _backends
from . import _linear_check as check
from ._choice import problem_of
from ._linear_maps import FeatureMap, favor_projection
from ._linear_run import LinearState, prepare, problem_key, run
from ._linear_step import prepare_step, step

__all__ = [
    "FeatureMap",
    "LinearState",
    "ema_scan",
    "favor_projection",
    "lightning_decay",
    "linear_attention",
    "linear_attention_step",
    "retnet_decay",
]

FeatureMaps = str | FeatureMap | tuple[str | FeatureMap, str | FeatureMap]


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature_map: FeatureMaps = "elu1",
    is_causal: bool = False,
    decay: Tensor | None = None,
    normalize: bool = True,
    scale: float | None = None,
    eps: float = 1e-6,
    const: float = 0.0,
    q_den: Tensor | None = None,
    k_den: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    block_size: int | None = None,
    block_mode: str = "previous",
    chunk_size: int | None = None,
    initial_state: LinearState | tuple[Tensor, Tensor | None] | Tensor | None = None,
    output_final_state: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, LinearState]:
    """Attention with weights scale * phi_q(q_i) . phi_k(k_j), in place and linear in the tokens.

    With m_j = 0 for ignored keys, b the inclusive cumulative sum of decay, and D_ij = 1; [j <= i] exp(b_i -
    b_j) with is_causal; or whether j's block is before i's (or the same) with block_size::

        w_ij = (scale * phi_q(q_i) . phi_k(k_j) + const) * m_j * D_ij
        o_i  = sum_j w_ij v_j / (sum_j w_ij + eps)       without normalize: the numerator alone

    Args:
        q: [B, N, Hq, dk], float32, float64, bfloat16 or float16. Any strides, such as NCHW's, in place.
        k: [B, M, Hq, dk]; M = N with is_causal or cu_seqlens.
        v: [B, M, H, dv]; Hq divides H, and consecutive heads of v share one of q and k.
        feature_map: a name, a `FeatureMap`, or a pair of them for q and k. "identity": q and k are features.
        is_causal: token i sees tokens up to i.
        decay: log-decay, at most 0 (not checked) and finite; needs is_causal. [H], or [B, N, H]: decay[i]
            multiplies all that token i sees of earlier tokens. [B, N, H, dk], per channel: reference only.
        normalize: divide by the sum of the weights plus eps.
        scale: of the products of features. Default None: 1.
        eps: added to the sum of the weights, at least 0. References that divide by a mean need eps * M.
        const: added to every weight.
        q_den: [B, N, Hq, dd], features (no map is applied) that make the denominator in place of q's; for
            rotary positions in the numerator only. Needs normalize.
        k_den: [B, M, Hq, dd]. Comes with q_den.
        key_padding_mask: [B, M], bool, True = ignored: phi(k_j) and const are 0 there.
        cu_seqlens: int32 [S + 1], ends of packed sequences, with B = 1; sums, states and decay start anew.
        block_size: with is_causal: tokens see whole blocks of this many tokens.
        block_mode: "previous": those before its own; "inclusive": and its own.
        chunk_size: a wish for the tokens per chunk of the causal loop. Changes rounding alone.
        initial_state: the sums before the first token: a `LinearState`, (s, z), or s if not normalised.
        output_final_state: also return the sums after the last token.
        backend: "cuda", "triton", "cpu" or "reference". Default None: the fastest that can.

    Returns:
        out [B, N, H, dv] in the dtype and memory order of v, and with output_final_state a LinearState. Where
        the sum of the weights plus eps is below 1e-30 in size, out is 0 and so are its gradients.

    Raises:
        TypeError: an argument has the wrong type or dtype. ValueError: a wrong shape or value.
        NotImplementedError: no backend (or not the forced one) takes the problem; lists every reason.

    Example:
        >>> q = k = v = torch.randn(2, 1024, 8, 64)
        >>> linear_attention(q, k, v).shape
        torch.Size([2, 1024, 8, 64])
        >>> out, state = linear_attention(q, k, v, is_causal=True, output_final_state=True)
        >>> state.s.shape, state.z.shape
        (torch.Size([2, 8, 64, 64]), torch.Size([2, 8, 64]))

    Source: Katharopoulos et al., Transformers are RNNs (arXiv 2006.16236).
    """
    call = prepare(
        q,
        k,
        v,
        feature_map=feature_map,
        is_causal=is_causal,
        decay=decay,
        normalize=normalize,
        scale=scale,
        eps=eps,
        const=const,
        q_den=q_den,
        k_den=k_den,
        key_padding_mask=key_padding_mask,
        cu_seqlens=cu_seqlens,
        block_size=block_size,
        block_mode=block_mode,
        chunk_size=chunk_size,
        initial_state=initial_state,
        output_final_state=output_final_state,
    )
    out, state = run(call, backend)
    return (out, state) if output_final_state else out


def linear_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: LinearState,
    *,
    feature_map: FeatureMaps = "elu1",
    decay: Tensor | None = None,
    normalize: bool = True,
    scale: float | None = None,
    eps: float = 1e-6,
    const: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """One token of causal `linear_attention`; the state is updated in place.

    s <- exp(decay) s + phi(k) v^T, z <- exp(decay) z + phi(k), out = f s / (f . z + eps) with f = scale *
    phi(q). Memory is fixed, so the call can be captured in a CUDA graph. No gradients: for those, pass the
    state to `linear_attention`.

    Args:
        q: [B, 1, Hq, dk]. k: [B, 1, Hq, dk]. v: [B, 1, H, dv].
        state: as `linear_attention` returns it; contiguous. zeros for the start of a sequence.
        decay: [H], [B, 1, H], or [B, 1, H, dk] on the reference.
        Others: as `linear_attention`.

    Returns:
        out [B, 1, H, dv].

    Example:
        >>> state = LinearState(torch.zeros(2, 8, 64, 64), torch.zeros(2, 8, 64))
        >>> q = k = v = torch.randn(2, 1, 8, 64)
        >>> linear_attention_step(q, k, v, state).shape
        torch.Size([2, 1, 8, 64])
    """
    options = (feature_map, decay, normalize, scale, eps, const)
    return step(q, k, v, state, options, backend)


def ema_scan(
    x: Tensor,
    p: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """y_t = p_t x_t + (1 - p_t) y_{t-1}, from y_{-1} = initial_state or 0.

    Args:
        x: [B, N, D]. p: [B, N], 0 <= p < 1 (not checked). H-Net clamps p to [1e-4, 1 - 1e-4].
        cu_seqlens: int32 [S + 1], ends of packed sequences, with B = 1.
        initial_state: [B or S, D], float32 (float64 for float64).
        output_final_state: also return the last y, [B or S, D], float32 (float64 for float64).
        backend: as `linear_attention`.

    Returns:
        y [B, N, D] in x's dtype.

    Example:
        >>> ema_scan(torch.ones(1, 3, 1), torch.full((1, 3), 0.5)).flatten().tolist()
        [0.5, 0.75, 0.875]

    Source: Hwang et al., Dynamic Chunking for End-to-End Hierarchical Sequence Modeling (arXiv 2507.07955).
    """
    check.check_scan(x, p, initial_state)
    wide = torch.promote_types(p.dtype, torch.float64 if x.dtype == torch.float64 else torch.float32)
    share = p.to(wide)
    one = x.new_ones(*x.shape[:2], 1, 1)
    call = prepare(
        one,
        one,
        (share[..., None] * x).to(x.dtype)[:, :, None],
        feature_map="identity",
        is_causal=True,
        decay=torch.log1p(-share)[..., None],
        normalize=False,
        scale=None,
        eps=0.0,
        const=0.0,
        q_den=None,
        k_den=None,
        key_padding_mask=None,
        cu_seqlens=cu_seqlens,
        block_size=None,
        block_mode="previous",
        chunk_size=None,
        initial_state=None if initial_state is None else initial_state[:, None, None],
        output_final_state=output_final_state,
    )
    out, state = run(call, backend)
    return (out[:, :, 0], state.s[:, 0, 0]) if output_final_state else out[:, :, 0]


def retnet_decay(heads: int, *, device: torch.device | str | None = None) -> Tensor:
    """RetNet's log-decay per head, log(1 - 2^(-5 - h)): float32 [heads].

    Example:
        >>> retnet_decay(2).exp().tolist()
        [0.96875, 0.984375]

    Source: Sun et al., Retentive Network (arXiv 2307.08621).
    """
    check.count("heads", heads)
    values = [math.log1p(-(2.0 ** (-5 - h))) for h in range(heads)]
    return torch.tensor(values, dtype=torch.float32, device=device)


def lightning_decay(
    heads: int, layer: int, layers: int, *, device: torch.device | str | None = None
) -> Tensor:
    """Lightning attention's log-decay per head, -(8 / heads) (1 - layer / layers) h: float32 [heads].

    Example:
        >>> lightning_decay(4, 0, 2).tolist()
        [0.0, -2.0, -4.0, -6.0]

    Source: Qin et al., Lightning Attention-2 (arXiv 2401.04658).
    """
    check.count("heads", heads)
    check.count("layers", layers)
    if not check.is_int(layer) or not 0 <= layer < layers:
        raise ValueError(f"layer is {layer!r}; it must be an int, 0 <= layer < layers = {layers}")
    slope = -(8.0 / heads) * (1.0 - layer / layers)
    return torch.tensor([slope * h + 0.0 for h in range(heads)], dtype=torch.float32, device=device)


def _explained(*args: Any, **kwargs: Any) -> Any:
    """The problem and the forced backend of linear_attention(*args, **kwargs)."""
    bound = inspect.signature(linear_attention).bind(*args, **kwargs)
    bound.apply_defaults()
    backend = bound.arguments.pop("backend")
    return problem_of(problem_key(prepare(**bound.arguments))), backend


def _explained_step(*args: Any, **kwargs: Any) -> Any:
    bound = inspect.signature(linear_attention_step).bind(*args, **kwargs)
    bound.apply_defaults()
    backend = bound.arguments.pop("backend")
    return problem_of(problem_key(prepare_step(**bound.arguments))), backend


_backends.explains(linear_attention, _explained)
_backends.explains(linear_attention_step, _explained_step)
