"""Linear attention of a sequence that is split over ranks: the ranks exchange sums, not tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._linear_run import as_maps
from ..linear import FeatureMap, FeatureMaps, LinearState
from ..linear import linear_attention as attend
from ._exchange import gather, rank_of, replicated


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature_map: FeatureMaps = "elu1",
    is_causal: bool = False,
    decay: Tensor | None = None,
    normalize: bool = True,
    scale: float | None = None,
    eps: float = 1e-6,
    const: float = 0.0,
    q_den: Tensor | None = None,
    k_den: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    block_size: int | None = None,
    block_mode: str = "previous",
    backend: str | None = None,
    group: Any = None,
) -> Tensor:
    """`vicinal.linear_attention` of a sequence that is split over the ranks of a process group.

    Every rank calls it with its tokens and gets the output of its tokens. Each makes the state of its own
    keys and values, a [K, dv] matrix (and K sums) per head; the states are gathered, and each rank starts
    from the sum of the others', or with is_causal of the earlier ones', decayed. What is sent does not grow
    with the sequence.

    Args:
        q, k, v: this rank's tokens, [B, N, Hq, dk] and [B, M, H, dv]; ranks hold them in order, any number
            each.
        decay: [H], the same on all ranks and its gradient summed over them; or [B, N, H] of this rank's
            tokens.
        key_padding_mask, q_den, k_den: of this rank's tokens.
        block_size: must divide the tokens of every rank but the last (not checked).
        group: the process group; None: all ranks.
        Others: as `vicinal.linear_attention`.

    Returns:
        out [B, N, H, dv]: what one process would have for these tokens.

    Raises:
        ValueError: feature_map looks at all keys ("softmax", or "favor" without is_causal); whatever
            `vicinal.linear_attention` raises.
        RuntimeError: torch.distributed is not initialised.

    Example:
        >>> import torch.distributed as dist
        >>> from vicinal import distributed
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> q = k = v = torch.randn(1, 256, 4, 32)
        >>> distributed.linear_attention(q, k, v, is_causal=True).shape
        torch.Size([1, 256, 4, 32])
        >>> dist.destroy_process_group()
    """
    rank, _ = rank_of(group)
    maps = as_maps(feature_map)
    if maps[1].name == "softmax" or (maps[1].name == "favor" and not is_causal):
        raise ValueError(
            f"feature_map of k is {maps[1].name!r}, over all keys; on a split sequence it cannot be"
        )
    if decay is not None and decay.dim() == 4:
        raise ValueError("decay has a value per channel; on a split sequence it must be [H] or [B, N, H]")
    if decay is not None and decay.dim() == 1:
        (decay,) = replicated(group, decay)
    shared: dict[str, Any] = {"const": const, "key_padding_mask": key_padding_mask}
    own = _own_state(k, v, maps[1], decay if is_causal else None, normalize, k_den, shared)
    total = v.new_zeros(v.shape[0], v.shape[2], dtype=own.s.dtype)
    if decay is not None:
        total = total + (decay * v.shape[1] if decay.dim() == 1 else decay.to(total.dtype).sum(1))
    out = attend(
        q,
        k,
        v,
        feature_map=maps,
        is_causal=is_causal,
        decay=decay,
        normalize=normalize,
        scale=scale,
        eps=eps,
        q_den=q_den,
        k_den=k_den,
        block_size=block_size,
        block_mode=block_mode,
        initial_state=_state_before(own, total, rank, is_causal, group),
        backend=backend,
        **shared,
    )
    assert isinstance(out, Tensor)
    return out


def _own_state(
    k: Tensor,
    v: Tensor,
    map_k: FeatureMap,
    decay: Tensor | None,
    normalize: bool,
    k_den: Tensor | None,
    shared: dict[str, Any],
) -> LinearState:
    """The sums over this rank's tokens, decayed to its last: attention of no queries, which is not causal."""
    wide = torch.float64 if v.dtype == torch.float64 else torch.float32
    if map_k.name == "favor":
        k = map_k(k, keys=True, ignored=shared["key_padding_mask"], streaming=True)
        map_k = as_maps("identity")[0]
    if decay is not None or k.dtype != v.dtype:  # weights and features of favor have no 16-bit form
        k, v = k.to(wide), v.to(wide)
    one = v.new_ones(*v.shape[:3], 1)
    if decay is not None:
        steps = decay.to(wide).expand(v.shape[:3])
        weight = (steps.sum(1, keepdim=True) - steps.cumsum(1)).exp()[..., None]
        v, one = v * weight, weight
    s = _sums(k, v, map_k, shared)
    if not normalize:
        return LinearState(s)
    z = _sums(k, one, map_k, shared) if k_den is None else _sums(k_den.to(v.dtype), one, "identity", shared)
    return LinearState(s, z[..., 0])


def _sums(k: Tensor, v: Tensor, map_k: FeatureMap | str, shared: dict[str, Any]) -> Tensor:
    """sum_j phi(k_j) v_j^T, [B, H, K, dv]."""
    state = attend(k[:, :0], k, v, feature_map=map_k, normalize=False, output_final_state=True, **shared)[1]
    assert isinstance(state, LinearState)
    return state.s


def _state_before(own: LinearState, total: Tensor, rank: int, is_causal: bool, group: Any) -> LinearState:
    """What this rank starts from. One exchange for all parts; every rank takes part in its backward too."""
    z = own.s[..., :0] if own.z is None else own.z[..., None]
    packed = torch.cat([own.s.flatten(2), z.flatten(2), total[..., None]], -1)
    parts = gather(packed, group)
    state = parts[:0].sum(0)
    for r in range(rank if is_causal else len(parts)):
        if r != rank:
            state = state * parts[r][..., -1:].exp() + parts[r]
    s = state[..., : own.s[0, 0].numel()].unflatten(-1, own.s.shape[2:])
    return LinearState(s, None if own.z is None else state[..., s[0, 0].numel() : -1])
