"""Names of DiNAT parameters in transformers, translated to the official names that `DiNAT` uses."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from vicinal.models.dinat import DiNAT

__all__ = ["official_dinat_state_dict"]

_HUGGINGFACE = [
    (r"^dinat\.", ""),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.norm\.", "patch_embed.norm."),
    (r"^encoder\.levels\.(\d+)\.layers\.", r"levels.\1.blocks."),
    (r"^encoder\.levels\.", "levels."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.self\.rpb$", ".attn.rpb"),
    (r"\.attention\.self\.", ".attn."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
]


def official_dinat_state_dict(state_dict: Mapping[str, Tensor], model: DiNAT) -> dict[str, Tensor]:
    """Translate a DiNAT state dict to the official names, in the order of `model.state_dict()`.

    Args:
        state_dict: from the official release or from transformers (`DinatForImageClassification`). model: a
            model of the same sizes; only its names are read.

    Returns:
        A dict that `model.load_state_dict(..., strict=True)` accepts.

    Raises:
        KeyError: a parameter of the model is missing, or one of the state dict has no place in the model.
    """
    renamed: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        for pattern, name in _HUGGINGFACE:
            key = re.sub(pattern, name, key)
        renamed[key] = value
    renamed = _split_scale(_join_qkv(renamed))
    own = model.state_dict()
    missing, unknown = sorted(own.keys() - renamed.keys()), sorted(renamed.keys() - own.keys())
    if missing or unknown:
        raise KeyError(f"state_dict does not fit this DiNAT: missing {missing}, unknown {unknown}")
    return {key: renamed[key] for key in own}


def _join_qkv(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Pack separate query, key and value projections."""
    out: dict[str, Tensor] = {}
    for key, value in state.items():
        if ".attn.query." in key:
            others = (state[key.replace(".query.", f".{name}.")] for name in ("key", "value"))
            out[key.replace(".query.", ".qkv.")] = torch.cat([value, *others])
        elif ".attn.key." not in key and ".attn.value." not in key:
            out[key] = value
    return out


def _split_scale(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers stacks the two layer scales of a block."""
    out: dict[str, Tensor] = {}
    for key, value in state.items():
        if key.endswith(".layer_scale_parameters"):
            block = key.removesuffix("layer_scale_parameters")
            out[f"{block}gamma1"], out[f"{block}gamma2"] = value.unbind(0)
        else:
            out[key] = value
    return out
