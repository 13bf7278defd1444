"""Checks of the arguments of linear attention: every message names the argument, what it is and what it may
be."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ._linear_maps import FeatureMap
    from ._linear_run import Call

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
BLOCK_MODES = ("previous", "inclusive")
SCALINGS = ("norms", "regular")


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def one_of(name: str, value: Any, accepted: tuple[str, ...]) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, accepted))}")
    if value not in accepted:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, accepted))}")


def flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}; it must be True or False")


def number(name: str, value: Any, lowest: float = -float("inf")) -> None:
    accepted = "a finite float" if lowest == -float("inf") else f"a finite float, at least {lowest:g}"
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}; it must be {accepted}")
    if not lowest <= value < float("inf") or value == -float("inf"):
        raise ValueError(f"{name} is {value!r}; it must be {accepted}")


def count(name: str, value: Any) -> None:
    if not is_int(value):
        raise TypeError(f"{name} is {value!r}; it must be an int >= 1 or None")
    if value < 1:
        raise ValueError(f"{name} is {value!r}; it must be an int >= 1 or None")


def tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; it must be a tensor")


def floating(name: str, value: Any) -> None:
    tensor(name, value)
    if not value.is_floating_point():
        raise TypeError(f"{name} is {value.dtype}; it must be a float tensor")


def shape(name: str, x: Tensor, expected: tuple[int, ...], meaning: str) -> None:
    if tuple(x.shape) != tuple(expected):
        raise ValueError(f"{name} has shape {list(x.shape)}; it must be {meaning} = {list(expected)}")


def check_feature_map(feature_map: FeatureMap) -> None:
    from ._linear_maps import NAMES, NORM_SCOPES

    one_of("feature_map", feature_map.name, NAMES)
    number("param", feature_map.param)
    number("power", feature_map.power, 1.0)
    one_of("norm_scope", feature_map.norm_scope, NORM_SCOPES)
    if feature_map.param and feature_map.name not in ("relu", "exp"):
        raise ValueError(f"param is {feature_map.param!r}; feature map {feature_map.name!r} takes only 0")
    if feature_map.scale is not None:
        floating("scale", feature_map.scale)
        if feature_map.name != "focused":
            raise ValueError(f"scale is given; feature map {feature_map.name!r} takes only None")
    if feature_map.name == "favor":
        floating("projection", feature_map.projection)
        assert feature_map.projection is not None
        if feature_map.projection.dim() != 2 or feature_map.projection.shape[0] < 1:
            raise ValueError(f"projection has shape {list(feature_map.projection.shape)}; it must be [m, dk]")
    elif feature_map.projection is not None:
        raise ValueError(f"projection is given; feature map {feature_map.name!r} takes only None")


def check_projection(dim: Any, features: Any, scaling: Any) -> None:
    count("dim", dim)
    if features is not None:
        count("features", features)
    one_of("scaling", scaling, SCALINGS)


def check_qkv_types(q: Any, k: Any, v: Any) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        tensor(name, x)
        if x.dim() != 4:
            raise ValueError(f"{name} has shape {list(x.shape)}; it must be [B, N, heads, head_dim]")
    if q.dtype not in DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise TypeError(f"q is {q.dtype}; it must be one of {names}")
    for name, x in (("k", k), ("v", v)):
        _like_q(name, x, q)


def _like_q(name: str, x: Tensor, q: Tensor) -> None:
    if x.dtype != q.dtype:
        raise TypeError(f"{name} is {x.dtype}; it must be {q.dtype} as q")
    _on_device(name, x, q)


def _on_device(name: str, x: Tensor, q: Tensor) -> None:
    if x.device != q.device:
        raise ValueError(f"{name} is on {x.device}; it must be on {q.device} as q")


def check_call(call: Call) -> None:
    """All arguments of a call against each other."""
    _check_options(call)
    _check_shapes(call)
    _check_maps(call)
    _check_mask(call)
    _check_den(call)
    if call.decay is not None:
        _check_decay(call)
    if call.key_padding_mask is not None:
        tensor("key_padding_mask", call.key_padding_mask)
        _on_device("key_padding_mask", call.key_padding_mask, call.q)
        if call.key_padding_mask.dtype != torch.bool:
            raise TypeError(
                f"key_padding_mask is {call.key_padding_mask.dtype}; it must be bool (True = ignored)"
            )
        shape("key_padding_mask", call.key_padding_mask, tuple(call.k.shape[:2]), "[B, M]")
    if call.cu_seqlens is not None:
        _check_sequences(call)
    _check_state(call)


def _check_options(call: Call) -> None:
    for name in ("is_causal", "normalize", "output_final_state"):
        flag(name, getattr(call, name))
    if call.scale is not None:
        number("scale", call.scale)
    number("eps", call.eps, 0.0)
    number("const", call.const)
    one_of("block_mode", call.block_mode, BLOCK_MODES)
    for name in ("block_size", "chunk_size"):
        if getattr(call, name) is not None:
            count(name, getattr(call, name))


def _check_shapes(call: Call) -> None:
    q, k, v = call.q, call.k, call.v
    shape("k", k, (q.shape[0], k.shape[1], *q.shape[2:]), "[B, M, Hq, dk]")
    shape("v", v, (q.shape[0], k.shape[1], v.shape[2], v.shape[3]), "[B, M, H, dv]")
    if q.shape[-1] < 1 or v.shape[-1] < 1:
        raise ValueError(f"q and v have head dims {q.shape[-1]} and {v.shape[-1]}; they must be at least 1")
    if q.shape[2] != v.shape[2] and (q.shape[2] < 1 or v.shape[2] % q.shape[2]):
        raise ValueError(f"q has {q.shape[2]} heads; their number must divide the {v.shape[2]} heads of v")


def _check_maps(call: Call) -> None:
    for feature_map in call.maps:
        w, scale = feature_map.projection, feature_map.scale
        if w is not None:
            _on_device("projection", w, call.q)
            shape("projection", w, (w.shape[0], call.q.shape[-1]), "[m, dk]")
        if scale is not None:
            _on_device("scale of the feature map", scale, call.q)
            own = (call.q.shape[2], call.q.shape[-1])
            last = tuple(scale.shape[-2:])
            fits = (
                all(a in (1, b) for a, b in zip(last[::-1], own[::-1])) and scale.numel() <= own[0] * own[1]
            )
            if not fits:
                raise ValueError(
                    f"scale of the feature map has shape {list(scale.shape)}; "
                    f"it must broadcast to [Hq, dk] = {list(own)}"
                )
    if call.maps[1].name == "softmax":
        for name in ("is_causal", "cu_seqlens", "initial_state", "output_final_state"):
            if getattr(call, name) is not None and getattr(call, name) is not False:
                raise ValueError(f"feature_map of k is 'softmax', over all tokens; {name} must not be given")


def _check_mask(call: Call) -> None:
    n, m = call.q.shape[1], call.k.shape[1]
    if call.block_size is not None and not call.is_causal:
        raise ValueError(f"block_size is {call.block_size!r}; it needs is_causal=True")
    if call.block_mode != "previous" and call.block_size is None:
        raise ValueError(f"block_mode is {call.block_mode!r}; it needs block_size")
    for name, given in (("is_causal", call.is_causal), ("cu_seqlens", call.cu_seqlens is not None)):
        if given and n != m:
            raise ValueError(f"k has {m} tokens; with {name} it must have {n} as q")


def _check_den(call: Call) -> None:
    if (call.q_den is None) != (call.k_den is None):
        raise ValueError("q_den and k_den must be given together")
    if call.q_den is None or call.k_den is None:
        return
    if not call.normalize:
        raise ValueError("q_den and k_den are given, but normalize is False; they make the denominator")
    for name, x, like, letter in (("q_den", call.q_den, call.q, "N"), ("k_den", call.k_den, call.k, "M")):
        tensor(name, x)
        _like_q(name, x, call.q)
        width = call.q_den.shape[-1] if call.q_den.dim() == 4 else 0
        shape(name, x, (*like.shape[:3], width), f"[B, {letter}, Hq, dd]")
        if width < 1:
            raise ValueError(f"{name} has head dim {width}; it must be at least 1")


def _check_decay(call: Call) -> None:
    decay = call.decay
    floating("decay", decay)
    assert decay is not None
    _on_device("decay", decay, call.q)
    if not call.is_causal:
        raise ValueError("decay is given, but is_causal is False; a decay needs is_causal=True")
    if call.block_size is not None:
        raise ValueError("decay is given together with block_size; blocks have no decay")
    batch, n, heads, _ = call.v.shape
    width = call.q.shape[-1]
    if tuple(decay.shape) not in ((heads,), (batch, n, heads), (batch, n, heads, width)):
        raise ValueError(
            f"decay has shape {list(decay.shape)}; it must be [H] = {[heads]}, "
            f"[B, N, H] = {[batch, n, heads]} or [B, N, H, dk] = {[batch, n, heads, width]}"
        )
    if decay.dim() == 4 and (call.const or call.q_den is not None or call.maps[1].name == "favor"):
        raise ValueError("decay has a channel dimension; it goes with neither const, q_den nor favor")


def _check_sequences(call: Call) -> None:
    ends = call.cu_seqlens
    tensor("cu_seqlens", ends)
    assert ends is not None
    _on_device("cu_seqlens", ends, call.q)
    if ends.dtype != torch.int32:
        raise TypeError(f"cu_seqlens is {ends.dtype}; it must be int32")
    if ends.dim() != 1 or ends.shape[0] < 1:
        raise ValueError(f"cu_seqlens has shape {list(ends.shape)}; it must be [sequences + 1]")
    if call.q.shape[0] != 1:
        raise ValueError(f"q has batch size {call.q.shape[0]}; with cu_seqlens it must be 1")
    if ends.device.type != "cpu" or torch.compiler.is_compiling() or type(ends) is not Tensor:
        return  # the values would have to be waited for, or are not known yet
    if torch._C._are_functorch_transforms_active():
        return
    values, tokens = ends.tolist(), call.q.shape[1]
    if values[0] != 0:
        raise ValueError(f"cu_seqlens starts with {values[0]}; it must start with 0")
    for a, b in itertools.pairwise(values):
        if b < a:
            raise ValueError(f"cu_seqlens descends from {a} to {b}; it must not")
    if values[-1] > tokens:
        raise ValueError(f"cu_seqlens ends with {values[-1]}; it must be at most {tokens}, the tokens of q")


def _check_state(call: Call) -> None:
    state = call.initial_state
    if state is None:
        return
    sequences = call.v.shape[0] if call.cu_seqlens is None else call.cu_seqlens.shape[0] - 1
    check_state("initial_state", state.s, state.z, call, sequences)


def check_state(name: str, s: Any, z: Any, call: Call, sequences: int) -> None:
    """A state's tensors: s [R, H, K, dv] and, where normalised, z [R, H, Kd], both float32 (float64)."""
    wide = torch.float64 if call.v.dtype == torch.float64 else torch.float32
    heads, dim_v = call.v.shape[2:]
    extra = int(call.const != 0)
    width = call.feature_width + extra
    width_den = width if call.q_den is None else call.q_den.shape[-1] + extra
    tensor(f"s of {name}", s)
    shape(f"s of {name}", s, (sequences, heads, width, dim_v), "[sequences, H, K, dv]")
    if (z is not None) != call.normalize:
        raise ValueError(
            f"z of {name} is {'given' if z is not None else None}; normalize is {call.normalize}"
        )
    if z is not None:
        tensor(f"z of {name}", z)
        shape(f"z of {name}", z, (sequences, heads, width_den), "[sequences, H, K]")
    for part, x in (("s", s), ("z", z)):
        if x is not None:
            _on_device(f"{part} of {name}", x, call.q)
            if x.dtype != wide:
                raise TypeError(f"{part} of {name} is {x.dtype}; it must be {wide}")


def check_step(call: Call) -> None:
    """What a step asks for besides the checks of linear_attention."""
    if call.q.shape[1] != 1:
        raise ValueError(f"q has {call.q.shape[1]} tokens; a step takes 1")
    state = call.initial_state
    assert state is not None
    for name, x in (("s", state.s), ("z", state.z)):
        if x is not None and not x.is_contiguous():
            raise ValueError(f"{name} of state is not contiguous; it is updated in place and must be")
    if torch.is_grad_enabled():
        given = {"q": call.q, "k": call.k, "v": call.v, "decay": call.decay, "s": state.s, "z": state.z}
        for name, x in given.items():
            if x is not None and x.requires_grad:
                raise ValueError(
                    f"{name} requires grad; a step has no gradients: use torch.no_grad(), "
                    "or linear_attention with initial_state"
                )


def check_scan(x: Any, p: Any, initial_state: Any) -> None:
    floating("x", x)
    if x.dim() != 3 or x.shape[-1] < 1:
        raise ValueError(f"x has shape {list(x.shape)}; it must be [B, N, D]")
    floating("p", p)
    shape("p", p, tuple(x.shape[:2]), "[B, N]")
    _on_device("p", p, x)
    if initial_state is not None:
        floating("initial_state", initial_state)
        shape("initial_state", initial_state, (initial_state.shape[0], x.shape[-1]), "[sequences, D]")
