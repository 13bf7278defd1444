"""Wrong arguments of linear attention: the right exception, whose message names the argument, what it is and
what it may be, and no launch.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_windowed_errors import refused
from torch import Tensor

from vicinal import (
    FeatureMap,
    LinearState,
    ema_scan,
    favor_projection,
    lightning_decay,
    linear_attention,
    linear_attention_step,
    retnet_decay,
)

N, H, D, V = 6, 2, 4, 3


def rand(*shape: int) -> Tensor:
    return torch.rand(*shape)


def call(**changes: Any) -> Any:
    given: dict[str, Any] = {"q": rand(2, N, H, D), "k": rand(2, N, H, D), "v": rand(2, N, H, V), **changes}
    return linear_attention(**given)


def ends(*values: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype)


PACKED: dict[str, Any] = {"q": rand(1, N, H, D), "k": rand(1, N, H, D), "v": rand(1, N, H, V)}
STATE = LinearState(torch.zeros(2, H, D, V), torch.zeros(2, H, D))
DEN: dict[str, Any] = {"q_den": rand(2, N, H, 2), "k_den": rand(2, N, H, 2)}

WRONG = [
    (TypeError, "q is a list|tensor", {"q": [1.0]}),
    (ValueError, "q has shape [2, 6, 4]|[B, N, heads, head_dim]", {"q": rand(2, N, D)}),
    (TypeError, "q is torch.int64|float32", {n: torch.ones(2, N, H, D, dtype=torch.int64) for n in "qkv"}),
    (TypeError, "k is torch.float64|torch.float32 as q", {"k": rand(2, N, H, D).double()}),
    (TypeError, "v is torch.bfloat16|torch.float32 as q", {"v": rand(2, N, H, V).bfloat16()}),
    (ValueError, "k is on meta|cpu as q", {"k": rand(2, N, H, D).to("meta")}),
    (ValueError, "k has shape [2, 6, 2, 5]|[B, M, Hq, dk]", {"k": rand(2, N, H, 5)}),
    (ValueError, "k has shape [3, 6, 2, 4]|[B, M, Hq, dk]", {"k": rand(3, N, H, D)}),
    (ValueError, "v has shape [2, 5, 2, 3]|[B, M, H, dv]", {"v": rand(2, 5, H, V)}),
    (ValueError, "head dims 4 and 0|at least 1", {"v": rand(2, N, H, 0)}),
    (ValueError, "q has 2 heads|divide the 3 heads of v", {"v": rand(2, N, 3, V)}),
    (
        ValueError,
        "k has 5 tokens|is_causal|6 as q",
        {"k": rand(2, 5, H, D), "v": rand(2, 5, H, V), "is_causal": True},
    ),
    (ValueError, "feature_map is 'tanh'|'elu1'", {"feature_map": "tanh"}),
    (TypeError, "feature_map is 3|a pair", {"feature_map": 3}),
    (ValueError, "feature_map has 3 entries|a pair", {"feature_map": ("relu",) * 3}),
    (TypeError, "is_causal is 1|True or False", {"is_causal": 1}),
    (TypeError, "normalize is None|True or False", {"normalize": None}),
    (TypeError, "output_final_state is 'yes'|True or False", {"output_final_state": "yes"}),
    (TypeError, "scale is '1'|finite float", {"scale": "1"}),
    (ValueError, "scale is inf|finite float", {"scale": float("inf")}),
    (ValueError, "scale is nan|finite float", {"scale": float("nan")}),
    (ValueError, "eps is -1e-06|at least 0", {"eps": -1e-6}),
    (TypeError, "eps is True|at least 0", {"eps": True}),
    (ValueError, "const is -inf|finite float", {"const": -float("inf")}),
    (ValueError, "q_den and k_den must be given together", {"q_den": DEN["q_den"]}),
    (ValueError, "q_den and k_den are given|normalize is False", {**DEN, "normalize": False}),
    (ValueError, "q_den has shape [2, 5, 2, 2]|[B, N, Hq, dd]", {**DEN, "q_den": rand(2, 5, H, 2)}),
    (ValueError, "k_den has shape [2, 6, 2, 3]|[B, M, Hq, dd]", {**DEN, "k_den": rand(2, N, H, 3)}),
    (TypeError, "k_den is torch.float64|as q", {**DEN, "k_den": rand(2, N, H, 2).double()}),
    (ValueError, "decay is given|is_causal is False", {"decay": rand(H)}),
    (TypeError, "decay is a float|tensor", {"decay": -0.1, "is_causal": True}),
    (TypeError, "decay is torch.int64|float tensor", {"decay": torch.zeros(H).long(), "is_causal": True}),
    (ValueError, "decay has shape [3]|[H] = [2]", {"decay": rand(3), "is_causal": True}),
    (
        ValueError,
        "decay is given together with block_size",
        {"decay": rand(H), "is_causal": True, "block_size": 2},
    ),
    (
        ValueError,
        "decay has a channel dimension|const",
        {"decay": rand(2, N, H, D), "is_causal": True, "const": 0.1},
    ),
    (TypeError, "key_padding_mask is torch.float32|bool", {"key_padding_mask": rand(2, N)}),
    (ValueError, "key_padding_mask has shape [2, 5]|[B, M] = [2, 6]", {"key_padding_mask": rand(2, 5) > 0.5}),
    (TypeError, "cu_seqlens is torch.int64|int32", {**PACKED, "cu_seqlens": ends(0, 6, dtype=torch.int64)}),
    (ValueError, "cu_seqlens has shape [1, 2]|[sequences + 1]", {**PACKED, "cu_seqlens": ends(0, 6)[None]}),
    (ValueError, "q has batch size 2|must be 1", {"cu_seqlens": ends(0, 6)}),
    (ValueError, "cu_seqlens starts with 1|0", {**PACKED, "cu_seqlens": ends(1, 6)}),
    (ValueError, "cu_seqlens descends from 4 to 3", {**PACKED, "cu_seqlens": ends(0, 4, 3, 6)}),
    (ValueError, "cu_seqlens ends with 7|at most 6", {**PACKED, "cu_seqlens": ends(0, 7)}),
    (ValueError, "block_size is 2|is_causal=True", {"block_size": 2}),
    (ValueError, "block_size is 0|int >= 1", {"block_size": 0, "is_causal": True}),
    (TypeError, "block_size is 2.0|int >= 1", {"block_size": 2.0, "is_causal": True}),
    (ValueError, "block_mode is 'next'|'previous', 'inclusive'", {"block_mode": "next"}),
    (ValueError, "block_mode is 'inclusive'|block_size", {"block_mode": "inclusive", "is_causal": True}),
    (ValueError, "chunk_size is -1|int >= 1", {"chunk_size": -1}),
    (TypeError, "initial_state is a list|LinearState", {"initial_state": [1]}),
    (
        ValueError,
        "s of initial_state has shape [2, 2, 4, 4]|[sequences, H, K, dv]",
        {"initial_state": LinearState(torch.zeros(2, H, D, 4), STATE.z)},
    ),
    (
        ValueError,
        "s of initial_state has shape [2, 2, 4, 3]|[2, 2, 5, 3]",
        {"initial_state": STATE, "const": 1.0},
    ),
    (ValueError, "z of initial_state is None|normalize is True", {"initial_state": STATE.s}),
    (
        ValueError,
        "z of initial_state is given|normalize is False",
        {"initial_state": STATE, "normalize": False},
    ),
    (
        ValueError,
        "z of initial_state has shape [2, 2, 3]",
        {"initial_state": LinearState(STATE.s, torch.zeros(2, H, 3))},
    ),
    (
        TypeError,
        "s of initial_state is torch.float64|torch.float32",
        {"initial_state": LinearState(STATE.s.double(), STATE.z)},
    ),
    (ValueError, "'softmax', over all tokens; is_causal", {"feature_map": "softmax", "is_causal": True}),
    (
        ValueError,
        "'softmax', over all tokens; cu_seqlens",
        {**PACKED, "feature_map": "softmax", "cu_seqlens": ends(0, 6)},
    ),
    (
        ValueError,
        "projection has shape [7, 5]|[m, dk]",
        {"feature_map": FeatureMap("favor", projection=rand(7, 5))},
    ),
    (
        ValueError,
        "scale of the feature map has shape [5]",
        {"feature_map": FeatureMap("focused", scale=rand(5))},
    ),
    (ValueError, "backend is 'mkl'", {"backend": "mkl"}),
]


@pytest.mark.parametrize(("error", "words", "changes"), WRONG, ids=[w[1] for w in WRONG])
def test_wrong_calls(error: type[Exception], words: str, changes: dict[str, Any]) -> None:
    refused(error, words, call, **changes)


MAPS = [
    (ValueError, "param is 0.5|takes only 0", {"name": "elu1", "param": 0.5}),
    (TypeError, "param is '1'|finite float", {"name": "relu", "param": "1"}),
    (ValueError, "power is 0.5|at least 1", {"name": "focused", "power": 0.5}),
    (ValueError, "norm_scope is 'token'|'head', 'all'", {"name": "focused", "norm_scope": "token"}),
    (ValueError, "scale is given|takes only None", {"name": "relu", "scale": rand(3)}),
    (TypeError, "projection is a NoneType|tensor", {"name": "favor"}),
    (ValueError, "projection has shape [3]|[m, dk]", {"name": "favor", "projection": rand(3)}),
    (ValueError, "projection is given|takes only None", {"name": "relu", "projection": rand(3, 4)}),
]


@pytest.mark.parametrize(("error", "words", "options"), MAPS, ids=[w[1] for w in MAPS])
def test_wrong_feature_maps(error: type[Exception], words: str, options: dict[str, Any]) -> None:
    refused(error, words, FeatureMap, **options)


def step(**changes: Any) -> Any:
    given: dict[str, Any] = {
        "q": rand(2, 1, H, D),
        "k": rand(2, 1, H, D),
        "v": rand(2, 1, H, V),
        "state": STATE,
        **changes,
    }
    return linear_attention_step(**given)


STEPS = [
    (
        ValueError,
        "q has 2 tokens|a step takes 1",
        {"q": rand(2, 2, H, D), "k": rand(2, 2, H, D), "v": rand(2, 2, H, V)},
    ),
    (TypeError, "state is None|LinearState", {"state": None}),
    (
        ValueError,
        "s of state is not contiguous|in place",
        {"state": LinearState(torch.zeros(2, H, V, D).mT, STATE.z)},
    ),
    (ValueError, "q requires grad|linear_attention", {"q": rand(2, 1, H, D).requires_grad_()}),
    (ValueError, "z of initial_state is None", {"state": LinearState(STATE.s)}),
    (ValueError, "decay has shape [3]", {"decay": rand(3)}),
    (ValueError, "eps is -1", {"eps": -1.0}),
]


@pytest.mark.parametrize(("error", "words", "changes"), STEPS, ids=[w[1] for w in STEPS])
def test_wrong_steps(error: type[Exception], words: str, changes: dict[str, Any]) -> None:
    refused(error, words, step, **changes)


def test_wrong_scans_and_decays() -> None:
    x, p = rand(2, 5, 3), rand(2, 5)
    refused(ValueError, "x has shape [2, 5]|[B, N, D]", ema_scan, p, p)
    refused(TypeError, "x is torch.int64|float tensor", ema_scan, x.long(), p)
    refused(ValueError, "p has shape [2, 4]|[B, N] = [2, 5]", ema_scan, x, rand(2, 4))
    refused(
        ValueError, "initial_state has shape [2, 4]|[sequences, D]", ema_scan, x, p, initial_state=rand(2, 4)
    )
    refused(ValueError, "heads is 0|int >= 1", retnet_decay, 0)
    refused(ValueError, "layer is 4|layer < layers = 4", lightning_decay, 8, 4, 4)
    refused(TypeError, "layers is 2.0|int >= 1", lightning_decay, 8, 1, 2.0)
    refused(ValueError, "features is 0|int >= 1", favor_projection, 8, 0)
    refused(ValueError, "scaling is 'l2'|'norms', 'regular'", favor_projection, 8, 4, scaling="l2")


def test_an_optional_tensor_on_another_device() -> None:
    for name, value in (("key_padding_mask", rand(2, N) > 2), ("decay", rand(H))):
        refused(ValueError, f"{name} is on meta|cpu as q", call, is_causal=True, **{name: value.to("meta")})
