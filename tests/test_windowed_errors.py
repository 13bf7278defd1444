"""Wrong arguments: the right exception, whose message names the argument, what it is and what it may be, and
no launch.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from dispatch_modes import refused
from torch import Tensor

from vicinal import RelativeBias, Windows, explain, windowed_attention, windowed_attention_qkvpacked

HEADS, DIM, DIM_V = 2, 4, 3


def rand(*shape: int) -> Tensor:
    return torch.rand(*shape)


def call(windows: Any = 2, **changes: Any) -> Any:
    """A correct call on a 4 x 6 grid, but for the changes."""
    given: dict[str, Any] = {
        "q": rand(2, 4, 6, HEADS, DIM),
        "k": rand(2, 4, 6, HEADS, DIM),
        "v": rand(2, 4, 6, HEADS, DIM_V),
        **changes,
    }
    return windowed_attention(windows=windows, **given)


WINDOWS = [
    (TypeError, "size is 'a'|an int >= 1 or -1", {"size": "a"}),
    (TypeError, "size is 2.0|an int >= 1", {"size": 2.0}),
    (TypeError, "size is True|an int >= 1", {"size": True}),
    (TypeError, "size is ()|tuple of 1 to 3", {"size": ()}),
    (TypeError, "size is (1, 1, 1, 1)|tuple of 1 to 3", {"size": (1, 1, 1, 1)}),
    (TypeError, "size is [2, 2]|tuple", {"size": [2, 2]}),
    (TypeError, "size is None|head_groups", {"size": None}),
    (ValueError, "size is 0|an int >= 1 or -1", {"size": 0}),
    (ValueError, "size is (2, -2)|an int >= 1 or -1", {"size": (2, -2)}),
    (TypeError, "shift is 1.5|an int >= 0", {"size": 2, "shift": 1.5}),
    (ValueError, "shift is -1|an int >= 0", {"size": 2, "shift": -1}),
    (ValueError, "shift is (1, 0)|partition 'grid'|0", {"size": 2, "shift": (1, 0), "partition": "grid"}),
    (ValueError, "shift is 1|q_size or kv_size", {"size": 4, "shift": 1, "kv_size": 6}),
    (ValueError, "shift is 1|q_size or kv_size", {"size": 4, "shift": 1, "q_size": 2}),
    (ValueError, "partition is 'blocks'|'block', 'grid'", {"size": 2, "partition": "blocks"}),
    (TypeError, "partition is None|'block', 'grid'", {"size": 2, "partition": None}),
    (ValueError, "edge is 'pad'|'mask', 'zero', 'const'", {"size": 2, "edge": "pad"}),
    (ValueError, "pad_order is 'roll'|'pad_roll', 'roll_pad'", {"size": 2, "pad_order": "roll"}),
    (ValueError, "pad_side is 'start'|'end', 'center'", {"size": 2, "pad_side": "start"}),
    (
        ValueError,
        "pad_order 'roll_pad'|pad_side 'end'",
        {"size": 2, "pad_order": "roll_pad", "pad_side": "center"},
    ),
    (TypeError, "mask_value is None|a float, at most 0", {"size": 2, "mask_value": None}),
    (ValueError, "mask_value is 1.0|at most 0", {"size": 2, "mask_value": 1.0}),
    (ValueError, "mask_value is nan|at most 0", {"size": 2, "mask_value": float("nan")}),
    (TypeError, "q_size is 1.0|an int >= 1", {"size": 2, "q_size": 1.0}),
    (ValueError, "kv_size is -1|an int >= 1", {"size": 2, "kv_size": -1}),
    (ValueError, "kv_size|partition 'block'", {"size": 2, "kv_size": 4, "partition": "grid"}),
    (ValueError, "kv_size|pad_side 'end'", {"size": 2, "kv_size": 4, "pad_side": "center"}),
    (ValueError, "size and shift|None and 0|head_groups", {"size": 2, "head_groups": ((1, 2),)}),
    (TypeError, "head_groups is [(1, 2)]|tuple", {"size": None, "head_groups": [(1, 2)]}),
    (TypeError, "head_groups is ()|(heads, size)", {"size": None, "head_groups": ()}),
    (TypeError, "head_groups has (1,)|(heads, size)", {"size": None, "head_groups": ((1,),)}),
    (TypeError, "head_groups has 1.0 heads|an int >= 1", {"size": None, "head_groups": ((1.0, 2),)}),
    (ValueError, "head_groups has 0 heads|an int >= 1", {"size": None, "head_groups": ((0, 2),)}),
    (ValueError, "size in head_groups is 0|an int >= 1", {"size": None, "head_groups": ((1, 0),)}),
    (ValueError, "shift in head_groups is -1|an int >= 0", {"size": None, "head_groups": ((1, 2, -1),)}),
]


@pytest.mark.parametrize(
    ("error", "words", "fields"), WINDOWS, ids=lambda x: x if isinstance(x, str) else None
)
def test_windows(error: type[Exception], words: str, fields: dict[str, Any]) -> None:
    refused(error, words, Windows, **fields)


TABLE = rand(9, HEADS)
BIASES: list[tuple[type[Exception], str, Callable[[], Any]]] = [
    (TypeError, "table is a list|tensor", lambda: RelativeBias([1.0])),  # type: ignore[arg-type]
    (ValueError, "table has shape [9]|float [T, heads]", lambda: RelativeBias(rand(9))),
    (ValueError, "table has shape [9, 2] and torch.int64|float", lambda: RelativeBias(TABLE.long())),
    (ValueError, "index is 'k'|'q-k', 'k-q', 'abs'", lambda: RelativeBias(TABLE, "k")),
    (
        ValueError,
        "index has shape [4]|[Nq, Nk]",
        lambda: RelativeBias(TABLE, torch.zeros(4, dtype=torch.long)),
    ),
    (
        ValueError,
        "index has shape [4, 4] and torch.float32|int64 or int32",
        lambda: RelativeBias(TABLE, rand(4, 4)),
    ),
    (TypeError, "window is 2|tuple", lambda: RelativeBias(TABLE, window=2)),  # type: ignore[arg-type]
    (ValueError, "window must be None|tensor", lambda: RelativeBias(TABLE, torch.zeros(4, 4).long(), (2, 2))),
]


@pytest.mark.parametrize(("error", "words", "make"), BIASES, ids=lambda x: x if isinstance(x, str) else "")
def test_relative_bias(error: type[Exception], words: str, make: Callable[[], Any]) -> None:
    refused(error, words, make)


ZEROS = torch.zeros(4, 4, dtype=torch.long)
CALLS: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (TypeError, "q is a list|tensor", {"q": [1.0]}),
    (ValueError, "q has shape [2, 4, 2]|[B, *S, heads, head_dim]|1 to 3 axes", {"q": rand(2, 4, 2)}),
    (ValueError, "q has shape|1 to 3 axes", {"q": rand(1, 2, 2, 2, 2, 2, 2)}),
    (
        TypeError,
        "q is torch.int64|float32, float64, bfloat16, float16",
        {"q": torch.ones(2, 4, 6, 2, 4).long()},
    ),
    (TypeError, "k is torch.float64|torch.float32", {"k": rand(2, 4, 6, HEADS, DIM).double()}),
    (ValueError, "k is on meta|cpu", {"k": torch.empty(2, 4, 6, HEADS, DIM, device="meta")}),
    (ValueError, "k has 4 dimensions|5", {"k": rand(2, 24, HEADS, DIM)}),
    (ValueError, "k has shape [2, 4, 5, 2, 4]|[2, 4, 6, 2, 4]", {"k": rand(2, 4, 5, HEADS, DIM)}),
    (ValueError, "k has shape|[2, 4, 6, 2, 4]", {"k": rand(2, 4, 6, HEADS, 5)}),
    (ValueError, "v has shape [2, 4, 6, 3, 3]|[2, 4, 6, 2, 3]", {"v": rand(2, 4, 6, 3, DIM_V)}),
    (ValueError, "head dims|at least 1", {"v": rand(2, 4, 6, HEADS, 0)}),
    (
        ValueError,
        "axis 0 of the grid has 0 tokens|at least 1",
        {n: rand(2, 0, 6, HEADS, d) for n, d in zip("qkv", (4, 4, 3))},
    ),
    (TypeError, "windows is 'a'|a Windows, an int or a tuple", {"windows": "a"}),
    (TypeError, "windows is None|a Windows, an int or a tuple", {"windows": None}),
    (ValueError, "size is (2,)|2 axes", {"windows": (2,)}),
    (ValueError, "shift is (1, 1, 1)|2 axes", {"windows": Windows(2, shift=(1, 1, 1))}),
    (ValueError, "kv_size is (4,)|2 axes", {"windows": Windows(2, kv_size=(4,))}),
    (ValueError, "head_groups has (2, (2,), 0)|2 axes", {"windows": Windows(None, head_groups=((2, (2,)),))}),
    (ValueError, "head_groups has 3 heads|q has 2", {"windows": Windows(None, head_groups=((1, 2), (2, 2)))}),
    (ValueError, "shift is 2 on axis 0|0 <= shift < size = 2", {"windows": Windows(2, shift=2)}),
    (ValueError, "shift is 6 on axis 1|size = 6", {"windows": Windows((4, -1), shift=(0, 6))}),
    (ValueError, "kv_size is 2 on axis 0|at least size = 4", {"windows": Windows(4, kv_size=2)}),
    (
        ValueError,
        "q_size is 2 on axis 0|2 windows of 4 queries|1 windows of keys",
        {"windows": Windows((4, 6), q_size=2)},
    ),
    (TypeError, "bias is a float|tensor", {"bias": 1.0}),
    (TypeError, "bias is torch.int64|float", {"bias": torch.zeros(HEADS, 4, 4).long()}),
    (ValueError, "bias has shape [2, 4, 5]|[T, 2]|[2, 4, 4]", {"bias": rand(HEADS, 4, 5)}),
    (ValueError, "bias has a table of 8 rows|'q-k' over (2, 2)|9", {"bias": rand(8, HEADS)}),
    (ValueError, "bias has a table of 9 rows|'abs'|4", {"bias": RelativeBias(TABLE, "abs")}),
    (ValueError, "bias has a table of 3 heads|2", {"bias": rand(9, 3)}),
    (ValueError, "bias is on meta|cpu", {"bias": torch.empty(9, HEADS, device="meta")}),
    (
        ValueError,
        "index has shape [4, 5]|[Nq, Nk] = [4, 4]",
        {"bias": RelativeBias(TABLE, torch.zeros(4, 5).long())},
    ),
    (ValueError, "index has rows 9 to 9|table has 9", {"bias": RelativeBias(TABLE, ZEROS + 9)}),
    (ValueError, "index has rows -10 to -10|table has 9", {"bias": RelativeBias(TABLE, ZEROS - 10)}),
    (ValueError, "window of bias is (2, 2, 2)|2 axes", {"bias": RelativeBias(TABLE, window=(2, 2, 2))}),
    (ValueError, "window of bias is (1, 3)|4 slots", {"bias": RelativeBias(rand(5, HEADS), window=(1, 3))}),
    (
        ValueError,
        "bias|head_groups has several",
        {"windows": Windows(None, head_groups=((1, 2), (1, 3))), "bias": TABLE},
    ),
    (
        ValueError,
        "'abs'|kv_size|index tensor",
        {"windows": Windows(2, kv_size=4), "bias": RelativeBias(TABLE, "abs")},
    ),
    (TypeError, "scale is '1'|finite float or None", {"scale": "1"}),
    (ValueError, "scale is inf|finite float", {"scale": float("inf")}),
    (ValueError, "scale is nan|finite float", {"scale": float("nan")}),
    (ValueError, "scale is 1.0|None where logit_scale is given", {"scale": 1.0, "logit_scale": rand(HEADS)}),
    (TypeError, "logit_scale is torch.int64|float", {"logit_scale": torch.ones(HEADS).long()}),
    (ValueError, "logit_scale has shape [3]|[2] or [2, 1, 1]", {"logit_scale": rand(3)}),
    (ValueError, "edge_k is given|edge is 'mask'|'const'", {"edge_k": rand(HEADS, DIM)}),
    (
        ValueError,
        "edge_v has shape [2, 4]|[2, 3]",
        {"windows": Windows(2, edge="const"), "edge_v": rand(HEADS, DIM)},
    ),
    (TypeError, "edge_k is a list|tensor", {"windows": Windows(2, edge="const"), "edge_k": [1.0]}),
    (ValueError, "extra_k and extra_v|together", {"extra_k": rand(2, 1, HEADS, DIM)}),
    (ValueError, "extra_bias|without extra_k", {"extra_bias": rand(HEADS, 1)}),
    (
        ValueError,
        "extra_k has 1 keys|extra_v has 2",
        {"extra_k": rand(2, 1, HEADS, DIM), "extra_v": rand(2, 2, HEADS, DIM_V)},
    ),
    (
        ValueError,
        "extra_v has shape|[B, M, heads, head_dim]",
        {"extra_k": rand(2, 1, HEADS, DIM), "extra_v": rand(2, 1, HEADS, DIM)},
    ),
    (
        ValueError,
        "extra_bias has shape [1, 2]|[2, 1]",
        {
            "extra_k": rand(2, 1, HEADS, DIM),
            "extra_v": rand(2, 1, HEADS, DIM_V),
            "extra_bias": rand(1, HEADS),
        },
    ),
    (TypeError, "key_padding_mask is a list|tensor", {"key_padding_mask": [True]}),
    (
        TypeError,
        "key_padding_mask is torch.int64|bool (True = ignored) or float",
        {"key_padding_mask": torch.ones(2, 4, 6).long()},
    ),
    (
        ValueError,
        "key_padding_mask has shape [2, 24]|[2, 4, 6]",
        {"key_padding_mask": torch.ones(2, 24).bool()},
    ),
    (
        ValueError,
        "key_padding_mask requires grad|none",
        {"key_padding_mask": torch.zeros(2, 4, 6, requires_grad=True)},
    ),
    (TypeError, "attn_mask is torch.bool|float", {"attn_mask": torch.ones(6, 4, 4).bool()}),
    (ValueError, "attn_mask has shape [5, 4, 4]|[W, 4, 4]|divisor|12", {"attn_mask": rand(5, 4, 4)}),
    (ValueError, "attn_mask has shape [6, 4, 5]|[W, 4, 4]", {"attn_mask": rand(6, 4, 5)}),
    (ValueError, "attn_mask has shape [12, 3, 4, 4]|1 or 2", {"attn_mask": rand(12, 3, 4, 4)}),
    (ValueError, "attn_mask requires grad|dense bias", {"attn_mask": rand(6, 4, 4).requires_grad_()}),
    (
        ValueError,
        "attn_mask|head_groups has several",
        {"windows": Windows(None, head_groups=((1, 2), (1, 3))), "attn_mask": rand(6, 4, 4)},
    ),
    (TypeError, "rel_pos is a list|tuple", {"rel_pos": [rand(3, DIM)]}),
    (ValueError, "rel_pos has 1 tables|2 axes", {"rel_pos": (rand(3, DIM),)}),
    (
        ValueError,
        f"rel_pos[1] has shape [4, {DIM}]|[3, {DIM}]|[{HEADS}, 3, {DIM}]",
        {"rel_pos": (rand(3, DIM), rand(4, DIM))},
    ),
    (TypeError, "rel_pos[0] is torch.int64|float", {"rel_pos": (rand(3, DIM).long(), rand(3, DIM))}),
    (
        ValueError,
        "rel_pos|head_groups has several",
        {"windows": Windows(None, head_groups=((1, 2), (1, 3))), "rel_pos": (rand(3, DIM), rand(3, DIM))},
    ),
    (TypeError, "activation is None|'softmax', 'relu2', 'relu', 'none'", {"activation": None}),
    (ValueError, "activation is 'gelu'|'softmax', 'relu2', 'relu', 'none'", {"activation": "gelu"}),
    (TypeError, "dropout_p is '0'|0 <= dropout_p < 1", {"dropout_p": "0"}),
    (ValueError, "dropout_p is 1.0|0 <= dropout_p < 1", {"dropout_p": 1.0}),
    (ValueError, "dropout_p is -0.1|0 <= dropout_p < 1", {"dropout_p": -0.1}),
    (TypeError, "return_lse is 1|True or False", {"return_lse": 1}),
    (ValueError, "return_lse is True|False|'relu'", {"return_lse": True, "activation": "relu"}),
    (TypeError, "backend|None or a string|int", {"backend": 3}),
    (ValueError, "backend is 'tpu'|'reference'", {"backend": "tpu"}),
]


@pytest.mark.parametrize(("error", "words", "changes"), CALLS, ids=[c[1][:60] for c in CALLS])
def test_call(error: type[Exception], words: str, changes: dict[str, Any]) -> None:
    call()  # also where the same shapes were accepted before
    refused(error, words, call, **changes)


@pytest.mark.parametrize("name", ["q", "windows", "bias"])
def test_the_correct_call_is_accepted(name: str) -> None:
    changes = {"q": rand(2, 4, 6, HEADS, DIM), "windows": (2, 2), "bias": TABLE}
    assert call(**{name: changes[name]}).shape == (2, 4, 6, HEADS, DIM_V)


def test_packed() -> None:
    refused(TypeError, "qkv is a list|tensor", windowed_attention_qkvpacked, [1.0], 2)
    refused(
        ValueError, "qkv has shape [2, 4, 6, 2, 4]|3", windowed_attention_qkvpacked, rand(2, 4, 6, 2, 4), 2
    )
    refused(ValueError, "qkv has shape [3, 2]|[B, *S, 3, h, d]", windowed_attention_qkvpacked, rand(3, 2), 2)


def test_arguments_are_checked_by_explain_too() -> None:
    q = rand(2, 4, 6, HEADS, DIM)
    refused(ValueError, "shift is 2 on axis 0", explain, windowed_attention, q, q, q, Windows(2, shift=2))
    refused(TypeError, "dilation", explain, windowed_attention, q, q, q, 2, dilation=2)
    refused(ValueError, "explain knows|windowed_attention", explain, torch.relu, q)


def test_values_are_frozen() -> None:
    for value, field in ((Windows(2), "size"), (RelativeBias(TABLE), "index")):
        with pytest.raises(AttributeError, match=re.escape(field)):
            setattr(value, field, 3)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"backend": ["cpu"]}, "backend must be None or a string"),
        ({"dropout_p": False}, "dropout_p is False"),
        ({"scale": True}, "scale is True"),
    ],
)
def test_wrong_types_after_a_good_call(wrong: dict[str, Any], message: str) -> None:
    """The memory of earlier calls must not take an equal value of another type for one that was checked."""
    q = torch.randn(1, 4, 4, 1, 8)
    windowed_attention(q, q, q, 2, scale=1.0)
    windowed_attention(q, q, q, 2)
    with pytest.raises(TypeError, match=message):
        windowed_attention(q, q, q, 2, **wrong)
