"""Flops of the ops for `torch.utils.flop_counter.FlopCounterMode`; importing this module registers them.

A multiply-add counts as two, and only pairs of tokens that see each other count: no pads, no part of a tile
that is masked, no exponentials. Backwards count what they compute, the scores that they make again included.
It is a module of its own because the counter takes longer to import than the rest of vicinal.

Example:
    >>> from torch.utils.flop_counter import FlopCounterMode
    >>> import vicinal.flops
    >>> q = k = v = torch.randn(1, 14, 14, 2, 16)
    >>> with FlopCounterMode(display=False) as counter:
    ...     _ = vicinal.windowed_attention(q, k, v, 7)
    >>> counter.get_total_flops() == 2 * (14 * 14 * 49) * 2 * (16 + 16)  # heads, pairs, a pair's work
    True
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import _attend_op, _hash_op, _joint_op, _linear_op, _voxel_op
from ._neighborhood_plan import axis_table
from ._neighborhood_types import Geometry as Neighborhoods
from ._windowed_op import Geometry as Windows
from .plan import visible_pairs

Pairs = Callable[[dict[str, Any]], int]


def _named(names: tuple[str, ...], options: tuple[str, ...], args: tuple[Any, ...]) -> dict[str, Any]:
    keys = [name.rstrip("?") for name in names] + [option.split()[-1] for option in options]
    return dict(zip(keys, args, strict=False))


def _windowed(given: dict[str, Any]) -> int:
    """Pairs of a query and a key, over batch and heads."""
    q, k, extra = given["q"], given["k"], given["extra_k"]
    geometry, pairs = Windows.decode(given["geometry"]), 0
    heads, tokens = q.shape[-2], prod(q.shape[1:-2])
    for group in geometry.groups:
        axes = geometry.axes(group, tuple(q.shape[1:-2]), tuple(k.shape[1:-2]))
        layout = (geometry.partition, geometry.pad_order, geometry.pad_side)
        pairs += (group.heads or heads) * visible_pairs(axes, *layout, bool(given["edge_row"]))
    rows = 0 if extra is None else extra.shape[1] - given["edge_row"]
    return q.shape[0] * (pairs + heads * tokens * rows)


def _neighborhood(given: dict[str, Any]) -> int:
    q, k, extra = given["q"], given["k"], given["extra_k"]
    axes = Neighborhoods.decode(given["geometry"]).on(tuple(q.shape[1:-2]), tuple(k.shape[1:-2]))
    counts = []
    for axis in axes:
        table = axis_table(axis)
        seen = table.b - table.a
        counts.append(int(seen[table.i >= axis.length - axis.q_length].sum()))
    rows = 0 if extra is None else extra.shape[1]
    return q.shape[0] * q.shape[-2] * (prod(counts) + prod(q.shape[1:-2]) * rows)


def _voxel(given: dict[str, Any]) -> int:
    """The rows of the plan are data: a call on fake tensors has no number."""
    rows, groups, pairs, first = given["rows"], given["groups"], 0, 0
    if type(rows) is not Tensor:
        raise NotImplementedError(
            f"flops of voxel_attention depend on the segments, and rows is a {type(rows).__name__}"
        )
    for at in range(0, len(groups), _voxel_op.GROUP):
        group = _voxel_op.Group(*groups[at : at + _voxel_op.GROUP])
        table = rows[first : first + group.rows].long()
        pairs += group.heads * int((table[:, 3:6].prod(1) * table[:, 9:12].prod(1)).sum())
        first += group.rows
    return pairs


def _attend(name: str, names: tuple[str, ...], options: tuple[str, ...], pairs: Pairs) -> None:
    def forward(*args: Any, **_: Any) -> int:
        given = _named(names, options, args)
        return 2 * pairs(given) * (given["q"].shape[-1] + given["v"].shape[-1])

    def backward(*args: Any, **_: Any) -> int:
        """Scores and dP again, then dq, dk and dv."""
        given = _named(names, options, args[4:])
        return 2 * pairs(given) * (3 * given["q"].shape[-1] + 2 * given["v"].shape[-1])

    _register(name, forward, backward)


def _register(name: str, forward: Callable[..., int], backward: Callable[..., int]) -> None:
    for direction, formula in (("fwd", forward), ("bwd", backward)):
        op = getattr(torch.ops.vicinal, f"{name}_{direction}")
        register_flop_formula(op, get_raw=True)(formula)


def _linear(args: tuple[Any, ...]) -> int:
    """Multiply-adds of one product of features and values over all keys, and over all queries."""
    given = _named(_linear_op.TENSORS, _linear_op.OPTIONS, args)
    q, k, v, dens = given["q"], given["k"], given["v"], given["k_den"]
    width = v.shape[-1] * k.shape[-1]
    width += (k if dens is None else dens).shape[-1] * given["normalize"]
    return v.shape[0] * v.shape[2] * width * (q.shape[1] + k.shape[1])


def _joint(args: tuple[Any, ...]) -> tuple[int, int, int]:
    """Multiply-adds of the scores, of their product with the values, and of the linear part."""
    given = _named(_joint_op.TENSORS, _joint_op.OPTIONS, args)
    v, u, tokens = given["v"], given["u"], given["v"].shape[1]
    group = given["group_size"] or tokens
    sizes = [min(group, tokens - at) for at in range(0, tokens, group)]
    pairs = v.shape[0] * sum(n * (n + 1) // 2 if given["is_causal"] else n * n for n in sizes)
    width = v.shape[-1] * (1 if u is None else 2)
    states = 2 * v.shape[0] * tokens * given["lin_q"].shape[-1] * width
    return pairs * given["quad_q"].shape[-1], pairs * width, states


def _hash(args: tuple[Any, ...]) -> tuple[int, int]:
    """Multiply-adds of the codes, and of attention with them."""
    given = _named(_hash_op.TENSORS, _hash_op.OPTIONS, args)
    qk, v, anchors, bits = given["qk"], given["v"], given["anchors"].shape[1], given["weight"].shape[1]
    tokens = qk.shape[0] * qk.shape[1] * qk.shape[2]
    return tokens * anchors * (qk.shape[-1] + bits), 2 * tokens * bits * (v.shape[-1] + 1)


def _skip(family: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of a backward behind the gradients of the outputs and what was saved of them."""
    return args[len(family.outputs) + len(family.saved) :]


def _register_sums() -> None:
    def joint_forward(*args: Any, **_: Any) -> int:
        return 2 * sum(_joint(args))

    def joint_backward(*args: Any, **_: Any) -> int:
        scores, values, states = _joint(_skip(_joint_op.JOINT, args))
        return 2 * (3 * scores + 2 * values + 2 * states)

    def hash_backward(*args: Any, **_: Any) -> int:
        codes, attention = _hash(_skip(_hash_op.HASH, args))
        return 2 * (2 * codes + 2 * attention)

    _register(
        "linear", lambda *a, **_: 2 * _linear(a), lambda *a, **_: 4 * _linear(_skip(_linear_op.LINEAR, a))
    )
    _register("joint", joint_forward, joint_backward)
    _register("hash", lambda *a, **_: 2 * sum(_hash(a)), hash_backward)


_attend("windowed", _attend_op.TENSORS, _attend_op.OPTIONS, _windowed)
_attend("neighborhood", _attend_op.TENSORS, _attend_op.OPTIONS, _neighborhood)
_attend("voxel", _voxel_op.TENSORS, _voxel_op.OPTIONS, _voxel)
_register_sums()
