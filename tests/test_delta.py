"""The delta rule: in chunks against token by token, finite differences, its step, published code, errors."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vicinal import delta_rule_attention, delta_rule_step
from vicinal.reference_linear import delta_rule


def inputs(n: int, shared: int = 1, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    q, k = torch.randn(2, n, 2, 7, dtype=dtype), F.normalize(torch.randn(2, n, 2, 7, dtype=dtype), dim=-1)
    return [q, k, torch.randn(2, n, 2 * shared, 5, dtype=dtype), torch.rand(2, n, 2 * shared, dtype=dtype)]


def both(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    found = delta_rule_attention(*args, output_final_state=True, **options)
    assert isinstance(found, tuple)
    return found


@pytest.mark.parametrize("n", [0, 1, 63, 64, 65, 200])
@pytest.mark.parametrize("shared", [1, 3])
def test_chunks_are_the_rule_token_by_token(n: int, shared: int) -> None:
    q, k, v, beta = inputs(n, shared)
    state = torch.randn(2, 2 * shared, 7, 5, dtype=torch.float64)
    for start in (None, state):
        expected = delta_rule(q, k, v, beta, 0.3, start)
        torch.testing.assert_close(both(q, k, v, beta, scale=0.3, initial_state=start), expected)


def test_gradients_are_finite_differences() -> None:
    leaves = [x[:1, :4].clone().requires_grad_() for x in inputs(5)]
    leaves.append(torch.randn(1, 2, 7, 5, dtype=torch.float64, requires_grad=True))

    def function(*x: Tensor) -> tuple[Tensor, Tensor]:
        return both(*x[:4], initial_state=x[4])

    assert torch.autograd.gradcheck(function, leaves)


def test_gradients_across_chunks() -> None:
    leaves = [x.requires_grad_() for x in inputs(150)]
    pairs = []
    for found in (both(*leaves), delta_rule(leaves[0], leaves[1], leaves[2], leaves[3], 1.0)):
        pairs.append(torch.autograd.grad((found[0].sin().sum() + found[1].cos().sum()), leaves))
    for got, expected in zip(*pairs):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_types(dtype: torch.dtype) -> None:
    given = [x.to(dtype) for x in inputs(130)]
    exact = both(*(x.double() for x in given))
    out, state = both(*given)
    assert out.dtype == dtype
    assert state.dtype == torch.float32
    limit = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 5e-3}[dtype]
    assert (out - exact[0]).norm() <= limit * exact[0].norm()
    assert (state - exact[1]).norm() <= 1e-5 * exact[1].norm()


def test_steps_continue_a_run() -> None:
    q, k, v, beta = inputs(90, shared=2)
    expected, last = both(q, k, v, beta, scale=0.5)
    out, state = both(q[:, :70], k[:, :70], v[:, :70], beta[:, :70], scale=0.5)
    outs = [out]
    for t in range(70, 90):
        at = slice(t, t + 1)
        outs.append(delta_rule_step(q[:, at], k[:, at], v[:, at], beta[:, at], state, scale=0.5))
    torch.testing.assert_close(torch.cat(outs, 1), expected)
    torch.testing.assert_close(state, last)


def test_a_key_keeps_the_last_value_that_it_was_given() -> None:
    k = torch.eye(7, dtype=torch.float64)[[0, 1, 0, 2]][None, :, None]
    v = torch.randn(1, 4, 1, 5, dtype=torch.float64)
    out = delta_rule_attention(k[:, [0, 0, 0, 0]], k, v, torch.ones(1, 4, 1, dtype=torch.float64))
    torch.testing.assert_close(out, v[:, [0, 0, 2, 2]])


def test_against_fla() -> None:
    try:
        naive = importlib.import_module("fla.ops.delta_rule.naive")
    except ImportError as error:
        pytest.skip(f"fla: {error}")
    q, k, v, beta = inputs(96, dtype=torch.float32)
    given = [x.transpose(1, 2) for x in (q, k, v, beta)]
    expected = naive.delta_rule_recurrence(*given)
    expected = (expected[0] if isinstance(expected, tuple) else expected).transpose(1, 2)
    torch.testing.assert_close(both(q, k, v, beta, scale=7**-0.5)[0], expected, rtol=1e-4, atol=1e-5)


def test_compiled_in_one_graph() -> None:
    given = inputs(70, dtype=torch.float32)
    compiled = torch.compile(delta_rule_attention, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*given), both(*given)[0])


def test_bad_input() -> None:
    q, k, v, beta = inputs(3)
    state = torch.zeros(2, 2, 7, 5, dtype=torch.float64)
    for change, error, words in (
        ({"q": None}, TypeError, "q is a NoneType"),
        ({"k": k[:, :2]}, ValueError, r"k has shape \[2, 2, 2, 7\]"),
        ({"v": v[:1]}, ValueError, r"v has shape \[1, 3, 2, 5\]"),
        ({"v": v[:, :, :1]}, ValueError, "v has 1 heads"),
        ({"beta": beta[..., 0]}, ValueError, r"beta has shape \[2, 3\]"),
        ({"beta": beta.long()}, TypeError, "beta is torch.int64"),
        ({"scale": "1"}, TypeError, "scale is '1'"),
        ({"initial_state": state[:1]}, ValueError, r"initial_state has shape \[1, 2, 7, 5\]"),
        ({"initial_state": state.float()}, TypeError, "initial_state is torch.float32"),
        ({"output_final_state": 1}, TypeError, "output_final_state is 1"),
    ):
        given: Any = {"q": q, "k": k, "v": v, "beta": beta, **change}
        with pytest.raises(error, match=words):
            delta_rule_attention(**given)
    with pytest.raises(ValueError, match="q has 3 tokens"):
        delta_rule_step(q, k, v, beta, state)
    with pytest.raises(TypeError, match="state is None"):
        delta_rule_step(q[:, :1], k[:, :1], v[:, :1], beta[:, :1], None)  # type: ignore[arg-type]
