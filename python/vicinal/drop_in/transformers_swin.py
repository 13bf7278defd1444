"""Swin, version 1, of Hugging Face transformers (5.x: separate q_proj, k_proj, v_proj, o_proj)."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.swin import modeling_swin

from vicinal.drop_in.adapter import Adapter
from vicinal.drop_in.swin_attention import attend_projected, changed_parts, windows_on


class FusedSwinLayer(modeling_swin.SwinLayer):
    """The layer of transformers with window attention in place on the map.

    Attention weights exist only where the original layer computes them: with `output_attentions` it runs as
    it was."""

    def forward(
        self,
        hidden_states: Tensor,
        input_dimensions: tuple[int, int],
        always_partition: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """[B, H * W, C] and (H, W) -> ([B, H * W, C], None)"""
        if kwargs.get("output_attentions", self.attention.config.output_attentions):
            outputs: Any = super().forward(hidden_states, input_dimensions, always_partition, **kwargs)
            return outputs
        if not always_partition:
            self.set_shift_and_window_size(input_dimensions)
        x = self.layernorm_before(hidden_states).unflatten(1, input_dimensions)
        x = self.dropout(self._window_attention(x)).flatten(1, 2)
        hidden_states = hidden_states + self.drop_path(x)
        x = self.dropout(self.mlp(self.layernorm_after(hidden_states)))
        return hidden_states + x, None

    def _window_attention(self, x: Tensor) -> Tensor:
        attn = self.attention
        out = attend_projected(
            x,
            attn.q_proj,
            attn.k_proj,
            attn.v_proj,
            windows_on(x.shape[1:3], (self.window_size,) * 2, shift=self.shift_size),
            attn.head_dim,
            bias=attn.relative_position_bias.relative_position_bias_table,
            scale=attn.scaling,
            dropout_p=attn.attention_dropout if self.training else 0.0,
        )
        return attn.o_proj(out)


def _reason_against(layer: Any) -> str | None:
    return changed_parts(
        layer.attention, modeling_swin.SwinAttention, ("q_proj", "k_proj", "v_proj", "o_proj")
    )


ADAPTERS = (
    Adapter("windowed", modeling_swin.SwinLayer, FusedSwinLayer, "windowed_attention", _reason_against),
)
