"""Small models of transformers, whose windowed and sliding attention `vicinal.accelerate` knows."""

from __future__ import annotations

from typing import Any

import torch
from models_support import library
from published_models import Published
from torch import Tensor, nn


class Output(nn.Module):
    """A model of transformers as a function of one tensor; parameters that it does not reach are frozen."""

    def __init__(
        self, model: nn.Module, output: str, unused: tuple[str, ...] = (), name: str = "", **inputs: Any
    ) -> None:
        super().__init__()
        self.model, self.output, self.name, self.inputs = model, output, name, inputs
        for key, parameter in model.named_parameters():
            parameter.requires_grad_(not key.startswith(unused) if unused else True)

    def forward(self, x: Tensor) -> Tensor:
        if self.name:
            out = getattr(self.model(**{self.name: x}, **self.inputs), self.output)
        else:
            out = getattr(self.model(x, **self.inputs), self.output)
        assert isinstance(out, Tensor)
        return out


def transformers() -> Any:
    library("regex")  # without it transformers fails with another error than ImportError
    return library("transformers")


def _sizes(size: tuple[int, int]) -> dict[str, Any]:
    return {"image_size": list(size), "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "patch_size": 4}


def _swinv2(size: tuple[int, int], window: int) -> nn.Module:
    config = transformers().Swinv2Config(**_sizes(size), window_size=window, drop_path_rate=0.0, num_labels=5)
    return Output(transformers().Swinv2ForImageClassification(config), "logits")


def _swin2sr() -> nn.Module:
    sizes = {"image_size": 24, "patch_size": 1, "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 2]}
    config = transformers().Swin2SRConfig(**sizes, window_size=8, upscale=2, drop_path_rate=0.0)
    return Output(transformers().Swin2SRForImageSuperResolution(config), "reconstruction")


def _donut(size: tuple[int, int]) -> nn.Module:
    config = transformers().DonutSwinConfig(**_sizes(size), window_size=7, drop_path_rate=0.0)
    return Output(transformers().DonutSwinModel(config), "last_hidden_state")


def _maskformer(size: tuple[int, int]) -> nn.Module:
    config = transformers().MaskFormerSwinConfig(**_sizes(size), window_size=7, drop_path_rate=0.0)
    swin = library("transformers.models.maskformer.modeling_maskformer_swin")
    return Output(swin.MaskFormerSwinModel(config), "last_hidden_state")


def _vitdet() -> nn.Module:
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 64}
    more = {"patch_size": 4, "window_size": 6, "window_block_indices": [0, 1, 3], "pretrain_image_size": 64}
    relative = {"use_relative_position_embeddings": True, "residual_block_indices": [3]}
    config = transformers().VitDetConfig(**sizes, **more, **relative)
    return Output(transformers().VitDetModel(config), "last_hidden_state")


def longformer(globals_: tuple[tuple[int, ...], ...], **options: Any) -> nn.Module:
    """Two layers with windows of 8 tokens on 40; `globals_` of each sample. With them, the second
    sample is 33 long (without, padded rows have NaN gradients in transformers' float64)."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    more = {"attention_window": [8, 8], "vocab_size": 11, "max_position_embeddings": 60}
    dropout = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
    model = transformers().LongformerModel(transformers().LongformerConfig(**sizes, **more, **dropout))
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, 33 if globals_[0] else 40 :] = 0
    seen_by_all = torch.zeros_like(mask)
    for sample, tokens in enumerate(globals_):
        seen_by_all[sample, list(tokens)] = 1
    unused: tuple[str, ...] = ("embeddings.word_embeddings", "pooler")
    if not seen_by_all.any():
        layers = ("encoder.layer.0.attention.self.", "encoder.layer.1.attention.self.")
        unused += tuple(f"{layer}{part}_global" for layer in layers for part in ("query", "key", "value"))
    masks = {"attention_mask": mask, "global_attention_mask": seen_by_all}
    return Output(model, "last_hidden_state", unused, "inputs_embeds", **masks, **options)


def causal_sizes(**options: Any) -> dict[str, Any]:
    """Sizes of a small language model with a window of 6 tokens."""
    sizes = {"vocab_size": 23, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 6}
    return {**sizes, **heads, "max_position_embeddings": 64, **options}


def _mistral() -> nn.Module:
    model = transformers().MistralModel(transformers().MistralConfig(**causal_sizes()))
    return Output(model, "last_hidden_state", ("embed_tokens",), "inputs_embeds")


def _gemma2() -> nn.Module:
    config = transformers().Gemma2Config(**causal_sizes(attn_logit_softcapping=None))
    model = transformers().Gemma2Model(config)
    return Output(model, "last_hidden_state", ("embed_tokens",), "inputs_embeds")


TRANSFORMERS: dict[str, Published] = {
    "transformers-swinv2": Published(lambda: _swinv2((64, 64), 8), (2, 3, 64, 64), 4),
    "transformers-swinv2-odd": Published(lambda: _swinv2((120, 88), 8), (2, 3, 120, 88), 4),
    "transformers-swin2sr": Published(_swin2sr, (2, 3, 24, 16), 4),
    "transformers-donut-odd": Published(lambda: _donut((120, 88)), (2, 3, 120, 88), 4),
    "transformers-maskformer-odd": Published(lambda: _maskformer((120, 88)), (2, 3, 120, 88), 4),
    "transformers-vitdet-odd": Published(_vitdet, (2, 3, 64, 64), 3, left=("VitDetLayer",)),
    "transformers-longformer": Published(lambda: longformer(((0, 5), (0, 9))), (2, 40, 32), 2, limit=1e-6),
    "transformers-longformer-local": Published(lambda: longformer(((), ())), (2, 40, 32), 2, limit=1e-5),
    "transformers-mistral": Published(_mistral, (2, 19, 32), 1, 2),
    "transformers-gemma2": Published(_gemma2, (2, 19, 32), 1, 2),
}
