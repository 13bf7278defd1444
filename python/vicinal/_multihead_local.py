"""Windowed, neighborhood and linear attention under the contract of nn.MultiheadAttention, for the slots of
torch's encoder and decoder layers."""

from __future__ import annotations

from math import prod
from typing import Any

from torch import Tensor

from . import _multihead_check as check
from . import _windowed_run
from ._attend import accumulator
from ._multihead import MultiheadAttention
from ._multihead_attend import Problem
from ._neighborhood_types import Neighborhood
from ._windowed_op import plans
from ._windowed_types import Size, Windows
from .linear import FeatureMap, linear_attention
from .neighborhood import neighborhood_attention
from .plan import box_tokens
from .windowed import windowed_attention

__all__ = ["LinearMultiheadAttention", "NeighborhoodMultiheadAttention", "WindowedMultiheadAttention"]

_ARGUMENTS = """
        embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device,
            dtype: as torch.nn.MultiheadAttention, whose parameters and state dicts these are."""


class _LocalMultiheadAttention(MultiheadAttention):
    """What the modules with a geometry share: no weights, and never torch's full attention in their place."""

    what: str

    def __init__(self, *args: Any, backend: str | None = None, **named: Any) -> None:
        super().__init__(*args, backend=backend, **named)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; arguments and layout as `MultiheadAttention`, but need_weights is False by default and must
        be, because there are no dense weights. The second result is None."""
        self._refuse_weights(need_weights)
        masks = (key_padding_mask, False, attn_mask, average_attn_weights, is_causal)
        return self._run(query, key, value, *masks)

    def _refuse_weights(self, need_weights: bool) -> None:
        if need_weights:
            raise NotImplementedError(f"need_weights is True; {self.what} has no dense weights to return")

    def __prepare_scriptable__(self) -> Any:
        raise NotImplementedError(f"{self.what} cannot be scripted; use torch.compile or torch.export")

    def explain(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError(f"{self.what} always runs its own kernels; ask explain about its function")

    def _why_upstream(self, query: Tensor, key: Tensor, value: Tensor) -> str:
        return ""

    def _grid(self, p: Problem, grid: tuple[int, ...] | None) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """q, k, v [N, *grid, h, d], and the grid."""
        tensors = tuple(p.samples_first(x) for x in (p.q, p.k, p.v))
        n_q, n_k = tensors[0].shape[1], tensors[1].shape[1]
        space = (n_q,) if grid is None else grid
        if prod(space) != n_q or n_q != n_k:
            raise ValueError(
                f"query has {n_q} tokens and key {n_k}; {self.what} with grid {grid} needs {prod(space)} of "
                "both"
            )
        return tuple(x.unflatten(1, space) for x in tensors), space

    def _flat(self, p: Problem, out: Any, space: tuple[int, ...]) -> tuple[Tensor, None]:
        assert isinstance(out, Tensor)
        return p.samples_first(out.flatten(1, len(space))), None


def _checked_grid(grid: Any) -> tuple[int, ...] | None:
    if grid is None:
        return None
    sizes = (grid,) if isinstance(grid, int) else tuple(grid)
    if not 1 <= len(sizes) <= 3 or not all(isinstance(n, int) and n >= 1 for n in sizes):
        raise ValueError(f"grid is {grid!r}; it must be None, an int or a tuple of 1 to 3 ints >= 1")
    return sizes


class WindowedMultiheadAttention(_LocalMultiheadAttention):
    __doc__ = f"""Multi-head attention inside windows of a grid of tokens, in torch's slots.

    out_proj(windowed_attention(q, k, v, windows)); tokens are the grid row by row, last axis fastest.

    Args:{_ARGUMENTS}
        windows: `Windows`, or its size alone.
        grid: extents of the grid, whose product is the number of tokens; None: a sequence of any length.
        backend: None for the fastest that can run, or its name.

    Example:
        >>> attention = WindowedMultiheadAttention(32, 4, batch_first=True, windows=7, grid=(14, 21))
        >>> x = torch.randn(2, 14 * 21, 32)
        >>> attention(x, x, x)[0].shape
        torch.Size([2, 294, 32])

    Source: Liu et al., Swin Transformer (arXiv 2103.14030).
    """
    what = "windowed attention"

    def __init__(
        self,
        *args: Any,
        windows: Windows | Size,
        grid: int | tuple[int, ...] | None = None,
        backend: str | None = None,
        **named: Any,
    ) -> None:
        super().__init__(*args, backend=backend, **named)
        self.windows = windows if isinstance(windows, Windows) else Windows(windows)
        self.grid = _checked_grid(grid)

    def _attend(self, p: Problem, **geometry: Any) -> tuple[Tensor, Tensor | None]:
        (q, k, v), space = self._grid(p, self.grid)
        extra_k, extra_v = self._extra_keys(p)
        out = windowed_attention(
            q,
            k,
            v,
            self.windows,
            extra_k=extra_k,
            extra_v=extra_v,
            key_padding_mask=None if p.keys is None else p.keys.unflatten(1, space),
            attn_mask=None if p.pairs is None else self._mask_of_windows(p.pairs, q, space),
            dropout_p=p.dropout_p,
            backend=self.backend,
        )
        return self._flat(p, out, space)

    def _mask_of_windows(self, pairs: Tensor, q: Tensor, space: tuple[int, ...]) -> Tensor:
        """attn_mask [1 or N, 1 or h, L, L] as [N windows, 1 or h, queries, keys]: pairs of each window."""
        if pairs.requires_grad:
            raise NotImplementedError("attn_mask requires grad; windowed attention has no gradient for it")
        if self.windows.head_groups is not None:
            raise NotImplementedError("attn_mask is given; windows with head_groups take none")
        text = _windowed_run._geometry(self.windows, len(space), "none")[1]
        ((_, _, plan),) = plans(text, space, space, q.shape[-2], q.device)
        queries, keys = (box_tokens(plan, keys=side).to(q.device).clamp_min(0) for side in (False, True))
        inside = check.added(pairs, accumulator(q.dtype))[:, :, queries[:, :, None], keys[:, None, :]]
        return inside.transpose(1, 2).flatten(0, 1)

    def extra_repr(self) -> str:
        return f"{self.windows}, grid={self.grid}"


class NeighborhoodMultiheadAttention(_LocalMultiheadAttention):
    __doc__ = f"""Multi-head attention of every token to a neighborhood of it, in torch's slots.

    out_proj(neighborhood_attention(q, k, v, neighborhood)); tokens are the grid row by row, last axis
    fastest.
    With a causal neighborhood the causal attn_mask and hint of decoder layers are accepted, and any other
    attn_mask raises.

    Args:{_ARGUMENTS}
        neighborhood: `Neighborhood`, or its kernel_size alone.
        grid: extents of the grid, whose product is the number of tokens; None: a sequence of any length.
        backend: None for the fastest that can run, or its name.

    Example:
        >>> attention = NeighborhoodMultiheadAttention(32, 4, batch_first=True, neighborhood=7)
        >>> x = torch.randn(2, 50, 32)
        >>> attention(x, x, x)[0].shape
        torch.Size([2, 50, 32])

    Source: Hassani et al., arXiv:2204.07143.
    """
    what = "neighborhood attention"

    def __init__(
        self,
        *args: Any,
        neighborhood: Neighborhood | int | tuple[Any, ...],
        grid: int | tuple[int, ...] | None = None,
        backend: str | None = None,
        **named: Any,
    ) -> None:
        super().__init__(*args, backend=backend, **named)
        self.neighborhood = (
            neighborhood if isinstance(neighborhood, Neighborhood) else Neighborhood(neighborhood)
        )
        self.grid = _checked_grid(grid)

    def _attend(self, p: Problem, **geometry: Any) -> tuple[Tensor, Tensor | None]:
        (q, k, v), space = self._grid(p, self.grid)
        causal = self.neighborhood.is_causal in (True, (True,)) and len(space) == 1
        _refuse_pairs(p, causal, self.what)
        keys = check.only_hidden(p.keys, self.what)
        extra_k, extra_v = self._extra_keys(p)
        out = neighborhood_attention(
            q,
            k,
            v,
            self.neighborhood,
            extra_k=extra_k,
            extra_v=extra_v,
            key_padding_mask=None if keys is None else keys.unflatten(1, space),
            dropout_p=p.dropout_p,
            backend=self.backend,
        )
        return self._flat(p, out, space)

    def extra_repr(self) -> str:
        return f"{self.neighborhood}, grid={self.grid}"


def _refuse_pairs(p: Problem, causal: bool, what: str) -> None:
    if p.pairs is not None and not (causal and p.causal):
        raise NotImplementedError(
            f"attn_mask is given; {what} takes it only where it is causal, with is_causal=True, and so is "
            "the module"
        )


class LinearMultiheadAttention(_LocalMultiheadAttention):
    __doc__ = f"""Multi-head linear attention, in torch's slots.

    out_proj(linear_attention(q, k, v)): weights are products of features, so cost grows with the tokens. It
    takes queries and keys of different lengths unless it is causal. With is_causal the causal attn_mask and
    hint of decoder layers are accepted; any other attn_mask raises.

    Args:{_ARGUMENTS}
        dropout must be 0, because there are no weights to drop; a causal module takes no added keys.
        feature_map: of `linear_attention`.
        is_causal: token i sees tokens up to i.
        backend: None for the fastest that can run, or its name.

    Example:
        >>> attention = LinearMultiheadAttention(32, 4, batch_first=True)
        >>> x, memory = torch.randn(2, 50, 32), torch.randn(2, 80, 32)
        >>> attention(x, memory, memory)[0].shape
        torch.Size([2, 50, 32])

    Source: Katharopoulos et al., Transformers are RNNs (arXiv 2006.16236).
    """
    what = "linear attention"

    def __init__(
        self,
        *args: Any,
        feature_map: str | FeatureMap | tuple[Any, Any] = "elu1",
        is_causal: bool = False,
        backend: str | None = None,
        **named: Any,
    ) -> None:
        super().__init__(*args, backend=backend, **named)
        if self.dropout:
            raise ValueError(f"dropout is {self.dropout}; linear attention has no weights to drop")
        if is_causal and (self.bias_k is not None or self.add_zero_attn):
            raise ValueError("add_bias_kv or add_zero_attn is True; a causal module takes no added keys")
        self.feature_map = feature_map
        self.is_causal = is_causal

    def _attend(self, p: Problem, **geometry: Any) -> tuple[Tensor, Tensor | None]:
        _refuse_pairs(p, self.is_causal, self.what)
        p = self._with_extra_keys(p)
        q, k, v = (p.samples_first(x) for x in (p.q, p.k, p.v))
        out = linear_attention(
            q,
            k,
            v,
            feature_map=self.feature_map,
            is_causal=self.is_causal,
            key_padding_mask=check.only_hidden(p.keys, self.what),
            backend=self.backend,
        )
        assert isinstance(out, Tensor)
        return p.samples_first(out), None

    def extra_repr(self) -> str:
        return f"feature_map={self.feature_map!r}, is_causal={self.is_causal}"
