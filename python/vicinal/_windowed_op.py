"""The ops vicinal::windowed_fwd and windowed_bwd: geometry text -> plans -> launches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
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
from .plan import AxisWindows, Plan, window_plan


@dataclass(frozen=True)
class Group:
    """Consecutive heads that share a window: `heads` 0 means all. A window of -1 is the whole axis."""

    heads: int
    window: tuple[int, ...]
    shift: tuple[int, ...]


@dataclass(frozen=True)
class Geometry:
    """Everything that the ops need to know of a windowed problem besides the tensors' shapes."""

    partition: str
    pad_order: str
    pad_side: str
    bias: str  # "none", "q-k", "k-q" or "dense": what the table's index means
    kv: tuple[int, ...]
    q: tuple[int, ...]
    groups: tuple[Group, ...]

    def encode(self) -> str:
        groups = [f"{g.heads}:{_join(g.window)}:{_join(g.shift)}" for g in self.groups]
        fields = (self.partition, self.pad_order, self.pad_side, self.bias, _join(self.kv), _join(self.q))
        return " ".join([*fields, *groups])

    @staticmethod
    @lru_cache(maxsize=512)
    def decode(text: str) -> Geometry:
        partition, pad_order, pad_side, bias, kv, q, *groups = text.split(" ")
        parsed = [g.split(":") for g in groups]
        made = tuple(Group(int(n), _split(window), _split(shift)) for n, window, shift in parsed)
        return Geometry(partition, pad_order, pad_side, bias, _split(kv), _split(q), made)

    def axes(
        self, group: Group, q_space: tuple[int, ...], k_space: tuple[int, ...]
    ) -> tuple[AxisWindows, ...]:
        """The axes of one group on grids of these sizes."""
        result = []
        for a, (length, q_length) in enumerate(zip(k_space, q_space, strict=True)):
            window = length if group.window[a] == -1 else group.window[a]
            kv = self.kv[a] if self.kv else 0
            q_window = self.q[a] if self.q else window
            result.append(AxisWindows(length, window, group.shift[a], kv, q_length, q_window))
        return tuple(result)


def _join(values: tuple[int, ...]) -> str:
    return "x".join(map(str, values)) if values else "-"


def _split(text: str) -> tuple[int, ...]:
    return () if text == "-" else tuple(map(int, text.split("x")))


@lru_cache(maxsize=1024)
def plans(
    text: str, q_space: tuple[int, ...], k_space: tuple[int, ...], heads: int, device: torch.device
) -> tuple[tuple[int, int, Plan], ...]:
    """(first head, last head + 1, plan) of every head group."""
    geometry, first, result = Geometry.decode(text), 0, []
    for group in geometry.groups:
        last = first + (group.heads or heads)
        axes = geometry.axes(group, q_space, k_space)
        plan = window_plan(
            axes, geometry.bias, geometry.partition, geometry.pad_order, geometry.pad_side, device
        )
        result.append((first, last, plan))
        first = last
    return tuple(result)


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


def _fake_forward(tensors: tuple[Any, ...], options: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    q, v = tensors[0], tensors[2]
    rows = q.shape[:-1]
    return q.new_empty((*rows, v.shape[-1])), q.new_empty(rows, dtype=accumulator(q.dtype))


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


WINDOWED = Family(
    name="windowed",
    tensors=TENSORS,
    options=OPTIONS,
    outputs=("out", "lse"),
    gradients=("q", "k", "v", "bias", "extra_k", "extra_v"),
    fake_fwd=_fake_forward,
    fake_bwd=_fake_backward,
)


def _make_call(tensors: tuple[Any, ...], options: tuple[Any, ...], out: Tensor, lse: Tensor) -> AttendCall:
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
    )


def _for_each_group(tensors: tuple[Any, ...], geometry: str) -> tuple[tuple[int, int, Plan], ...]:
    q, k = tensors[0], tensors[1]
    return plans(geometry, tuple(q.shape[1:-2]), tuple(k.shape[1:-2]), q.shape[-2], q.device)


def _forward(launchers: _launch.Launchers) -> Callable[..., tuple[Tensor, Tensor]]:
    launch, repeat = launchers.forward, launchers.repeat
    repeats: dict[Any, Callable[..., None]] = {}  # by shapes and strides, for calls without optional tensors
    assert launch is not None

    def windowed_fwd(*args: Any) -> tuple[Tensor, Tensor]:
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
        call = _make_call(tensors, options, out, lse)
        groups = _for_each_group(tensors, options[0])
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

    return windowed_fwd


def _backward(launchers: _launch.Launchers) -> Callable[..., tuple[Tensor, ...]]:
    launch, repeat = launchers.backward, launchers.repeat_backward
    repeats: dict[Any, Callable[..., None]] = {}
    assert launch is not None

    def windowed_bwd(*args: Any) -> tuple[Tensor, ...]:
        dout, dlse, out, lse, q, k, v, bias = args[:8]
        tensors, options, packed = args[4:15], args[15:-1], args[-1]
        results = _fake_backward((out, lse), tensors, options, packed)
        key = None
        if repeat is not None and args[8:15] == _NO_TENSORS and dout.stride(-1) == 1:
            shapes = (q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(), dout.stride(), q.dtype)
            saved = (out.stride(), lse.stride(), dlse is None)
            key = (*shapes, *saved, None if bias is None else bias.shape, packed, options)
            again = repeats.get(key)
            if again is not None:
                dlse = None if dlse is None else dlse.contiguous()
                again((q, k, v, bias, out, lse, dout), dlse, results, packed)
                return results
        if lse.numel() == 0:
            return tuple(r.zero_() for r in results)
        call, grads = _make_grads(args[:4], tensors, options, packed, results)
        groups = _for_each_group(tensors, options[0])
        for first, last, plan in groups:
            _backward_group(launch, slice_call(call, plan, first, last), slice_grads(grads, first, last))
        _sum_shared(grads, results)
        pairs = ((q, call.q), (k, call.k), (v, call.v), (dout, grads.dout), (out, call.out), (lse, call.lse))
        if key is not None and all(x.data_ptr() == y.data_ptr() for x, y in pairs) and len(groups) == 1:
            call.plan = groups[0][2]
            if repeat is not None and not call.plan.overlap:
                if len(repeats) >= 1024:
                    repeats.clear()
                repeats[key] = repeat(call, grads)
        return results

    return windowed_bwd


def _make_grads(
    given: tuple[Any, ...],
    tensors: tuple[Any, ...],
    options: tuple[Any, ...],
    packed: bool,
    results: tuple[Tensor, ...],
) -> tuple[AttendCall, AttendGrads]:
    """The launch of a backward: what it reads, and where it writes."""
    dout, dlse, out, lse = given
    batch, extra_k, extra_v = tensors[0].shape[0], tensors[6], tensors[7]
    call = _make_call(tensors, options, flat(out), lse.contiguous())
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


def _backward_group(
    launch: Callable[[AttendCall, AttendGrads], None], call: AttendCall, grads: AttendGrads
) -> None:
    if not call.plan.overlap:
        launch(call, grads)
        return
    copied = with_copied_keys(call)
    dk, dv = torch.empty_like(copied.k), torch.empty_like(copied.v)
    total_k, total_v, grads.dk, grads.dv = grads.dk, grads.dv, dk, dv
    launch(copied, grads)
    sum_copies(dk, call.plan, total_k)
    sum_copies(dv, call.plan, total_v)


for _row in _launch.ROWS:
    _backends.register(_row.capability("windowed"))
    if _row.forward is not None and _row.backward is not None:
        define(WINDOWED, _row.backend, _forward(_row), _backward(_row))


def _finish(grads: list[Tensor | None], tensors: tuple[Any, ...], packed: bool) -> list[Tensor | None]:
    """Gradients of all tensors. Scores are scale * q_scale * k_scale * (q . k), so q_scale gets (q . dq) /
    q_scale."""
    bias, q_scale, extra_k, extra_v = tensors[3], tensors[4], tensors[6], tensors[7]
    dq, dk, dv, dbias, dextra_k, dextra_v = grads
    if packed:
        parts = dq.unbind(-3) if dq is not None else ()
        dq_scale, dk_scale = (None, None) if q_scale is None else _scale_grads(parts, tensors)
    else:
        dq_scale, dk_scale = (None, None) if q_scale is None else _scale_grads((dq, dk), tensors)

    def cast(grad: Tensor | None, like: Tensor | None) -> Tensor | None:
        return None if grad is None or like is None else grad.to(like.dtype)

    small = [cast(dbias, bias), dq_scale, dk_scale, cast(dextra_k, extra_k), cast(dextra_v, extra_v)]
    return [dq, dk, dv, *small, None, None, None]


def _scale_grads(grads: Any, tensors: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    q, k, _, _, q_scale, k_scale, *_ = tensors
    acc = q_scale.dtype
    return (q * grads[0].to(acc)).sum(-1) / q_scale, (k * grads[1].to(acc)).sum(-1) / k_scale


windowed_op = autograd_function(WINDOWED, _finish)
