"""The reference against worked examples, loops over pairs, finite differences, and other libraries."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import neighborhood_brute_force as brute
import pytest
import torch
import torch.nn.functional as F
from backends_support import device_of, op_backends
from neighborhood_problems import BY_NAME, PROBLEMS, Problem
from neighborhood_solutions import make, run
from rule import TRAINED
from torch import Tensor

from vicinal import Neighborhood, Windows, neighborhood_attention, windowed_attention

N = Neighborhood
ALL = [*op_backends(), "reference"]

Leaves = tuple[Tensor, Tensor, Tensor]


def attend(*args: Any, **options: Any) -> Tensor:
    out = neighborhood_attention(*args, **options)
    assert isinstance(out, Tensor)
    return out


def windows_of(length: int, where: Neighborhood, backend: str = "reference") -> list[str]:
    """The keys that each query reads, as digits; checks that lse counts them."""
    zero = torch.zeros(1, length, 1, 1, dtype=torch.float64)
    unit = torch.eye(length, dtype=torch.float64).view(1, length, 1, length)
    out, lse = neighborhood_attention(zero, zero, unit, where, return_lse=True, backend=backend)
    counts = (out[0, :, 0] > 0).sum(-1)
    torch.testing.assert_close(lse[0, :, 0].exp(), counts.double())
    return ["".join(str(j) for j in row.nonzero().flatten().tolist()) for row in out[0, :, 0]]


EXAMPLES = [
    (7, N(3), "012 012 123 234 345 456 456"),
    (7, N(3, border="truncate"), "01 012 123 234 345 456 56"),
    (7, N(3, is_causal=True), "0 01 012 123 234 345 456"),
    (7, N(3, dilation=2), "024 135 024 135 246 135 246"),
    (7, N(3, stride=2), "012 012 234 234 456 456 456"),
    (7, N(3, stride=2, is_causal=True), "0 01 12 123 34 345 456"),
    (7, N(3, stride=2, is_causal=True, border="truncate"), "0 01 12 123 34 345 56"),
    (7, N(3, stride=3), "012 012 012 345 345 345 456"),
    (7, N(3, stride=3, border="truncate"), "012 012 012 345 345 345 6"),
    (10, N(4), "0123 0123 0123 1234 2345 3456 4567 5678 6789 6789"),
    (5, N((-1, 0), border="truncate"), "0 01 012 0123 01234"),
    (5, N((0, -1), border="truncate"), "01234 1234 234 34 4"),
    (6, N((-1, -1), dilation=2, border="truncate"), "024 135 024 135 024 135"),
]


@pytest.mark.parametrize(("length", "where", "expected"), EXAMPLES, ids=str)
def test_worked_examples(length: int, where: Neighborhood, expected: str) -> None:
    assert windows_of(length, where) == expected.split()


def test_bias_entries_of_the_worked_example() -> None:
    zero = torch.zeros(1, 7, 1, 1, dtype=torch.float64)
    unit = torch.eye(7, dtype=torch.float64).view(1, 7, 1, 7)
    entries = torch.arange(5, dtype=torch.float64)
    out, lse = neighborhood_attention(
        zero, zero, unit, 3, bias=torch.log(entries + 1)[None], return_lse=True, backend="reference"
    )
    read = (out[0, :, 0] * lse[0, :, 0, None].exp()).round().long() - 1  # -1: not read
    firsts = [next(entry for entry in row if entry >= 0) for row in read.tolist()]
    assert firsts == [2, 1, 1, 1, 1, 1, 0]


SMALL = [p for p in PROBLEMS if p.dropout_p == 0 and p.batch and p.dim <= 128]


@pytest.mark.parametrize("problem", SMALL, ids=str)
def test_loops_over_pairs(problem: Problem) -> None:
    tensors = make(problem, torch.float64)
    for x, y in zip(run(problem, tensors, "reference"), brute.solve(problem, tensors)):
        torch.testing.assert_close(x.detach(), y, rtol=1e-12, atol=1e-12)


DIFFERENTIATED = [
    "1d-stride-dilated",
    "1d-causal-stride",
    "2d-dilated",
    "2d-blocks",
    "3d-causal-time",
    "truncate-pair-2d",
    "unlimited-stride",
    "more-keys",
    "extra-grouped",
    "padding-sample-extra",
    "padding-window",
    "dropout-grouped",
    "dropout-all",
    "everything",
    "rel-pos-causal",
]


def differentiable(problem: Problem) -> tuple[Any, list[Tensor]]:
    """A function of the trained tensors that gives the finite outputs, and those tensors."""
    tensors = make(problem, torch.float64)
    names = [n for n in tensors if n in TRAINED]

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        given = {**tensors, **dict(zip(names, values))}
        return tuple(x.masked_fill(x.isinf(), 0.0) for x in run(problem, given, "reference"))

    return function, [tensors[n] for n in names]


@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    function, inputs = differentiable(replace(BY_NAME[name], layout="contiguous"))
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_second_gradients_are_those_of_finite_differences(name: str) -> None:
    function, inputs = differentiable(replace(BY_NAME[name], layout="contiguous", dim=2, dim_v=2))
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def drawn(device: str, *space: int, heads: int = 2, kv_heads: int = 0) -> Leaves:
    """q, k and v."""

    def normal(n: int) -> Tensor:
        return torch.randn(2, *space, n, 8, device=device, requires_grad=True)

    return normal(heads), normal(kv_heads or heads), normal(kv_heads or heads)


def same(ours: Tensor, theirs: Tensor, leaves: Leaves) -> None:
    """The same outputs and gradients."""
    torch.testing.assert_close(ours, theirs)
    grad = torch.randn_like(theirs)
    for x, y in zip(*[torch.autograd.grad(out, leaves, grad) for out in (ours, theirs)]):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scaled dot product attention of all tokens; mask bool [N, N], True: read."""
    flat_q, flat_k, flat_v = (x.flatten(1, -3).transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[-2] != k.shape[-2]
    out = F.scaled_dot_product_attention(flat_q, flat_k, flat_v, attn_mask=mask, enable_gqa=grouped)
    return out.transpose(1, 2).reshape(*q.shape[:-1], v.shape[-1])


@pytest.mark.parametrize("backend", ALL)
def test_a_kernel_of_the_whole_grid_is_dense_attention(backend: str) -> None:
    leaves = drawn(device_of(backend), 5, 6)
    same(attend(*leaves, (5, 6), backend=backend), dense(*leaves), leaves)
    leaves = drawn(device_of(backend), 12, heads=4, kv_heads=2)
    same(attend(*leaves, N((-1, -1), border="truncate"), backend=backend), dense(*leaves), leaves)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("border", ["shift", "truncate"])
def test_a_stride_of_the_kernel_partitions_into_windows(backend: str, border: str) -> None:
    leaves = drawn(device_of(backend), 6, 8)
    windows = windowed_attention(*leaves, Windows((3, 4)), backend="reference")
    assert isinstance(windows, Tensor)
    same(attend(*leaves, (3, 4), stride=(3, 4), border=border, backend=backend), windows, leaves)


def band(n: int, left: int, right: int, device: str) -> Tensor:
    offset = torch.arange(n, device=device) - torch.arange(n, device=device)[:, None]
    return (offset >= -left) & (offset <= right)


@pytest.mark.parametrize("backend", ALL)
def test_sliding_windows_are_bands_of_dense_attention(backend: str) -> None:
    device = device_of(backend)
    leaves = drawn(device, 40)
    causal = attend(*leaves, 9, is_causal=True, backend=backend)
    same(causal, dense(*leaves, band(40, 8, 0, device)), leaves)
    two_sided = attend(*leaves, (5, 3), border="truncate", backend=backend)
    same(two_sided, dense(*leaves, band(40, 5, 3, device)), leaves)


WINDOW_CONVENTIONS = [  # what published code calls it, left, right
    ("FlashAttention window_size=(4, 2)", (4, 2), lambda i, j: -4 <= j - i <= 2),
    ("Mistral, xFormers: a window of 5 with itself", (4, 0), lambda i, j: 0 <= i - j < 5),
    ("Longformer, one-sided 3", (3, 3), lambda i, j: abs(i - j) <= 3),
    ("Longformer of Hugging Face, two-sided 6", (3, 3), lambda i, j: abs(i - j) <= 6 // 2),
    ("Long Range Arena, Longformer 6", (2, 3), lambda i, j: -2 <= j - i <= 3),
    ("attention-gym, i - j <= 4, causal", (4, 0), lambda i, j: 0 <= i - j <= 4),
    ("H-Net (4, -1) causal", (4, 0), lambda i, j: j <= i and i - j <= 4),
]


@pytest.mark.parametrize(
    ("name", "pair", "reads"), WINDOW_CONVENTIONS, ids=lambda x: x if isinstance(x, str) else None
)
def test_window_conventions_of_published_code(name: str, pair: tuple[int, int], reads: Any) -> None:
    expected = ["".join(str(j) for j in range(10) if reads(i, j)) for i in range(10)]
    assert windows_of(10, N(pair, border="truncate")) == expected


@pytest.mark.parametrize("backend", ALL)
def test_dilation_groups_are_separate_grids(backend: str) -> None:
    q, k, v = leaves = drawn(device_of(backend), 8, 6)
    whole = attend(*leaves, (4, 3), dilation=2, backend=backend)
    parts = torch.empty_like(whole)
    for y, x in ((0, 0), (0, 1), (1, 0), (1, 1)):
        group = [t[:, y::2, x::2] for t in (q, k, v)]
        parts[:, y::2, x::2] = dense(*group)
    same(whole, parts, leaves)


@pytest.mark.parametrize("backend", ALL)
def test_grouped_queries_are_repeated_keys(backend: str) -> None:
    q, k, v = leaves = drawn(device_of(backend), 7, 6, heads=6, kv_heads=2)
    repeated = attend(q, *[x.repeat_interleave(3, -2) for x in (k, v)], 3, backend=backend)
    same(attend(*leaves, 3, backend=backend), repeated, leaves)


@pytest.mark.parametrize("backend", ALL)
def test_fewer_queries_are_the_last_rows(backend: str) -> None:
    q, k, v = leaves = drawn(device_of(backend), 30)
    where = N((7, 2), dilation=3, border="truncate")
    same(
        attend(q[:, 19:], k, v, where, backend=backend),
        attend(*leaves, where, backend=backend)[:, 19:],
        leaves,
    )


@pytest.mark.parametrize("backend", ALL)
def test_arguments_and_the_value_object_say_the_same(backend: str) -> None:
    q, k, v = drawn(device_of(backend), 9, 8)
    where = N((3, 4), (2, 1), (1, 2), (False, True), "truncate")
    options: Any = {"dilation": (2, 1), "stride": (1, 2), "is_causal": (False, True), "border": "truncate"}
    expected = attend(q, k, v, where, backend=backend)
    assert torch.equal(attend(q, k, v, (3, 4), **options, backend=backend), expected)
    one_axis = attend(q[:, 0], k[:, 0], v[:, 0], (3,), backend=backend)
    assert torch.equal(one_axis, attend(q[:, 0], k[:, 0], v[:, 0], 3, backend=backend))


def test_dropping_everything_leaves_lse() -> None:
    tensors = make(BY_NAME["dropout-all"])
    out, lse = run(BY_NAME["dropout-all"], tensors)
    plain = run(replace(BY_NAME["dropout-all"], dropout_p=0.0), tensors)[1]
    assert not out.any()
    assert torch.equal(lse, plain)
    assert bool(lse.isfinite().all())


NATTEN = [
    ((9,), 3, 1, 1, False),
    ((14,), 4, 3, 2, True),
    ((9, 8), (3, 4), (2, 1), (1, 2), (False, True)),
    ((12, 10), (5, 3), (2, 3), (5, 3), False),
    ((5, 6, 7), (3, 2, 4), 1, (1, 2, 1), (True, False, False)),
    ((6, 4, 9), (2, 4, 3), (3, 1, 2), (2, 1, 3), (False, True, True)),
]


@pytest.mark.parametrize(("space", "kernel", "dilation", "stride", "causal"), NATTEN, ids=str)
def test_natten(space: tuple[int, ...], kernel: Any, dilation: Any, stride: Any, causal: Any) -> None:
    natten = pytest.importorskip("natten")
    q, k, v = (torch.randn(2, *space, 2, 16) for _ in range(3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its CPU path, which is FlexAttention without a compiler
        theirs = getattr(natten, f"na{len(space)}d")(
            q, k, v, kernel_size=kernel, dilation=dilation, stride=stride, is_causal=causal
        )
    options: Any = {"dilation": dilation, "stride": stride, "is_causal": causal}
    torch.testing.assert_close(attend(q, k, v, kernel, **options, backend="reference"), theirs)
