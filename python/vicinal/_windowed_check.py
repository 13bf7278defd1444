"""Checks of windowed arguments: every message names the argument, what it is and what it may be."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import _check as checks
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


def _sizes(name: str, value: Any, lowest: int, whole: bool) -> None:
    entries = value if isinstance(value, tuple) else (value,)
    accepted = f"an int >= {lowest}{' or -1 (the whole axis)' if whole else ''}, or a tuple of 1 to 3 of them"
    if not entries or len(entries) > 3 or not all(checks.is_int(e) for e in entries):
        raise TypeError(f"{name} is {value!r}; it must be {accepted}")
    if not all(e >= lowest or (whole and e == -1) for e in entries):
        raise ValueError(f"{name} is {value!r}; it must be {accepted}")


def check_windows(windows: Windows) -> None:
    """The fields of a Windows, without a grid."""
    checks.one_of("partition", windows.partition, PARTITIONS)
    checks.one_of("edge", windows.edge, EDGES)
    checks.one_of("pad_order", windows.pad_order, PAD_ORDERS)
    checks.one_of("pad_side", windows.pad_side, PAD_SIDES)
    if not isinstance(windows.mask_value, (int, float)) or isinstance(windows.mask_value, bool):
        raise TypeError(f"mask_value is {windows.mask_value!r}; it must be a float, at most 0")
    if not windows.mask_value <= 0:
        raise ValueError(f"mask_value is {windows.mask_value!r}; it must be at most 0")
    _check_groups(windows)
    for name in ("q_size", "kv_size"):
        if getattr(windows, name) is not None:
            _sizes(name, getattr(windows, name), 1, name == "q_size")
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
        if not checks.is_int(group[0]):
            raise TypeError(f"head_groups has {group[0]!r} heads; it must be an int >= 1")
        if group[0] < 1:
            raise ValueError(f"head_groups has {group[0]!r} heads; it must be an int >= 1")
        _sizes("size in head_groups", group[1], 1, True)
        _sizes("shift in head_groups", group[2] if len(group) == 3 else 0, 0, False)


def check_relative_bias(bias: RelativeBias) -> None:
    checks.tensor("table", bias.table)
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
        checks.one_of("index", bias.index, INDEXES)
    if bias.window is not None:
        _sizes("window", bias.window, 1, False)
        if not isinstance(bias.window, tuple):
            raise TypeError(f"window is {bias.window!r}; it must be a tuple with an int per axis")


def check_window_type(windows: Any, kind: type) -> Any:
    if isinstance(windows, (kind, tuple)) or checks.is_int(windows):
        return windows
    raise TypeError(f"windows is {windows!r}; it must be a Windows, an int or a tuple of ints")


def check_call(call: Call, relative: type) -> None:
    """All arguments of a call against each other."""
    _check_qkv(call)
    _check_options(call)
    axes = _check_grid(call)
    _check_extras(call)
    _check_masks(call, axes)
    if call.bias is not None:
        _check_bias(call, axes, relative)
    if call.rel_pos is not None:
        _check_rel_pos(call, axes)


def _check_qkv(call: Call) -> None:
    q, k, v = call.q, call.k, call.v
    checks.like_q(q, k=k, v=v)
    space = q.shape[1:-2] if call.windows.q_size is None else k.shape[1:-2]
    checks.shape("k", k, (q.shape[0], *space, *q.shape[-2:]), "[B, *S, heads, dk]")
    checks.shape("v", v, (*k.shape[:-1], v.shape[-1]), "[B, *S, heads, dv]")
    checks.head_dims(q, v)


def _check_options(call: Call) -> None:
    checks.one_of("activation", call.activation, ACTIVATIONS)
    checks.probability("dropout_p", call.dropout_p, one=False)
    checks.finite_or_none("scale", call.scale)
    if call.logit_scale is not None:
        checks.floating("logit_scale", call.logit_scale)
        if call.scale is not None:
            raise ValueError(f"scale is {call.scale!r}; it must be None where logit_scale is given")
        heads = call.q.shape[-2]
        if tuple(call.logit_scale.shape) not in ((heads,), (heads, 1, 1)):
            raise ValueError(
                f"logit_scale has shape {list(call.logit_scale.shape)}; "
                f"it must be [{heads}] or [{heads}, 1, 1]"
            )


def check_lse(return_lse: Any, activation: str) -> None:
    checks.flag("return_lse", return_lse)
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
            checks.floating(name, x)
            checks.shape(name, x, shape, meaning)
            if call.windows.edge != "const":
                raise ValueError(f"{name} is given, but edge is {call.windows.edge!r}; it must be 'const'")
    checks.extras(call.extra_k, call.extra_v, batch, heads, dim, dim_v)
    if call.extra_bias is not None and call.extra_k is None:
        raise ValueError("extra_bias is given without extra_k and extra_v")
    if call.extra_k is None:
        return
    if call.extra_bias is not None:
        checks.floating("extra_bias", call.extra_bias)
        checks.shape("extra_bias", call.extra_bias, (heads, call.extra_k.shape[1]), "[heads, M]")


def _check_masks(call: Call, groups: list[tuple[AxisWindows, ...]]) -> None:
    key = call.key_padding_mask
    if key is not None:
        checks.tensor("key_padding_mask", key)
        if key.dtype != torch.bool and not key.is_floating_point():
            raise TypeError(
                f"key_padding_mask is {key.dtype}; it must be bool (True = ignored) or float (added)"
            )
        checks.shape("key_padding_mask", key, tuple(call.k.shape[:-2]), "[B, *S]")
        if key.requires_grad:
            raise ValueError("key_padding_mask requires grad; it gets none")
    mask = call.attn_mask
    if mask is None:
        return
    checks.floating("attn_mask", mask)
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
    _check_one_window("bias", groups)
    _, n, m = _counts(axes)
    if not isinstance(bias, relative):
        checks.floating("bias", bias)
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
        checks.shape("index", index, (n, m), "[Nq, Nk]")
        if not torch.compiler.is_compiling() and index.numel():
            low, high = int(index.min()), int(index.max())
            if low < -len(table) or high >= len(table):
                raise ValueError(f"index has rows {low} to {high}; the table has {len(table)}")
        return
    _check_table_size(bias, axes)


def _check_one_window(name: str, groups: list[tuple[AxisWindows, ...]]) -> None:
    if len({tuple((a.q_window, a.kv or a.window) for a in g) for g in groups}) > 1:
        raise ValueError(f"{name} needs one window for all heads; head_groups has several")


def _check_rel_pos(call: Call, groups: list[tuple[AxisWindows, ...]]) -> None:
    _check_one_window("rel_pos", groups)
    checks.axis_tables(call.rel_pos, call.q, [a.q_window + (a.kv or a.window) - 1 for a in groups[0]])


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
