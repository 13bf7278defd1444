"""How DTensor may shard vicinal's ops: over the batch, and over the heads where they are independent.

Registered when `vicinal.distributed.register_dtensor` is called, because DTensor takes long to import.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from .. import _attend_op, _hash_op, _joint_op, _linear_op
from .._family import Family
from .._neighborhood_op import NEIGHBORHOOD
from .._windowed_op import WINDOWED
from .._windowed_op import Geometry as Windows

Dims = tuple[int | None, int | None]  # the batch and the heads; None: all of it everywhere


class Sharding(NamedTuple):
    """One family: `dims` of its tensors and outputs, and what forbids the batch or the heads."""

    family: Family
    dims: dict[str, Dims]
    batch: Callable[[dict[str, Any]], bool]
    heads: Callable[[dict[str, Any]], bool]


ROWS: Dims = (0, -2)
ATTEND: dict[str, Dims] = {
    **dict.fromkeys(("q", "k", "v", "extra_k", "extra_v", "out"), ROWS),
    **dict.fromkeys(("q_scale", "k_scale", "lse"), (0, -1)),
    "bias": (None, 0),
    "key_bias": (0, None),
}
LINEAR: dict[str, Dims] = {
    **dict.fromkeys(("q", "k", "v", "q_den", "k_den", "out"), ROWS),
    **dict.fromkeys(("initial_s", "initial_z", "final_s", "final_z", "den"), (0, 1)),
    "decay": (0, -1),
    "key_mask": (0, None),
}
JOINT: dict[str, Dims] = dict.fromkeys(
    (
        "quad_q",
        "quad_k",
        "lin_q",
        "lin_k",
        "v",
        "u",
        "ignored",
        "out",
        "other",
        "inner_v",
        "inner_u",
        "state",
    ),
    (0, None),
)
HASH: dict[str, Dims] = {
    **dict.fromkeys(("qk", "v", "out"), ROWS),
    **dict.fromkeys(("anchors", "weight", "mean"), (None, 0)),
    **dict.fromkeys(("codes", "state"), (0, 1)),
}


def _shared_mask(given: dict[str, Any]) -> bool:
    """Dropout counts batches and heads, and a mask may be one per sample."""
    return given["dropout_p"] == 0 and given["mask"] is None


def _one_window(given: dict[str, Any]) -> bool:
    return _same_heads(given) and len(Windows.decode(given["geometry"]).groups) == 1


def _same_heads(given: dict[str, Any]) -> bool:
    return bool(_shared_mask(given) and given["q"].shape[-2] == given["k"].shape[-2])


SHARDINGS = (
    Sharding(WINDOWED.family, ATTEND, _shared_mask, _one_window),
    Sharding(NEIGHBORHOOD.family, ATTEND, _shared_mask, _same_heads),
    Sharding(
        _linear_op.LINEAR,
        LINEAR,
        lambda given: given["cu_seqlens"] is None,
        lambda given: given["q"].shape[-2] == given["v"].shape[-2],
    ),
    Sharding(_joint_op.JOINT, JOINT, lambda given: given["dropout_p"] == 0, lambda given: False),
    Sharding(_hash_op.HASH, HASH, lambda given: True, lambda given: True),
)
OPTIONS = {"linear": _linear_op.OPTIONS, "joint": _joint_op.OPTIONS, "hash": _hash_op.OPTIONS}


def register_dtensor() -> None:
    """Let `torch.distributed.tensor.DTensor` run vicinal's functions on shards of the batch or of the heads.

    Windowed, neighborhood, linear, joint and hash attention of DTensors then run on each device's shard,
    after a redistribution where another dimension is sharded. Gradients of tables under a sharded batch are
    partial sums, which DTensor reduces. With dropout, or with an attn_mask, everything is gathered first:
    their meaning depends on the place in the batch.

    Call it once, in every process.

    Example:
        >>> from vicinal import distributed
        >>> distributed.register_dtensor()
    """
    from torch.distributed.tensor.experimental import register_sharding

    for sharding in SHARDINGS:
        name = sharding.family.name
        for direction, strategies in (("fwd", _forward), ("bwd", _backward)):
            packet = getattr(torch.ops.vicinal, f"{name}_{direction}")
            overloads = [getattr(packet, overload) for overload in packet.overloads()]
            register_sharding(overloads)(_bound(strategies, sharding))


def _bound(strategies: Callable[..., list[Any]], sharding: Sharding) -> Callable[..., list[Any]]:
    return lambda *args: strategies(sharding, args)


def _given(sharding: Sharding, args: tuple[Any, ...]) -> dict[str, Any]:
    names = [name.rstrip("?") for name in sharding.family.tensors]
    options = OPTIONS.get(sharding.family.name, _attend_op.OPTIONS)
    return dict(zip([*names, *(o.split()[-1] for o in options)], args, strict=False))


def _ways(sharding: Sharding, given: dict[str, Any]) -> Iterator[int | None]:
    """None: nothing is sharded; 0: the batch; 1: the heads."""
    yield None
    if sharding.batch(given):
        yield 0
    if sharding.heads(given):
        yield 1


def _placement(dims: Dims | None, x: Any, way: int | None, partial: bool = False) -> Any:
    """Of a tensor with these dims; partial: it is a gradient, of which every shard has a part."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    if x is None:
        return None
    if way is None:
        return Replicate()
    dim = None if dims is None else dims[way]
    if dim is None or (way == 0 and (x.shape[0] == 1 or (dims == (0, -1) and len(x.shape) == 1))):
        return Partial() if partial else Replicate()
    return Shard(dim % len(x.shape))


class _Shape(NamedTuple):
    """As much of a tensor as `_placement` reads."""

    shape: tuple[int, ...]


def _outputs(sharding: Sharding, given: dict[str, Any], way: int | None) -> list[Any]:
    """Placements of a forward's outputs; those that are empty are everywhere."""
    from torch.distributed.tensor import Replicate

    family = sharding.family
    count = len(family.tensors)
    values = list(given.values())
    with torch.device("meta"):
        metas = [torch.empty(x.shape) if hasattr(x, "shape") else x for x in values]
    made = family.fake_fwd(tuple(metas[:count]), tuple(metas[count:]))
    return [
        Replicate() if x.dim() == 1 and x.numel() == 0 else _placement(sharding.dims[name], x, way)
        for name, x in zip(family.outputs, made, strict=True)
    ]


def _inputs(sharding: Sharding, given: dict[str, Any], way: int | None) -> list[Any]:
    """Placements of the tensors, None for the options."""
    names = [name.rstrip("?") for name in sharding.family.tensors]
    tensors = [_placement(sharding.dims.get(n), given[n], way) for n in names]
    return [*tensors, *[None] * (len(given) - len(names))]


def _forward(sharding: Sharding, args: tuple[Any, ...]) -> list[Any]:
    given = _given(sharding, args)
    return [(_outputs(sharding, given, way), _inputs(sharding, given, way)) for way in _ways(sharding, given)]


def _backward(sharding: Sharding, args: tuple[Any, ...]) -> list[Any]:
    from torch.distributed.tensor import Replicate

    family = sharding.family
    skipped = len(family.outputs) + len(family.saved)
    given, packed = _given(sharding, args[skipped:-1]), args[-1]
    names = (*family.outputs, *family.saved)
    found = []
    for way in _ways(sharding, given):
        before = [
            Replicate() if x is not None and tuple(x.shape) == (0,) else _placement(sharding.dims[n], x, way)
            for n, x in zip(names, args, strict=False)
        ]
        grads = []
        for name in family.gradients:
            x = given[name]
            if packed and name == "q":
                x = _Shape((*x.shape[:-2], 3, *x.shape[-2:]))
            empty = x is None or (packed and name in ("k", "v"))
            grads.append(Replicate() if empty else _placement(sharding.dims.get(name), x, way, True))
        found.append((grads, [*before, *_inputs(sharding, given, way), None]))
    return found
