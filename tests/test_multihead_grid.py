"""Multi-head attention against torch's slow path: every combination of options in float64, sizes and types
by the rule."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import rule
import torch
from multihead_support import differences, outputs_and_gradients, padding, pair, slow_path, tokens
from torch import Tensor

N, L, S = 3, 5, 7
HIDE = -torch.inf


def _causal(n_q: int, n_k: int) -> Tensor:
    return torch.ones(n_q, n_k).triu(1).bool()


def masks(kind: str, n: int, n_q: int, n_k: int, heads: int, need_weights: bool) -> dict[str, Any]:
    """Arguments of one kind of masking; no row is wholly hidden."""
    hidden = padding(n, n_k)
    free = torch.randn(n * heads, n_q, n_k, dtype=torch.float64)
    added = torch.zeros(n, n_k, dtype=torch.float64).masked_fill(hidden, HIDE)
    calls: dict[str, dict[str, Any]] = {
        "none": {},
        "bool keys": {"key_padding_mask": hidden},
        "float keys": {"key_padding_mask": added},
        "bias of keys": {"key_padding_mask": added + free[:n, 0]},
        "bool pairs": {"attn_mask": _causal(n_q, n_k)},
        "float pairs": {"attn_mask": free[0].clone().requires_grad_()},
        "pairs by head": {"attn_mask": free},
        "keys and pairs": {"key_padding_mask": hidden, "attn_mask": _causal(n_q, n_k)},
        "hint": {"attn_mask": _causal(n_q, n_k), "is_causal": n_q == n_k or need_weights},
    }
    return calls[kind]


KINDS = (
    "none",
    "bool keys",
    "float keys",
    "bias of keys",
    "bool pairs",
    "float pairs",
    "pairs by head",
    "keys and pairs",
    "hint",
)


def arguments(kind: str, batch_first: bool) -> tuple[dict[str, Any], tuple[Tensor, ...]]:
    """Options of the constructor and q, k, v."""
    x, y = tokens(N, L, 12, batch_first), tokens(N, S, 12, batch_first)
    if kind == "self":
        return {}, (x, x, x)
    if kind == "q is k":
        return {}, (x, x, tokens(N, L, 12, batch_first))
    if kind == "cross":
        return {}, (x, y, y)
    return {"kdim": 10, "vdim": 8}, (x, tokens(N, S, 10, batch_first), tokens(N, S, 8, batch_first))


@pytest.mark.parametrize("inputs", ["self", "q is k", "cross", "other widths"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_combination_equals_the_slow_path(kind: str, inputs: str) -> None:
    grid = product((False, True), (False, True), ("none", "add_bias_kv", "add_zero_attn"))
    for index, (batch_first, bias, extra) in enumerate(grid):
        torch.manual_seed(0)
        sizes, given = arguments(inputs, batch_first)
        options = {"bias": bias, "batch_first": batch_first, **sizes}
        if extra != "none":
            options[extra] = True
        heads = 3 if bias else 4
        ours, theirs = pair(12, heads, dtype=torch.float64, **options)
        n_k = L if inputs in ("self", "q is k") else S
        for need_weights, average in ((False, True), (True, True), (True, False)):
            if kind == "hint" and extra != "none" and not need_weights:
                continue  # upstream drops the mask and hides the added keys
            call = masks(kind, N, L, n_k, heads, need_weights)
            call |= {"need_weights": need_weights, "average_attn_weights": average}
            where = f"batch_first={batch_first} bias={bias} {extra} {need_weights} {average}"
            expected = outputs_and_gradients(theirs.train(), given, call)
            actual = outputs_and_gradients(ours.train(index % 2 == 0), given, call)
            assert not differences(actual, expected, 1e-11), where
            with torch.no_grad(), slow_path():
                out, weights = ours(*given, **call)
            assert (out - expected["output"]).abs().max() < 1e-11, where
            assert (weights is None) == (not need_weights)


SIZES = [(1, 1), (1, 90), (17, 17), (36, 36), (49, 17), (90, 90), (197, 197), (4, 512), (390, 390)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_error_against_float64_is_at_most_twice_that_of_the_slow_path(
    size: tuple[int, int], dtype: torch.dtype
) -> None:
    n_q, n_k = size
    n = 2 if n_q * n_k < 20000 else 1
    heads, width = (3, 39) if n_q % 2 else (2, 48)
    ours, theirs = pair(width, heads, dtype=dtype, batch_first=True)
    exact = pair(width, heads, dtype=torch.float64, batch_first=True)[1]
    exact.load_state_dict(ours.state_dict())
    x = tokens(n, n_q, width, True, dtype)
    y = x if n_q == n_k else tokens(n, n_k, width, True, dtype)
    given = (x, y, y)
    wide = tuple(t.double() for t in (x, y))
    wide = (wide[0], wide[0], wide[0]) if y is x else (wide[0], wide[1], wide[1])
    for call in ({"key_padding_mask": padding(n, n_k)}, {"need_weights": False}):
        truth = outputs_and_gradients(exact, wide, call)
        actual = outputs_and_gradients(ours, given, call)
        theirs_error = outputs_and_gradients(theirs, given, call)
        errors = {name: rule.error_of(theirs_error[name], x64) for name, x64 in truth.items()}
        assert not rule.compare(actual, truth, errors, dtype)


@pytest.mark.parametrize("kind", ["none", "bool keys", "bool pairs"])
@pytest.mark.parametrize("need_weights", [False, True])
def test_gradients_equal_finite_differences(kind: str, need_weights: bool) -> None:
    ours, _ = pair(6, 2, dtype=torch.float64, batch_first=True)
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True)
    call = masks(kind, 2, 3, 4, 2, need_weights)

    def outputs(q: Tensor, kv: Tensor) -> tuple[Tensor, ...]:
        return tuple(t for t in ours(q, kv, kv, need_weights=need_weights, **call) if t is not None)

    assert torch.autograd.gradcheck(outputs, (x, y))
