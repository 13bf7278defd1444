"""The Swin encoders of Donut and MaskFormer in Hugging Face transformers."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.donut import modeling_donut_swin
from transformers.models.maskformer import modeling_maskformer_swin

from vicinal.drop_in.adapter import Adapter
from vicinal.drop_in.swin_attention import attend_projected, changed_parts, windows_on


def _forward(layer: Any, hidden_states: Tensor, input_dimensions: tuple[int, int]) -> Tensor:
    attn, side = layer.attention.self, layer.window_size
    x = attend_projected(
        layer.layernorm_before(hidden_states).unflatten(1, input_dimensions),
        attn.query,
        attn.key,
        attn.value,
        windows_on(input_dimensions, (side, side), shift=layer.shift_size),
        attn.attention_head_size,
        bias=attn.relative_position_bias_table,
        dropout_p=attn.dropout.p if layer.training else 0.0,
    )
    x = layer.attention.output(x.flatten(1, 2), hidden_states)
    hidden_states = hidden_states + layer.drop_path(x)
    return hidden_states + layer.output(layer.intermediate(layer.layernorm_after(hidden_states)))


class FusedDonutSwinLayer(modeling_donut_swin.DonutSwinLayer):
    """The layer of transformers with window attention in place on the map.

    With `output_attentions` it runs as it was."""

    def forward(
        self,
        hidden_states: Tensor,
        input_dimensions: tuple[int, int],
        output_attentions: bool | None = False,
        always_partition: bool | None = False,
    ) -> tuple[Tensor, ...]:
        """[B, H * W, C] and (H, W) -> ([B, H * W, C],)"""
        if output_attentions:
            options = (input_dimensions, output_attentions, always_partition)
            outputs: tuple[Tensor, ...] = super().forward(hidden_states, *options)
            return outputs
        if not always_partition:
            self.set_shift_and_window_size(input_dimensions)
        return (_forward(self, hidden_states, input_dimensions),)


class FusedMaskFormerSwinLayer(modeling_maskformer_swin.MaskFormerSwinLayer):
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


def _against_donut(layer: Any) -> str | None:
    attn = layer.attention.self
    return changed_parts(attn, modeling_donut_swin.DonutSwinSelfAttention, ("query", "key", "value"))


def _against_maskformer(layer: Any) -> str | None:
    attn = layer.attention.self
    return changed_parts(
        attn, modeling_maskformer_swin.MaskFormerSwinSelfAttention, ("query", "key", "value")
    )


ADAPTERS = (
    Adapter(
        "windowed",
        modeling_donut_swin.DonutSwinLayer,
        FusedDonutSwinLayer,
        "windowed_attention",
        _against_donut,
    ),
    Adapter(
        "windowed",
        modeling_maskformer_swin.MaskFormerSwinLayer,
        FusedMaskFormerSwinLayer,
        "windowed_attention",
        _against_maskformer,
    ),
)
