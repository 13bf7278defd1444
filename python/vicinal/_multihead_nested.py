"""Strided NestedTensors in multi-head attention: pad, hide the padding, attend, and nest the output."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def run_nested(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    need_weights: bool,
    attn_mask: Tensor | None,
    average: bool,
    is_causal: bool,
) -> tuple[Tensor, Tensor | None]:
    """module(query, key, value) for one NestedTensor [N, *, C]: nested output, dense weights [N, Lmax, Lmax]
    with zeros where there is no query."""
    if query is not key or key is not value:
        raise AssertionError("query, key and value are not one NestedTensor; only self-attention takes one")
    if key_padding_mask is not None or attn_mask is not None or is_causal:
        raise AssertionError("a mask is given with a NestedTensor, whose lengths say what is padding")
    if query.layout != torch.strided or not module.batch_first:
        raise AssertionError(
            f"query is a NestedTensor of layout {query.layout} and batch_first is {module.batch_first}; it "
            "must be strided and batch_first True: or pad it with torch.nested.to_padded_tensor and pass "
            "key_padding_mask"
        )
    lengths = [len(x) for x in query.unbind()]
    x = torch.nested.to_padded_tensor(query, 0.0)
    bounds = torch.tensor(lengths, device=x.device)[:, None]
    padding = torch.arange(x.shape[1], device=x.device) >= bounds
    out, weights = module(x, x, x, padding, need_weights, None, average)
    nested = torch.nested.as_nested_tensor([row[:n] for row, n in zip(out, lengths)])
    if weights is None:
        return nested, None
    rows = padding[..., None] if average else padding[:, None, :, None]
    return nested, weights.masked_fill(rows, 0.0)
