"""Joint and hash attention in Triton's interpreter, against float64. Run by test_joint_triton.py in processes
of their own: TRITON_INTERPRET=1 must be set before triton is imported. bfloat16 is left out: the
interpreter's arithmetic on it is wrong."""

from __future__ import annotations

import hash_problems
import joint_problems
import pytest
import torch

JOINT = [p for p in joint_problems.PROBLEMS if not p.dropout_p]
QUICK_JOINT = (
    "gate",
    "without-u",
    "short-group",
    "causal-gate",
    "mask-causal",
    "bias-laplace",
    "batch-0",
    "whole",
)
QUICK_HASH = (
    "ecoformer-stage3",
    "self",
    "tokens-17",
    "bits-8",
    "dim-17-5",
    "channels",
    "zero-tokens",
    "batch-0",
)
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.float64], ids=["float32", "float16", "float64"]
)

OF_JOINT = pytest.mark.parametrize("dtype", [torch.float32], ids=["float32"])


@OF_JOINT
@pytest.mark.parametrize("name", QUICK_JOINT)
def test_quick_joint(name: str, dtype: torch.dtype) -> None:
    assert joint_problems.violations(joint_problems.BY_NAME[name], dtype, "triton") == []


@DTYPES
@pytest.mark.parametrize("name", QUICK_HASH)
def test_quick_hash(name: str, dtype: torch.dtype) -> None:
    assert hash_problems.violations(hash_problems.BY_NAME[name], dtype, "triton") == []


@OF_JOINT
@pytest.mark.parametrize("problem", JOINT, ids=str)
def test_every_joint(problem: joint_problems.Problem, dtype: torch.dtype) -> None:
    assert joint_problems.violations(problem, dtype, "triton") == []


@DTYPES
@pytest.mark.parametrize("problem", hash_problems.PROBLEMS, ids=str)
def test_every_hash(problem: hash_problems.Problem, dtype: torch.dtype) -> None:
    assert hash_problems.violations(problem, dtype, "triton") == []


@pytest.mark.parametrize("name", ["gate", "causal", "bias"])
def test_quick_backends_mix(name: str) -> None:
    """What one backend's forward saves, another's backward reads."""
    problem = joint_problems.BY_NAME[name]
    tensors = joint_problems.make(problem)
    joint_fwd, joint_bwd = torch.ops.vicinal.joint_fwd, torch.ops.vicinal.joint_bwd
    given = [tensors.get(n) for n in ("quad_q", "quad_k", "lin_q", "lin_k", "v", "u", "bias")] + [None, None]
    given = [None if x is None else x.detach() for x in given]
    options = (problem.group, problem.causal, problem.activation, 0.3, None, 0.0, problem.gate, True)
    outputs = {b: getattr(joint_fwd, b)(*given, *options) for b in ("cpu", "triton")}
    dout = torch.randn_like(given[4])  # type: ignore[arg-type]
    grads = (dout, None, None, None, None)
    for forward, backward in (("cpu", "triton"), ("triton", "cpu")):
        mixed = getattr(joint_bwd, backward)(*grads, *outputs[forward][2:], *given, *options, False)
        own = getattr(joint_bwd, forward)(*grads, *outputs[forward][2:], *given, *options, False)
        for x, y in zip(mixed, own):
            torch.testing.assert_close(x, y)
