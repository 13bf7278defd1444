"""Language models of transformers, accelerated: caches, padding, attention weights, what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models_support import CountOps, gradients, redraw, rms_ratio
from published_transformers import causal_sizes, longformer, transformers
from torch import Tensor, nn

import vicinal


def _mistral() -> Any:
    model = transformers().MistralForCausalLM(transformers().MistralConfig(**causal_sizes()))
    return redraw(model).eval()


def _pair() -> tuple[Any, Any]:
    model = _mistral()
    fast = copy.deepcopy(model)
    assert len(vicinal.accelerate(fast).replaced) == 1
    return model, fast


def test_generation_with_a_cache_takes_the_same_tokens() -> None:
    model, fast = _pair()
    tokens = torch.randint(23, (2, 5))
    options = {"max_new_tokens": 12, "do_sample": False, "output_logits": True, "pad_token_id": 0}
    expected = model.generate(tokens, return_dict_in_generate=True, **options)
    with CountOps() as counter:
        actual = fast.generate(tokens, return_dict_in_generate=True, **options)
    assert sum(counter.calls.values()) == 2 * 12
    assert torch.equal(actual.sequences, expected.sequences)
    assert rms_ratio(torch.stack(actual.logits), torch.stack(expected.logits)) < 1e-5


def test_pieces_of_a_sequence_against_a_cache() -> None:
    """Several queries after a full cache, and before it is full."""
    model, fast = _pair()
    tokens = torch.randint(23, (2, 20))
    with torch.no_grad():
        whole = model(tokens).logits
        cache, outs = None, []
        for piece in tokens.split([3, 7, 1, 9], 1):
            out = fast(piece, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            outs.append(out.logits)
    assert rms_ratio(torch.cat(outs, 1), whole) < 1e-5


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(side: str) -> None:
    model, fast = _pair()
    tokens, mask = torch.randint(23, (2, 15)), torch.ones(2, 15, dtype=torch.long)
    mask[1, slice(0, 4) if side == "left" else slice(11, 15)] = 0
    with torch.no_grad():
        expected = model(tokens, attention_mask=mask).logits[mask.bool()]
        assert rms_ratio(fast(tokens, attention_mask=mask).logits[mask.bool()], expected) < 1e-5


def test_packed_sequences_keep_their_mask() -> None:
    model, fast = _pair()
    tokens = torch.randint(23, (1, 16))
    places = torch.cat([torch.arange(9), torch.arange(7)])[None]
    with torch.no_grad():
        expected = model(tokens, position_ids=places, use_cache=False).logits
        assert rms_ratio(fast(tokens, position_ids=places, use_cache=False).logits, expected) < 1e-5


def test_attention_weights_and_configuration_are_as_they_were() -> None:
    model, fast = _pair()
    for each in (model, fast):
        each.set_attn_implementation("eager")
    tokens = torch.randint(23, (2, 15))
    with torch.no_grad():
        expected, actual = (each(tokens, output_attentions=True) for each in (model, fast))
        fast(tokens)
    assert all(torch.equal(a, b) for a, b in zip(actual.attentions, expected.attentions, strict=True))
    assert fast.config._attn_implementation == "eager"


def test_recomputed_layers_have_the_same_gradients() -> None:
    model, fast = _pair()
    fast.gradient_checkpointing_enable()
    tokens = torch.randint(23, (2, 15))
    grads = []
    for each in (model.train(), fast.train()):
        each(tokens, labels=tokens).loss.backward()
        grads.append(each.model.layers[0].self_attn.v_proj.weight.grad)
    assert rms_ratio(grads[1], grads[0]) < 1e-5


def _refusals() -> dict[str, tuple[nn.Module, str]]:
    lib = transformers()
    return {
        "softcap": (lib.Gemma2Model(lib.Gemma2Config(**causal_sizes())), "attn_logit_softcapping is 50.0"),
        "no-window": (
            lib.MistralModel(lib.MistralConfig(**causal_sizes(sliding_window=None))),
            "no sliding window",
        ),
    }


@pytest.mark.parametrize("name", ["softcap", "no-window"])
def test_what_is_refused_is_left_alone_with_the_reason(name: str) -> None:
    model, reason = _refusals()[name]
    report = vicinal.accelerate(model)
    assert not report.replaced
    assert report.left_alone[0].note.startswith(reason)


def _longformer(globals_: tuple[tuple[int, ...], ...], **options: Any) -> tuple[nn.Module, Tensor]:
    model = redraw(longformer(globals_, **options)).eval()
    vicinal.accelerate(model)
    return model, torch.randn(2, 40, 32)


def test_longformer_with_unequal_numbers_of_global_tokens_runs_as_it_was() -> None:
    model, x = _longformer(((0,), (0, 9)))
    with CountOps() as counter:
        actual = gradients(model, x)
    assert not counter.calls
    vicinal.restore(model)
    assert torch.equal(actual["output"], gradients(model, x)["output"])
