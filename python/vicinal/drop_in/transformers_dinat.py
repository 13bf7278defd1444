"""Dinat of Hugging Face transformers."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.dinat import modeling_dinat

from vicinal.drop_in.adapter import Adapter
from vicinal.drop_in.swin_attention import changed_parts
from vicinal.neighborhood import neighborhood_attention


class FusedNeighborhoodAttentionModule(modeling_dinat.NeighborhoodAttentionModule):
    """The attention of transformers in one fused operation.

    Attention weights exist only where the original computes them: with `output_attentions` it runs as it
    was."""

    def forward(self, hidden_states: Tensor, output_attentions: bool | None = False) -> tuple[Tensor, ...]:
        """[B, H, W, C] -> ([B, H, W, C],)"""
        if output_attentions:
            outputs: tuple[Tensor, ...] = super().forward(hidden_states, output_attentions)
            return outputs
        attn = self.self
        heads = (attn.num_attention_heads, attn.attention_head_size)
        projections = (attn.query, attn.key, attn.value)
        q, k, v = (project(hidden_states).unflatten(-1, heads) for project in projections)
        out = neighborhood_attention(
            q,
            k,
            v,
            attn.kernel_size,
            dilation=attn.dilation,
            bias=attn.rpb,
            dropout_p=attn.dropout.p if self.training else 0.0,
        )
        assert isinstance(out, Tensor)
        return (self.output(out.flatten(-2), hidden_states),)


def _reason_against(module: Any) -> str | None:
    return changed_parts(module.self, modeling_dinat.NeighborhoodAttention, ("query", "key", "value"))


ADAPTERS = (
    Adapter(
        "neighborhood",
        modeling_dinat.NeighborhoodAttentionModule,
        FusedNeighborhoodAttentionModule,
        "neighborhood_attention",
        _reason_against,
    ),
)
