"""Full attention of Hugging Face transformers on the kernels of `vicinal.nn.MultiheadAttention`.

Importing this module registers "vicinal_full" with transformers' `AttentionInterface`, and a mask function
that leaves padding as [B, keys], so that `model.set_attn_implementation("vicinal_full")` skips padded keys
instead of hiding them. Weights are not returned.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import bidirectional_mask_function, sdpa_mask

from vicinal._multihead_attend import Problem, attend

NAME = "vicinal_full"


def padding_or_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    *args: Any,
    attention_mask: Tensor | None = None,
    **options: Any,
) -> Tensor | None:
    """The padding bool [B, keys] (True = seen) of a mask that is nothing else, or transformers' own [B, 1,
    queries, keys]."""
    if options.get("mask_function") is not bidirectional_mask_function:
        options |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        mask: Tensor | None = sdpa_mask(
            batch_size, q_length, kv_length, *args, attention_mask=attention_mask, **options
        )
        return mask
    return None if attention_mask is None else attention_mask[:, -kv_length:].bool()


def attend_all(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """query [B, h, T, d], key and value [B, hkv, L, d], mask of `padding_or_mask` -> [B, T, h, d], None.

    A mask is bool (True = seen) or float (added)."""
    for name in ("softcap", "position_bias", "sliding_window"):
        if options.get(name) is not None:
            raise NotImplementedError(f"{name} is {options[name]!r}; {NAME} takes None")
    causal = options.get("is_causal", getattr(module, "is_causal", False))
    if causal and attention_mask is None and query.shape[2] > 1:
        raise NotImplementedError(f"is_causal is True without a mask; {NAME} takes causal models with theirs")
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    usual = query.shape[-1] ** -0.5
    if scaling is not None and abs(scaling - usual) > 1e-6 * usual:
        query = query * (scaling / usual)
    hidden = attention_mask
    if hidden is not None and not hidden.is_floating_point():
        hidden = ~hidden
    padding = hidden is not None and hidden.dim() == 2
    problem = Problem(
        q=query.transpose(1, 2),
        k=key.transpose(1, 2),
        v=value.transpose(1, 2),
        packed=None,
        batch_dim=0,
        keys=hidden if padding else None,
        hidden=None,
        pairs=None if padding else hidden,
        causal=False,
        dropout_p=dropout,
        weights=False,
        average=True,
        backend=None,
    )
    return attend(problem)[0].contiguous(), None


AttentionInterface.register(NAME, attend_all)
AttentionMaskInterface.register(NAME, padding_or_mask)
