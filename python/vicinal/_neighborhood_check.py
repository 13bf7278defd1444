"""Checks of neighborhood arguments: every message names the argument, the axis, what it is and what it may
be.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import _check as checks
from ._neighborhood_plan import AxisNeighborhood
from .plan import MAX_TOKENS

if TYPE_CHECKING:
    from ._neighborhood_run import Call
    from ._neighborhood_types import Neighborhood

BORDERS = ("shift", "truncate")
KERNEL = "an int >= 1, or a tuple with one per axis"
PAIR = "a pair (left, right) of ints >= -1"


def check_neighborhood(neighborhood: Neighborhood) -> None:
    """The fields of a Neighborhood, without a grid."""
    checks.one_of("border", neighborhood.border, BORDERS)
    _check_kernel(neighborhood.kernel_size, neighborhood.border == "truncate")
    for name in ("dilation", "stride"):
        value = getattr(neighborhood, name)
        entries = value if isinstance(value, tuple) else (value,)
        if not 1 <= len(entries) <= 3 or not all(checks.is_int(e) for e in entries):
            raise TypeError(f"{name} is {value!r}; it must be {KERNEL}")
        if min(entries) < 1:
            raise ValueError(f"{name} is {value!r}; it must be {KERNEL}")
    causal = neighborhood.is_causal
    flags = causal if isinstance(causal, tuple) else (causal,)
    if not 1 <= len(flags) <= 3 or not all(isinstance(c, bool) for c in flags):
        raise TypeError(f"is_causal is {causal!r}; it must be a bool, or a tuple with one per axis")


def _check_kernel(kernel: Any, truncate: bool) -> None:
    accepted = KERNEL + (f" (each may be {PAIR})" if truncate else "")
    entries = kernel if isinstance(kernel, tuple) else (kernel,)
    if not 1 <= len(entries) <= 3:
        raise TypeError(f"kernel_size is {kernel!r}; it must be {accepted}")
    lone_pair = truncate and len(entries) == 2 and isinstance(kernel, tuple)  # on a grid of one axis
    for entry in entries:
        if isinstance(entry, tuple):
            if len(entry) != 2 or not all(checks.is_int(side) for side in entry):
                raise TypeError(f"kernel_size is {kernel!r}; it must be {accepted}")
            if not truncate:
                raise ValueError(
                    f"kernel_size is {kernel!r}; a pair (left, right) needs border 'truncate', "
                    f"border 'shift' takes {KERNEL}"
                )
            if min(entry) < -1:
                raise ValueError(f"kernel_size is {kernel!r}; it must be {accepted}")
        elif not checks.is_int(entry):
            raise TypeError(f"kernel_size is {kernel!r}; it must be {accepted}")
        elif entry < (-1 if lone_pair else 1):
            raise ValueError(f"kernel_size is {kernel!r}; it must be {accepted}")


def check_rank(neighborhood: Neighborhood, rank: int) -> None:
    """The fields of a Neighborhood against a grid of this many axes."""
    kernel = neighborhood.kernel_size
    lone_pair = rank == 1 and neighborhood.border == "truncate" and isinstance(kernel, tuple)
    lone_pair = lone_pair and len(kernel) == 2 and all(checks.is_int(side) for side in kernel)  # type: ignore[arg-type, union-attr]
    for name in ("kernel_size", "dilation", "stride", "is_causal"):
        value = getattr(neighborhood, name)
        if isinstance(value, tuple) and len(value) != rank and not (name == "kernel_size" and lone_pair):
            pair = " (a lone pair (left, right) needs border 'truncate')" * (rank == 1 and len(value) == 2)
            raise ValueError(
                f"{name} is {value!r}; it must have an entry per axis, and the grid has {rank}{pair}"
            )
    if isinstance(kernel, tuple) and not lone_pair:
        for a, entry in enumerate(kernel):
            if checks.is_int(entry) and entry < 1:  # type: ignore[operator]
                raise ValueError(f"kernel_size is {entry} on axis {a}; it must be an int >= 1")


def check_call(call: Call) -> None:
    """All arguments of a call against each other."""
    _check_qkv(call)
    checks.probability("dropout_p", call.dropout_p, one=True)
    checks.finite_or_none("scale", call.scale)
    check_axes(call.axes)
    batch, kv_heads = call.k.shape[0], call.k.shape[-2]
    checks.extras(call.extra_k, call.extra_v, batch, kv_heads, call.k.shape[-1], call.v.shape[-1])
    for name, x in (("extra_k", call.extra_k), ("extra_v", call.extra_v)):
        if x is not None:
            _like_q(name, x, call.q)
    check_padding(call.key_padding_mask, call.k)
    if call.bias is not None:
        check_bias(call.bias, call.q, call.axes)
    if call.rel_pos is not None:
        check_limited("rel_pos", call.axes)
        checks.axis_tables(call.rel_pos, call.q, [2 * a.kernel - 1 for a in call.axes])


def _like_q(name: str, x: Tensor, q: Tensor) -> None:
    checks.on_device_of_q(name, x, q)
    if x.dtype != q.dtype:
        raise ValueError(f"{name} is {x.dtype}; it must be {q.dtype} as q")


def _check_qkv(call: Call) -> None:
    q, k, v = call.q, call.k, call.v
    checks.like_q(q, ValueError, k=k, v=v)
    check_lengths(call.neighborhood, q, k)
    check_heads("q", q.shape[-2], k)
    checks.shape("k", k, (q.shape[0], *k.shape[1:-1], q.shape[-1]), "[B, *S, kv heads, D]")
    checks.shape("v", v, (*k.shape[:-1], v.shape[-1]), "[B, *S, kv heads, Dv]")
    checks.head_dims(q, v)


def check_lengths(neighborhood: Neighborhood, q: Tensor, k: Tensor, name: str = "k", rows: str = "q") -> None:
    """The grids of queries and keys: equal, but for a truncated axis with more keys than queries."""
    q_space, k_space = tuple(q.shape[1:-2]), tuple(k.shape[1:-2])
    if q_space == k_space:
        return
    if len(q_space) > 1 or neighborhood.border != "truncate":
        raise ValueError(
            f"{name} has the grid {list(k_space)}, {rows} has {list(q_space)}; they must be equal "
            "(but for border 'truncate' on one axis, where there may be more keys)"
        )
    if k_space[0] < q_space[0]:
        raise ValueError(
            f"{name} has {k_space[0]} tokens on axis 0, {rows} has {q_space[0]}; "
            "there must be at least as many"
        )


def check_heads(name: str, heads: int, k: Tensor) -> None:
    kv_heads = k.shape[-2]
    if kv_heads < 1 or heads < 1 or heads % kv_heads:
        raise ValueError(
            f"{name} has {heads} heads; it must be a multiple of the {kv_heads} heads of k and v"
        )


def check_axes(axes: tuple[AxisNeighborhood, ...]) -> None:
    tokens = 1
    for a, axis in enumerate(axes):
        _check_axis(a, axis)
        tokens *= axis.length
    if tokens > MAX_TOKENS:
        raise ValueError(f"the grid has {tokens} tokens; a sample may have {MAX_TOKENS}")


def _check_axis(a: int, axis: AxisNeighborhood) -> None:
    if axis.length < 1 or axis.q_length < 1:
        raise ValueError(
            f"axis {a} of the grid has {min(axis.length, axis.q_length)} tokens; it must have at least 1"
        )
    s, left, right = axis.stride, axis.left, axis.right
    if axis.shift and axis.kernel * axis.dilation > axis.length:
        raise ValueError(
            f"kernel_size * dilation is {axis.kernel} * {axis.dilation} = {axis.kernel * axis.dilation} on "
            f"axis {a}; border 'shift' accepts at most the {axis.length} tokens of the axis: use "
            "border='truncate', or in a module pad_small_inputs=True"
        )
    if left >= 0 and right >= 0 and s > axis.kernel:
        raise ValueError(
            f"stride is {s} on axis {a}; it must be at most the kernel_size there, {axis.kernel}"
        )
    if axis.causal and right != 0:
        raise ValueError(f"kernel_size has right = {right} on axis {a}; a causal axis takes only right = 0")
    least = s - 1 if axis.causal else s // 2
    if 0 <= left < least:
        raise ValueError(
            f"kernel_size has left = {left} on axis {a}; under stride {s} it must be at least {least}, or -1"
        )
    if not axis.causal and 0 <= right < s - 1 - s // 2:
        raise ValueError(
            f"kernel_size has right = {right} on axis {a}; under stride {s} it must be at least "
            f"{s - 1 - s // 2}, or -1"
        )


def check_limited(name: str, axes: tuple[AxisNeighborhood, ...]) -> None:
    """`name` has a place for every key of a window: no axis may be unlimited."""
    for a, axis in enumerate(axes):
        if axis.left < 0 or axis.right < 0:
            raise ValueError(
                f"{name} needs a window of a fixed size; kernel_size is ({axis.left}, {axis.right}) on "
                f"axis {a}, where -1 is unlimited"
            )


def check_bias(bias: Any, q: Tensor, axes: tuple[AxisNeighborhood, ...]) -> None:
    checks.floating("bias", bias)
    checks.on_device_of_q("bias", bias, q)
    check_limited("bias", axes)
    checks.shape("bias", bias, (q.shape[-2], *[2 * a.kernel - 1 for a in axes]), "[heads, 2 K - 1 per axis]")


def check_padding(mask: Any, k: Tensor) -> None:
    if mask is None:
        return
    checks.tensor("key_padding_mask", mask)
    if mask.dtype != torch.bool:
        raise ValueError(f"key_padding_mask is {mask.dtype}; it must be torch.bool, True = ignored")
    checks.shape("key_padding_mask", mask, tuple(k.shape[:-2]), "[B, *S]")
    checks.on_device_of_q("key_padding_mask", mask, k)
