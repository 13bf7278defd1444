"""Names of Swin parameters in other libraries, translated to the official names that `SwinTransformer` uses.

timm, torchvision and transformers hold the same tensors under other names; versions 1 and 2 are recognised.
The index, coordinate and mask buffers that the official release stores follow from the sizes and are taken
from the model."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from vicinal.models.swin import SwinTransformer

__all__ = ["official_state_dict"]

_BUFFERS = ("relative_position_index", "relative_coords_table", "attn_mask")

_HUGGINGFACE = [
    (r"^swin\.", ""),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.norm\.", "patch_embed.norm."),
    (r"^encoder\.layers\.", "layers."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.relative_position_bias\.", ".attn."),
    (r"\.attention\.o_proj\.", ".attn.proj."),
    (r"\.attention\.", ".attn."),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
]


def official_state_dict(state_dict: Mapping[str, Tensor], model: SwinTransformer) -> dict[str, Tensor]:
    """Translate a Swin state dict to the official names, in the order of `model.state_dict()`.

    Args:
        state_dict: from the official release, timm, torchvision or transformers
        (`SwinForImageClassification`). model: a model of the same sizes; only its names and its buffers are
        read.

    Returns:
        A dict that `model.load_state_dict(..., strict=True)` accepts.

    Raises:
        KeyError: a parameter of the model is missing, or one of the state dict has no place in the model.
    """
    renamed = dict(_join_qkv(dict(_rename(key, value) for key, value in state_dict.items())))
    renamed = {key: value for key, value in renamed.items() if not key.endswith(_BUFFERS)}
    own = model.state_dict()
    buffers = {key: value for key, value in own.items() if key.endswith(_BUFFERS)}
    missing = sorted(own.keys() - renamed.keys() - buffers.keys())
    unknown = sorted(renamed.keys() - own.keys())
    if missing or unknown:
        raise KeyError(f"state_dict does not fit this SwinTransformer: missing {missing}, unknown {unknown}")
    return {key: renamed[key] if key in renamed else buffers[key] for key in own}


def _rename(key: str, value: Tensor) -> tuple[str, Tensor]:
    if key.startswith("features."):
        return _from_torchvision(key), value
    if key.startswith(("swin.", "classifier.")):
        for pattern, name in _HUGGINGFACE:
            key = re.sub(pattern, name, key)
        return key, value
    if key.startswith("head.fc."):  # timm
        return key.replace("head.fc.", "head."), value
    return key, value


def _from_torchvision(key: str) -> str:
    """features.0 is the embedding, 2i+1 the blocks of stage i, 2i+2 the merging after it."""
    _, index, rest = key.split(".", 2)
    if index == "0":
        return re.sub(r"^2\.", "patch_embed.norm.", re.sub(r"^0\.", "patch_embed.proj.", rest))
    stage = (int(index) - 1) // 2
    if int(index) % 2 == 0:
        return f"layers.{stage}.downsample.{rest}"
    rest = rest.replace(".mlp.0.", ".mlp.fc1.").replace(".mlp.3.", ".mlp.fc2.")
    return f"layers.{stage}.blocks.{rest}"


def _join_qkv(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Pack separate q, k, v; split a packed bias where version 2 wants two; move timm's merging."""
    state = _move_merging(state)
    out: dict[str, Tensor] = {}
    for key, value in state.items():
        if ".attn.q_proj." in key:
            others = (state[key.replace(".q_proj.", f".{name}_proj.")] for name in "kv")
            out[key.replace(".q_proj.", ".qkv.")] = torch.cat([value, *others])
        elif ".attn.k_proj." in key or ".attn.v_proj." in key:
            continue
        elif key.endswith(".attn.qkv.bias") and key.replace("qkv.bias", "logit_scale") in state:
            q_bias, _, v_bias = value.chunk(3)  # torchvision keeps a key third that it never uses
            out[key.replace("qkv.bias", "q_bias")] = q_bias
            out[key.replace("qkv.bias", "v_bias")] = v_bias
        else:
            out[key] = value
    return out


def _move_merging(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm merges at the head of stage i, the official model at the end of stage i - 1."""
    if "layers.0.downsample.reduction.weight" in state:
        return state
    pattern = re.compile(r"^layers\.(\d+)\.downsample\.")
    return {
        pattern.sub(lambda m: f"layers.{int(m[1]) - 1}.downsample.", key): value
        for key, value in state.items()
    }
