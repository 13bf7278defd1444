"""The Mamba-2 mixer of Hugging Face transformers (5.x)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.mamba2 import modeling_mamba2

from vicinal.drop_in.adapter import Adapter
from vicinal.drop_in.swin_attention import changed_parts
from vicinal.linear import LinearState, linear_attention


class FusedMamba2Mixer(modeling_mamba2.Mamba2Mixer):
    """The mixer of transformers with its scan in one operation, prompts that fill a cache included.

    Continuing a cache, token by token or by more, runs as it was."""

    def forward(
        self, hidden_states: Tensor, cache_params: Any = None, attention_mask: Any = None, **kwargs: Any
    ) -> Tensor:
        """[B, N, C] -> [B, N, C]"""
        continues = cache_params is not None and cache_params.has_previous_state(self.layer_idx)
        if continues or kwargs.get("seq_idx") is not None:
            out: Tensor = super().forward(hidden_states, cache_params, attention_mask, **kwargs)
            return out
        mask = modeling_mamba2.apply_mask_to_padding_states
        projected = self.in_proj(mask(hidden_states, attention_mask))
        gate, mixed, dt = projected.split([self.intermediate_size, self.conv_dim, self.num_heads], -1)
        mixed = mask(self._convolved(mixed, cache_params), attention_mask)
        y, state = self._scan(mixed, dt)
        if cache_params is not None:
            cache_params.update_recurrent_state(state.s.mT, layer_idx=self.layer_idx)
        return self.out_proj(self.norm(y.flatten(-2), gate).to(hidden_states.dtype))

    def _convolved(self, x: Tensor, cache: Any) -> Tensor:
        """The short causal convolution and its activation: [B, N, channels] -> [B, N, channels]."""
        n, x = x.shape[1], x.transpose(1, 2)
        if cache is not None:
            x = cache.update_conv_state(x, self.layer_idx, conv_kernel_size=self.conv_kernel_size)
        weight, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
        x = modeling_mamba2.causal_conv1d_fn(x, weight, bias, activation=self.activation)
        return x[:, :, -n:].transpose(1, 2)

    def _scan(self, mixed: Tensor, dt: Tensor) -> tuple[Tensor, LinearState]:
        """[B, N, H, P], and the state [B, H, N, P] after the last token."""
        groups = self.n_groups * self.ssm_state_size
        values, k, q = mixed.split([self.intermediate_size, groups, groups], -1)
        values = values.unflatten(-1, (self.num_heads, self.head_dim)).float()
        k, q = (x.unflatten(-1, (self.n_groups, self.ssm_state_size)).float() for x in (k, q))
        time = F.softplus(dt + self.dt_bias.to(dt.dtype)).clamp(*self.time_step_limit).float()
        with torch.autocast(mixed.device.type, enabled=False):  # the original's sums are in float32
            y, state = linear_attention(
                q,
                k,
                values * time[..., None],
                feature_map="identity",
                is_causal=True,
                decay=-self.A_log.float().exp() * time,
                normalize=False,
                output_final_state=True,
            )
        assert isinstance(state, LinearState)
        return y + self.D[:, None] * values, state


def _reason_against(mixer: Any) -> str | None:
    if not hasattr(modeling_mamba2, "mamba2_chunk_scan"):
        return "its transformers is older than 5.0, whose mixer has other parts"
    return changed_parts(mixer, modeling_mamba2.Mamba2Mixer, ("in_proj", "out_proj"))


ADAPTERS = (
    Adapter(
        "linear",
        modeling_mamba2.Mamba2Mixer,
        FusedMamba2Mixer,
        "linear_attention with decay",
        _reason_against,
    ),
)
