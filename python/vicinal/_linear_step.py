"""One token of causal linear attention, on a state that is updated in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _backends
from . import _linear_check as check
from ._choice import choose
from ._linear_maps import ELEMENTWISE
from ._linear_run import IDENTITY, Call, LinearState, as_state, prepare, problem_key, run_reference

# What was found for the first call of a signature: op, its options.
Settled = tuple[Any, tuple[Any, ...]]
_settled: dict[Any, Settled] = {}
_backends.on_change(_settled.clear)

Options = tuple[Any, Tensor | None, Any, Any, Any, Any]  # feature_map, decay, normalize, scale, eps, const


def step(q: Any, k: Any, v: Any, state: Any, options: Options, backend: Any) -> Tensor:
    key = _signature(q, k, v, state, options, backend)
    known = None if key is None else _settled.get(key)
    if known is not None:
        op, settings = known
        out = op(q, k, v, state.s, state.z, options[1], *settings)
        assert isinstance(out, Tensor)
        return out
    feature_map, decay, normalize, scale, eps, const = options
    call = prepare_step(q, k, v, state, feature_map, decay, normalize, scale, eps, const)
    chosen = choose(problem_key(call), backend)
    if chosen == "reference":
        return _reference(call)
    return _run_op(call, chosen, key)


def prepare_step(
    q: Any,
    k: Any,
    v: Any,
    state: Any,
    feature_map: Any,
    decay: Any,
    normalize: Any,
    scale: Any,
    eps: Any,
    const: Any,
) -> Call:
    if state is None:
        raise TypeError("state is None; it must be a LinearState")
    call = prepare(
        q,
        k,
        v,
        feature_map=feature_map,
        is_causal=True,
        decay=decay,
        normalize=normalize,
        scale=scale,
        eps=eps,
        const=const,
        q_den=None,
        k_den=None,
        key_padding_mask=None,
        cu_seqlens=None,
        block_size=None,
        block_mode="previous",
        chunk_size=None,
        initial_state=as_state(state),
        output_final_state=True,
    )
    check.check_step(call)
    return call


def _signature(q: Any, k: Any, v: Any, state: Any, options: Options, backend: Any) -> Any:
    """What decides the checks, the choice and the launch; None where there is no shortcut."""
    feature_map, decay, normalize, scale, eps, const = options
    plain = (
        isinstance(q, Tensor)
        and isinstance(k, Tensor)
        and isinstance(v, Tensor)
        and type(state) is LinearState
        and isinstance(state.s, Tensor)
        and type(feature_map) is str
        and type(normalize) is bool
        and type(scale) in (float, type(None))
        and type(eps) is float
        and type(const) is float
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled(q.device.type)
        and not torch.is_grad_enabled()
    )
    if not plain:
        return None
    given: list[Any] = [q.device, normalize, scale, eps, const, feature_map, backend]
    for x in (q, k, v, state.s, state.z, decay):
        if x is None:
            given.append(None)
        elif isinstance(x, Tensor):
            given += (x.shape, x.dtype, x.device, x.is_contiguous())
        else:
            return None
    return tuple(given)


def _reference(call: Call) -> Tensor:
    state = call.initial_state
    assert state is not None
    with torch.no_grad():
        out, after = run_reference(call)
        state.s.copy_(after.s)
        if state.z is not None and after.z is not None:
            state.z.copy_(after.z)
    return out


def _run_op(call: Call, backend: str, key: Any) -> Tensor:
    state = call.initial_state
    assert state is not None
    q, k, v, dtype = call.q, call.k, call.v, call.v.dtype
    map_q, map_k = call.maps
    rows = any(m.name not in ELEMENTWISE for m in call.maps)
    if rows and dtype == torch.float16:
        v = v.float()
    if map_q.name not in ELEMENTWISE:
        q, map_q = map_q(q), IDENTITY
    if map_k.name not in ELEMENTWISE:
        k, map_k = map_k(k, keys=True, streaming=True), IDENTITY
    q, k = q.to(v.dtype), k.to(v.dtype)
    decay = None if call.decay is None else call.decay.to(state.s.dtype)
    settings = (
        *(map_q.name, float(map_q.param), map_k.name, float(map_k.param)),
        *(1.0 if call.scale is None else float(call.scale), float(call.eps), float(call.const)),
    )
    op = getattr(torch.ops.vicinal.linear_step, backend)
    if key is not None and not rows and decay is call.decay:
        if len(_settled) >= 1024:
            _settled.clear()
        _settled[key] = (op, settings)
    out = op(q, k, v, state.s, state.z, decay, *settings)
    assert isinstance(out, Tensor)
    return out.to(dtype)
