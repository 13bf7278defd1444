"""torch's own nn.MultiheadAttention, wherever it stands, and the encoders around it."""

from __future__ import annotations

from typing import Any

from torch import nn

from vicinal.drop_in.adapter import Adapter
from vicinal.nn import MultiheadAttention


class FusedMultiheadAttention(MultiheadAttention):
    """A module of torch with vicinal's forward: see `vicinal.nn.MultiheadAttention`."""


class FusedTransformerEncoder(nn.TransformerEncoder):
    """torch's encoder, which otherwise packs padded batches into NestedTensors for its fused layers."""

    @property
    def use_nested_tensor(self) -> bool:
        """False; the value that the encoder was made with stays in __dict__, for the class without this."""
        return False

    @use_nested_tensor.setter
    def use_nested_tensor(self, value: bool) -> None:
        self.__dict__["use_nested_tensor"] = value


def _holds_ours(encoder: Any) -> bool:
    """Whether a module in the encoder is accelerated, or can be."""
    return any(
        type(m) is FusedMultiheadAttention or (type(m) is nn.MultiheadAttention and not _reason_against(m))
        for m in encoder.modules()
    )


def _itself(encoder: nn.Module) -> tuple[nn.Module]:
    return (encoder,)


def _reason_against(module: Any) -> str | None:
    if type(module.out_proj) is not nn.modules.linear.NonDynamicallyQuantizableLinear:
        return f"its out_proj is a {type(module.out_proj).__name__}, whose forward would not be called"
    return None


ADAPTERS = (
    Adapter(
        "multihead",
        nn.MultiheadAttention,
        FusedMultiheadAttention,
        "segments, windows or SDPA, by shape",
        _reason_against,
    ),
    Adapter(
        "multihead",
        nn.TransformerEncoder,
        FusedTransformerEncoder,
        "no NestedTensors",
        applies=_holds_ours,
        covers=_itself,
    ),
)
