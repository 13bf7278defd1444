"""The CUDA attend kernels on the emulator, and on a GPU where there is one: every option, with gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import vicinal
from vicinal import RelativeBias, Windows, _windowed_run, reference

from .conftest import HostBuild
from .emulated import Emulation, emulated

# order, copies, seed of the emulator: see NamedSchedule in driver.h
SCHEDULES = {"forward_eager": (0, 0, 1), "reverse_lazy": (1, 1, 1)}
SCHEDULES |= {f"random_{seed}": (2, 2, seed) for seed in (1, 2, 3)}
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A windowed problem: grid, windows, heads, head dims, and a function that makes its optional tensors."""

    grid: tuple[int, ...]
    windows: Windows
    dims: tuple[int, int] = (32, 32)
    heads: int = 2
    batch: int = 2
    dtype: torch.dtype = torch.bfloat16
    tensors: Callable[[Case], Tensors] = field(default=lambda case: {})
    options: tuple[tuple[str, Any], ...] = ()
    shared_memory: int = 227 * 1024


def table(case: Case, scale: float = 0.5) -> Tensors:
    """A trainable bias table for windows of case.windows.size (keys: kv_size)."""
    size = case.windows.size
    sizes = size if isinstance(size, tuple) else (size,) * len(case.grid)
    kv = case.windows.kv_size
    total = 1
    for w in sizes:
        assert w is not None
        assert kv is None or isinstance(kv, int)
        total *= w + (w if kv is None else kv) - 1
    return {"table": scale * torch.randn(total, case.heads)}


def edge(case: Case) -> Tensors:
    dk, dv = case.dims
    dtype = case.dtype
    return {
        "edge_k": torch.randn(case.heads, dk).to(dtype),
        "edge_v": torch.randn(case.heads, dv).to(dtype),
        **table(case),
    }


def extras(case: Case) -> Tensors:
    dk, dv = case.dims
    shape = (case.batch, 3, case.heads)
    masked = torch.zeros(case.batch, *case.grid)
    masked[0, ..., 1] = -torch.inf
    masked[-1, ..., 0] = 0.7
    return {
        "extra_k": torch.randn(*shape, dk).to(case.dtype),
        "extra_v": torch.randn(*shape, dv).to(case.dtype),
        "extra_bias": torch.randn(case.heads, 3),
        "key_padding_mask": masked,
        **edge(case),
    }


def all_ignored(case: Case) -> Tensors:
    return {"key_padding_mask": torch.ones(case.batch, *case.grid, dtype=torch.bool)}


def cosine(case: Case) -> Tensors:
    return {"logit_scale": torch.log(10 * torch.rand(case.heads) + 1), **table(case)}


def dense(case: Case) -> Tensors:
    size = case.windows.size
    assert isinstance(size, int)
    n = size ** len(case.grid)
    return {"bias": torch.randn(case.heads, n, n), "attn_mask": torch.randn(2, n, n)}


def some(**options: Any) -> tuple[tuple[str, Any], ...]:
    return tuple(options.items())


SHIFTED = Windows(4, shift=(2, 1), edge="const")
CASES = {
    "swin": Case((6, 7), SHIFTED, tensors=edge),
    "swin_half": Case((6, 7), SHIFTED, dtype=torch.float16, tensors=edge),
    "swin_float": Case((6, 7), SHIFTED, dtype=torch.float32, tensors=edge),
    "two_tiles": Case((9, 9), Windows(9), (30, 18), dtype=torch.float16, batch=1, tensors=table),
    "two_tiles_float": Case((9, 9), Windows(9), (10, 6), dtype=torch.float32, batch=1, tensors=table),
    "odd_dims": Case((8,), Windows(4, shift=1, mask_value=-torch.inf), (53, 7)),
    "wide": Case((8, 8), Windows(8), (122, 77), heads=1, batch=1),
    "widest": Case((40,), Windows(40), (256, 200), heads=1, batch=1, dtype=torch.float16),
    "widest_float": Case((36,), Windows(36), (250, 130), heads=1, batch=1, dtype=torch.float32),
    "little_shared": Case((70,), Windows(70), (128, 96), heads=1, batch=1, shared_memory=48 * 1024),
    "overlap": Case((8, 8), Windows(4, kv_size=6, edge="zero"), (24, 24), batch=1, tensors=table),
    "extras": Case((5, 6), SHIFTED, (18, 34), tensors=extras, options=some(dropout_p=0.4)),
    "all_ignored": Case((8,), Windows(4), tensors=all_ignored),
    "cosine": Case((6, 6), Windows(3, shift=1), (16, 24), tensors=cosine),
    "dense": Case((6, 6), Windows(3), (48, 40), tensors=dense),
    "relu2": Case((6, 6), Windows(3, shift=1), tensors=table, options=some(activation="relu2", scale=0.2)),
    "relu": Case((6, 6), Windows(3, shift=1), options=some(activation="relu", dropout_p=0.3)),
    "none": Case((6, 6), Windows(3), dtype=torch.float32, options=some(activation="none", scale=0.1)),
    "volume": Case((3, 4, 5), Windows((2, 3, 3), shift=(1, 0, 2), edge="mask"), (6, 10), tensors=table),
    "grid": Case((6, 9), Windows(3, partition="grid"), tensors=table),
    "stripes": Case((5, 6), Windows(None, head_groups=((1, (-1, 2)), (1, (3, -1)))), (24, 24)),
}


def inputs(case: Case) -> Tensors:
    torch.manual_seed(0)
    shape = (case.batch, *case.grid, case.heads)
    qkv = {n: torch.randn(*shape, d).to(case.dtype) for n, d in zip("qkv", (*case.dims[:1], *case.dims))}
    made = qkv | case.tensors(case)
    if "key_padding_mask" in made:  # what an ignored key holds is nobody's business
        ignored = made["key_padding_mask"].isinf() | (made["key_padding_mask"] == 1)
        for name in ("k", "v"):
            made[name] = made[name].masked_fill(ignored[..., None, None], torch.nan)
    return made


def run(
    case: Case,
    backend: str,
    dtype: torch.dtype,
    compute: torch.dtype | None = None,
    device: str = "cpu",
) -> Tensors:
    """out, lse and the gradient of every floating-point input, in float64."""
    given = {}
    for name, x in inputs(case).items():
        narrow = dtype == torch.float64 or name in ("q", "k", "v", "edge_k", "edge_v", "extra_k", "extra_v")
        x = x.to(dtype) if x.is_floating_point() and narrow else x
        given[name] = x.to(device).clone().requires_grad_(x.is_floating_point() and "mask" not in name)
    named: dict[str, Any] = {n: t for n, t in given.items() if n not in ("q", "k", "v", "table")}
    if "table" in given:
        named["bias"] = RelativeBias(given["table"])
    softmax = dict(case.options).get("activation", "softmax") == "softmax"
    torch.manual_seed(1)  # of dropout
    plain = reference.windowed
    _windowed_run.reference.windowed = partial(plain, compute_dtype=compute) if compute else plain
    try:
        found = vicinal.windowed_attention(
            given["q"],
            given["k"],
            given["v"],
            case.windows,
            **named,
            **dict(case.options),
            return_lse=softmax,
            backend=backend,
        )
    finally:
        _windowed_run.reference.windowed = plain
    torch.manual_seed(2)
    results, loss = dict(zip(("out", "lse"), found if softmax else (found,))), torch.zeros((), device=device)
    for x in results.values():
        upstream = torch.randn(x.shape).to(case.dtype)
        loss = loss + (x.masked_fill(x.isinf(), 0).double() * upstream.to(device).double()).sum()
    loss.backward()
    results = {n: x.detach() for n, x in results.items()}
    results |= {f"d{n}": t.grad for n, t in given.items() if t.requires_grad and t.grad is not None}
    return {n: t.double().cpu() for n, t in results.items()}


def check(case: Case, got: Tensors) -> None:
    """Error against float64 at most twice that of dense PyTorch in the same dtype, plus 4 eps of the largest
    value."""
    exact = run(case, "reference", torch.float64)
    peer = run(case, "reference", case.dtype, case.dtype)
    assert got.keys() == exact.keys()
    for name, want in exact.items():
        acc = name in ("lse", "dbias", "dtable", "dextra_bias", "dlogit_scale")
        eps = torch.finfo(torch.float32 if acc else case.dtype).eps
        finite = ~want.isinf()
        assert torch.equal(got[name][~finite], want[~finite]), name
        error = (got[name] - want)[finite].abs().max().item() if finite.any() else 0.0
        allowed = (peer[name] - want)[finite].abs().max().item() if finite.any() else 0.0
        bound = 2 * allowed + 4 * eps * (want[finite].abs().max().item() if finite.any() else 0.0)
        assert error <= bound, f"{name}: error {error:.3g}, bound {bound:.3g}"


def emulate(case: Case, build: HostBuild, flavor: str, schedule: str) -> tuple[Tensors, Emulation]:
    order, copies, seed = SCHEDULES[schedule]
    options = {"order": order, "copies": copies, "seed": seed, "shared_memory": case.shared_memory}
    with emulated(build, flavor, **options) as emulation:
        return run(case, "emulated", case.dtype), emulation


@pytest.mark.parametrize("name", CASES)
def test_every_option(name: str, host_build: HostBuild) -> None:
    schedule = list(SCHEDULES)[list(CASES).index(name) % len(SCHEDULES)]
    got, emulation = emulate(CASES[name], host_build, "plain", schedule)
    check(CASES[name], got)
    assert emulation.conflicts == 0


@pytest.mark.parametrize(("dim", "kibibytes"), [(32, 24), (64, 39), (96, 55), (128, 71), (256, 135)])
def test_shared_memory(dim: int, kibibytes: int, host_build: HostBuild) -> None:
    """What a 7 x 7 window needs, forward and backward: it decides how many blocks a multiprocessor holds."""
    case = Case((7, 7), Windows(7), (dim, dim), heads=1, batch=1)
    got, emulation = emulate(case, host_build, "plain", "forward_eager")
    check(case, got)
    assert emulation.largest_block <= kibibytes * 1024


@pytest.mark.parametrize("name", ["two_tiles", "two_tiles_float", "extras", "little_shared"])
def test_results_do_not_depend_on_the_schedule(name: str, host_build: HostBuild) -> None:
    results = [emulate(CASES[name], host_build, "plain", schedule)[0] for schedule in SCHEDULES]
    for result in results[1:]:
        assert all(torch.equal(result[n], x) for n, x in results[0].items())


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_address_sanitizer(name: str, host_build: HostBuild) -> None:
    check(CASES[name], emulate(CASES[name], host_build, "asan", "forward_eager")[0])


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["forward_eager", "random_1"])
@pytest.mark.parametrize("name", ["swin", "two_tiles", "two_tiles_float", "little_shared", "extras"])
def test_race_detector(name: str, schedule: str, host_build: HostBuild) -> None:
    check(CASES[name], emulate(CASES[name], host_build, "tsan", schedule)[0])


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if "dropout_p" not in dict(case.options)])
def test_on_a_gpu(name: str) -> None:
    """Not with dropout: its seed is drawn on the device, so that the float64 run drops other weights."""
    if not torch.cuda.is_available():
        pytest.skip("PyTorch sees no GPU")
    check(CASES[name], run(CASES[name], "cuda", CASES[name].dtype, device="cuda"))
