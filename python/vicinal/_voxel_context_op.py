"""The ops vicinal::voxel_context_fwd and voxel_context_bwd: segment attention with a ContextTable on CPUs
(csrc/context.h). Other backends take the terms as channels (`_voxel_context.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._attend import accumulator, flat
from ._backends import _C
from ._family import Family, autograd_function, define
from ._launch import DTYPE_CODES, plan_arguments, pointer, row_arguments
from ._voxel_op import OPTIONS, Part, add_copies, parts
from ._voxel_plan import kernel_plan
from .plan import Plan

WIDTH = 16  # rows of tables have a multiple of so many elements (kContextWidth)
TENSORS = ("q", "k", "v", "key_bias?", "axes", "rows", "copy_rows", "copies", "cells", "tables")


def padded_width(dim: int) -> int:
    return -(-dim // WIDTH) * WIDTH


def _fake_forward(tensors: tuple[Any, ...], options: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    q, v = tensors[0], tensors[2]
    return q.new_empty((*q.shape[:2], v.shape[-1])), q.new_empty(q.shape[:2], dtype=accumulator(q.dtype))


def _fake_backward(
    outputs: tuple[Any, ...], tensors: tuple[Any, ...], options: tuple[Any, ...], packed: bool
) -> tuple[Tensor, ...]:
    wanted = (*tensors[:3], tensors[-1])
    return tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in wanted)


CONTEXT = Family(
    name="voxel_context",
    tensors=TENSORS,
    options=OPTIONS,
    outputs=("out", "lse"),
    gradients=("q", "k", "v", "tables"),
    fake_fwd=_fake_forward,
    fake_bwd=_fake_backward,
    reads=("lse",),
)


def _heads(x: Tensor, part: Part) -> Tensor:
    return x[:, part.first : part.last]


def _arguments(
    tensors: tuple[Any, ...], part: Part, plan: Plan, scale: float, copies: Tensor | None = None
) -> tuple[tuple[int | float, ...], list[Tensor]]:
    """struct Context of csrc/context.h, flat, for some heads, and the tensors that it points to. copies: the
    key rows that the plan's keys are copies of."""
    q, k, v, key_bias, cells, tables = (*tensors[:4], *tensors[-2:])
    q, k, v = (_heads(x, part) for x in (q, k, v))
    q_cells = k_cells = cells[min(part.index, len(cells) - 1)]
    if copies is not None:
        k, v, k_cells = (x.index_select(0, copies) for x in (k, v, k_cells))
        key_bias = None if key_bias is None else key_bias.index_select(0, copies)
    q, k, v = (flat(x[None]) for x in (q, k, v))
    tables = tables[part.first : part.last]
    (heads, dim), dim_v = q.shape[2:], v.shape[3]
    fields = (
        *(DTYPE_CODES[q.dtype], heads, dim, dim_v, q.shape[1], k.shape[1]),
        *(*row_arguments(q), *row_arguments(k), *row_arguments(v), *plan_arguments(plan)),
        *(scale, pointer(key_bias), q_cells.data_ptr(), k_cells.data_ptr()),
        *(tables.shape[2], padded_width(dim), padded_width(dim_v), tables.data_ptr()),
    )
    kept = [q, k, v, q_cells, k_cells, tables, plan.axes, plan.rows]
    return fields, kept if key_bias is None else [*kept, key_bias]


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    tensors, (scale, groups, fill_q, _) = args[: len(TENSORS)], args[len(TENSORS) :]
    out, lse = _fake_forward(tensors, ())
    if fill_q:
        out.zero_()
        lse.fill_(-torch.inf)
    axes, rows = tensors[4:6]
    if lse.numel() == 0 or len(rows) == 0:
        return out, lse
    for part in parts(groups):
        plan = kernel_plan(axes, rows[part.rows], part.group, len(tensors[1]))
        fields, kept = _arguments(tensors, part, plan, scale)
        written = (*row_arguments(_heads(out, part)[None]), lse[:, part.first :].data_ptr(), lse.shape[1])
        _C.context_fwd((*fields, *written, torch.get_num_threads()))
        del kept
    return out, lse


def _backward(*args: Any) -> tuple[Tensor, ...]:
    dout, dlse, lse = args[:3]
    tensors, (scale, groups, fill_q, fill_k) = args[3 : 3 + len(TENSORS)], args[3 + len(TENSORS) : -1]
    dq, dk, dv, dtables = results = _fake_backward((), tensors, (), False)
    axes, rows, copy_rows, copies = tensors[4:8]
    nothing = lse.numel() == 0 or len(rows) == 0
    if fill_q or nothing:
        dq.zero_()
    if fill_k or nothing:
        dk.zero_()
        dv.zero_()
    dtables.zero_()
    if nothing:
        return results
    dout, lse = flat(dout[None])[0], lse.contiguous()
    dlse = None if dlse is None else dlse.contiguous()

    def launch(part: Part, plan: Plan, copied: Tensor | None, to_k: Tensor, to_v: Tensor) -> None:
        fields, kept = _arguments(tensors, part, plan, scale, copied)
        sums = torch.empty_like(dtables[part.first : part.last])
        given = (lse[:, part.first :].data_ptr(), 0 if dlse is None else dlse[:, part.first :].data_ptr())
        written = (row_arguments(x[None]) for x in (_heads(dq, part), to_k, to_v))
        _C.context_bwd(
            (
                *(*fields, *row_arguments(_heads(dout, part)[None]), *given, lse.shape[1]),
                *(value for x in written for value in x),
                *(sums.data_ptr(), torch.get_num_threads()),
            )
        )
        dtables[part.first : part.last] += sums
        del kept

    for part in parts(groups):
        own_k, own_v = _heads(dk, part), _heads(dv, part)
        if part.group.owners:
            plan = kernel_plan(axes, rows[part.owners], part.group, len(dk))
            launch(part, plan, None, own_k, own_v)
        if part.group.copies:
            copied = copies[part.copies].long()
            plan = kernel_plan(axes, copy_rows[part.copy_rows], part.group, part.group.copies)
            to_k, to_v = (x.new_empty(len(copied), *x.shape[1:]) for x in (own_k, own_v))
            launch(part, plan, copied, to_k, to_v)
            add_copies(own_k, to_k, copied)
            add_copies(own_v, to_v, copied)
    return results


define(CONTEXT, "cpu", _forward, _backward)


def _finish(grads: list[Tensor | None], tensors: tuple[Any, ...], packed: bool) -> list[Tensor | None]:
    return [*grads[:3], *[None] * (len(TENSORS) - 4), grads[3]]


voxel_context_op = autograd_function(CONTEXT, _finish)
