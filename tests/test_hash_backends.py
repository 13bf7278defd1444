"""Hash attention: every backend against the reference in float64, and what kernels promise besides."""

from __future__ import annotations

import pytest
import torch
from backends_support import device_of, op_backends, op_backends_and_dtypes
from hash_problems import BY_NAME, PROBLEMS, Problem, make, packed_codes, run, upstream, violations

from vicinal import explain, hash_attention


@pytest.mark.parametrize(("backend", "dtype"), op_backends_and_dtypes("hash"))
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_codes_outputs_and_gradients(problem: Problem, backend: str, dtype: torch.dtype) -> None:
    assert violations(problem, dtype, backend, device_of(backend)) == []


@pytest.mark.parametrize("backend", op_backends("hash"))
@pytest.mark.parametrize("name", ["ecoformer-stage1", "tokens-1100"])
def test_same_bits_on_any_number_of_threads(name: str, backend: str) -> None:
    problem, results, before = BY_NAME[name], [], torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            tensors = make(problem, device=device_of(backend))
            out = run(problem, tensors, backend)
            grad = upstream(problem, torch.float32, str(out.device))
            results.append([out, *torch.autograd.grad(out, [tensors["qk"], tensors["v"]], grad)])
    finally:
        torch.set_num_threads(before)
    for x, y in zip(*results):
        assert torch.equal(x, y)


@pytest.mark.parametrize("backend", op_backends("hash"))
def test_a_sample_alone_equals_the_sample_in_a_batch(backend: str) -> None:
    problem = BY_NAME["tokens-128"]
    tensors = make(problem, device=device_of(backend))
    both = run(problem, tensors, backend)
    for i in range(2):
        alone = {k: x[i : i + 1] if k in ("qk", "v") else x for k, x in tensors.items()}
        assert torch.equal(run(problem, alone, backend), both[i : i + 1])


@pytest.mark.parametrize("backend", op_backends("hash"))
def test_long_sequences(backend: str) -> None:
    if device_of(backend) == "cpu" and backend != "cpu":
        pytest.skip(f"{backend}: its interpreter takes minutes for 65,536 tokens")
    problem = Problem("long", 65_536, batch=1, heads=1)
    for dtype in (torch.float32, torch.bfloat16):
        assert violations(problem, dtype, backend, device_of(backend)) == []


@pytest.mark.parametrize("backend", op_backends("hash"))
def test_codes_are_not_all_alike(backend: str) -> None:
    """What the other tests compare would be empty if every token had the same code."""
    problem = BY_NAME["ecoformer-stage1"]
    words = packed_codes(problem, make(problem, device=device_of(backend)), backend)
    assert len(words.unique()) > 100


def test_codes_above_16_bits_run_on_the_reference() -> None:
    problem = Problem("bits-20", 30, bits=20)
    tensors = make(problem)
    assert run(problem, tensors).shape == (2, 30, 2, 32)
    assert explain(hash_attention, **tensors).backend == "reference"
    with pytest.raises(NotImplementedError, match="long codes is missing"):
        run(problem, tensors, "cpu")
