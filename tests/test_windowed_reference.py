"""The reference against worked examples, finite differences, published code and loops over pairs."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from brute_force import BruteForce
from models_support import library
from problems import BY_NAME, PROBLEMS, TRAINED, Problem, make, run
from torch import Tensor
from windowed_problems import CONTEXT, OPTIONS

from vicinal import Windows, reference, windowed_attention

P = -1  # a pad


def attend(q: Any, k: Any, v: Any, windows: Windows, **options: Any) -> list[float]:
    """One-dimensional float64 attention with one head and head dimension 1."""
    q, k, v = (torch.tensor(x, dtype=torch.float64).view(1, -1, 1, 1) for x in (q, k, v))
    out = windowed_attention(q, k, v, windows, backend="reference", **options)
    assert isinstance(out, Tensor)
    return out.flatten().tolist()


def ids(lengths: Any, windows: Any, shifts: Any, partition: str = "block", order: str = "pad_roll") -> Any:
    return reference.window_ids(lengths, windows, shifts, partition, order, "end").tolist()


def test_windows_of_a_shifted_map() -> None:
    assert ids((4, 4), (2, 2), (1, 1)) == [[5, 6, 9, 10], [7, 4, 11, 8], [13, 14, 1, 2], [15, 12, 3, 0]]
    labels = reference.region_ids((4, 4), (2, 2), (1, 1))
    keys = torch.tensor([[0, 0, 0, 0], [0, 1, 0, 1], [0, 0, 2, 2], [0, 1, 2, 3]])
    assert torch.equal(labels[:, :, None] == labels[:, None], keys[:, :, None] == keys[:, None])


def test_corners_of_a_shifted_map_see_only_themselves() -> None:
    q, k, v = (torch.randn(1, 4, 4, 1, 3, dtype=torch.float64) for _ in range(3))
    out = windowed_attention(q, k, v, Windows(2, shift=1, mask_value=-torch.inf), backend="reference")
    assert isinstance(out, Tensor)
    for token in (15, 12, 3, 0):
        assert torch.equal(out.flatten(1, 2)[:, token], v.flatten(1, 2)[:, token])
    assert not torch.equal(out, v)


def test_relative_index() -> None:
    square = torch.tensor([[4, 3, 1, 0], [5, 4, 2, 1], [7, 6, 4, 3], [8, 7, 5, 4]])
    assert torch.equal(reference.relative_index((2, 2), (2, 2), "q-k"), square)
    assert torch.equal(reference.relative_index((2, 2), (2, 2), "k-q"), 8 - square)
    distances = [[0, 1, 2, 3], [1, 0, 3, 2], [2, 3, 0, 1], [3, 2, 1, 0]]
    assert reference.relative_index((2, 2), (2, 2), "abs").tolist() == distances
    assert reference.relative_index((2, 3), (2, 3), "q-k")[0].tolist() == [7, 6, 5, 2, 1, 0]


@pytest.mark.parametrize(
    ("edge", "expected"), [("mask", [3, 3, 8]), ("zero", [3, 3, 4]), ("const", [3, 3, 5])]
)
def test_edge_rules(edge: str, expected: list[float]) -> None:
    given = {}
    if edge == "const":
        given = {"edge_k": torch.tensor([[math.log(3)]]).double(), "edge_v": torch.tensor([[4.0]]).double()}
    got = attend([1.0] * 3, [0, math.log(3), 0], [0.0, 4.0, 8.0], Windows(2, edge=edge), scale=1.0, **given)
    assert got == pytest.approx(expected)


def test_pad_orders() -> None:
    assert ids((7,), (4,), (2,)) == [[2, 3, 4, 5], [6, P, 0, 1]]
    assert ids((7,), (4,), (2,), order="roll_pad") == [[2, 3, 4, 5], [6, 0, 1, P]]
    assert reference.region_ids((7,), (4,), (2,)).tolist()[0] == [0] * 4
    last = reference.region_ids((7,), (4,), (2,))[1]
    assert last[0] == last[1] != last[2] == last[3]
    expected = {"pad_roll": [0.5, 0.5, *[3.5] * 4, 3], "roll_pad": [3, 0.5, *[3.5] * 4, 3]}
    for order, means in expected.items():
        windows = Windows(4, shift=2, mask_value=-torch.inf, edge="zero", pad_order=order)
        assert attend([0.0] * 7, [1.0] * 7, [float(i) for i in range(7)], windows) == pytest.approx(means)


def test_grid_and_overlap() -> None:
    assert ids((6,), (3,), (0,), "grid") == [[0, 2, 4], [1, 3, 5]]
    assert reference.overlapping_ids((8,), (4,), (6,)).tolist() == [[P, 0, 1, 2, 3, 4], [3, 4, 5, 6, 7, P]]


@pytest.mark.parametrize(("tau", "leak"), [(10, 4.5e-38), (50, 9.4e-14), (100, 1.0)])
def test_a_finite_mask_leaks_at_high_temperature(tau: float, leak: float) -> None:
    def unit(*cosines: float) -> Tensor:
        return torch.tensor([[c, (1 - c * c) ** 0.5] for c in cosines], dtype=torch.float64).view(1, -1, 1, 2)

    v = torch.tensor([1.0, 0.0], dtype=torch.float64).view(1, 2, 1, 1)
    scale = torch.tensor([math.log(tau)], dtype=torch.float64)
    windows = Windows(2, shift=1)  # the window holds tokens 1 and 0, of different regions
    out = windowed_attention(unit(1, 1), unit(0.9, -0.5), v, windows, logit_scale=scale, backend="reference")
    assert isinstance(out, Tensor)
    assert float(out[0, 1]) == pytest.approx(leak, rel=0.05)


def test_a_region_without_keys_sees_the_other_under_a_finite_mask() -> None:
    ignored = torch.tensor(
        [[True, False, False, True]]
    )  # the window holds tokens 2, 3 and 0, 1: one key each
    v = [1.0, 2.0, 4.0, 8.0]
    out = attend(
        [0.0] * 4,
        [0.0] * 4,
        v,
        Windows(4, shift=2),
        key_padding_mask=torch.tensor([[True] * 2 + [False] * 2]),
    )
    assert out == pytest.approx([6.0] * 4)
    out = attend([0.0] * 4, [0.0] * 4, v, Windows(4, shift=2), key_padding_mask=ignored)
    assert out == pytest.approx([2.0, 2.0, 4.0, 4.0])


def test_cosine_of_a_zero_vector_is_zero() -> None:
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        q = torch.zeros(1, 4, 1, 8, dtype=dtype, requires_grad=True)
        v = torch.arange(4.0).view(1, 4, 1, 1).to(dtype)
        out = windowed_attention(q, torch.ones_like(q), v, 4, logit_scale=torch.zeros(1), backend="reference")
        assert isinstance(out, Tensor)
        assert out.flatten().tolist() == [1.5] * 4
        assert bool(torch.autograd.grad(out.sum(), q)[0].isfinite().all())


SMALL = [p for p in PROBLEMS if p.batch * math.prod(p.query_space) * p.heads * (p.dim + p.value_dim) < 9000]


@pytest.mark.parametrize("problem", [p for p in SMALL if p.dropout_p == 0 and p.batch], ids=str)
def test_loops_over_pairs(problem: Problem) -> None:
    tensors = make(problem, torch.float64)
    expected = BruteForce(problem, tensors).solve()
    for x, y in zip(run(problem, tensors, "reference"), expected):
        torch.testing.assert_close(x.detach(), y, rtol=1e-12, atol=1e-12)


def differentiable(problem: Problem) -> tuple[Any, list[Tensor]]:
    """A function of the trained tensors that gives the finite outputs, and those tensors."""
    tensors = make(problem, torch.float64)
    names = [n for n in tensors if n in TRAINED]

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        given = {**tensors, **dict(zip(names, values))}
        return tuple(x.masked_fill(x.isinf(), 0.0) for x in run(problem, given, "reference"))

    return function, [tensors[n] for n in names]


@pytest.mark.parametrize("problem", [p for p in (*OPTIONS, *CONTEXT) if p in SMALL and p.batch], ids=str)
def test_gradients_are_those_of_finite_differences(problem: Problem) -> None:
    function, inputs = differentiable(replace(problem, batch=1))
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


TWICE = [
    "stripes",
    "overlap-overhang",
    "pooled",
    "edge-const-extra",
    "bias-abs",
    "bias-index",
    "mask-value-200",
    "padding-window",
    "mask-heads",
    "extra-and-bias",
    "cosine-const",
    "relu2",
    "relu",
    "none",
    "dropout-extra",
    "rel-pos-const-shift",
]


@pytest.mark.parametrize("problem", [BY_NAME[name] for name in TWICE], ids=str)
def test_second_gradients_are_those_of_finite_differences(problem: Problem) -> None:
    function, inputs = differentiable(replace(problem, batch=1, dim=2, dim_v=2))
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def sdpa_swin(q: Tensor, k: Tensor, v: Tensor, table: Tensor, w: int, s: int) -> Tensor:
    """Swin as published: roll, partition, dense attention with bias and mask, and back; divisible sizes."""
    b, height, width, heads, d = q.shape

    def split(x: Tensor) -> Tensor:
        x = x.roll((-s, -s), (1, 2)).view(b, height // w, w, width // w, w, heads, d)
        return x.permute(0, 1, 3, 5, 2, 4, 6).reshape(-1, heads, w * w, d)

    y, x = (t.flatten() for t in torch.meshgrid(torch.arange(w), torch.arange(w), indexing="ij"))
    index = (y[:, None] - y + w - 1) * (2 * w - 1) + x[:, None] - x + w - 1
    bias = table[index].permute(2, 0, 1)
    region = torch.zeros(height, width, dtype=table.dtype)
    if s:
        bounds = [slice(0, -w), slice(-w, -s), slice(-s, None)]
        for i, rows in enumerate(bounds):
            for j, columns in enumerate(bounds):
                region[rows, columns] = 3 * i + j
    region = region.view(height // w, w, width // w, w).transpose(1, 2).reshape(-1, w * w)
    mask = torch.where(region[:, None] != region[:, :, None], -100.0, 0.0).to(table.dtype)
    mask = (mask[:, None] + bias).repeat(b, 1, 1, 1)
    out = F.scaled_dot_product_attention(split(q), split(k), split(v), attn_mask=mask)
    out = out.view(b, height // w, width // w, heads, w, w, d).permute(0, 1, 4, 2, 5, 3, 6)
    return out.reshape(b, height, width, heads, d).roll((s, s), (1, 2))


@pytest.mark.parametrize(
    ("size", "w", "s"), [((8, 12), 4, 2), ((6, 3), 3, 1), ((14, 7), 7, 0), ((6, 9), 3, 2)]
)
def test_scaled_dot_product_attention_in_windows(size: tuple[int, int], w: int, s: int) -> None:
    q, k, v = (torch.randn(2, *size, 3, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    table = torch.randn((2 * w - 1) ** 2, 3, dtype=torch.float64, requires_grad=True)
    ours = windowed_attention(q, k, v, Windows(w, shift=s), bias=table, backend="reference")
    theirs = sdpa_swin(q, k, v, table, w, s)
    assert isinstance(ours, Tensor)
    torch.testing.assert_close(ours, theirs)
    grad = torch.randn_like(theirs)
    for a, b in zip(*[torch.autograd.grad(out, (q, k, v, table), grad) for out in (ours, theirs)]):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("size", [(8, 8), (7, 10), (5, 13), (3, 3)])
@pytest.mark.parametrize("shift", [(0, 0), (2, 2), (0, 1)])
def test_torchvision(size: tuple[int, int], shift: tuple[int, int], cosine: bool) -> None:
    swin = library("torchvision.models.swin_transformer")
    heads, d, w = 2, 6, 4
    c = heads * d
    x = torch.randn(2, *size, c, dtype=torch.float64, requires_grad=True)
    qkv_weight = torch.randn(3 * c, c, dtype=torch.float64) / 4
    qkv_bias = torch.randn(3 * c, dtype=torch.float64, requires_grad=True)
    eye, table = torch.eye(c, dtype=torch.float64), torch.randn((2 * w - 1) ** 2, heads, dtype=torch.float64)
    table.requires_grad_()
    logit_scale = torch.tensor([1.0, 5.0], dtype=torch.float64, requires_grad=True) if cosine else None
    bias = reference.relative_index((w, w), (w, w), "q-k")
    theirs = swin.shifted_window_attention(
        x,
        qkv_weight,
        eye,
        table[bias.flatten()].view(w * w, w * w, heads).permute(2, 0, 1)[None],
        [w, w],
        heads,
        list(shift),
        qkv_bias=qkv_bias,
        logit_scale=None if logit_scale is None else logit_scale.view(heads, 1, 1),
    )
    bias_q, bias_k, bias_v = qkv_bias.view(3, heads, d)
    if cosine:  # version 2 has no bias of keys
        bias_k = torch.zeros_like(bias_k)
    q, k, v = F.linear(x, qkv_weight).unflatten(-1, (3, heads, d)).unbind(-3)
    effective = tuple(
        0 if w >= n else s for n, s in zip(size, shift)
    )  # its rule: no shift of a single window
    ours = windowed_attention(
        q + bias_q,
        k + bias_k,
        v + bias_v,
        Windows(w, shift=effective, edge="const"),
        bias=table,
        logit_scale=logit_scale,
        edge_k=bias_k,
        edge_v=bias_v,
        backend="reference",
    )
    assert isinstance(ours, Tensor)
    torch.testing.assert_close(ours.flatten(-2), theirs)
    leaves = [x, qkv_bias, table] + ([] if logit_scale is None else [logit_scale])
    grad = torch.randn_like(theirs)
    for a, b in zip(*[torch.autograd.grad(out, leaves, grad) for out in (ours.flatten(-2), theirs)]):
        torch.testing.assert_close(a, b)
