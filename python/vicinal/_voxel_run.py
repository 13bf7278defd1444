"""From a call of segment attention to a backend: cast, check, choose, bring terms to the kernels' form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _check as checks
from . import _choice
from . import reference_voxel as reference
from ._attend import accumulator
from ._segments_type import SegmentGroups, Segments
from ._voxel_context import Channels, head_channels, packed_cells, packed_tables
from ._voxel_context_op import voxel_context_op
from ._voxel_op import BOTH, CONTEXT, RELATIVE, arguments, voxel_op
from ._voxel_plan import plan_of
from ._voxel_types import Bias, ContextTable, KeyBias, RelTable, Rope3D


@dataclass(slots=True)
class Call:
    """Checked arguments; q and k are not rotated yet."""

    q: Tensor
    k: Tensor
    v: Tensor
    segments: Segments | SegmentGroups
    terms: tuple[Bias, ...]
    scale: float

    def term(self, kind: type) -> Any:
        return next((t for t in self.terms if isinstance(t, kind)), None)


def prepare(
    q: Tensor, k: Tensor, v: Tensor, segments: Any, bias: Any = None, scale: float | None = None
) -> Call:
    """Cast under autocast, check, and name the arguments."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        checks.tensor(name, x)
        if x.dim() != 3:
            raise ValueError(f"{name} has shape {list(x.shape)}; it must be [N, heads, head_dim]")
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    checks.like_q(q, k=k, v=v)
    checks.shape("k", k, (k.shape[0], *q.shape[1:]), "[Nk, heads, D]")
    checks.shape("v", v, (*k.shape[:2], v.shape[-1]), "[Nk, heads, Dv]")
    checks.head_dims(q, v)
    checks.finite_or_none("scale", scale)
    _check_segments(q, k, segments)
    terms = () if bias is None else bias if isinstance(bias, tuple) else (bias,)
    call = Call(q, k, v, segments, terms, q.shape[-1] ** -0.5 if scale is None else float(scale))
    _check_terms(call)
    return call


def _check_segments(q: Tensor, k: Tensor, segments: Any) -> None:
    if not isinstance(segments, (Segments, SegmentGroups)):
        raise TypeError(f"segments is a {type(segments).__name__}; it must be Segments or SegmentGroups")
    first = segments.groups[0][0] if isinstance(segments, SegmentGroups) else segments
    for name, x, rows in (("q", q, first.n_q), ("k", k, first.n_k)):
        if x.shape[0] != rows:
            raise ValueError(f"{name} has {x.shape[0]} rows; segments was built for {rows}")
    if first.device != q.device:
        raise ValueError(f"segments is on {first.device}; it must be on {q.device} as q")
    if isinstance(segments, SegmentGroups) and segments.heads != q.shape[1]:
        raise ValueError(f"segments has {segments.heads} heads; q has {q.shape[1]}")


def _check_terms(call: Call) -> None:
    heads, dim = call.q.shape[1:]
    kinds = [type(t) for t in call.terms]
    for kind in kinds:
        if kind not in (RelTable, ContextTable, KeyBias, Rope3D):
            raise TypeError(
                f"bias has a {kind.__name__}; it must be RelTable, ContextTable, KeyBias, Rope3D or a tuple"
            )
    if len(set(kinds)) != len(kinds):
        raise ValueError("bias has two objects of one kind; each may be there once")
    rows = call.q.shape[0]
    for term in call.terms:
        name = type(term).__name__
        if isinstance(term, KeyBias):
            if tuple(term.b.shape) not in ((call.k.shape[0],), (call.k.shape[0], heads)):
                raise ValueError(
                    f"KeyBias has b of shape {list(term.b.shape)}; it must be [{call.k.shape[0]}] or "
                    f"[{call.k.shape[0]}, {heads}]"
                )
            checks.on_device_of_q("KeyBias.b", term.b, call.q)
            continue
        coords = term.coords if not isinstance(term, ContextTable) else _first_cells(call, term)
        checks.on_device_of_q(f"{name}.coords", coords, call.q)
        if coords.shape[0] != rows or call.k.shape[0] != rows:
            raise ValueError(
                f"{name} has {coords.shape[0]} coordinates; q has {rows} rows and k {call.k.shape[0]}, all "
                "of which must be the same voxels"
            )
        if isinstance(term, RelTable) and term.table.shape[2] != heads:
            raise ValueError(f"RelTable has a table of {term.table.shape[2]} heads; q has {heads}")
        if isinstance(term, ContextTable):
            for table, width in (("q_table", dim), ("k_table", dim), ("v_table", call.v.shape[2])):
                t = getattr(term, table)
                shape = (term.q_table.shape[0], coords.shape[1], heads, width)
                checks.shape(f"ContextTable.{table}", t, shape, "[L, A, heads, head_dim]")
        if isinstance(term, Rope3D) and (dim % 6 or term.angles.shape[-1] * 6 != dim):
            raise ValueError(
                f"Rope3D has angles of shape {list(term.angles.shape)}; heads of {dim} need a D that 6 "
                f"divides, and D / 6 = {dim / 6:g} angles"
            )


def _first_cells(call: Call, term: ContextTable) -> Tensor:
    """The cells of the first head group, all of which are alike."""
    if not isinstance(term.cells, tuple):
        return term.cells
    groups = len(call.segments.groups) if isinstance(call.segments, SegmentGroups) else 1
    if len(term.cells) != groups:
        raise ValueError(f"ContextTable has {len(term.cells)} tensors of cells; segments has {groups} groups")
    return term.cells[0]


def problem_key(call: Call) -> _choice.Key:
    features = [name for name, kind in ((RELATIVE, RelTable), (CONTEXT, ContextTable)) if call.term(kind)]
    if len(features) == 2:
        features.append(BOTH)
    context = call.term(ContextTable)
    more = (0, 0) if context is None else head_channels(context)
    return _choice.problem_key("voxel", call.q, call.v, tuple(features), *more)


def run(
    q: Tensor, k: Tensor, v: Tensor, segments: Any, bias: Any, scale: Any, backend: str | None
) -> tuple[Tensor, Tensor]:
    """out and lse."""
    call = prepare(q, k, v, segments, bias, scale)
    chosen = _choice.choose(problem_key(call), backend)
    return run_reference(call) if chosen == "reference" else _run_op(call, chosen)


def _rotated(call: Call) -> tuple[Tensor, Tensor]:
    rope = call.term(Rope3D)
    return (call.q, call.k) if rope is None else (rope.rotate(call.q), rope.rotate(call.k))


def _run_op(call: Call, backend: str) -> tuple[Tensor, Tensor]:
    q, k = _rotated(call)
    v, scale, context = call.v, call.scale, call.term(ContextTable)
    channels = None
    if context is not None and backend != "cpu":
        channels = Channels(context, _head_groups(call))
        if scale == 0:
            q, scale = q * 0, 1.0
        q, k, v = channels.longer(q, k, v, scale)
    term, key_bias = call.term(KeyBias), None
    if term is not None:
        if term.b.dim() == 1 and not term.b.requires_grad:
            key_bias = term.b.to(accumulator(q.dtype)).contiguous()
        else:
            q, k = with_bias_channels(q, k, term.b, scale)
    tables, options = arguments(plan_of(call.segments), q.shape[1])
    if context is not None and channels is None:
        terms = (packed_cells(context), packed_tables(context, q.shape[-1], q.dtype))
        out, lse = voxel_context_op(backend, False, (scale, *options), q, k, v, key_bias, *tables, *terms)
        return out, lse
    relative = _packed_relative(call.term(RelTable), accumulator(q.dtype))
    out, lse = voxel_op(backend, False, (scale, *options), q, k, v, key_bias, *tables, *relative)
    return (out if channels is None else channels.narrow(out, call.v.shape[-1])), lse


def _packed_relative(term: RelTable | None, acc: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """coords int32 [N, 3] and table [H, 3, 2 b + 1], with zeros for axes that are not there."""
    if term is None:
        return None, None
    missing = 3 - term.coords.shape[1]
    table = F.pad(term.table.to(acc).permute(2, 0, 1), (0, 0, 0, missing)).contiguous()
    return F.pad(term.coords.to(torch.int32), (0, missing)).contiguous(), table


def _head_groups(call: Call) -> list[tuple[int, int]]:
    """First head and last head + 1 of every group."""
    if not isinstance(call.segments, SegmentGroups):
        return [(0, call.q.shape[1])]
    found, first = [], 0
    for _, n in call.segments.groups:
        found.append((first, first + n))
        first += n
    return found


def with_bias_channels(q: Tensor, k: Tensor, b: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """q with channels of 1, k with channels of b / scale, so that their product adds b to the scores: a b per
    head, and the gradient of b, then need nothing of the kernels. 16-bit types take b in parts, whose sum has
    the precision of float32."""
    if scale == 0:
        raise ValueError("scale is 0; with a KeyBias that is trained or per head it must not be")
    acc = accumulator(q.dtype)
    parts, rest = [], b.to(acc) / scale
    for _ in range({torch.bfloat16: 3, torch.float16: 2}.get(q.dtype, 1)):
        part = rest.to(q.dtype)
        parts.append(part if part.dim() == 2 else part[:, None].expand(-1, k.shape[1]))
        rest = torch.where(part.isinf(), 0, rest - part.to(acc))
    ones = q.new_ones(*q.shape[:2], len(parts))
    return torch.cat([q, ones], -1), torch.cat([k, torch.stack(parts, -1)], -1)


def run_reference(call: Call, compute_dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Plain PyTorch, one head group after the other. compute_dtype: instead of the accumulation type."""
    if torch.is_autocast_enabled(call.q.device.type):  # prepare cast what is to be cast
        with torch.autocast(call.q.device.type, enabled=False):
            return run_reference(call, compute_dtype)
    q, k = _rotated(call)
    segments = call.segments
    parts = [s for s, _ in segments.groups] if isinstance(segments, SegmentGroups) else [segments]
    outs, lses = [], []
    for i, (s, (first, last)) in enumerate(zip(parts, _head_groups(call), strict=True)):
        part = (q[:, first:last], k[:, first:last], call.v[:, first:last])
        terms = _terms(call, i, first, last)
        out, lse = reference.segment_attention(*part, s, call.scale, terms, compute_dtype)
        outs.append(out)
        lses.append(lse)
    acc = accumulator(call.q.dtype)
    if len(outs) == 1:
        return outs[0], lses[0].to(acc)
    return torch.cat(outs, 1), torch.cat(lses, 1).to(acc)


def _terms(call: Call, group: int, first: int, last: int) -> reference.Terms:
    key, rel, context = call.term(KeyBias), call.term(RelTable), call.term(ContextTable)
    return reference.Terms(
        key_bias=None if key is None else (key.b[:, None] if key.b.dim() == 1 else key.b[:, first:last]),
        rel=None if rel is None else (rel.coords, rel.table[:, :, first:last]),
        context=None
        if context is None
        else (
            context.cells[group] if isinstance(context.cells, tuple) else context.cells,
            *(getattr(context, name)[:, :, first:last] for name in ("q_table", "k_table", "v_table")),
        ),
    )
