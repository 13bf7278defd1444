"""From a linear attention call to a backend: cast, check, choose, map what needs whole rows, run."""

from __future__ import annotations

from dataclasses import dataclass
from operator import index
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _linear_check as check
from . import reference_linear
from ._choice import Key, choose
from ._choice import problem_key as shared_key
from ._linear_maps import ELEMENTWISE, FeatureMap
from ._linear_op import linear_op

CHANNEL_DECAY = "decay per channel"


class LinearState(NamedTuple):
    """Sums over tokens: s [R, H, K, dv] and, where normalised, z [R, H, K], both float32 (float64 for
    float64); R is the batch or the number of sequences, K the number of features, one more with `const`."""

    s: Tensor
    z: Tensor | None = None


@dataclass(slots=True)
class Call:
    """Checked arguments."""

    q: Tensor
    k: Tensor
    v: Tensor
    maps: tuple[FeatureMap, FeatureMap]
    is_causal: bool
    decay: Tensor | None
    normalize: bool
    scale: float | None
    eps: float
    const: float
    q_den: Tensor | None
    k_den: Tensor | None
    key_padding_mask: Tensor | None
    cu_seqlens: Tensor | None
    block_size: int | None
    block_mode: str
    chunk_size: int | None
    initial_state: LinearState | None
    output_final_state: bool

    @property
    def feature_width(self) -> int:
        """K without the channel of `const`."""
        projection = self.maps[1].projection
        return self.k.shape[-1] if projection is None else projection.shape[0]

    @property
    def mask(self) -> str:
        if self.block_size is not None:
            return self.block_mode
        return "causal" if self.is_causal else "full"

    @property
    def streaming(self) -> bool:
        """Features of a key may not depend on other keys."""
        return self.is_causal or self.output_final_state or self.initial_state is not None


_NAMED = {name: FeatureMap(name) for name in (*ELEMENTWISE, "softmax", "focused")}


def as_map(feature_map: Any) -> FeatureMap:
    if isinstance(feature_map, FeatureMap):
        return feature_map
    if not isinstance(feature_map, str):
        accepted = "a name, a FeatureMap or a pair of them (for q, for k)"
        raise TypeError(f"feature_map is {feature_map!r}; it must be {accepted}")
    known = _NAMED.get(feature_map)
    return FeatureMap(feature_map) if known is None else known


def as_maps(feature_map: Any) -> tuple[FeatureMap, FeatureMap]:
    if not isinstance(feature_map, tuple):
        one = as_map(feature_map)
        return one, one
    if len(feature_map) != 2:
        raise ValueError(f"feature_map has {len(feature_map)} entries; a pair is (for q, for k)")
    return as_map(feature_map[0]), as_map(feature_map[1])


def as_state(state: Any) -> LinearState | None:
    if state is None or isinstance(state, LinearState):
        return state
    if isinstance(state, Tensor):
        return LinearState(state)
    if isinstance(state, tuple) and len(state) == 2:
        return LinearState(*state)
    raise TypeError(f"initial_state is a {type(state).__name__}; it must be a LinearState or (s, z)")


def prepare(q: Any, k: Any, v: Any, *, feature_map: Any, initial_state: Any, **options: Any) -> Call:
    """Cast under autocast, check, and name the arguments."""
    check.check_qkv_types(q, k, v)
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        for name in ("q_den", "k_den"):
            if isinstance(options[name], Tensor):
                options[name] = options[name].to(dtype)
    call = Call(q, k, v, maps=as_maps(feature_map), initial_state=as_state(initial_state), **options)
    check.check_call(call)
    return call


def problem_key(call: Call) -> Key:
    features = [CHANNEL_DECAY] if call.decay is not None and call.decay.dim() == 4 else []
    key = shared_key("linear", call.q, call.v, features)
    return (*key[:3], index(call.feature_width), *key[4:])


def run(call: Call, backend: str | None) -> tuple[Tensor, LinearState]:
    """out and the final state."""
    chosen = choose(problem_key(call), backend)
    if torch.is_autocast_enabled(call.q.device.type):  # prepare cast what is to be cast
        with torch.autocast(call.q.device.type, enabled=False):
            return run_reference(call) if chosen == "reference" else _run_op(call, chosen)
    return run_reference(call) if chosen == "reference" else _run_op(call, chosen)


def run_reference(call: Call, compute_dtype: torch.dtype | None = None) -> tuple[Tensor, LinearState]:
    """Plain PyTorch. compute_dtype: instead of the accumulation type."""
    q, k, map_q, map_k = _mapped(call, compute_dtype or _wide(call.v.dtype))
    options = reference_linear.Options(
        map_q=map_q.name,
        param_q=map_q.param,
        map_k=map_k.name,
        param_k=map_k.param,
        mask=call.mask,
        block_size=call.block_size or 0,
        normalize=call.normalize,
        scale=1.0 if call.scale is None else float(call.scale),
        eps=float(call.eps),
        constant=float(call.const),
    )
    state = call.initial_state
    out, s, z = reference_linear.linear(
        q,
        k,
        call.v,
        options,
        q_den=call.q_den,
        k_den=call.k_den,
        decay=call.decay,
        key_mask=call.key_padding_mask,
        cu_seqlens=call.cu_seqlens,
        initial_s=None if state is None else state.s,
        initial_z=None if state is None else state.z,
        compute_dtype=compute_dtype,
    )
    return out.to(call.v.dtype), LinearState(s, z if call.normalize else None)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


IDENTITY = _NAMED["identity"]


def _mapped(call: Call, dtype: torch.dtype) -> tuple[Tensor, Tensor, FeatureMap, FeatureMap]:
    """q and k, as features of this dtype where their map needs whole rows; and the maps that are left."""
    q, k, (map_q, map_k) = call.q, call.k, call.maps
    if map_q.name not in ELEMENTWISE:
        q, map_q = map_q(q).to(dtype), IDENTITY
    if map_k.name not in ELEMENTWISE:
        ignored, ends = call.key_padding_mask, call.cu_seqlens
        features = map_k(k, keys=True, ignored=ignored, streaming=call.streaming, ends=ends)
        k, map_k = features.to(dtype), IDENTITY
    return q, k, map_q, map_k


def _run_op(call: Call, backend: str) -> tuple[Tensor, LinearState]:
    v, q_den, k_den, dtype = call.v, call.q_den, call.k_den, call.v.dtype
    rows = any(m.name not in ELEMENTWISE for m in call.maps)
    if rows and dtype == torch.float16:  # softmax over many tokens and favor leave its range
        v = v.float()
        q_den, k_den = (None if x is None else x.float() for x in (q_den, k_den))
    q, k, map_q, map_k = _mapped(call, v.dtype)
    q, k = q.to(v.dtype), k.to(v.dtype)
    wide = _wide(dtype)
    decay = None if call.decay is None else call.decay.to(wide)
    s, z = (None, None) if call.initial_state is None else call.initial_state
    options = (
        *(map_q.name, float(map_q.param), map_k.name, float(map_k.param), call.mask),
        *(call.block_size or 0, call.chunk_size or 0, call.normalize),
        *(1.0 if call.scale is None else float(call.scale), float(call.eps), float(call.const)),
    )
    tensors = (q, k, v, q_den, k_den, decay, call.key_padding_mask, call.cu_seqlens, s, z)
    out, _, s, z = linear_op(backend, False, options, *tensors)
    return out.to(dtype), LinearState(s, z if call.normalize else None)
