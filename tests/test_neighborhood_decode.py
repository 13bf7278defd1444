"""Ring caches and decoding, against the same rows of the whole sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backends_support import device_of, op_backends
from dispatch_modes import refused
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from vicinal import Neighborhood, RingKVCache, neighborhood_attention, sliding_window_decode


def cache_of(capacity: int, dim_v: int = 5, **options: Any) -> RingKVCache:
    return RingKVCache(2, capacity, 2, 8, dim_v, **{"dtype": torch.float64, "device": "cpu", **options})


@pytest.mark.parametrize("capacity", [1, 4, 7])
def test_a_ring_holds_the_last_positions(capacity: int) -> None:
    cache, written = cache_of(capacity), 0
    for tokens in (1, 1, 3, 1, 2, 4, 1):
        tokens = min(tokens, capacity)
        new = torch.arange(written, written + tokens, dtype=torch.float64).view(1, -1, 1, 1)
        cache.append(new.expand(2, -1, 2, 8), new.expand(2, -1, 2, 5))
        written += tokens
        assert int(cache.length) == written
        for slot, position in enumerate(cache.positions().tolist()):
            assert position % capacity == slot
            assert position > written - 1 - capacity
            if position >= 0:
                assert bool((cache.k[:, slot] == position).all())
                assert bool((cache.v[:, slot] == position).all())
    cache.reset()
    assert int(cache.length) == 0
    assert bool((cache.positions() < 0).all())


@pytest.mark.parametrize("dilation", [1, 3])
@pytest.mark.parametrize("left", [0, 1, 4])
@pytest.mark.parametrize("backend", [*op_backends(), "reference"])
def test_decoding_gives_the_rows_of_the_whole(backend: str, left: int, dilation: int) -> None:
    device, total = device_of(backend), 23
    q = torch.randn(2, total, 4, 8, device=device)
    k, v = torch.randn(2, total, 2, 8, device=device), torch.randn(2, total, 2, 5, device=device)
    extra = [torch.randn(2, 2, 2, n, device=device) for n in (8, 5)]
    where = Neighborhood((left, 0), dilation=dilation, border="truncate")
    out, lse = neighborhood_attention(
        q, k, v, where, extra_k=extra[0], extra_v=extra[1], return_lse=True, backend="reference"
    )
    most = 5
    cache = cache_of(left * dilation + most, dtype=torch.float32, device=device)
    first = 0
    for tokens in (1, 1, 5, 2, 3, 1, 5, 1, 4):
        span = slice(first, first + tokens)
        cache.append(k[:, span], v[:, span])
        got = sliding_window_decode(
            q[:, span],
            cache,
            left=left,
            dilation=dilation,
            extra_k=extra[0],
            extra_v=extra[1],
            return_lse=True,
            backend=backend,
        )
        torch.testing.assert_close(got, (out[:, span], lse[:, span]))
        first += tokens
    assert first == total


def test_decoding_does_not_read_what_the_cache_forgot() -> None:
    cache = cache_of(5)
    ones = torch.ones(2, 1, 2, 8, dtype=torch.float64)
    for value in (float("inf"), float("nan"), 1.0, 2.0, 3.0, 4.0, 5.0):
        cache.append(ones * value, ones[..., :5] * value)
    out = sliding_window_decode(torch.zeros(2, 1, 4, 8, dtype=torch.float64), cache, left=4)
    assert isinstance(out, Tensor)
    assert torch.equal(out, torch.full_like(out, 3.0))


def test_decoding_is_differentiable_in_its_queries() -> None:
    cache = cache_of(8)
    cache.append(torch.randn(2, 6, 2, 8).double(), torch.randn(2, 6, 2, 5).double())
    q = torch.randn(2, 3, 4, 8, dtype=torch.float64, requires_grad=True)

    def function(q: Tensor) -> Any:
        return sliding_window_decode(q, cache, left=4, scale=0.7, return_lse=True)

    assert torch.autograd.gradcheck(function, q, fast_mode=True)


def test_decoding_compiles_once_for_all_steps() -> None:
    cache = cache_of(8, dtype=torch.float32)
    q = torch.randn(9, 2, 1, 4, 8)
    k, v = torch.randn(9, 2, 1, 2, 8), torch.randn(9, 2, 1, 2, 5)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def step(q: Tensor, k: Tensor, v: Tensor) -> Any:
        cache.append(k, v)
        return sliding_window_decode(q, cache, left=6)

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    got = torch.cat([compiled(*new) for new in zip(q, k, v)], 1)
    assert counter.frame_count == 1
    cache.reset()
    assert torch.equal(got, torch.cat([step(*new) for new in zip(q, k, v)], 1))


def rand(*shape: int) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64)


NEW, LONG = (rand(2, 1, 2, 8), rand(2, 1, 2, 5)), rand(2, 2, 2, 5)
CACHES: list[tuple[type[Exception], str, Any]] = [
    (TypeError, "capacity is 4.0|an int >= 1", lambda: cache_of(4.0)),  # type: ignore[arg-type]
    (ValueError, "capacity is 0|an int >= 1", lambda: cache_of(0)),
    (ValueError, "head_dim_v is 0|an int >= 1", lambda: cache_of(4, 0)),
    (TypeError, "k_new is a int|tensor", lambda: cache_of(4).append(1, NEW[1])),  # type: ignore[arg-type]
    (ValueError, "k_new has shape [2, 1, 2, 5]|[2, 1, 2, 8]", lambda: cache_of(4).append(NEW[1], NEW[1])),
    (
        ValueError,
        "v_new has shape [2, 2, 2, 5]|[2, 1, 2, 5]",
        lambda: cache_of(4).append(NEW[0], rand(2, 2, 2, 5)),
    ),
    (ValueError, "k_new is torch.float32|torch.float64", lambda: cache_of(4).append(NEW[0].float(), NEW[1])),
    (
        ValueError,
        "k_new has 5 tokens; the cache holds 4",
        lambda: cache_of(4).append(rand(2, 5, 2, 8), rand(2, 5, 2, 5)),
    ),
]


@pytest.mark.parametrize(("error", "words", "make"), CACHES, ids=lambda x: x if isinstance(x, str) else "")
def test_refused_caches(error: type[Exception], words: str, make: Any) -> None:
    refused(error, words, make)


DECODES: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (TypeError, "q is a list|tensor", {"q": [1]}),
    (TypeError, "cache is a int|RingKVCache", {"cache": 1}),
    (TypeError, "left is 1.0|an int >= 0", {"left": 1.0}),
    (ValueError, "left is -1|an int >= 0", {"left": -1}),
    (TypeError, "dilation is True|an int >= 1", {"dilation": True}),
    (ValueError, "dilation is 0|an int >= 1", {"dilation": 0}),
    (ValueError, "q has shape [2, 4, 8]|[B, T, heads, head_dim]", {"q": rand(2, 4, 8)}),
    (ValueError, "q has shape [2, 1, 4, 7]|[2, 1, 4, 8]", {"q": rand(2, 1, 4, 7)}),
    (ValueError, "q has 3 heads|a multiple of the 2", {"q": rand(2, 1, 3, 8)}),
    (ValueError, "q is torch.float32|torch.float64", {"q": rand(2, 1, 4, 8).float()}),
    (ValueError, "capacity of 8|2 * 4 + 1|at least 9", {"left": 2, "dilation": 4}),
    (ValueError, "capacity of 8|7 * 1 + 2|at least 9", {"left": 7, "q": rand(2, 2, 4, 8)}),
    (TypeError, "return_lse is 1", {"return_lse": 1}),
]


@pytest.mark.parametrize(
    ("error", "words", "changes"), DECODES, ids=lambda x: x if isinstance(x, str) else None
)
def test_refused_decodes(error: type[Exception], words: str, changes: dict[str, Any]) -> None:
    given: dict[str, Any] = {"q": rand(2, 1, 4, 8), "cache": cache_of(8), "left": 3}
    refused(error, words, sliding_window_decode, **{**given, **changes})
