"""Checks of windowed arguments: every message names the argument, what it is and what it may be."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .plan import MAX_TOKENS, AxisWindows

if TYPE_CHECKING:
    from ._windowed_run import Call
    from ._windowed_types import RelativeBias, Windows

PARTITIONS = ("block", "grid")
EDGES = ("mask", "zero", "const")
PAD_ORDERS = ("pad_roll", "roll_pad")
PAD_SIDES = ("end", "center")
ACTIVATIONS = ("softmax", "relu2", "relu", "none")
INDEXES = ("q-k", "k-q", "abs")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _sizes(name: str, value: Any, lowest: int, whole: bool) -> None:
    entries = value if isinstance(value, tuple) else (value,)
    accepted = f"an int >= {lowest}{' or -1 (the whole axis)' if whole else ''}, or a tuple of 1 to 3 of them"
    if not entries or len(entries) > 3 or not all(_is_int(e) for e in entries):
        raise TypeError(f"{name} is {value!r}; it must be {accepted}")
    if not all(e >= lowest or (whole and e == -1) for e in entries):
        raise ValueError(f"{name} is {value!r}; it must be {accepted}")


def _one_of(name: str, value: Any, accepted: tuple[str, ...]) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, accepted))}")
    if value not in accepted:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, accepted))}")


def check_windows(windows: Windows) -> None:
    """The fields of a Windows, without a grid."""
    _one_of("partition", windows.partition, PARTITIONS)
    _one_of("edge", windows.edge, EDGES)
    _one_of("pad_order", windows.pad_order, PAD_ORDERS)
    _one_of("pad_side", windows.pad_side, PAD_SIDES)
    if not isinstance(windows.mask_value, (int, float)) or isinstance(windows.mask_value, bool):
        raise TypeError(f"mask_value is {windows.mask_value!r}; it must be a float, at most 0")
    if not windows.mask_value <= 0:
        raise ValueError(f"mask_value is {windows.mask_value!r}; it must be at most 0")
    _check_groups(windows)
    for name in ("q_size", "kv_size"):
        if getattr(windows, name) is not None:
            _sizes(name, getattr(windows, name), 1, False)
    shifted = _shifted(windows)
    if shifted and windows.partition != "block":
        raise ValueError(f"shift is {windows.shift!r}; partition {windows.partition!r} takes only 0")
    if shifted and (windows.q_size is not None or windows.kv_size is not None):
        raise ValueError(f"shift is {windows.shift!r}; windows with q_size or kv_size take only 0")
    if windows.kv_size is not None and (windows.partition != "block" or windows.pad_side != "end"):
        raise ValueError("kv_size needs partition 'block' and pad_side 'end'")
    if windows.pad_order == "roll_pad" and windows.pad_side != "end":
        raise ValueError("pad_order 'roll_pad' needs pad_side 'end'")


def _shifted(windows: Windows) -> bool:
    shifts = (
        [windows.shift] if windows.head_groups is None else [g[2] for g in windows.head_groups if len(g) == 3]
    )
    return any(s != 0 for shift in shifts for s in (shift if isinstance(shift, tuple) else (shift,)))


def _check_groups(windows: Windows) -> None:
    if windows.head_groups is None:
        if windows.size is None:
            raise TypeError("size is None; it must be an int or a tuple, or head_groups be given")
        _sizes("size", windows.size, 1, True)
        _sizes("shift", windows.shift, 0, False)
        return
    if windows.size is not None or windows.shift != 0:
        raise ValueError("size and shift must be None and 0 where head_groups is given")
    groups = windows.head_groups
    if not isinstance(groups, tuple) or not groups:
        raise TypeError(
            f"head_groups is {groups!r}; it must be a tuple of (heads, size) or (heads, size, shift)"
        )
    for group in groups:
        if not isinstance(group, tuple) or len(group) not in (2, 3):
            raise TypeError(f"head_groups has {group!r}; an entry is (heads, size) or (heads, size, shift)")
        if not _is_int(group[0]):
            raise TypeError(f"head_groups has {group[0]!r} heads; it must be an int >= 1")
        if group[0] < 1:
            raise ValueError(f"head_groups has {group[0]!r} heads; it must be an int >= 1")
        _sizes("size in head_groups", group[1], 1, True)
        _sizes("shift in head_groups", group[2] if len(group) == 3 else 0, 0, False)


def check_relative_bias(bias: RelativeBias) -> None:
    _tensor("table", bias.table)
    if bias.table.dim() != 2 or not bias.table.is_floating_point():
        raise ValueError(
            f"table has shape {list(bias.table.shape)} and {bias.table.dtype}; it must be float [T, heads]"
        )
    if isinstance(bias.index, Tensor):
        if bias.index.dim() != 2 or bias.index.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"index has shape {list(bias.index.shape)} and {bias.index.dtype}; "
                "a tensor must be int64 or int32 [Nq, Nk]"
            )
        if bias.window is not None:
            raise ValueError("window must be None where index is a tensor")
    else:
        _one_of("index", bias.index, INDEXES)
    if bias.window is not None:
        _sizes("window", bias.window, 1, False)
        if not isinstance(bias.window, tuple):
            raise TypeError(f"window is {bias.window!r}; it must be a tuple with an int per axis")


def _tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; it must be a tensor")


def check_packed(qkv: Any) -> None:
    _tensor("qkv", qkv)
    if not 5 <= qkv.dim() <= 7:
        raise ValueError(f"qkv has shape {list(qkv.shape)}; it must be [B, *S, 3, h, d] with 1 to 3 axes S")
    if qkv.shape[-3] != 3:
        raise ValueError(f"qkv has shape {list(qkv.shape)}; the third dimension from the end must be 3")


def check_window_type(windows: Any, kind: type) -> Any:
    if isinstance(windows, (kind, tuple)) or _is_int(windows):
        return windows
    raise TypeError(f"windows is {windows!r}; it must be a Windows, an int or a tuple of ints")


def check_qkv_types(q: Any, k: Any, v: Any) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        _tensor(name, x)
        if not 4 <= x.dim() <= 6:
            raise ValueError(
                f"{name} has shape {list(x.shape)}; it must be [B, *S, heads, head_dim] with 1 to 3 axes S"
            )


def _shape(name: str, x: Tensor, expected: tuple[int, ...], meaning: str) -> None:
    if tuple(x.shape) != tuple(expected):
        raise ValueError(f"{name} has shape {list(x.shape)}; it must be {meaning} = {list(expected)}")


def _floating(name: str, x: Any) -> None:
    _tensor(name, x)
    if not x.is_floating_point():
        raise TypeError(f"{name} is {x.dtype}; it must be a float tensor")


def check_call(call: Call, relative: type) -> None:
    """All arguments of a call against each other."""
    _check_qkv(call)
    _check_options(call)
    axes = _check_grid(call)
    _check_extras(call)
    _check_masks(call, axes)
    if call.bias is not None:
        _check_bias(call, axes, relative)


def _check_qkv(call: Call) -> None:
    q, k, v = call.q, call.k, call.v
    if q.dtype not in DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise TypeError(f"q is {q.dtype}; it must be one of {names}")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise TypeError(f"{name} is {x.dtype}; it must be {q.dtype} as q")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}; it must be on {q.device} as q")
        if x.dim() != q.dim():
            raise ValueError(f"{name} has {x.dim()} dimensions; it must have {q.dim()} as q")
    space = q.shape[1:-2] if call.windows.q_size is None else k.shape[1:-2]
    _shape("k", k, (q.shape[0], *space, *q.shape[-2:]), "[B, *S, heads, dk]")
    _shape("v", v, (*k.shape[:-1], v.shape[-1]), "[B, *S, heads, dv]")
    if q.shape[-1] < 1 or v.shape[-1] < 1:
        raise ValueError(f"q and v have head dims {q.shape[-1]} and {v.shape[-1]}; they must be at least 1")


def _check_options(call: Call) -> None:
    _one_of("activation", call.activation, ACTIVATIONS)
    if not isinstance(call.dropout_p, (int, float)) or isinstance(call.dropout_p, bool):
        raise TypeError(f"dropout_p is {call.dropout_p!r}; it must be a float, 0 <= dropout_p < 1")
    if not 0 <= call.dropout_p < 1:
        raise ValueError(f"dropout_p is {call.dropout_p!r}; it must be 0 <= dropout_p < 1")
    if call.scale is not None:
        if not isinstance(call.scale, (int, float)) or isinstance(call.scale, bool):
            raise TypeError(f"scale is {call.scale!r}; it must be a finite float or None")
        if not -float("inf") < call.scale < float("inf"):
            raise ValueError(f"scale is {call.scale!r}; it must be a finite float or None")
    if call.logit_scale is not None:
        _floating("logit_scale", call.logit_scale)
        if call.scale is not None:
            raise ValueError(f"scale is {call.scale!r}; it must be None where logit_scale is given")
        heads = call.q.shape[-2]
        if tuple(call.logit_scale.shape) not in ((heads,), (heads, 1, 1)):
            raise ValueError(
                f"logit_scale has shape {list(call.logit_scale.shape)}; "
                f"it must be [{heads}] or [{heads}, 1, 1]"
            )


def check_lse(return_lse: Any, activation: str) -> None:
    if not isinstance(return_lse, bool):
        raise TypeError(f"return_lse is {return_lse!r}; it must be True or False")
    if return_lse and activation in ACTIVATIONS[1:]:
        raise ValueError(f"return_lse is True; it must be False under activation {activation!r}")


def _check_grid(call: Call) -> list[tuple[AxisWindows, ...]]:
    """The windows of every head group on this grid."""
    from ._windowed_run import geometry_of

    windows, q, rank = call.windows, call.q, call.q.dim() - 3
    for name in ("size", "shift", "q_size", "kv_size"):
        value = getattr(windows, name)
        if isinstance(value, tuple) and len(value) != rank:
            raise ValueError(f"{name} is {value!r}; the grid has {rank} axes")
    for group in windows.head_groups or ():
        for value in group[1:]:
            if isinstance(value, tuple) and len(value) != rank:
                raise ValueError(f"head_groups has {group!r}; the grid has {rank} axes")
    if windows.head_groups is not None and sum(g[0] for g in windows.head_groups) != q.shape[-2]:
        raise ValueError(
            f"head_groups has {sum(g[0] for g in windows.head_groups)} heads; q has {q.shape[-2]}"
        )
    geometry = geometry_of(windows, rank)
    groups = [geometry.axes(g, tuple(q.shape[1:-2]), tuple(call.k.shape[1:-2])) for g in geometry.groups]
    for axes in groups:
        for a, axis in enumerate(axes):
            _check_axis(a, axis)
    tokens = 1
    for axis in groups[0]:
        tokens *= max(axis.length, axis.q_length)
    if tokens > MAX_TOKENS:
        raise ValueError(f"the grid has {tokens} tokens; a sample may have {MAX_TOKENS}")
    return groups


def _check_axis(a: int, axis: AxisWindows) -> None:
    if axis.length < 1 or axis.q_length < 1:
        raise ValueError(
            f"axis {a} of the grid has {min(axis.length, axis.q_length)} tokens; it must have at least 1"
        )
    if axis.shift >= axis.window:
        raise ValueError(f"shift is {axis.shift} on axis {a}; it must be 0 <= shift < size = {axis.window}")
    if axis.kv and axis.kv < axis.window:
        raise ValueError(f"kv_size is {axis.kv} on axis {a}; it must be at least size = {axis.window}")
    count = -(-axis.q_length // axis.q_window)
    if count != axis.n_windows:
        raise ValueError(
            f"q_size is {axis.q_window} on axis {a}: {count} windows of {axis.q_length} queries; "
            f"there are {axis.n_windows} windows of keys"
        )


def _check_extras(call: Call) -> None:
    batch, (heads, dim), dim_v = call.q.shape[0], call.q.shape[-2:], call.v.shape[-1]
    for name, x, shape, meaning in (
        ("edge_k", call.edge_k, (heads, dim), "[heads, dk]"),
        ("edge_v", call.edge_v, (heads, dim_v), "[heads, dv]"),
    ):
        if x is not None:
            _floating(name, x)
            _shape(name, x, shape, meaning)
            if call.windows.edge != "const":
                raise ValueError(f"{name} is given, but edge is {call.windows.edge!r}; it must be 'const'")
    if (call.extra_k is None) != (call.extra_v is None):
        raise ValueError("extra_k and extra_v must be given together")
    if call.extra_bias is not None and call.extra_k is None:
        raise ValueError("extra_bias is given without extra_k and extra_v")
    if call.extra_k is None or call.extra_v is None:
        return
    for name, x, width in (("extra_k", call.extra_k, dim), ("extra_v", call.extra_v, dim_v)):
        _floating(name, x)
        count = x.shape[1] if x.dim() == 4 else 0
        _shape(name, x, (batch, count, heads, width), "[B, M, heads, head_dim]")
    if call.extra_k.shape[1] != call.extra_v.shape[1]:
        raise ValueError(f"extra_k has {call.extra_k.shape[1]} keys, extra_v has {call.extra_v.shape[1]}")
    if call.extra_bias is not None:
        _floating("extra_bias", call.extra_bias)
        _shape("extra_bias", call.extra_bias, (heads, call.extra_k.shape[1]), "[heads, M]")


def _check_masks(call: Call, groups: list[tuple[AxisWindows, ...]]) -> None:
    key = call.key_padding_mask
    if key is not None:
        _tensor("key_padding_mask", key)
        if key.dtype != torch.bool and not key.is_floating_point():
            raise TypeError(
                f"key_padding_mask is {key.dtype}; it must be bool (True = ignored) or float (added)"
            )
        _shape("key_padding_mask", key, tuple(call.k.shape[:-2]), "[B, *S]")
        if key.requires_grad:
            raise ValueError("key_padding_mask requires grad; it gets none")
    mask = call.attn_mask
    if mask is None:
        return
    _floating("attn_mask", mask)
    if len(groups) > 1:
        raise ValueError("attn_mask needs one window for all heads; head_groups has several")
    windows, n, m = _counts(groups[0])
    total, heads = call.q.shape[0] * windows, call.q.shape[-2]
    if mask.requires_grad:
        raise ValueError("attn_mask requires grad; it gets none (a dense bias [heads, Nq, Nk] does)")
    fits = mask.dim() == 3 or (mask.dim() == 4 and mask.shape[1] in (1, heads))
    if not fits or tuple(mask.shape[-2:]) != (n, m) or mask.shape[0] < 1 or total % mask.shape[0]:
        raise ValueError(
            f"attn_mask has shape {list(mask.shape)}; it must be [W, {n}, {m}] or "
            f"[W, 1 or {heads}, {n}, {m}] with W a divisor of batch * windows = {total}"
        )


def _counts(axes: tuple[AxisWindows, ...]) -> tuple[int, int, int]:
    """Windows, query slots and key slots."""
    windows = n = m = 1
    for axis in axes:
        windows, n, m = windows * axis.n_windows, n * axis.q_window, m * (axis.kv or axis.window)
    return windows, n, m


def _check_bias(call: Call, groups: list[tuple[AxisWindows, ...]], relative: type) -> None:
    bias, heads, axes = call.bias, call.q.shape[-2], groups[0]
    shapes = {tuple((a.q_window, a.kv or a.window) for a in g) for g in groups}
    if len(shapes) > 1:
        raise ValueError("bias needs one window for all heads; head_groups has several")
    _, n, m = _counts(axes)
    if not isinstance(bias, relative):
        _floating("bias", bias)
        if tuple(bias.shape) not in ((heads, n, m), (1, heads, n, m)):  # type: ignore[union-attr]
            raise ValueError(
                f"bias has shape {list(bias.shape)}; it must be [T, {heads}] or [{heads}, {n}, {m}]"  # type: ignore[union-attr]
            )
        return
    table, index = bias.table, bias.index  # type: ignore[union-attr]
    if table.device != call.q.device:
        raise ValueError(f"bias is on {table.device}; it must be on {call.q.device} as q")
    if table.shape[1] != heads:
        raise ValueError(f"bias has a table of {table.shape[1]} heads; q has {heads}")
    if isinstance(index, Tensor):
        _shape("index", index, (n, m), "[Nq, Nk]")
        if not torch.compiler.is_compiling() and index.numel():
            low, high = int(index.min()), int(index.max())
            if low < -len(table) or high >= len(table):
                raise ValueError(f"index has rows {low} to {high}; the table has {len(table)}")
        return
    _check_table_size(bias, axes)


def _check_table_size(bias: Any, axes: tuple[AxisWindows, ...]) -> None:
    made = bias.window or tuple(a.q_window for a in axes)
    if len(made) != len(axes):
        raise ValueError(f"window of bias is {made!r}; the grid has {len(axes)} axes")
    rows, slots = 1, 1
    for w, axis in zip(made, axes, strict=True):
        keys = w if bias.window else (axis.kv or axis.window)
        rows *= w if bias.index == "abs" else w + keys - 1
        slots *= w
    if bias.index == "abs" and any(axis.kv or axis.q_window != axis.window for axis in axes):
        raise ValueError("index 'abs' needs windows without q_size and kv_size; give an index tensor")
    if bias.window and (any(axis.kv for axis in axes) or slots < _counts(axes)[1]):
        raise ValueError(
            f"window of bias is {bias.window!r}; it must have at least the {_counts(axes)[1]} slots in use"
        )
    if len(bias.table) != rows:
        raise ValueError(
            f"bias has a table of {len(bias.table)} rows; index {bias.index!r} over {made} needs {rows}"
        )
