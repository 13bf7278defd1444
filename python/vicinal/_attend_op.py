"""The ops of one softmax family, vicinal::<family>_fwd and <family>_bwd: geometry text -> plans -> launches.

What the families share is all here; a family adds its plans.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import _backends, _launch
from ._attend import (
    AttendCall,
    AttendGrads,
    accumulator,
    flat,
    slice_call,
    slice_grads,
    sum_copies,
    with_copied_keys,
)
from ._family import Family, autograd_function, define, empty_gradient
from .plan import Plan

TENSORS = (
    "q",
    "k",
    "v",
    "bias?",
    "q_scale?",
    "k_scale?",
    "extra_k?",
    "extra_v?",
    "key_bias?",
    "mask?",
    "seed?",
)
OPTIONS = (
    "str geometry",
    "float scale",
    "float mask_value",
    "int edge_row",
    "str activation",
    "float dropout_p",
)


_NO_TENSORS = (None,) * 7  # of the optional ones, all but the bias

# (geometry text, q, k, backend) -> (first head, last head + 1, plan) of every head group
Plans = Callable[[str, Tensor, Tensor, str], Sequence[tuple[int, int, Plan]]]


def _fake_forward(tensors: tuple[Any, ...], options: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    q, v = tensors[0], tensors[2]
    rows, dtype, device = q.shape[:-1], q.dtype, q.device
    # torch.empty takes a third of the time of new_empty
    out = torch.empty((*rows, v.shape[-1]), dtype=dtype, device=device)
    return out, torch.empty(rows, dtype=accumulator(dtype), device=device)


def _fake_backward(
    outputs: tuple[Any, ...], tensors: tuple[Any, ...], options: tuple[Any, ...], packed: bool
) -> tuple[Tensor, ...]:
    q, k, v, bias, _, _, extra_k, extra_v, *_ = tensors
    first: tuple[Tensor, ...]
    if packed:
        dqkv = torch.empty((*q.shape[:-2], 3, *q.shape[-2:]), dtype=q.dtype, device=q.device)
        first = (dqkv, empty_gradient(k), empty_gradient(v))
    else:
        first = tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    acc = accumulator(q.dtype)
    small = (
        empty_gradient(q) if t is None else t.new_empty(t.shape, dtype=acc) for t in (bias, extra_k, extra_v)
    )
    return (*first, *small)


class AttendOps:
    """The ops of a family. `apply(backend, packed, options, *tensors) -> out, lse`, differentiable once.

    Args:
        name: the family's name. plans: see `Plans`. drop_by_token: what the dropout counter counts.
        missing: features that no kernel has for this family.
    """

    def __init__(
        self, name: str, plans: Plans, drop_by_token: bool = False, missing: frozenset[str] = frozenset()
    ) -> None:
        self.plans, self.drop_by_token = plans, drop_by_token
        self.family = Family(
            name=name,
            tensors=TENSORS,
            options=OPTIONS,
            outputs=("out", "lse"),
            gradients=("q", "k", "v", "bias", "extra_k", "extra_v"),
            fake_fwd=_fake_forward,
            fake_bwd=_fake_backward,
        )
        for row in _launch.ROWS:
            capability = row.capability(name)
            if row.forward is not None:
                self.define(row)
                capability = replace(capability, missing=capability.missing | missing)
            _backends.register(capability)
        self.apply = autograd_function(self.family, _finish)

    def define(self, row: _launch.Launchers) -> None:
        """Register a backend's overloads."""
        define(self.family, row.backend, self._forward(row), self._backward(row))

    def _forward(self, launchers: _launch.Launchers) -> Callable[..., tuple[Tensor, Tensor]]:
        launch, repeat, backend = launchers.forward, launchers.repeat, launchers.backend
        repeats: dict[Any, Callable[..., None]] = {}  # by shapes and strides, without optional tensors
        assert launch is not None

        def forward(*args: Any) -> tuple[Tensor, Tensor]:
            tensors, options = args[:11], args[11:]
            out, lse = _fake_forward(tensors, options)
            q, k, v, bias = args[:4]
            key = None
            if repeat is not None and args[4:11] == _NO_TENSORS:
                shapes = (q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(), q.dtype)
                key = (*shapes, None if bias is None else bias.shape, options)
                again = repeats.get(key)
                if again is not None:
                    again(q, k, v, bias, out, lse)
                    return out, lse
            if lse.numel() == 0:
                return out, lse
            call = self._call(tensors, options, out, lse)
            groups = self.plans(options[0], q, k, backend)
            if len(groups) > 1:
                for first, last, plan in groups:
                    launch(slice_call(call, plan, first, last))
                return out, lse
            call.plan = groups[0][2]
            launch(call)
            copied = any(x.data_ptr() != y.data_ptr() for x, y in ((q, call.q), (k, call.k), (v, call.v)))
            if repeat is not None and key is not None and not copied:
                if len(repeats) >= 1024:
                    repeats.clear()
                repeats[key] = repeat(call)
            return out, lse

        return forward

    def _backward(self, launchers: _launch.Launchers) -> Callable[..., tuple[Tensor, ...]]:
        launch, repeat, backend = launchers.backward, launchers.repeat_backward, launchers.backend
        repeats: dict[Any, Callable[..., None]] = {}
        assert launch is not None

        def backward(*args: Any) -> tuple[Tensor, ...]:
            dout, dlse, out, lse, q, k, v, bias = args[:8]
            tensors, options, packed = args[4:15], args[15:-1], args[-1]
            results = _fake_backward((out, lse), tensors, options, packed)
            key = None
            if repeat is not None and args[8:15] == _NO_TENSORS and dout.stride(-1) == 1:
                strides = (q.stride(), k.stride(), v.stride(), dout.stride())
                saved = (out.stride(), lse.stride(), dlse is None)
                shapes = (q.shape, k.shape, v.shape, q.dtype, None if bias is None else bias.shape)
                key = (*shapes, *strides, *saved, packed, options)
                again = repeats.get(key)
                if again is not None:
                    dlse = None if dlse is None else dlse.contiguous()
                    again((q, k, v, bias, out, lse, dout), dlse, results, packed)
                    return results
            if lse.numel() == 0:
                return tuple(r.zero_() for r in results)
            call, grads = self._grads(args[:4], tensors, options, packed, results)
            groups = self.plans(options[0], q, k, backend)
            _run_backward(launch, call, grads, groups)
            _sum_shared(grads, results)
            pairs = ((q, call.q), (k, call.k), (v, call.v), (dout, grads.dout), (out, call.out))
            same = all(x.data_ptr() == y.data_ptr() for x, y in (*pairs, (lse, call.lse)))
            if repeat is not None and key is not None and same and len(groups) == 1:
                call.plan = groups[0][2]
                if not call.plan.overlap:
                    if len(repeats) >= 1024:
                        repeats.clear()
                    repeats[key] = repeat(call, grads)
            return results

        return backward

    def _call(
        self, tensors: tuple[Any, ...], options: tuple[Any, ...], out: Tensor, lse: Tensor
    ) -> AttendCall:
        q, k, v, bias, q_scale, k_scale, extra_k, extra_v, key_bias, mask, seed = tensors
        _, scale, mask_value, edge_row, activation, dropout_p = options
        batch, heads = q.shape[0], q.shape[-2]
        return AttendCall(
            plan=None,  # type: ignore[arg-type]  # set per head group
            q=flat(q),
            k=flat(k),
            v=flat(v),
            bias=bias,
            q_scale=None if q_scale is None else q_scale.reshape(batch, -1, heads),
            k_scale=None if k_scale is None else k_scale.reshape(batch, -1, heads),
            extra_k=None if extra_k is None else flat(extra_k).expand(batch, -1, -1, -1),
            extra_v=None if extra_v is None else flat(extra_v).expand(batch, -1, -1, -1),
            key_bias=key_bias,
            mask=mask,
            seed=seed,
            scale=scale,
            mask_value=mask_value,
            edge_row=edge_row,
            activation=activation,
            dropout_p=dropout_p,
            head_offset=0,
            head_total=heads,
            out=out.view(batch, -1, heads, v.shape[-1]) if out.numel() else out,
            lse=lse.view(batch, -1, heads) if lse.numel() else lse,
            drop_by_token=self.drop_by_token,
        )

    def _grads(
        self,
        given: tuple[Any, ...],
        tensors: tuple[Any, ...],
        options: tuple[Any, ...],
        packed: bool,
        results: tuple[Tensor, ...],
    ) -> tuple[AttendCall, AttendGrads]:
        """The launch of a backward: what it reads, and where it writes."""
        dout, dlse, out, lse = given
        batch, extra_k, extra_v = tensors[0].shape[0], tensors[6], tensors[7]
        call = self._call(tensors, options, flat(out), lse.contiguous())
        dq, dk, dv = results[0].unbind(-3) if packed else results[:3]
        grads = AttendGrads(
            dout=flat(dout),
            dlse=None if dlse is None else dlse.contiguous().view(call.lse.shape),
            dq=flat(dq),
            dk=flat(dk),
            dv=flat(dv),
            dbias=None if tensors[3] is None else results[3],
            dextra_k=_per_sample(results[4], extra_k, batch),
            dextra_v=_per_sample(results[5], extra_v, batch),
        )
        return call, grads


def _sum_shared(grads: AttendGrads, results: tuple[Tensor, ...]) -> None:
    """Extra rows that the batch shares: the sum over the samples."""
    for result, per_sample in ((results[4], grads.dextra_k), (results[5], grads.dextra_v)):
        if per_sample is not None and per_sample is not result:
            torch.sum(per_sample, 0, keepdim=True, out=result)


def _per_sample(result: Tensor, tensor: Tensor | None, batch: int) -> Tensor | None:
    """Where the kernel writes an extra row's gradient: [B, E, H, D], even if the batch shares the row."""
    if tensor is None:
        return None
    return result if tensor.shape[0] == batch else result.new_empty(batch, *result.shape[1:])


def _run_backward(
    launch: Callable[[AttendCall, AttendGrads], None],
    call: AttendCall,
    grads: AttendGrads,
    groups: Sequence[tuple[int, int, Plan]],
) -> None:
    for first, last, plan in groups:
        if len(groups) == 1:
            call.plan, part, wanted = plan, call, grads
        else:
            part, wanted = slice_call(call, plan, first, last), slice_grads(grads, first, last)
        if plan.overlap:
            _backward_of_copies(launch, part, wanted)
        else:
            launch(part, wanted)


def _backward_of_copies(
    launch: Callable[[AttendCall, AttendGrads], None], call: AttendCall, grads: AttendGrads
) -> None:
    copied = with_copied_keys(call)
    dk, dv = torch.empty_like(copied.k), torch.empty_like(copied.v)
    launch(copied, replace(grads, dk=dk, dv=dv))
    sum_copies(dk, call.plan, grads.dk)
    sum_copies(dv, call.plan, grads.dv)


def _finish(grads: list[Tensor | None], tensors: tuple[Any, ...], packed: bool) -> list[Tensor | None]:
    """Gradients of all tensors. Scores are scale * q_scale * k_scale * (q . k), so q_scale gets (q . dq) /
    q_scale."""
    bias, q_scale, extra_k, extra_v = tensors[3], tensors[4], tensors[6], tensors[7]
    dq, dk, dv, dbias, dextra_k, dextra_v = grads
    dq_scale = dk_scale = None
    if q_scale is not None:
        parts = (dq.unbind(-3) if dq is not None else ()) if packed else (dq, dk)
        dq_scale, dk_scale = _scale_grads(parts, tensors)

    def cast(grad: Tensor | None, like: Tensor | None) -> Tensor | None:
        return None if grad is None or like is None else grad.to(like.dtype)

    small = [cast(dbias, bias), dq_scale, dk_scale, cast(dextra_k, extra_k), cast(dextra_v, extra_v)]
    return [dq, dk, dv, *small, None, None, None]


def _scale_grads(grads: Any, tensors: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    q, k, _, _, q_scale, k_scale, *_ = tensors
    acc = q_scale.dtype
    return (q * grads[0].to(acc)).sum(-1) / q_scale, (k * grads[1].to(acc)).sum(-1) / k_scale
