"""Causal sliding windows of Hugging Face transformers (Mistral, Gemma 2), through its `AttentionInterface`.

The attention is registered as "vicinal", with a mask function that makes no mask of a plain causal window:
padding stays [B, keys]. `attn_implementation="vicinal"` uses both in any model that passes `sliding_window`,
once this module is imported; an accelerated model uses them during its forward alone and keeps its
configuration. Rows of padding, which nothing reads, are zero here, an average in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.mistral import modeling_mistral
from transformers.utils import output_capturing

from vicinal.drop_in.adapter import Adapter
from vicinal.neighborhood import Neighborhood, neighborhood_attention

NAME = "vicinal"


def window_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **options: Any,
) -> Tensor | None:
    """None or the padding [B, keys] where the mask is a causal window whose last query is the last key, else
    transformers' mask [B, 1, queries, keys]."""
    plain = allow_is_causal_skip and isinstance(q_offset, int) and isinstance(kv_offset, int)
    if not plain or q_offset + q_length != kv_offset + kv_length:
        sizes = {"batch_size": batch_size, "q_length": q_length, "kv_length": kv_length}
        offsets = {"q_offset": q_offset, "kv_offset": kv_offset, "allow_is_causal_skip": False}
        mask: Tensor | None = sdpa_mask(attention_mask=attention_mask, **sizes, **offsets, **options)
        return mask
    if attention_mask is None:
        return None
    padding = attention_mask[:, kv_offset : kv_offset + kv_length]
    return F.pad(padding, (0, kv_length - padding.shape[1]))


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """query [B, h, T, d], key and value [B, hkv, L, d], mask of `window_mask` -> [B, T, h, d], no weights."""
    if softcap is not None:
        raise NotImplementedError(f"softcap is {softcap}; vicinal's attention takes None")
    if attention_mask is not None and attention_mask.dim() == 4:
        options = {"attn_mask": attention_mask, "dropout_p": dropout, "scale": scaling, "enable_gqa": True}
        return F.scaled_dot_product_attention(query, key, value, **options).transpose(1, 2), None
    left = -1 if sliding_window is None else sliding_window - 1
    out = neighborhood_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        Neighborhood((left, 0), border="truncate"),
        scale=scaling,
        key_padding_mask=None if attention_mask is None else ~attention_mask,
        dropout_p=dropout,
    )
    assert isinstance(out, Tensor)
    return out, None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, window_mask)


def _run(model: Any, forward: Callable[..., Any], args: Any, options: dict[str, Any]) -> Any:
    """The model's forward with the attention above, or as it was: for attention weights, and where layers
    are recomputed after the forward."""
    config = model.config
    weights = options.get("output_attentions", config.output_attentions)
    if weights or (model.training and model.gradient_checkpointing):
        return forward(*args, **options)
    before, config._attn_implementation = config._attn_implementation, NAME
    try:
        return forward(*args, **options)
    finally:
        config._attn_implementation = before


class WindowedMistralModel(modeling_mistral.MistralModel):
    """Mistral with sliding windows on vicinal's kernels."""

    def forward(self, *args: Any, **options: Any) -> Any:
        """As the original."""
        return _run(self, super().forward, args, options)


class WindowedGemma2Model(modeling_gemma2.Gemma2Model):
    """Gemma 2 with sliding windows on vicinal's kernels."""

    def forward(self, *args: Any, **options: Any) -> Any:
        """As the original."""
        return _run(self, super().forward, args, options)


for _model in (WindowedMistralModel, WindowedGemma2Model):  # transformers finds what a class records by name
    output_capturing._CAN_RECORD_REGISTRY[str(_model)] = _model._can_record_outputs


def _against_mistral(model: Any) -> str | None:
    if model.config.sliding_window is None:
        return "no sliding window: scaled_dot_product_attention computes attention to all keys already"
    return _against_attention(model, modeling_mistral.MistralAttention)


def _against_gemma2(model: Any) -> str | None:
    if model.config.attn_logit_softcapping is not None:
        return (
            f"attn_logit_softcapping is {model.config.attn_logit_softcapping}: scores pass a tanh, "
            "which the kernels do not compute"
        )
    if getattr(model.config, "use_bidirectional_attention", False):
        return "its attention is not causal"
    return _against_attention(model, modeling_gemma2.Gemma2Attention)


def _against_attention(model: Any, original: type[nn.Module]) -> str | None:
    for layer in model.layers:
        if type(layer.self_attn) is not original:
            return f"its attention is a {type(layer.self_attn).__qualname__}, not a {original.__qualname__}"
    return None


_WHAT = "neighborhood_attention through AttentionInterface"
ADAPTERS = (
    Adapter("neighborhood", modeling_mistral.MistralModel, WindowedMistralModel, _WHAT, _against_mistral),
    Adapter("neighborhood", modeling_gemma2.Gemma2Model, WindowedGemma2Model, _WHAT, _against_gemma2),
)
