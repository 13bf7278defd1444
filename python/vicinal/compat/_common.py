"""What the versions of natten have in common, under their layouts and habits with arguments.

In their unfused functions heads come first ([B, heads, *space, D], weights [B, heads, *space, slots]) and
nothing is scaled; in the fused ones heads come last, as in vicinal.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vicinal.neighborhood import neighborhood_attention
from vicinal.neighborhood_slots import neighborhood_aggregate, neighborhood_scores


def plain(value: Any, default: Any) -> Any:
    """None is the default; lists (of a configuration file) are tuples."""
    if value is None:
        return default
    return tuple(value) if isinstance(value, list) else value


def volume(depth: Any, plane: Any) -> tuple[Any, Any, Any]:
    """The entries of three axes, of which the last two share one."""
    return (depth, plane, plane)


def qk(
    query: Tensor,
    key: Tensor,
    kernel_size: Any,
    dilation: Any = 1,
    *,
    is_causal: Any = False,
    rpb: Tensor | None = None,
    additional_keys: Tensor | None = None,
) -> Tensor:
    """query, key [B, h, *space, D], additional_keys [B, h, E, D], rpb [h, 2k - 1, ...] -> [B, h, *space, S +
    E]: q.k + rpb in the order of the window, causal windows filled up with -inf at the end."""
    scores = neighborhood_scores(
        query.movedim(1, -2),
        key.movedim(1, -2),
        plain(kernel_size, None),
        dilation=plain(dilation, 1),
        is_causal=plain(is_causal, False),
        bias=rpb,
        extra_k=None if additional_keys is None else additional_keys.transpose(1, 2),
    )
    return scores.movedim(-2, 1)


def av(
    attn: Tensor,
    value: Tensor,
    kernel_size: Any,
    dilation: Any = 1,
    *,
    is_causal: Any = False,
    additional_values: Tensor | None = None,
) -> Tensor:
    """attn [B, h, *space, S + E], value [B, h, *space, D], additional_values [B, h, E, D] -> [B, h, *space,
    D]."""
    out = neighborhood_aggregate(
        attn.movedim(1, -2),
        value.movedim(1, -2),
        plain(kernel_size, None),
        dilation=plain(dilation, 1),
        is_causal=plain(is_causal, False),
        extra_v=None if additional_values is None else additional_values.transpose(1, 2),
    )
    return out.movedim(-2, 1)


def fused(
    rank: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Any,
    *,
    stride: Any = 1,
    dilation: Any = 1,
    is_causal: Any = False,
    rpb: Tensor | None = None,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    return_lse: bool = False,
) -> Any:
    """query, key, value [B, *space, h, D], additional_* [B, E, h, D] -> [B, *space, h, D], and [B, *space, h]
    with return_lse. A scale of 0 is read as none, as natten does."""
    if query.dim() != rank + 3:
        raise ValueError(f"query has {query.dim()} dimensions; na{rank}d takes [B, {rank} axes, heads, dim]")
    return neighborhood_attention(
        query,
        key,
        value,
        plain(kernel_size, None),
        stride=plain(stride, 1),
        dilation=plain(dilation, 1),
        is_causal=plain(is_causal, False),
        bias=rpb,
        scale=scale or None,
        extra_k=additional_keys,
        extra_v=additional_values,
        return_lse=return_lse,
    )


def ignore_tuning(given: dict[str, Any], known: frozenset[str], function: str) -> None:
    """Refuse keyword arguments that no natten had; the known ones choose kernels and are ignored."""
    unknown = sorted(given.keys() - known)
    if unknown:
        raise TypeError(f"{function}() got unexpected keyword arguments {unknown}")


def _sizes(sizes: tuple[Any, ...], kernel_size: Any, dilation: Any, axes: int) -> tuple[Any, Any]:
    """Kernel and dilation of `axes` arguments each, from the positional arguments after the tensors: both
    (versions from 0.14.5 on), or the dilation alone (before); kernel None where nobody says it."""
    if len(sizes) == 2 * axes:
        return sizes[:axes], sizes[axes:]
    if len(sizes) == axes and kernel_size is None:
        return None, sizes
    if len(sizes) == axes and dilation is not None:
        raise TypeError("give kernel_size and dilation both by position or both by name")
    if len(sizes) == axes:
        return (kernel_size,) * axes, sizes
    if sizes:
        raise TypeError(f"expected {axes} or {2 * axes} sizes after the tensors, got {len(sizes)}")
    return None if kernel_size is None else (kernel_size,) * axes, (plain(dilation, 1),) * axes


def natten_qkrpb(
    query: Tensor,
    key: Tensor,
    rpb: Tensor | None,
    sizes: tuple[Any, ...],
    kernel_size: Any = None,
    dilation: Any = None,
) -> Tensor:
    """natten{1,2,3}dqkrpb with either number of arguments; without a kernel size it is rpb's."""
    rank = query.dim() - 3
    kernel, spread = _sizes(sizes, kernel_size, dilation, 2 if rank == 3 else 1)
    if kernel is None:
        if rpb is None:
            raise TypeError("kernel_size is missing: without rpb nothing else tells it")
        window: Any = tuple((n + 1) // 2 for n in rpb.shape[1:])
    else:
        window = _grid(rank, kernel)
    return qk(query, key, window, _grid(rank, spread), rpb=rpb)


def natten_av(
    attn: Tensor, value: Tensor, sizes: tuple[Any, ...], kernel_size: Any = None, dilation: Any = None
) -> Tensor:
    """natten{1,2,3}dav with either number of arguments; without a kernel size it is the root of the number of
    weights."""
    rank = value.dim() - 3
    kernel, spread = _sizes(sizes, kernel_size, dilation, 2 if rank == 3 else 1)
    if kernel is None:
        side = round(attn.shape[-1] ** (1 / rank))
        if side**rank != attn.shape[-1]:
            raise ValueError(f"attn has {attn.shape[-1]} weights, which is no window of {rank} equal sides")
        window: Any = (side,) * rank
    else:
        window = _grid(rank, kernel)
    return av(attn, value, window, _grid(rank, spread))


def _grid(rank: int, entries: tuple[Any, ...]) -> Any:
    """One entry for all axes, or one for the first of three and one for the others."""
    entries = tuple(plain(entry, 1) for entry in entries)
    return volume(*entries) if len(entries) == 2 else (entries[0],) * rank
