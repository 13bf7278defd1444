"""Segment attention as a module, with the parameters of torch.nn.MultiheadAttention."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ._attend import accumulator
from ._multihead_attend import Problem
from ._multihead_check import added
from ._multihead_local import _LocalMultiheadAttention
from ._segments_type import SegmentGroups, Segments
from ._voxel_types import KeyBias
from .voxel import voxel_attention

__all__ = ["SegmentMultiheadAttention"]


class SegmentMultiheadAttention(_LocalMultiheadAttention):
    """Multi-head attention inside segments of rows; [N, C] -> [N, C].

    It has the constructor and the parameters of `torch.nn.MultiheadAttention`, so state dicts load strictly
    both ways. Where that one attends over gathered, padded sets with a key mask, this one projects and
    attends to the rows there are.

    Args:
        embed_dim: C. num_heads: divides C. bias: give the projections a bias. Default True.
        dropout: of attention weights; there is none yet, so a module in training mode raises unless it is 0.
        add_bias_kv, add_zero_attn: must be False: a segment has no keys but its own.
        kdim, vdim, batch_first, device, dtype: as torch.nn.MultiheadAttention.
        segments: which rows attend to which, for callers that pass none, such as torch's encoder and decoder
            layers. It is an attribute, which may be set before every call. With it a batch [N, L, C] is taken
            too, its rows counted sample after sample. Default None.
        backend: None for the fastest that can run, or its name.

    Example:
        >>> from vicinal import segments
        >>> attend = SegmentMultiheadAttention(192, 8)
        >>> x = torch.randn(5, 192)
        >>> attend(x, x, x, segments.from_lengths(torch.tensor([3, 2])))[0].shape
        torch.Size([5, 192])
    """

    what = "segment attention"

    def __init__(
        self,
        *args: Any,
        segments: Segments | SegmentGroups | None = None,
        backend: str | None = None,
        **named: Any,
    ) -> None:
        super().__init__(*args, backend=backend, **named)
        if self.bias_k is not None or self.add_zero_attn:
            raise ValueError("add_bias_kv or add_zero_attn is True; a segment has no keys but its own")
        self.segments = segments

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        segments: Segments | SegmentGroups | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        key_padding_mask: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend.

        Args:
            query: [Nq, C]. key: [Nk, kdim]. value: [Nk, vdim]. Batches: see `segments` of the constructor.
            segments: which rows attend to which. Default: those of the module.
            need_weights: must be False. attn_mask: must be None.
            key_padding_mask: [Nk] bool (True = ignored) or float (added).
            **options: `bias` and `scale` of `voxel_attention`.

        Returns:
            [Nq, C], and None in the place of the weights.
        """
        if isinstance(segments, Tensor):
            raise TypeError("segments is a Tensor; pass key_padding_mask by its name")
        found = self.segments if segments is None else segments
        if found is None:
            raise ValueError("segments is None; pass them, or set the module's")
        self._refuse_weights(need_weights)
        masks = (key_padding_mask, False, attn_mask, average_attn_weights, is_causal)
        return self._run(query, key, value, *masks, segments=found, **options)

    def _attend(self, p: Problem, **geometry: Any) -> tuple[Tensor, None]:
        if p.pairs is not None:
            raise NotImplementedError("attn_mask is given; segments say which rows attend to which")
        if p.dropout_p > 0:
            raise NotImplementedError(f"dropout is {p.dropout_p}; attention weights are not dropped yet")
        if p.keys is not None:
            terms = geometry.get("bias") or ()
            keys = KeyBias(added(p.keys, accumulator(p.q.dtype)).flatten())
            geometry["bias"] = (*(terms if isinstance(terms, tuple) else (terms,)), keys)
        q, k, v = (p.samples_first(x).flatten(0, 1) for x in (p.q, p.k, p.v))
        out = voxel_attention(q, k, v, backend=self.backend, **geometry)
        assert isinstance(out, Tensor)
        return p.samples_first(out.unflatten(0, p.samples_first(p.q).shape[:2])), None

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, num_heads={self.num_heads}"
