"""Swinv2 and Swin2SR of Hugging Face transformers, whose layers are the same.

The mask between regions of a shift is added twice there: -200."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.swin2sr import modeling_swin2sr
from transformers.models.swinv2 import modeling_swinv2

from vicinal.drop_in.adapter import Adapter
from vicinal.drop_in.swin_attention import attend_projected, changed_parts, cosine_table, windows_on


def _forward(layer: Any, hidden_states: Tensor, input_dimensions: tuple[int, int]) -> Tensor:
    attn, side = layer.attention.self, layer.window_size
    x = attend_projected(
        hidden_states.unflatten(1, input_dimensions),
        attn.query,
        attn.key,
        attn.value,
        windows_on(input_dimensions, (side, side), shift=layer.shift_size, mask_value=-200.0),
        attn.attention_head_size,
        bias=cosine_table(attn.continuous_position_bias_mlp, attn.relative_coords_table),
        logit_scale=attn.logit_scale,
        dropout_p=attn.dropout.p if layer.training else 0.0,
    )
    x = layer.attention.output(x.flatten(1, 2), hidden_states)
    hidden_states = hidden_states + layer.drop_path(layer.layernorm_before(x))
    x = layer.output(layer.intermediate(hidden_states))
    return hidden_states + layer.drop_path(layer.layernorm_after(x))


class FusedSwinv2Layer(modeling_swinv2.Swinv2Layer):
    """The layer of transformers with window attention in place on the map.

    With `output_attentions` it runs as it was."""

    def forward(
        self,
        hidden_states: Tensor,
        input_dimensions: tuple[int, int],
        output_attentions: bool | None = False,
    ) -> tuple[Tensor, ...]:
        """[B, H * W, C] and (H, W) -> ([B, H * W, C],)"""
        if output_attentions:
            outputs: tuple[Tensor, ...] = super().forward(hidden_states, input_dimensions, output_attentions)
            return outputs
        return (_forward(self, hidden_states, input_dimensions),)


class FusedSwin2SRLayer(modeling_swin2sr.Swin2SRLayer):
    """The layer of transformers with window attention in place on the map.

    With `output_attentions` it runs as it was."""

    def forward(
        self,
        hidden_states: Tensor,
        input_dimensions: tuple[int, int],
        output_attentions: bool | None = False,
    ) -> tuple[Tensor, ...]:
        """[B, H * W, C] and (H, W) -> ([B, H * W, C],)"""
        if output_attentions:
            outputs: tuple[Tensor, ...] = super().forward(hidden_states, input_dimensions, output_attentions)
            return outputs
        return (_forward(self, hidden_states, input_dimensions),)


def _against_v2(layer: Any) -> str | None:
    attn = layer.attention.self
    return changed_parts(attn, modeling_swinv2.Swinv2SelfAttention, ("query", "key", "value"))


def _against_sr(layer: Any) -> str | None:
    attn = layer.attention.self
    return changed_parts(attn, modeling_swin2sr.Swin2SRSelfAttention, ("query", "key", "value"))


ADAPTERS = (
    Adapter("windowed", modeling_swinv2.Swinv2Layer, FusedSwinv2Layer, "windowed_attention", _against_v2),
    Adapter("windowed", modeling_swin2sr.Swin2SRLayer, FusedSwin2SRLayer, "windowed_attention", _against_sr),
)
