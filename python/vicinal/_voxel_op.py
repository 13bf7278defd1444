"""The ops vicinal::voxel_fwd and voxel_bwd: tables of a SegmentPlan, one launch per head group."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import _backends, _launch
from ._attend import AttendCall, AttendGrads, accumulator, flat, slice_call, slice_grads
from ._family import Family, autograd_function, define, empty_gradient
from ._voxel_plan import Group, SegmentPlan, kernel_plan

TENSORS = ("q", "k", "v", "key_bias?", "axes", "rows", "copy_rows", "copies", "coords?", "rel?")
OPTIONS = ("float scale", "int[] groups", "bool fill_q", "bool fill_k")
GROUP = len(Group._fields)

RELATIVE, CONTEXT, BOTH = "RelTable", "ContextTable", "ContextTable beside RelTable"


def arguments(plan: SegmentPlan, heads: int) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    """The op's tensors and options that describe a plan."""
    groups = [value for g in plan.groups for value in g._replace(heads=g.heads or heads)]
    return (plan.axes, plan.rows, plan.copy_rows, plan.copies), (groups, plan.fill_q, plan.fill_k)


def _fake_forward(tensors: tuple[Any, ...], options: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    q, v = tensors[0], tensors[2]
    return q.new_empty((*q.shape[:2], v.shape[-1])), q.new_empty(q.shape[:2], dtype=accumulator(q.dtype))


def _fake_backward(
    outputs: tuple[Any, ...], tensors: tuple[Any, ...], options: tuple[Any, ...], packed: bool
) -> tuple[Tensor, ...]:
    q, k, v, rel = *tensors[:3], tensors[-1]
    drel = empty_gradient(q) if rel is None else torch.empty_like(rel)
    if packed:
        whole = torch.empty((q.shape[0], 3, *q.shape[1:]), dtype=q.dtype, device=q.device)
        return whole, q.new_empty(0), q.new_empty(0), drel
    return (*(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v)), drel)


VOXEL = Family(
    name="voxel",
    tensors=TENSORS,
    options=OPTIONS,
    outputs=("out", "lse"),
    gradients=("q", "k", "v", "rel"),
    fake_fwd=_fake_forward,
    fake_bwd=_fake_backward,
)


class Part:
    """One head group of a launch: its heads, rows and copies."""

    def __init__(self, index: int, group: Group, first: int, row: int, copy_row: int, copy: int) -> None:
        self.index = index
        self.group, self.first, self.last = group, first, first + group.heads
        self.rows = slice(row, row + group.rows)
        self.owners = slice(row, row + group.owners)
        self.copy_rows = slice(copy_row, copy_row + group.rows - group.owners)
        self.copies = slice(copy, copy + group.copies)


def parts(groups: Sequence[int]) -> Iterator[Part]:
    first = row = copy_row = copy = 0
    for at in range(0, len(groups), GROUP):
        group = Group(*groups[at : at + GROUP])
        part = Part(at // GROUP, group, first, row, copy_row, copy)
        first, row, copy_row, copy = part.last, part.rows.stop, part.copy_rows.stop, part.copies.stop
        yield part


def _call(tensors: tuple[Any, ...], scale: float, out: Tensor, lse: Tensor) -> AttendCall:
    q, k, v, key_bias = tensors[:4]
    coords, rel = tensors[-2:]
    return AttendCall(
        plan=None,  # type: ignore[arg-type]  # set per head group
        q=flat(q[None]),
        k=flat(k[None]),
        v=flat(v[None]),
        bias=None,
        q_scale=None,
        k_scale=None,
        extra_k=None,
        extra_v=None,
        key_bias=None if key_bias is None else key_bias[None],
        mask=None,
        seed=None,
        scale=scale,
        mask_value=0.0,
        edge_row=0,
        activation="softmax",
        dropout_p=0.0,
        head_offset=0,
        head_total=q.shape[1],
        out=out[None],
        lse=lse[None],
        q_coords=coords,
        k_coords=coords,
        rel=rel,
    )


def _forward(launchers: _launch.Launchers) -> Callable[..., tuple[Tensor, Tensor]]:
    launch = launchers.forward
    assert launch is not None

    def voxel_fwd(*args: Any) -> tuple[Tensor, Tensor]:
        tensors, (scale, groups, fill_q, _) = args[: len(TENSORS)], args[len(TENSORS) :]
        out, lse = _fake_forward(tensors, ())
        if fill_q:
            out.zero_()
            lse.fill_(-torch.inf)
        axes, rows = tensors[4:6]
        if lse.numel() == 0 or len(rows) == 0:
            return out, lse
        call = _call(tensors, scale, out, lse)
        for part in parts(groups):
            plan = kernel_plan(axes, rows[part.rows], part.group, len(tensors[1]))
            launch(slice_call(call, plan, part.first, part.last))
        return out, lse

    return voxel_fwd


def _backward(launchers: _launch.Launchers) -> Callable[..., tuple[Tensor, ...]]:
    launch = launchers.backward
    assert launch is not None

    def voxel_bwd(*args: Any) -> tuple[Tensor, ...]:
        dout, dlse, out, lse = args[:4]
        tensors, packed = args[4 : 4 + len(TENSORS)], args[-1]
        scale, groups, fill_q, fill_k = args[4 + len(TENSORS) : -1]
        results = _fake_backward((), tensors, (), packed)
        drel = results[3] if tensors[-1] is not None else None
        dq, dk, dv = results[0].unbind(1) if packed else results[:3]
        if fill_q or lse.numel() == 0:
            dq.zero_()
        if fill_k or lse.numel() == 0:
            dk.zero_()
            dv.zero_()
        if drel is not None:
            drel.zero_()
        axes, rows, copy_rows, copies = tensors[4:8]
        if lse.numel() == 0 or len(rows) == 0:
            return results
        call = _call(tensors, scale, flat(out[None])[0], lse.contiguous())
        grads = AttendGrads(
            dout=flat(dout[None]),
            dlse=None if dlse is None else dlse.contiguous()[None],
            dq=dq[None],
            dk=dk[None],
            dv=dv[None],
            dbias=None,
            dextra_k=None,
            dextra_v=None,
            drel=drel,
        )
        for part in parts(groups):
            part_call = slice_call(call, None, part.first, part.last)  # type: ignore[arg-type]
            part_grads = slice_grads(grads, part.first, part.last)
            if part.group.owners:
                part_call.plan = kernel_plan(axes, rows[part.owners], part.group, len(dk))
                _add_to_table(launch, part_call, part_grads)
            if part.group.copies:
                plan = kernel_plan(axes, copy_rows[part.copy_rows], part.group, part.group.copies)
                _backward_of_copies(launch, part_call, part_grads, plan, copies[part.copies].long())
        return results

    return voxel_bwd


def _add_to_table(
    launch: Callable[[AttendCall, AttendGrads], None], call: AttendCall, grads: AttendGrads
) -> None:
    """A launch whose gradient of the table, which it overwrites, comes on top of what is there."""
    if grads.drel is None:
        launch(call, grads)
        return
    found = torch.empty_like(grads.drel)
    launch(call, replace(grads, drel=found))
    grads.drel += found


def _backward_of_copies(
    launch: Callable[[AttendCall, AttendGrads], None],
    call: AttendCall,
    grads: AttendGrads,
    plan: Any,
    copies: Tensor,
) -> None:
    """Rows that work on copies of keys; their gradients are added to those of the keys, copy after copy."""
    taken = {name: getattr(call, name).index_select(1, copies) for name in ("k", "v")}
    if call.k_coords is not None:
        taken["k_coords"] = call.k_coords.index_select(0, copies)
    bias = None if call.key_bias is None else call.key_bias.index_select(1, copies)
    copied = replace(call, plan=plan, key_bias=bias, **taken)
    dk, dv = torch.empty_like(copied.k), torch.empty_like(copied.v)
    _add_to_table(launch, copied, replace(grads, dk=dk, dv=dv))
    for total, copy in ((grads.dk, dk), (grads.dv, dv)):
        add_copies(total[0], copy[0], copies)


def add_copies(total: Tensor, copies: Tensor, rows: Tensor) -> None:
    """total[rows[i]] += copies[i], in the order of i for every row, in the accumulation type."""
    acc = accumulator(total.dtype)
    touched, inverse = torch.unique(rows, return_inverse=True)
    sums = total.index_select(0, touched).to(acc)
    if total.device.type == "cpu":
        sums.index_add_(0, inverse, copies.to(acc))
    else:  # sorts, where index_add_ would use atomics
        sums.index_put_((inverse,), copies.to(acc), accumulate=True)
    total.index_copy_(0, touched, sums.to(total.dtype))


for _row in _launch.ROWS:
    _capability = _row.capability("voxel")
    if _row.forward is not None and _row.backward is not None:
        define(VOXEL, _row.backend, _forward(_row), _backward(_row))
        lacks = {BOTH} if _row.backend == "cpu" else {RELATIVE, BOTH}
        _capability = replace(_capability, missing=_capability.missing | lacks)
    _backends.register(_capability)


def _finish(grads: list[Tensor | None], tensors: tuple[Any, ...], packed: bool) -> list[Tensor | None]:
    return [*grads[:3], *[None] * (len(TENSORS) - 4), grads[3]]


voxel_op = autograd_function(VOXEL, _finish)
