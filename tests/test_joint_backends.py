"""Joint attention: every backend against the reference in float64, and what kernels promise besides."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from backends_support import device_of, op_backends, op_backends_and_dtypes
from joint_problems import BY_NAME, PROBLEMS, Problem, make, rms_ratio, run, solve, violations

from vicinal import joint_attention


@pytest.mark.parametrize(("backend", "dtype"), op_backends_and_dtypes("joint"))
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_outputs_and_gradients(problem: Problem, backend: str, dtype: torch.dtype) -> None:
    assert violations(problem, dtype, backend, device_of(backend)) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_the_reference_in_lower_precision(problem: Problem, dtype: torch.dtype) -> None:
    assert violations(problem, dtype, "reference") == []


@pytest.mark.parametrize("backend", op_backends("joint"))
@pytest.mark.parametrize("name", ["bias-laplace", "causal-gate", "many-groups", "mossformer"])
def test_same_bits_on_any_number_of_threads(name: str, backend: str) -> None:
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(solve(BY_NAME[name], make(BY_NAME[name], device=device_of(backend)), backend))
    finally:
        torch.set_num_threads(before)
    for key, x in results[0].items():
        assert torch.equal(x, results[1][key]), key


@pytest.mark.parametrize("backend", [*op_backends("joint"), "reference"])
@pytest.mark.parametrize("name", ["mask", "mask-causal"])
def test_ignored_keys_may_hold_nan(name: str, backend: str) -> None:
    problem = replace(BY_NAME[name], gate=False)
    tensors = make(problem, device=device_of(backend))
    expected = run(problem, tensors, backend)
    for key in ("quad_k", "lin_k", "v", "u"):
        hole = tensors["key_padding_mask"][..., None]
        tensors[key] = tensors[key].detach().masked_fill(hole, float("nan"))
    for x, y in zip(run(problem, tensors, backend), expected):
        assert torch.equal(x, y)


@pytest.mark.parametrize("backend", [*op_backends("joint"), "reference"])
def test_masked_padding_is_a_shorter_input(backend: str) -> None:
    problem = replace(BY_NAME["laplace-mask-causal"], mask="", causal=False)
    tensors = make(problem, device=device_of(backend))
    short = run(problem, {k: x[:, :43] for k, x in tensors.items()}, backend)
    ignored = (torch.arange(50, device=device_of(backend)) >= 43).expand(2, -1)
    long = run(replace(problem, lin_scale=1 / 43), {**tensors, "key_padding_mask": ignored}, backend)
    for x, y in zip(long, short):
        assert rms_ratio(x[:, :43].detach(), y.detach()) < 1e-6


@pytest.mark.parametrize("backend", op_backends("joint"))
def test_a_sample_alone_equals_the_sample_in_a_batch(backend: str) -> None:
    problem = BY_NAME["mask-causal"]
    tensors = make(problem, device=device_of(backend))
    (both,) = run(problem, tensors, backend)
    for i in range(2):
        (alone,) = run(problem, {k: x[i : i + 1] for k, x in tensors.items()}, backend)
        assert torch.equal(alone, both[i : i + 1])


@pytest.mark.parametrize("backend", [*op_backends("joint"), "reference"])
def test_causal_outputs_do_not_see_the_future(backend: str) -> None:
    problem = replace(BY_NAME["causal-gate"], quad_scale=0.3, lin_scale=0.1)
    tensors = make(problem, device=device_of(backend))
    (before,) = run(problem, tensors, backend)
    changed = {k: x.detach().clone() for k, x in tensors.items()}
    for x in changed.values():
        x[:, 30:] += 1.0
    (after,) = run(problem, changed, backend)
    assert torch.equal(before[:, :30], after[:, :30])
    assert not torch.equal(before[:, 30:], after[:, 30:])


@pytest.mark.parametrize("backend", [*op_backends("joint"), "reference"])
def test_one_of_two_outputs_differentiated(backend: str) -> None:
    problem = BY_NAME["plain"]
    tensors = make(problem, device=device_of(backend))
    leaves = list(tensors.values())
    for index in (0, 1):
        kept = torch.autograd.grad(run(problem, tensors, backend)[index].sum(), leaves, allow_unused=True)
        pair = run(problem, tensors, "reference")
        truth = torch.autograd.grad(pair[index].sum() + 0 * pair[1 - index].sum(), leaves)
        for x, y in zip(kept, truth):
            assert rms_ratio(torch.zeros_like(y) if x is None else x, y) < 1e-5


@pytest.mark.parametrize("backend", op_backends("joint"))
def test_large_and_small_scores_are_finite(backend: str) -> None:
    device = device_of(backend)
    for size in (1e4, 1e-4):
        x, y, z, w = (size * torch.randn(1, 40, 8, device=device) for _ in range(4))
        v = torch.randn(1, 40, 16, device=device)
        for activation in ("relu2", "laplace"):
            out = joint_attention(
                x, y, z, w, v, v, gate=True, group_size=16, activation=activation, backend=backend
            )
            assert isinstance(out, torch.Tensor)
            assert bool(out.isfinite().all())
