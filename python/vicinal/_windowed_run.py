"""From a windowed call to a backend: cast, check, choose, bring the options to the kernels' form, run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from . import _attend_run as shared
from . import _check as checks
from . import _choice, reference
from . import _windowed_check as check
from ._attend import accumulator, flat
from ._windowed_context import LOG_100, HeadGroup, channels, norm, of_heads, without_rel_pos
from ._windowed_op import WINDOWED, Geometry, Group
from ._windowed_types import RelativeBias, Size, Windows, per_axis


def geometry_of(windows: Windows, rank: int) -> Geometry:
    return _geometry(windows, rank, "none")[0]


def _geometry(windows: Windows, rank: int, bias: str) -> tuple[Geometry, str]:
    """The ops' geometry of these windows on a grid of this rank, and its text."""
    if torch.compiler.is_compiling():  # traces through caches, and warns of it
        return _make_geometry(windows, rank, bias)
    return _cached_geometry(windows, rank, bias)


def _make_geometry(windows: Windows, rank: int, bias: str) -> tuple[Geometry, str]:
    if windows.head_groups is not None:
        groups = tuple(
            Group(n, per_axis(size, rank), per_axis(s, rank)) for n, size, s in windows.head_groups
        )
    else:
        assert windows.size is not None
        groups = (Group(0, per_axis(windows.size, rank), per_axis(windows.shift, rank)),)
    kv = () if windows.kv_size is None else per_axis(windows.kv_size, rank)
    q = () if windows.q_size is None else per_axis(windows.q_size, rank)
    geometry = Geometry(windows.partition, windows.pad_order, windows.pad_side, bias, kv, q, groups)
    return geometry, geometry.encode()


_cached_geometry = lru_cache(maxsize=1024)(_make_geometry)
_cached_windows: Callable[[Size], Windows] = lru_cache(maxsize=1024)(Windows)


def as_windows(windows: Windows | Size) -> Windows:
    if isinstance(windows, Windows):
        return windows
    return Windows(windows) if torch.compiler.is_compiling() else _cached_windows(windows)


@dataclass(slots=True)
class Call:
    """Checked arguments."""

    q: Tensor
    k: Tensor
    v: Tensor
    windows: Windows
    bias: Tensor | RelativeBias | None
    scale: float | None
    logit_scale: Tensor | None
    edge_k: Tensor | None
    edge_v: Tensor | None
    extra_k: Tensor | None
    extra_v: Tensor | None
    extra_bias: Tensor | None
    key_padding_mask: Tensor | None
    attn_mask: Tensor | None
    activation: str
    dropout_p: float
    rel_pos: tuple[Tensor, ...] | None = None


def prepare(q: Tensor, k: Tensor, v: Tensor, windows: Windows | Size, *options: Any, **named: Any) -> Call:
    """Cast under autocast, check, and name the arguments."""
    checks.tokens(q=q, k=k, v=v)
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    call = Call(q, k, v, as_windows(check.check_window_type(windows, Windows)), *options, **named)
    if isinstance(call.bias, Tensor) and call.bias.dim() == 2:
        call.bias = RelativeBias(call.bias)
    check.check_call(call, RelativeBias)
    return call


def problem_key(call: Call) -> _choice.Key:
    features = [] if call.activation == "softmax" else [call.activation]
    if call.dropout_p > 0:
        features.append("dropout")
    more = 0 if call.rel_pos is None else channels(call.q.shape[-1], head_groups(call)[0][2])
    return _choice.problem_key("windowed", call.q, call.v, features, more)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qkv: Tensor | None,
    windows: Any,
    options: tuple[Any, ...],
    backend: Any,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """out and lse. qkv: the packed tensor whose views q, k and v are, or None. options: as Call has them.
    seed: of the dropout; drawn unless given."""
    key = _signature(q, k, v, windows, options, backend)
    known = _settled.get(key)
    if known is not None:
        return _settled.run(known, q, k, v, qkv, options[0])
    call = prepare(q, k, v, windows, *options)
    chosen = _choice.choose(problem_key(call), backend)
    if seed is None:
        seed = shared.draw_seed(call.dropout_p, call.q.device)
    if chosen == "reference":
        return run_reference(call, seed)
    if key is not None:
        kind = "none" if call.bias is None else "q-k" if isinstance(call.bias, RelativeBias) else "dense"
        _, text = _geometry(call.windows, call.q.dim() - 3, kind)
        _settled.put(key, shared.Settled(chosen, text, _scales(call)[0], call.windows.mask_value))
    return _run_op(call, chosen, qkv, seed)


def _settled_table(bias: Tensor, q: Tensor) -> Tensor:
    return bias.t() if bias.dim() == 2 else bias.flatten(-2).reshape(q.shape[-2], -1)


_settled = shared.CallMemory(WINDOWED.apply, _settled_table)


def _signature(q: Any, k: Any, v: Any, windows: Any, options: tuple[Any, ...], backend: Any) -> Any:
    """What decides the checks and the choice of a call with no tensors but q, k, v and a bias; else None."""
    bias, scale, a, b, c, d, e, f, g, h, activation, dropout_p, i = options
    if not (a is b is c is d is e is f is g is h is i is None and activation == "softmax" and dropout_p == 0):
        return None
    if type(dropout_p) not in (float, int) or type(windows) not in (Windows, int):
        return None
    if isinstance(windows, Windows) and windows.edge != "mask":  # pads read an edge row
        return None
    return _settled.key(q, k, v, bias, windows, scale, backend)


def _run_op(call: Call, backend: str, qkv: Tensor | None, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    if call.rel_pos is not None:
        call, qkv = without_rel_pos(call, head_groups(call)), None
    acc = accumulator(call.q.dtype)
    kind, table = _table(call, acc)
    _, text = _geometry(call.windows, call.q.dim() - 3, kind)
    scale, q_scale, k_scale = _scales(call)
    edge_row, extra_k, extra_v = _extras(call)
    mask = call.attn_mask
    if mask is not None:
        mask = (mask if mask.dim() == 4 else mask[:, None]).to(acc).contiguous()
    mask_value = call.windows.mask_value if call.activation == "softmax" else -torch.inf
    first = (call.q, call.k, call.v) if qkv is None else (qkv, None, None)
    key_bias = shared.key_bias(call.key_padding_mask, acc)
    tensors = (*first, table, q_scale, k_scale, extra_k, extra_v, key_bias, mask, seed)
    options = (text, scale, mask_value, edge_row, call.activation, call.dropout_p)
    out, lse = WINDOWED.apply(backend, qkv is not None, options, *tensors)
    return out, lse


def _table(call: Call, acc: torch.dtype) -> tuple[str, Tensor | None]:
    """What the codes of the plan index, and the table [h, T (+ M extra keys)] in the accumulation type."""
    bias, heads = call.bias, call.q.shape[-2]
    kind, table = "none", None
    if isinstance(bias, RelativeBias):
        kind, table = _relative_table(call, bias)
    elif bias is not None:
        kind, table = "dense", bias.flatten(-2).reshape(heads, -1)
    if call.extra_k is not None and (table is not None or call.extra_bias is not None):
        base = call.q.new_zeros(heads, 1, dtype=acc) if table is None else table.to(acc)
        extra = call.extra_bias
        extra = base.new_zeros(heads, call.extra_k.shape[1]) if extra is None else extra.to(acc)
        table = torch.cat([base, extra], 1)
    return kind, None if table is None else table.to(acc).contiguous()


def _relative_table(call: Call, bias: RelativeBias) -> tuple[str, Tensor]:
    """Signed tables of the window in use go to the kernel; every other form is gathered here,
    differentiably."""
    q_window, k_window = bias_windows(call)
    if isinstance(bias.index, Tensor) or (bias.window is not None and bias.window != q_window):
        return "dense", bias.dense(q_window, k_window).flatten(1)
    if bias.index != "abs":
        return bias.index, bias.table.t()
    offsets = [torch.arange(1 - w, w, device=bias.table.device).abs() for w in q_window]
    index = torch.zeros(1, dtype=torch.long, device=bias.table.device)
    for w, offset in zip(q_window, offsets, strict=True):
        index = (index[:, None] * w + offset).flatten()
    return "q-k", bias.table[index].t()


def head_groups(call: Call) -> list[HeadGroup]:
    """The head groups of a call on its grid."""
    geometry, first, found = geometry_of(call.windows, call.q.dim() - 3), 0, []
    for group in geometry.groups:
        last = first + (group.heads or call.q.shape[-2])
        axes = geometry.axes(group, tuple(call.q.shape[1:-2]), tuple(call.k.shape[1:-2]))
        found.append((first, last, axes))
        first = last
    return found


def bias_windows(call: Call) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The query window and the key window that a bias table is made for (those of the first head group)."""
    axes = head_groups(call)[0][2]
    return tuple(a.q_window for a in axes), tuple(a.kv or a.window for a in axes)


def _scales(call: Call) -> tuple[float, Tensor | None, Tensor | None]:
    """The factor of q.k, and for cosine attention tau / |q| [B, *Sq, h] and 1 / |k| [B, *S, h]."""
    if call.logit_scale is None:
        return (call.q.shape[-1] ** -0.5 if call.scale is None else float(call.scale)), None, None
    acc = accumulator(call.q.dtype)
    tau = call.logit_scale.to(acc).flatten().clamp(max=LOG_100).exp()
    return 1.0, tau / norm(call.q, acc), 1.0 / norm(call.k, acc)


def _extras(call: Call) -> tuple[int, Tensor | None, Tensor | None]:
    """1 if pads read an edge row, and the extra rows [1 or B, E, h, d]: the edge row first, then the extra
    keys."""
    edge_row = int(call.windows.edge != "mask")
    extra_k = None if call.extra_k is None else call.extra_k.to(call.q.dtype)
    extra_v = None if call.extra_v is None else call.extra_v.to(call.q.dtype)
    if edge_row:
        extra_k = _with_edge(call.edge_k, extra_k, call.k)
        extra_v = _with_edge(call.edge_v, extra_v, call.v)
    if extra_k is not None and call.logit_scale is not None:
        acc = accumulator(call.q.dtype)
        extra_k = (extra_k.to(acc) / norm(extra_k, acc)[..., None]).to(call.q.dtype)
    return edge_row, extra_k, extra_v


def _with_edge(edge: Tensor | None, extra: Tensor | None, like: Tensor) -> Tensor:
    heads, dim = like.shape[-2:]
    row = like.new_zeros(1, 1, heads, dim) if edge is None else edge.to(like.dtype)[None, None]
    return row if extra is None else torch.cat([row.expand(extra.shape[0], -1, -1, -1), extra], 1)


def run_reference(
    call: Call, seed: Tensor | None, compute_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Plain PyTorch, one head group after the other. compute_dtype: instead of the accumulation type."""
    if torch.is_autocast_enabled(call.q.device.type):  # prepare cast what is to be cast
        with torch.autocast(call.q.device.type, enabled=False):
            return run_reference(call, seed, compute_dtype)
    q, k, v, windows = flat(call.q), flat(call.k), flat(call.v), call.windows
    bias = call.bias.dense(*bias_windows(call)) if isinstance(call.bias, RelativeBias) else call.bias
    outs, lses = [], []
    for first, last, axes in head_groups(call):

        def part(x: Tensor | None, dim: int, span: slice = slice(first, last)) -> Tensor | None:
            return None if x is None else x.narrow(dim, span.start, span.stop - span.start)

        mask = call.attn_mask
        out, lse = reference.windowed(
            q[:, :, first:last],
            k[:, :, first:last],
            v[:, :, first:last],
            axes,
            partition=windows.partition,
            pad_order=windows.pad_order,
            pad_side=windows.pad_side,
            edge=windows.edge,
            mask_value=windows.mask_value,
            scale=call.scale,
            bias=None if bias is None else part(bias.reshape(q.shape[2], *bias.shape[-2:]), 0),
            logit_scale=None if call.logit_scale is None else part(call.logit_scale.flatten(), 0),
            edge_k=part(call.edge_k, 0),
            edge_v=part(call.edge_v, 0),
            extra_k=part(call.extra_k, 2),
            extra_v=part(call.extra_v, 2),
            extra_bias=part(call.extra_bias, 0),
            key_bias=shared.key_bias(call.key_padding_mask, accumulator(q.dtype)),
            attn_mask=mask if mask is None or mask.dim() == 3 or mask.shape[1] == 1 else part(mask, 1),
            activation=call.activation,
            dropout_p=call.dropout_p,
            seed=seed,
            head_offset=first,
            head_total=q.shape[2],
            compute_dtype=compute_dtype,
            rel_pos=None if call.rel_pos is None else tuple(of_heads(t, first, last) for t in call.rel_pos),
        )
        outs.append(out)
        lses.append(lse.to(accumulator(q.dtype)))
    out = outs[0] if len(outs) == 1 else torch.cat(outs, 2)
    lse = lses[0] if len(lses) == 1 else torch.cat(lses, 2)
    return out.view(*call.q.shape[:-1], v.shape[-1]), lse.view(call.q.shape[:-1])
