"""Longformer of Hugging Face transformers: a sliding window, and global tokens that see and are seen by all.

Global tokens leave the window and come as extra keys of the same softmax; what they see themselves, through
projections of their own, is one small dense attention, which runs as it was."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.models.longformer import modeling_longformer

from vicinal.drop_in.adapter import Adapter
from vicinal.drop_in.swin_attention import changed_parts
from vicinal.neighborhood import Neighborhood, neighborhood_attention


class FusedLongformerSelfAttention(modeling_longformer.LongformerSelfAttention):
    """The attention of transformers as one sliding window with extra keys.

    With `output_attentions`, or where the samples of a batch differ in the number of their global tokens, it
    runs as it was."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        is_index_masked: Any = None,
        is_index_global_attn: Any = None,
        is_global_attn: Any = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, ...]:
        """[B, N, C] and masks [B, N] -> ([B, N, C],)"""
        counts = is_index_global_attn.sum(1) if is_global_attn else None
        if output_attentions or (counts is not None and not bool((counts == counts[0]).all())):
            outputs: tuple[Tensor, ...] = super().forward(
                hidden_states,
                attention_mask=attention_mask,
                is_index_masked=is_index_masked,
                is_index_global_attn=is_index_global_attn,
                is_global_attn=is_global_attn,
                output_attentions=output_attentions,
            )
            return outputs
        out = self._window(hidden_states, attention_mask, is_index_global_attn if is_global_attn else None)
        out = out.masked_fill(is_index_masked[..., None], 0.0)
        if is_global_attn:
            out = self._with_global_rows(out, hidden_states, is_index_masked, is_index_global_attn)
        return (out,)

    def _window(self, x: Tensor, attention_mask: Tensor, is_global: Tensor | None) -> Tensor:
        heads = (self.num_heads, self.head_dim)
        q, k, v = (project(x).unflatten(-1, heads) for project in (self.query, self.key, self.value))
        extra_k, extra_v = (
            None if is_global is None else t[is_global].unflatten(0, (len(x), -1)) for t in (k, v)
        )
        side = self.one_sided_attn_window_size
        out = neighborhood_attention(
            q,
            k,
            v,
            Neighborhood((side, side), border="truncate"),
            scale=self.head_dim**-0.5,
            key_padding_mask=attention_mask != 0,
            dropout_p=self.dropout if self.training else 0.0,
            extra_k=extra_k,
            extra_v=extra_v,
        )
        assert isinstance(out, Tensor)
        return out.flatten(-2)

    def _with_global_rows(self, out: Tensor, x: Tensor, masked: Tensor, is_global: Tensor) -> Tensor:
        most, *places = self._get_global_attn_indices(is_global)
        rows, _ = self._compute_global_attn_output_from_hidden(
            hidden_states=x.transpose(0, 1),
            max_num_global_attn_indices=most,
            is_index_global_attn_nonzero=places[0],
            is_local_index_global_attn_nonzero=places[1],
            is_local_index_no_global_attn_nonzero=places[2],
            is_index_masked=masked,
        )
        return torch.index_put(out, places[0], rows.transpose(1, 2).flatten(0, 1).flatten(1))


def _reason_against(attn: Any) -> str | None:
    projections = ("query", "key", "value", "query_global", "key_global", "value_global")
    return changed_parts(attn, modeling_longformer.LongformerSelfAttention, projections)


ADAPTERS = (
    Adapter(
        "neighborhood",
        modeling_longformer.LongformerSelfAttention,
        FusedLongformerSelfAttention,
        "neighborhood_attention, global tokens as extra keys",
        _reason_against,
    ),
)
