"""Linear attention in Triton's interpreter, against float64. Run by test_linear_triton.py in processes of
their own: TRITON_INTERPRET=1 must be set before triton is imported. bfloat16 is left out: the interpreter's
arithmetic on it is wrong.

The interpreter takes seconds for what a GPU does in microseconds: problems are cut to a few dozen tokens, and
causal ones to parts of 16, so that there are several."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import linear_problems
import pytest
import torch
from linear_problems import BY_NAME, Problem, violations

from vicinal import LinearState, ema_scan, linear_attention_step

QUICK = (
    "n1", "den-options", "causal-const-mask", "causal-state-head", "causal-den-options", "blocks-inclusive",
    "blocks-previous", "packed-rest", "causal-packed", "shared", "layout-nchw", "exp", "relu-param",
    "map-pair",
)  # fmt: skip
QUICK_HALF = ("n1", "causal-step-decay", "huge-logits", "relu2", "causal-packed-rest")
QUICK_DOUBLE = ("causal-step-decay", "relu-param")
MORE = (
    "causal-dims-53-32", "cross", "state", "const", "den", "mask-all", "packed", "causal-head-decay",
    "causal-retention", "causal-shared", "blocks-den-shared", "blocks-packed", "causal-layout-strided",
)  # fmt: skip


def small(p: Problem) -> Problem:
    """The same options on fewer tokens and heads."""
    heads = p.shared if p.shared > 1 else 1
    chunk = 16 if p.causal and p.block_size is None else None
    block = None if p.block_size is None else min(p.block_size, 70)
    if p.ends:
        ends = tuple(e if e < 20 else 20 + (e - 20) * 40 // p.tokens for e in p.ends)
        return replace(p, tokens=75, ends=ends, heads=heads, chunk_size=chunk, block_size=block)
    tokens = min(p.tokens, 80 if p.block_size else 45)
    keys = min(p.keys, 50)
    return replace(
        p, tokens=tokens, keys=keys, batch=1, heads=heads, chunk_size=chunk, block_size=block, dim_v=p.dim_v
    )


@pytest.mark.parametrize("name", QUICK)
def test_quick_float32(name: str) -> None:
    assert not violations(small(BY_NAME[name]), torch.float32, "triton")


@pytest.mark.parametrize("name", QUICK_HALF)
def test_quick_float16(name: str) -> None:
    assert not violations(small(BY_NAME[name]), torch.float16, "triton")


@pytest.mark.parametrize("name", QUICK_DOUBLE)
def test_quick_float64(name: str) -> None:
    assert not violations(small(BY_NAME[name]), torch.float64, "triton")


@pytest.mark.parametrize("name", MORE)
def test_more_float32(name: str) -> None:
    assert not violations(small(BY_NAME[name]), torch.float32, "triton")


def test_wide_values() -> None:
    """Several tiles of values and of features."""
    problem = replace(BY_NAME["wide-v"], tokens=20, dim=40, dim_v=150)
    assert not violations(problem, torch.float32, "triton")


def test_long_many_parts() -> None:
    """Parts of several tiles, and several parts: the table's own sizes."""
    problem = replace(BY_NAME["causal-n1025"], tokens=300, batch=1, heads=1, decay="step")
    assert not violations(problem, torch.float32, "triton")


@pytest.mark.parametrize("name", ["causal-step-decay", "causal-retention", "causal-no-decay-const"])
def test_one_token(name: str) -> None:
    problem = replace(BY_NAME[name], mask="", tokens=1, batch=2, state=True)
    tensors = {n: x.detach() for n, x in linear_problems.make(problem).items()}
    expected = linear_problems.run(problem, tensors, "reference")
    z = tensors["z"].clone() if "z" in tensors else None
    state = LinearState(tensors["s"].clone(), z)
    options: dict[str, Any] = {
        "feature_map": problem.feature_map, "decay": tensors.get("decay"), "normalize": problem.normalize,
        "scale": problem.scale, "eps": problem.eps, "const": problem.const,
    }  # fmt: skip
    q, k, v = (tensors[n] for n in "qkv")
    out = linear_attention_step(q, k, v, state, backend="triton", **options)
    torch.testing.assert_close(out, expected["out"])
    torch.testing.assert_close(state.s, expected["s"])
    if z is not None:
        torch.testing.assert_close(z, expected["z"])


def test_scan() -> None:
    x = torch.randn(1, 40, 5, dtype=torch.float64, requires_grad=True)
    p = (torch.rand(1, 40, dtype=torch.float64) * 0.9).requires_grad_()
    ends = torch.tensor([0, 17, 17, 40], dtype=torch.int32)
    results = []
    for backend in ("reference", "triton"):
        y = ema_scan(x, p, cu_seqlens=ends, backend=backend)
        assert isinstance(y, torch.Tensor)
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, p))))
    for expected, found in zip(*results):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["causal-step-decay"])
def test_backends_mix(name: str) -> None:
    """What one backend's forward saved, the other's backward reads; runs agree bit for bit."""
    problem = small(BY_NAME[name])
    tensors = {n: x.detach() for n, x in linear_problems.make(problem).items()}
    given = [tensors.get(n) for n in ("q", "k", "v", "q_den", "k_den", "decay")] + [None] * 4
    names = (problem.feature_map, 0.0, problem.feature_map, 0.0, "causal")
    options = (*names, 0, 16, True, problem.scale or 1.0, 1e-6, 0.0)
    fwd, bwd = torch.ops.vicinal.linear_fwd, torch.ops.vicinal.linear_bwd
    saved = {b: getattr(fwd, b)(*given, *options) for b in ("cpu", "triton")}
    dout = torch.randn_like(tensors["v"])

    def gradients(forward: str, backward: str) -> Any:
        return getattr(bwd, backward)(dout, None, None, None, *saved[forward], *given, *options, False)

    for x, y in zip(gradients("cpu", "triton"), gradients("triton", "cpu")):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
    again = fwd.triton(*given, *options)
    assert all(torch.equal(x, y) for x, y in zip(again, saved["triton"]))
    pairs = zip(gradients("triton", "triton"), gradients("triton", "triton"))
    assert all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("name", ["causal-step-decay", "den"])
def test_ops_and_compile(name: str) -> None:
    """opcheck of both directions, and one graph of forward and backward."""
    problem = replace(small(BY_NAME[name]), tokens=18, dim=4)
    tensors = linear_problems.make(problem)
    given = [tensors.get(n) for n in ("q", "k", "v", "q_den", "k_den", "decay")] + [None] * 4
    plain = [None if x is None else x.detach() for x in given]
    mask = "causal" if problem.causal else "full"
    options = (problem.feature_map, 0.0, problem.feature_map, 0.0, mask, 0, 16, True, 1.0, 1e-6, 0.0)
    ops = torch.ops.vicinal
    outputs = ops.linear_fwd.triton(*plain, *options)
    dout = torch.ones_like(tensors["v"])
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.linear_fwd.triton, (*plain, *options), test_utils=checks)
    backward = (dout, None, None, None, *outputs, *plain, *options, False)
    torch.library.opcheck(ops.linear_bwd.triton, backward, test_utils=checks)

    def run(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return linear_problems.run(problem, tensors, "triton")

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    results = [linear_problems.differentiate(f(tensors), tensors, torch.float32) for f in (run, compiled)]
    for key, x in results[0].items():
        torch.testing.assert_close(x, results[1][key])
