"""From a neighborhood call to a backend: cast, check, choose, bring the options to the kernels' form, run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _attend_run as shared
from . import _check as checks
from . import _choice
from . import _neighborhood_check as check
from . import reference_neighborhood as reference
from ._attend import accumulator, flat
from ._axis_terms import added_channels, axis_channels, neighborhood_term
from ._neighborhood_op import LARGE_GRID, NEIGHBORHOOD, PLACE_BITS, place_bits
from ._neighborhood_plan import AxisNeighborhood
from ._neighborhood_types import Geometry, Neighborhood, resolve


@dataclass(slots=True)
class Call:
    """Checked arguments."""

    q: Tensor
    k: Tensor
    v: Tensor
    neighborhood: Neighborhood
    axes: tuple[AxisNeighborhood, ...]
    bias: Tensor | None
    scale: float | None
    extra_k: Tensor | None
    extra_v: Tensor | None
    key_padding_mask: Tensor | None
    dropout_p: float
    rel_pos: tuple[Tensor, ...] | None = None

    @property
    def factor(self) -> float:
        return self.q.shape[-1] ** -0.5 if self.scale is None else float(self.scale)


GEOMETRY = (1, 1, False, "shift")  # defaults of dilation, stride, is_causal, border


def as_neighborhood(kernel_size: Any, *geometry: Any) -> Neighborhood:
    """A Neighborhood as it is, or that of these arguments (dilation, stride, is_causal, border)."""
    if isinstance(kernel_size, Neighborhood):
        for name, value, default in zip(
            ("dilation", "stride", "is_causal", "border"), geometry, GEOMETRY, strict=True
        ):
            if value != default:
                raise ValueError(f"{name} is {value!r}; it is a field of the Neighborhood that was given")
        return kernel_size
    if torch.compiler.is_compiling() or not _plain(kernel_size, *geometry):
        return Neighborhood(kernel_size, *geometry)
    return _cached_neighborhood(kernel_size, *geometry)


def _plain(kernel_size: Any, dilation: Any, stride: Any, is_causal: Any, border: Any) -> bool:
    """Whether the arguments are exactly of the common types, so that equal ones mean the same."""
    for value in (kernel_size, dilation, stride):
        if type(value) is not int and not (
            type(value) is tuple and all(type(entry) is int for entry in value)
        ):
            return False
    flags = is_causal if type(is_causal) is tuple else (is_causal,)
    return all(type(flag) is bool for flag in flags) and type(border) is str


_cached_neighborhood = lru_cache(maxsize=1024)(Neighborhood)


def geometry_of(neighborhood: Neighborhood, rank: int, biased: bool) -> tuple[Geometry, str]:
    """The ops' geometry of a neighborhood on a grid of this rank, and its text."""
    if torch.compiler.is_compiling():  # traces through caches, and warns of it
        return _make_geometry(neighborhood, rank, biased)
    return _cached_geometry(neighborhood, rank, biased)


def _make_geometry(neighborhood: Neighborhood, rank: int, biased: bool) -> tuple[Geometry, str]:
    check.check_rank(neighborhood, rank)
    geometry = resolve(neighborhood, rank, biased)
    return geometry, geometry.encode()


_cached_geometry = lru_cache(maxsize=1024)(_make_geometry)


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    neighborhood: Neighborhood,
    bias: Tensor | None = None,
    scale: float | None = None,
    extra_k: Tensor | None = None,
    extra_v: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    rel_pos: tuple[Tensor, ...] | None = None,
) -> Call:
    """Cast under autocast, check, and name the arguments."""
    checks.tokens(q=q, k=k, v=v)
    for name, extra in (("extra_k", extra_k), ("extra_v", extra_v)):
        if extra is not None:
            checks.tensor(name, extra)
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        extra_k = None if extra_k is None else extra_k.to(dtype)
        extra_v = None if extra_v is None else extra_v.to(dtype)
    geometry, _ = geometry_of(neighborhood, q.dim() - 3, False)
    same_rank = k.dim() == q.dim()  # if not, the check says so
    axes = geometry.on(tuple(q.shape[1:-2]), tuple(k.shape[1:-2])) if same_rank else ()
    options = (bias, scale, extra_k, extra_v, key_padding_mask, dropout_p, rel_pos)
    call = Call(q, k, v, neighborhood, axes, *options)
    check.check_call(call)
    if call.extra_k is not None and call.extra_k.shape[1] == 0:
        call.extra_k = call.extra_v = None
    return call


def problem_key(call: Call) -> _choice.Key:
    features = ["dropout"] if call.dropout_p > 0 else []
    if place_bits(call.axes) > PLACE_BITS:
        features.append(LARGE_GRID)
    more = 0
    if call.rel_pos is not None:
        more = added_channels(call.q.shape[-1], [a.kernel for a in call.axes])
    return _choice.problem_key("neighborhood", call.q, call.v, features, more)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qkv: Tensor | None,
    geometry: tuple[Any, ...],
    options: tuple[Any, ...],
    backend: Any,
) -> tuple[Tensor, Tensor]:
    """out and lse. qkv: the packed tensor whose views q, k and v are, or None. geometry: as as_neighborhood
    takes it. options: as Call has them."""
    neighborhood = as_neighborhood(*geometry)
    key = _signature(q, k, v, neighborhood, options, backend)
    known = _settled.get(key)
    if known is not None:
        return _settled.run(known, q, k, v, qkv, options[0])
    call = prepare(q, k, v, neighborhood, *options)
    chosen = _choice.choose(problem_key(call), backend)
    if call.dropout_p == 1:  # 1 / (1 - dropout_p) has no value, the output of no weights has
        out, lse = run(q, k, v, qkv, geometry, (*options[:5], 0.0, *options[6:]), backend)
        return out.masked_fill(torch.ones((), dtype=torch.bool, device=out.device), 0.0), lse
    seed = shared.draw_seed(call.dropout_p, call.q.device)
    if chosen == "reference":
        return run_reference(call, seed)
    if key is not None:
        _, text = geometry_of(neighborhood, q.dim() - 3, call.bias is not None)
        _settled.put(key, shared.Settled(chosen, text, call.factor, 0.0))
    return _run_op(call, chosen, qkv, seed)


_settled = shared.CallMemory(NEIGHBORHOOD.apply, lambda bias, q: bias.flatten(1))


def _signature(
    q: Any, k: Any, v: Any, neighborhood: Neighborhood, options: tuple[Any, ...], backend: Any
) -> Any:
    """What decides the checks and the choice of a call with no tensors but q, k, v and a bias; else None."""
    bias, scale, extra_k, extra_v, mask, dropout_p, rel_pos = options
    if not (
        extra_k is extra_v is mask is rel_pos is None and type(dropout_p) in (float, int) and dropout_p == 0
    ):
        return None
    return _settled.key(q, k, v, bias, neighborhood, scale, backend)


def _run_op(call: Call, backend: str, qkv: Tensor | None, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    if call.rel_pos is not None:
        call, qkv = without_rel_pos(call), None
    acc, rank = accumulator(call.q.dtype), call.q.dim() - 3
    _, text = geometry_of(call.neighborhood, rank, call.bias is not None)
    table = None
    if call.bias is not None:
        table = call.bias.flatten(1).to(acc)
        if call.extra_k is not None:  # the table of the kernels goes on with the extra keys
            table = torch.cat([table, table.new_zeros(len(table), call.extra_k.shape[1])], 1)
        table = table.contiguous()
    first = (call.q, call.k, call.v) if qkv is None or qkv.dtype != call.q.dtype else (qkv, None, None)
    mask = shared.key_bias(call.key_padding_mask, acc)
    tensors = (*first, table, None, None, call.extra_k, call.extra_v, mask, None, seed)
    options = (text, call.factor, 0.0, 0, "softmax", call.dropout_p)
    out, lse = NEIGHBORHOOD.apply(backend, first[1] is None, options, *tensors)
    return out, lse


def without_rel_pos(call: Call) -> Call:
    """The same attention with longer rows."""
    scale, q = call.factor, call.q
    if scale == 0:  # nothing of q.k is left, and no factor would bring the channels through
        q, scale = q * 0, 1.0
    terms = [neighborhood_term(axis, q.device) for axis in call.axes]
    more_q, more_k = axis_channels(call.q, call.k, call.rel_pos or (), terms, scale)
    wide = more_q.shape[-1]
    return replace(
        call,
        q=torch.cat([q, more_q], -1),
        k=torch.cat([call.k, more_k], -1),
        extra_k=None if call.extra_k is None else F.pad(call.extra_k, (0, wide)),
        scale=scale,
        rel_pos=None,
    )


def run_reference(
    call: Call, seed: Tensor | None, compute_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Plain PyTorch. compute_dtype: instead of the accumulation type."""
    if torch.is_autocast_enabled(call.q.device.type):  # prepare cast what is to be cast
        with torch.autocast(call.q.device.type, enabled=False):
            return run_reference(call, seed, compute_dtype)
    out, lse = reference.neighborhood(
        flat(call.q),
        flat(call.k),
        flat(call.v),
        call.axes,
        scale=call.factor,
        bias=None if call.bias is None else call.bias.flatten(1),
        extra_k=call.extra_k,
        extra_v=call.extra_v,
        ignored=None if call.key_padding_mask is None else call.key_padding_mask.flatten(1),
        dropout_p=call.dropout_p,
        seed=seed,
        compute_dtype=compute_dtype,
        rel_pos=call.rel_pos,
    )
    rows = call.q.shape[:-1]
    return out.view(*rows, call.v.shape[-1]), lse.to(accumulator(call.q.dtype)).view(rows)
