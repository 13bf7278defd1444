"""Joint attention: groups of tokens attend without a normaliser, and everyone reads one linear memory.

The attention of FLASH and of MossFormer: cost is linear in the number of tokens, and the values are many
times wider than the queries and keys.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import _backends
from . import _joint_check as check
from ._attend import accumulator
from ._choice import Key, choose, problem_key, problem_of
from ._joint_op import joint_op, resolve
from ._joint_reference import joint as reference

__all__ = ["joint_attention"]


@dataclass(frozen=True)
class Call:
    """The arguments of joint_attention but the backend."""

    quad_q: Tensor
    quad_k: Tensor
    lin_q: Tensor
    lin_k: Tensor
    v: Tensor
    u: Tensor | None
    group_size: int | None
    is_causal: bool
    key_padding_mask: Tensor | None
    activation: str
    quad_scale: float | None
    lin_scale: float | None
    bias: Tensor | None
    dropout_p: float
    gate: bool


def joint_attention(
    quad_q: Tensor,
    quad_k: Tensor,
    lin_q: Tensor,
    lin_k: Tensor,
    v: Tensor,
    u: Tensor | None = None,
    *,
    group_size: int | None = 256,
    is_causal: bool = False,
    key_padding_mask: Tensor | None = None,
    activation: str = "relu2",
    quad_scale: float | None = None,
    lin_scale: float | None = None,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    gate: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Quadratic attention inside groups of consecutive tokens plus linear attention over all, not normalised.

    For W = v, and for W = u::

        s[i, j] = quad_scale * quad_q[i].quad_k[j] + bias[i % g, j % g]        i, j in one group of g tokens
        A = act(s), 0 where key j is ignored, or is_causal and j > i
        out_W[i] = sum_j dropout(A)[i, j] W[j] + lin_scale * lin_q[i] @ sum_j outer(lin_k[j], W[j])

    The second sum runs over all keys that are not ignored; if is_causal, over those of the earlier groups.
    The last group may be short: it is not padded.

    Args:
        quad_q: [B, N, d], one head, float32, float64, bfloat16 or float16. Any strides; tensors with a
            contiguous last dimension are not copied.
        quad_k: [B, N, d].
        lin_q: [B, N, d].
        lin_k: [B, N, d].
        v: [B, N, V].
        u: [B, N, V], a second matrix of values, which shares all weights with v.
        group_size: g. None: all tokens are one group.
        is_causal: a token sees itself and earlier ones: in its own group by A, in the groups before by the
            linear part.
        key_padding_mask: [B, N] bool, True = ignored as a key: excluded from both sums. (Published FLASH
            and MossFormer masks are True = keep.)
        activation: "relu2", relu(s)^2, or "laplace", (1 + erf((s - mu) / (sd sqrt 2))) / 2 with mu =
            sqrt(1/2) and sd = sqrt(1 / (4 pi)).
        quad_scale: default 1 / g.
        lin_scale: default 1 / N, whatever is ignored; 1 / g if is_causal.
        bias: [g, g], added to the scaled scores of every group. Trainable, any float dtype.
        dropout_p: probability that a weight of A is dropped, 0 <= dropout_p < 1; the others are scaled by 1 /
            (1 - dropout_p).
        gate: return out_u * v * sigmoid(out_v * u), elementwise, instead of out_v and out_u. Needs u.
        backend: "cpu", "triton" or "reference". Default None: the fastest that can.

    Returns:
        [B, N, V] without u or with a gate; else the pair (out_v, out_u). In v's dtype.

    Raises:
        TypeError: an argument has the wrong type or dtype. ValueError: a wrong shape or value.
        NotImplementedError: the forced backend does not take the problem; lists every reason.

    Example:
        >>> qk = [torch.randn(1, 1000, 128) for _ in range(4)]
        >>> v, u = torch.randn(1, 1000, 2048).chunk(2, -1)
        >>> joint_attention(*qk, v, u, gate=True).shape
        torch.Size([1, 1000, 1024])

    Sources: Hua et al., Transformer Quality in Linear Time (arXiv 2202.10447); Zhao and Ma, MossFormer (arXiv
    2302.11824).
    """
    options = (key_padding_mask, activation, quad_scale, lin_scale, bias, dropout_p, gate)
    call = prepare(Call(quad_q, quad_k, lin_q, lin_k, v, u, group_size, is_causal, *options))
    chosen = choose(key_of(call), backend)
    seed = None
    if call.dropout_p > 0:
        seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=call.v.device)
    out, other = run_reference(call, seed) if chosen == "reference" else _run_op(call, chosen, seed)
    return out if other is None else (out, other)


def prepare(call: Call) -> Call:
    """The checked arguments, cast under autocast."""
    check.check_types(call)
    device = call.quad_q.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        call = replace(
            call,
            quad_q=call.quad_q.to(dtype),
            quad_k=call.quad_k.to(dtype),
            lin_q=call.lin_q.to(dtype),
            lin_k=call.lin_k.to(dtype),
            v=call.v.to(dtype),
            u=None if call.u is None else call.u.to(dtype),
        )
    check.check_call(call)
    return call


def key_of(call: Call) -> Key:
    options = {"dropout": call.dropout_p > 0, "keys above 256": call.quad_q.shape[-1] > 256}
    return problem_key("joint", call.quad_q, call.v, tuple(name for name, there in options.items() if there))


def _run_op(call: Call, backend: str, seed: Tensor | None) -> tuple[Tensor, Tensor | None]:
    tensors = (call.quad_q, call.quad_k, call.lin_q, call.lin_k, call.v, call.u)
    bias = None if call.bias is None else call.bias.to(accumulator(call.v.dtype)).contiguous()
    ignored = None if call.key_padding_mask is None else call.key_padding_mask.contiguous()
    wants = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (*tensors, bias))
    scales = (None if x is None else float(x) for x in (call.quad_scale, call.lin_scale))
    keep = call.gate and (wants or torch._C._are_functorch_transforms_active())
    shape = (call.group_size or 0, call.is_causal, call.activation)
    options = (*shape, *scales, float(call.dropout_p), call.gate, keep)
    out, other, *_ = joint_op(backend, False, options, *tensors, bias, ignored, seed)
    return out, other if call.u is not None and not call.gate else None


def run_reference(
    call: Call, seed: Tensor | None, compute_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor | None]:
    group = call.group_size or call.v.shape[1]
    options = (group, call.is_causal, call.activation, call.quad_scale, call.lin_scale)
    o = resolve((*options, float(call.dropout_p), call.gate, False), call.v.shape[1])
    qk = (call.quad_q, call.quad_k, call.lin_q, call.lin_k)
    with torch.autocast(call.v.device.type, enabled=False):
        return reference(
            *(*qk, call.v, call.u, call.bias, call.key_padding_mask, seed),
            group=o.group,
            causal=o.causal,
            activation=o.activation,
            quad_scale=o.quad_scale,
            lin_scale=o.lin_scale,
            dropout_p=o.dropout_p,
            gate=o.gate,
            compute_dtype=compute_dtype,
        )


def _explained(*args: Any, **kwargs: Any) -> Any:
    """The problem and the forced backend of joint_attention(*args, **kwargs)."""
    bound = inspect.signature(joint_attention).bind(*args, **kwargs)
    bound.apply_defaults()
    backend = bound.arguments.pop("backend")
    return problem_of(key_of(prepare(Call(**bound.arguments)))), backend


_backends.explains(joint_attention, _explained)
