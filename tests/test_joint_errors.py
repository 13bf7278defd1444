"""Every wrong argument of joint and hash attention is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from vicinal import explain, hash_attention, joint_attention


def joint(**changes: Any) -> dict[str, Any]:
    given: dict[str, Any] = {name: torch.zeros(2, 20, 8) for name in ("quad_q", "quad_k", "lin_q", "lin_k")}
    return given | {"v": torch.zeros(2, 20, 6), "group_size": 4} | changes


def hashed(**changes: Any) -> dict[str, Any]:
    given: dict[str, Any] = {"qk": torch.ones(2, 20, 3, 8), "v": torch.zeros(2, 20, 3, 6)}
    tables = {"anchors": torch.zeros(5, 8), "weight": torch.zeros(16, 5), "mean": torch.zeros(5)}
    return given | tables | changes


WRONG_JOINT: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"quad_q": 1}, TypeError, "quad_q is a int; it must be a tensor"),
    ({"u": "x"}, TypeError, "u is a str"),
    ({"quad_k": torch.zeros(2, 20, 1, 8)}, ValueError, r"quad_k has shape \[2, 20, 1, 8\]"),
    ({"v": torch.zeros(2, 20)}, ValueError, r"v has shape \[2, 20\]; it must be \[B, N, V\]"),
    ({"quad_q": torch.zeros(2, 20, 8).int()}, TypeError, "quad_q is torch.int32"),
    (
        {"lin_q": torch.zeros(2, 20, 8).double()},
        TypeError,
        "lin_q is torch.float64; it must be torch.float32",
    ),
    ({"v": torch.zeros(2, 20, 6).half()}, TypeError, "v is torch.float16; it must be torch.float32"),
    ({"quad_k": torch.zeros(2, 20, 7)}, ValueError, r"quad_k has shape \[2, 20, 7\]"),
    ({"lin_k": torch.zeros(2, 21, 8)}, ValueError, r"lin_k has shape \[2, 21, 8\]"),
    ({"lin_q": torch.zeros(3, 20, 8)}, ValueError, r"lin_q has shape \[3, 20, 8\]"),
    ({"v": torch.zeros(2, 19, 6)}, ValueError, r"v has shape \[2, 19, 6\]"),
    ({"v": torch.zeros(2, 20, 0)}, ValueError, "V must be at least 1"),
    ({"u": torch.zeros(2, 20, 5)}, ValueError, r"u has shape \[2, 20, 5\]; it must be \[B, N, V\] as v"),
    ({"quad_k": torch.zeros(2, 20, 8, device="meta")}, ValueError, "quad_k is on meta"),
    ({"group_size": 2.0}, TypeError, "group_size is 2.0"),
    ({"group_size": True}, TypeError, "group_size is True"),
    ({"group_size": 0}, ValueError, "group_size is 0"),
    ({"is_causal": 1}, TypeError, "is_causal is 1"),
    ({"gate": None}, TypeError, "gate is None"),
    ({"gate": True}, ValueError, "gate is True, but u is None"),
    ({"activation": "softmax"}, ValueError, "activation is 'softmax'; it must be one of relu2, laplace"),
    ({"activation": None}, TypeError, "activation is None"),
    ({"quad_scale": "1"}, TypeError, "quad_scale is '1'"),
    ({"lin_scale": float("nan")}, ValueError, "lin_scale is nan"),
    ({"dropout_p": 1.0}, ValueError, "dropout_p is 1.0"),
    ({"dropout_p": -0.1}, ValueError, "dropout_p is -0.1"),
    ({"dropout_p": None}, TypeError, "dropout_p is None"),
    ({"key_padding_mask": torch.zeros(2, 20)}, TypeError, "key_padding_mask is torch.float32"),
    ({"key_padding_mask": torch.zeros(20, dtype=torch.bool)}, ValueError, "key_padding_mask has shape"),
    ({"bias": torch.zeros(4, 4).int()}, TypeError, "bias is torch.int32"),
    ({"bias": torch.zeros(4, 5)}, ValueError, r"bias has shape \[4, 5\]"),
    ({"bias": torch.zeros(4, 4), "group_size": None}, ValueError, r"= \[20, 20\]"),
    ({"backend": "fast"}, ValueError, "backend is 'fast'; joint has"),
    ({"backend": 1}, TypeError, "backend must be None or a string"),
]
WRONG_HASH: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"qk": None}, TypeError, "qk is a NoneType"),
    ({"v": torch.zeros(2, 20, 18)}, ValueError, r"v has shape \[2, 20, 18\]"),
    ({"qk": torch.ones(2, 20, 3, 8).long()}, TypeError, "qk is torch.int64"),
    (
        {"v": torch.zeros(2, 20, 3, 6).double()},
        TypeError,
        "v is torch.float64; it must be torch.float32 as qk",
    ),
    ({"v": torch.zeros(2, 20, 2, 6)}, ValueError, r"v has shape \[2, 20, 2, 6\]"),
    ({"v": torch.zeros(2, 20, 3, 6, device="meta")}, ValueError, "v is on meta"),
    ({"qk": torch.ones(2, 20, 3, 0)}, ValueError, "N, H, D and dv must be at least 1"),
    ({"anchors": torch.zeros(5, 7)}, ValueError, r"anchors has shape \[5, 7\]; .* D = 8 as qk"),
    ({"anchors": torch.zeros(2, 5, 8)}, ValueError, "it must have 3 heads as qk"),
    ({"anchors": torch.zeros(5, 8).int()}, TypeError, "anchors is torch.int32"),
    ({"anchors": [1.0]}, TypeError, "anchors is a list"),
    ({"anchors": torch.zeros(5, 8, requires_grad=True)}, ValueError, "anchors requires grad; it gets none"),
    ({"weight": torch.zeros(16, 6)}, ValueError, r"weight has shape \[16, 6\]; .* m = 5 anchors"),
    ({"weight": torch.zeros(5)}, ValueError, r"weight has shape \[5\]; it must be \[H, bits, m\]"),
    ({"mean": torch.zeros(4)}, ValueError, r"mean has shape \[4\]"),
    ({"mean": torch.zeros(5, device="meta")}, ValueError, "mean is on meta"),
    ({"numerator": "mine"}, ValueError, "numerator is 'mine'; it must be one of sum, self"),
    ({"numerator": True}, TypeError, "numerator is True"),
    ({"offset": "17"}, TypeError, "offset is '17'"),
    ({"offset": 16.0}, ValueError, "offset is 16.0; it must be above 16"),
    ({"offset": float("inf")}, ValueError, "offset is inf"),
    ({"backend": "cuda2"}, ValueError, "backend is 'cuda2'; hash has"),
]


@pytest.mark.parametrize(("changes", "kind", "message"), WRONG_JOINT)
def test_joint_refuses(changes: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        joint_attention(**joint(**changes))


@pytest.mark.parametrize(("changes", "kind", "message"), WRONG_HASH)
def test_hash_refuses(changes: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        hash_attention(**hashed(**changes))


def test_what_is_right_is_taken() -> None:
    out = joint_attention(**joint())
    assert isinstance(out, Tensor)
    assert out.shape == (2, 20, 6)
    assert hash_attention(**hashed()).shape == (2, 20, 3, 6)


def test_explain_knows_both() -> None:
    for function, given in ((joint_attention, joint()), (hash_attention, hashed())):
        assert explain(function, **given, backend="reference").backend == "reference"
        assert "reference" in explain(function, **given).reasons
