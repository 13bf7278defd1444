"""Wrong arguments: the right exception, whose message names the argument, the axis, what it is and what it
may be, and no launch.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from dispatch_modes import refused

from vicinal import Neighborhood, explain, neighborhood_attention, neighborhood_attention_qkvpacked

HEADS, KV_HEADS, DIM, DIM_V = 4, 2, 4, 3


def rand(*shape: int) -> torch.Tensor:
    return torch.rand(*shape)


def call(kernel_size: Any = 3, **changes: Any) -> Any:
    """A correct call on a 6 x 8 grid, but for the changes."""
    given: dict[str, Any] = {
        "q": rand(2, 6, 8, HEADS, DIM),
        "k": rand(2, 6, 8, KV_HEADS, DIM),
        "v": rand(2, 6, 8, KV_HEADS, DIM_V),
        **changes,
    }
    return neighborhood_attention(kernel_size=kernel_size, **given)


def line(kernel_size: Any = 3, tokens: int = 9, **changes: Any) -> Any:
    """A correct call on a grid of one axis, but for the changes."""
    given: dict[str, Any] = {
        "q": rand(2, 9, 2, DIM),
        "k": rand(2, tokens, 2, DIM),
        "v": rand(2, tokens, 2, DIM_V),
    }
    return neighborhood_attention(kernel_size=kernel_size, **{**given, **changes})


FIELDS: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (TypeError, "kernel_size is 'a'|an int >= 1", {"kernel_size": "a"}),
    (TypeError, "kernel_size is 3.0|an int >= 1", {"kernel_size": 3.0}),
    (TypeError, "kernel_size is True|an int >= 1", {"kernel_size": True}),
    (TypeError, "kernel_size is [3, 3]|a tuple with one per axis", {"kernel_size": [3, 3]}),
    (TypeError, "kernel_size is ()|an int >= 1", {"kernel_size": ()}),
    (TypeError, "kernel_size is (3, 3, 3, 3)|a tuple", {"kernel_size": (3, 3, 3, 3)}),
    (TypeError, "kernel_size is (3, False)|an int >= 1", {"kernel_size": (3, False)}),
    (ValueError, "kernel_size is 0|an int >= 1", {"kernel_size": 0}),
    (ValueError, "kernel_size is (3, 0)|an int >= 1", {"kernel_size": (3, 0)}),
    (ValueError, "kernel_size is (-1, 3)|an int >= 1", {"kernel_size": (-1, 3)}),
    (ValueError, "kernel_size is ((1, 1), 3)|border 'truncate'", {"kernel_size": ((1, 1), 3)}),
    (TypeError, "kernel_size is ((1, 1, 1), 3)|pair", {"kernel_size": ((1, 1, 1), 3), "border": "truncate"}),
    (TypeError, "kernel_size is ((1, 1.0), 3)|pair", {"kernel_size": ((1, 1.0), 3), "border": "truncate"}),
    (ValueError, "kernel_size is ((1, -2), 3)|>= -1", {"kernel_size": ((1, -2), 3), "border": "truncate"}),
    (ValueError, "kernel_size is (1, -2)|>= -1", {"kernel_size": (1, -2), "border": "truncate"}),
    (TypeError, "dilation is 1.0|an int >= 1", {"kernel_size": 3, "dilation": 1.0}),
    (TypeError, "dilation is True|an int >= 1", {"kernel_size": 3, "dilation": True}),
    (TypeError, "dilation is None|an int >= 1", {"kernel_size": 3, "dilation": None}),
    (ValueError, "dilation is (1, 0)|an int >= 1", {"kernel_size": 3, "dilation": (1, 0)}),
    (TypeError, "stride is 1.0|an int >= 1", {"kernel_size": 3, "stride": 1.0}),
    (ValueError, "stride is -1|an int >= 1", {"kernel_size": 3, "stride": -1}),
    (TypeError, "is_causal is 1|a bool", {"kernel_size": 3, "is_causal": 1}),
    (TypeError, "is_causal is (True, 0)|a bool", {"kernel_size": 3, "is_causal": (True, 0)}),
    (TypeError, "is_causal is ()|a bool", {"kernel_size": 3, "is_causal": ()}),
    (TypeError, "border is None|'shift', 'truncate'", {"kernel_size": 3, "border": None}),
    (ValueError, "border is 'wrap'|'shift', 'truncate'", {"kernel_size": 3, "border": "wrap"}),
]


@pytest.mark.parametrize(
    ("error", "words", "fields"), FIELDS, ids=lambda x: x if isinstance(x, str) else None
)
def test_fields(error: type[Exception], words: str, fields: dict[str, Any]) -> None:
    refused(error, words, Neighborhood, **fields)
    refused(error, words, call, **fields)


GRIDS: list[tuple[type[Exception], str, Any, dict[str, Any]]] = [
    (ValueError, "kernel_size is (3,)|an entry per axis|the grid has 2", call, {"kernel_size": (3,)}),
    (ValueError, "kernel_size is (3, 3, 3)|the grid has 2", call, {"kernel_size": (3, 3, 3)}),
    (ValueError, "dilation is (1,)|the grid has 2", call, {"dilation": (1,)}),
    (ValueError, "stride is (1, 1, 1)|the grid has 2", call, {"stride": (1, 1, 1)}),
    (ValueError, "is_causal is (True,)|the grid has 2", call, {"is_causal": (True,)}),
    (ValueError, "kernel_size is (2, 1)|the grid has 1|border 'truncate'", line, {"kernel_size": (2, 1)}),
    (ValueError, "kernel_size is 0 on axis 1|>= 1", call, {"kernel_size": (3, 0), "border": "truncate"}),
    (ValueError, "kernel_size is -1 on axis 0|>= 1", call, {"kernel_size": (-1, 3), "border": "truncate"}),
    (
        ValueError,
        "kernel_size * dilation is 7 * 1 = 7 on axis 0|6 tokens|border='truncate'|pad_small_inputs",
        call,
        {"kernel_size": 7},
    ),
    (ValueError, "3 * 3 = 9 on axis 1|the 8 tokens", call, {"dilation": (2, 3)}),
    (ValueError, "3 * 4 = 12 on axis 0|the 9 tokens", line, {"dilation": 4}),
    (ValueError, "stride is 4 on axis 0|at most the kernel_size there, 3", call, {"stride": (4, 1)}),
    (
        ValueError,
        "stride is 3 on axis 0|at most|2",
        line,
        {"kernel_size": (1, 0), "stride": 3, "border": "truncate"},
    ),
    (
        ValueError,
        "left = 0 on axis 0|under stride 2 it must be at least 1",
        line,
        {"kernel_size": (0, 5), "stride": 2, "border": "truncate"},
    ),
    (
        ValueError,
        "right = 0 on axis 0|under stride 3 it must be at least 1",
        line,
        {"kernel_size": (5, 0), "stride": 3, "border": "truncate"},
    ),
    (
        ValueError,
        "right = 1 on axis 0|a causal axis takes only right = 0",
        line,
        {"kernel_size": (5, 1), "is_causal": True, "border": "truncate"},
    ),
    (
        ValueError,
        "right = -1 on axis 0|a causal axis takes only right = 0",
        line,
        {"kernel_size": (-1, -1), "is_causal": True, "border": "truncate"},
    ),
    (
        ValueError,
        "stride is 3 on axis 0|at most the kernel_size there, 2",
        line,
        {"kernel_size": (1, 0), "stride": 3, "is_causal": True, "border": "truncate"},
    ),
    (ValueError, "k has the grid [12]|q has [9]|'truncate'", line, {"tokens": 12}),
    (
        ValueError,
        "k has 7 tokens on axis 0, q has 9|at least as many",
        line,
        {"tokens": 7, "border": "truncate"},
    ),
    (
        ValueError,
        "k has the grid [6, 9]|q has [6, 8]",
        call,
        {"k": rand(2, 6, 9, KV_HEADS, DIM), "v": rand(2, 6, 9, KV_HEADS, DIM_V), "border": "truncate"},
    ),
    (
        ValueError,
        "axis 1 of the grid has 0 tokens|at least 1",
        call,
        {
            "q": rand(2, 6, 0, HEADS, DIM),
            "k": rand(2, 6, 0, KV_HEADS, DIM),
            "v": rand(2, 6, 0, KV_HEADS, DIM_V),
            "border": "truncate",
        },
    ),
]


@pytest.mark.parametrize(
    ("error", "words", "function", "changes"), GRIDS, ids=lambda x: x if isinstance(x, str) else None
)
def test_grids(error: type[Exception], words: str, function: Any, changes: dict[str, Any]) -> None:
    refused(error, words, function, **changes)


BIAS, MADE = rand(HEADS, 5, 5), Neighborhood(3)
CALLS: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (TypeError, "q is a list|tensor", {"q": [1.0]}),
    (TypeError, "v is a NoneType|tensor", {"v": None}),
    (ValueError, "q has shape [2, 6, 4]|[B, *S, heads, head_dim]|1 to 3 axes", {"q": rand(2, 6, 4)}),
    (ValueError, "k has shape|1 to 3 axes", {"k": rand(1, 2, 2, 2, 2, 2, 2)}),
    (TypeError, "q is torch.int64|float32, float64", {"q": torch.ones(2, 6, 8, HEADS, DIM).long()}),
    (ValueError, "k is torch.float64|torch.float32", {"k": rand(2, 6, 8, KV_HEADS, DIM).double()}),
    (ValueError, "k is on meta|cpu", {"k": torch.empty(2, 6, 8, KV_HEADS, DIM, device="meta")}),
    (ValueError, "k has 4 dimensions; it must have 5", {"k": rand(2, 6, KV_HEADS, DIM)}),
    (ValueError, "k has shape [3, 6, 8, 2, 4]|[2, 6, 8, 2, 4]", {"k": rand(3, 6, 8, KV_HEADS, DIM)}),
    (ValueError, "k has shape [2, 6, 8, 2, 5]|[2, 6, 8, 2, 4]", {"k": rand(2, 6, 8, KV_HEADS, DIM + 1)}),
    (ValueError, "v has shape [2, 6, 8, 4, 3]|[2, 6, 8, 2, 3]", {"v": rand(2, 6, 8, HEADS, DIM_V)}),
    (ValueError, "v has shape [2, 6, 7, 2, 3]|[2, 6, 8, 2, 3]", {"v": rand(2, 6, 7, KV_HEADS, DIM_V)}),
    (ValueError, "q has 3 heads|a multiple of the 2", {"q": rand(2, 6, 8, 3, DIM)}),
    (ValueError, "head dims 4 and 0", {"v": rand(2, 6, 8, KV_HEADS, 0)}),
    (TypeError, "bias is a list|tensor", {"bias": [1.0]}),
    (TypeError, "bias is torch.int64|float", {"bias": BIAS.long()}),
    (ValueError, "bias has shape [4, 3, 3]|[heads, 2 K - 1 per axis] = [4, 5, 5]", {"bias": rand(4, 3, 3)}),
    (ValueError, "bias has shape [2, 5, 5]|[4, 5, 5]", {"bias": rand(2, 5, 5)}),
    (ValueError, "bias is on meta|cpu", {"bias": torch.empty(HEADS, 5, 5, device="meta")}),
    (
        ValueError,
        "bias needs a window of a fixed size|(-1, 2) on axis 1",
        {"bias": BIAS, "kernel_size": (3, (-1, 2)), "border": "truncate"},
    ),
    (TypeError, "scale is '1'|a finite float or None", {"scale": "1"}),
    (TypeError, "scale is True|a finite float or None", {"scale": True}),
    (ValueError, "scale is inf|a finite float or None", {"scale": float("inf")}),
    (ValueError, "scale is nan|a finite float or None", {"scale": float("nan")}),
    (TypeError, "dropout_p is None|0 <= dropout_p <= 1", {"dropout_p": None}),
    (TypeError, "dropout_p is True|0 <= dropout_p <= 1", {"dropout_p": True}),
    (ValueError, "dropout_p is 1.5|0 <= dropout_p <= 1", {"dropout_p": 1.5}),
    (ValueError, "dropout_p is -0.1|0 <= dropout_p <= 1", {"dropout_p": -0.1}),
    (ValueError, "extra_k and extra_v must be given together", {"extra_k": rand(2, 1, KV_HEADS, DIM)}),
    (ValueError, "extra_k and extra_v must be given together", {"extra_v": rand(2, 1, KV_HEADS, DIM_V)}),
    (TypeError, "extra_k is a int|tensor", {"extra_k": 1, "extra_v": rand(2, 1, KV_HEADS, DIM_V)}),
    (
        ValueError,
        "extra_k has shape [2, 1, 4, 4]|[2, 1, 2, 4]",
        {"extra_k": rand(2, 1, HEADS, DIM), "extra_v": rand(2, 1, KV_HEADS, DIM_V)},
    ),
    (
        ValueError,
        "extra_v has shape [1, 1, 2, 3]|[2, 1, 2, 3]",
        {"extra_k": rand(2, 1, KV_HEADS, DIM), "extra_v": rand(1, 1, KV_HEADS, DIM_V)},
    ),
    (
        ValueError,
        "extra_k has 2 keys, extra_v has 3",
        {"extra_k": rand(2, 2, KV_HEADS, DIM), "extra_v": rand(2, 3, KV_HEADS, DIM_V)},
    ),
    (
        ValueError,
        "extra_k is torch.float64|torch.float32 as q",
        {"extra_k": rand(2, 1, KV_HEADS, DIM).double(), "extra_v": rand(2, 1, KV_HEADS, DIM_V)},
    ),
    (
        ValueError,
        "extra_v is on meta|cpu",
        {"extra_k": rand(2, 1, KV_HEADS, DIM), "extra_v": torch.empty(2, 1, KV_HEADS, DIM_V, device="meta")},
    ),
    (TypeError, "rel_pos is a Tensor|tuple", {"rel_pos": rand(5, DIM)}),
    (ValueError, "rel_pos has 3 tables|2 axes", {"rel_pos": (rand(5, DIM),) * 3}),
    (ValueError, "rel_pos[0] has shape [6, 4]|[5, 4]", {"rel_pos": (rand(6, 4), rand(5, DIM))}),
    (
        ValueError,
        "rel_pos needs a window of a fixed size|axis 0",
        {
            "kernel_size": ((-1, -1), 3),
            "border": "truncate",
            "rel_pos": (rand(5, DIM), rand(5, DIM)),
        },
    ),
    (TypeError, "key_padding_mask is a list|tensor", {"key_padding_mask": [True]}),
    (
        ValueError,
        "key_padding_mask is torch.float32|torch.bool, True = ignored",
        {"key_padding_mask": rand(2, 6, 8)},
    ),
    (
        ValueError,
        "key_padding_mask has shape [2, 6]|[2, 6, 8]",
        {"key_padding_mask": torch.zeros(2, 6, dtype=torch.bool)},
    ),
    (
        ValueError,
        "key_padding_mask is on meta|cpu",
        {"key_padding_mask": torch.zeros(2, 6, 8, dtype=torch.bool, device="meta")},
    ),
    (TypeError, "return_lse is 1|True or False", {"return_lse": 1}),
    (TypeError, "backend must be None or a string, got int", {"backend": 1}),
    (ValueError, "backend is 'tpu'|'cpu', 'cuda', 'triton', 'reference'", {"backend": "tpu"}),
    (NotImplementedError, "no backend takes neighborhood on cpu|cuda: device cpu", {"backend": "cuda"}),
    (
        ValueError,
        "dilation is 2|a field of the Neighborhood",
        {"kernel_size": Neighborhood(3), "dilation": 2},
    ),
    (ValueError, "border is 'truncate'|Neighborhood", {"kernel_size": Neighborhood(3), "border": "truncate"}),
]


@pytest.mark.parametrize(
    ("error", "words", "changes"), CALLS, ids=lambda x: x if isinstance(x, str) else None
)
def test_calls(error: type[Exception], words: str, changes: dict[str, Any]) -> None:
    refused(error, words, call, **changes)


def test_packed_calls() -> None:
    refused(TypeError, "qkv is a list|tensor", neighborhood_attention_qkvpacked, [1.0], 3)
    refused(
        ValueError, "qkv has shape|third dimension", neighborhood_attention_qkvpacked, rand(2, 6, 2, 2, 4), 3
    )
    refused(ValueError, "qkv has shape|[B, *S, 3, h, d]", neighborhood_attention_qkvpacked, rand(3, 2), 3)


def test_what_is_accepted() -> None:
    """The borders of the rules, on the right side."""
    call(1)
    call((3, 4), dilation=2)
    call((6, 8), stride=(6, 8))
    call(9, border="truncate", dilation=20)
    call(bias=BIAS.half())
    call(scale=0.0, dropout_p=1.0)
    call(extra_k=rand(2, 0, KV_HEADS, DIM), extra_v=rand(2, 0, KV_HEADS, DIM_V))
    line((0, 0), border="truncate")
    line((1, 0), stride=2, border="truncate")
    line((2, 0), stride=3, is_causal=True, border="truncate")
    line((3, -1), tokens=12, border="truncate")
    line(((3, 1),), border="truncate")


def test_arguments_are_checked_by_explain_too() -> None:
    q = rand(2, 6, 8, HEADS, DIM)
    refused(ValueError, "stride is 4 on axis 0", explain, neighborhood_attention, q, q, q, 3, stride=4)
    refused(TypeError, "window", explain, neighborhood_attention, q, q, q, 3, window=2)


def test_values_are_frozen() -> None:
    with pytest.raises(AttributeError, match=re.escape("dilation")):
        Neighborhood(3).dilation = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"backend": ["cpu"]}, "backend must be None or a string"),
        ({"dropout_p": False}, "dropout_p is False"),
        ({"scale": True}, "scale is True"),
        ({"is_causal": 0}, "is_causal is 0"),
        ({"dilation": True}, "dilation is True"),
        ({"kernel_size": (3.0, 3)}, "kernel_size is"),
        ({"stride": (1, True)}, "stride is"),
    ],
    ids=str,
)
def test_wrong_types_after_a_good_call(wrong: dict[str, Any], message: str) -> None:
    """The memory of earlier calls must not take an equal value of another type for one that was checked."""
    q = torch.randn(1, 4, 4, 1, 8)
    good: dict[str, Any] = {"kernel_size": (3, 3), "stride": (1, 1), "scale": 1.0}
    neighborhood_attention(q, q, q, **good)
    neighborhood_attention(q, q, q, kernel_size=(3, 3), is_causal=False, dilation=1)
    with pytest.raises(TypeError, match=message):
        neighborhood_attention(q, q, q, **{**good, **wrong})
