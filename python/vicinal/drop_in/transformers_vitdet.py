"""ViTDet of Hugging Face transformers: its layers with windows."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.vitdet import modeling_vitdet

from vicinal.drop_in.adapter import Adapter
from vicinal.drop_in.sam_windows import against_windows, attend_in_windows
from vicinal.drop_in.swin_attention import changed_parts


class FusedVitDetLayer(modeling_vitdet.VitDetLayer):
    """The layer of transformers with window attention in place on the map.

    With `output_attentions` it runs as it was."""

    def forward(self, hidden_states: Tensor, output_attentions: bool = False) -> tuple[Tensor, ...]:
        """[B, C, H, W] -> ([B, C, H, W],)"""
        if output_attentions:
            outputs: tuple[Tensor, ...] = super().forward(hidden_states, output_attentions)
            return outputs
        attn, x = self.attention, hidden_states.permute(0, 2, 3, 1)
        relative = attn.use_relative_position_embeddings
        x = x + self.drop_path(attend_in_windows(attn, self.norm1(x), self.window_size, relative))
        x = (x + self.drop_path(self.mlp(self.norm2(x)))).permute(0, 3, 1, 2)
        return (self.residual(x) if self.use_residual_block else x,)


def _reason_against(layer: Any) -> str | None:
    reason = changed_parts(layer.attention, modeling_vitdet.VitDetAttention, ("qkv", "proj"))
    return reason or against_windows(layer.window_size)


ADAPTERS = (
    Adapter("windowed", modeling_vitdet.VitDetLayer, FusedVitDetLayer, "windowed_attention", _reason_against),
)
