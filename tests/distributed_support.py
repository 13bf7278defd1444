"""What the cases of tests/test_distributed.py are made of: a whole and a part that have to agree."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

Found = dict[str, Tensor]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def results(outputs: Any, inputs: dict[str, Tensor], upstream: Sequence[Tensor]) -> Found:
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = torch.autograd.grad(
        outputs, list(inputs.values()), [u.to(o.dtype) for u, o in zip(upstream, outputs)]
    )
    found = {f"out{i}": o.detach() for i, o in enumerate(outputs)}
    return found | {f"d{name}": g for name, g in zip(inputs, grads)}


def close(name: str, x: Tensor, truth: Tensor) -> None:
    """In float64, a sum in another order is all that may differ."""
    torch.testing.assert_close(x, truth, rtol=1e-11, atol=1e-11, msg=lambda text: f"{name}: {text}")


def compare(
    whole: Callable[..., Any],
    part: Callable[..., Any],
    split: dict[str, Tensor],
    shared: dict[str, Tensor],
    dim: int,
    lengths: Sequence[int],
    lse: bool = False,
    exact: bool = False,
) -> None:
    """whole(**split, **shared) against part(...) of this rank's rows on `dim`. exact: outputs to the bit."""
    rank = dist.get_rank()
    first = [0, *accumulate(lengths)][rank]

    def mine(x: Tensor) -> Tensor:
        return x.narrow(dim, first, lengths[rank])

    leaves = {n: x.clone().requires_grad_() for n, x in (split | shared).items()}
    outputs = whole(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    upstream = [random(*o.shape, seed=50 + i) for i, o in enumerate(outputs)]
    expected = results(outputs, leaves, upstream)
    own = {n: mine(x).clone().requires_grad_() for n, x in split.items()}
    own |= {n: x.clone().requires_grad_() for n, x in shared.items()}
    got = results(part(**own), own, [mine(u) for u in upstream])
    for name, x in expected.items():
        truth = x if name[1:] in shared else mine(x)
        if exact and name.startswith("out"):
            assert torch.equal(got[name], truth), f"{name} is not equal to the bit"
        close(name, got[name], truth)
    assert len(got) == len(expected)


def even(rows: int) -> list[int]:
    ranks = dist.get_world_size()
    assert rows % ranks == 0
    return [rows // ranks] * ranks


def grid(*space: int, heads: int = 2, dim: int = 6) -> dict[str, Tensor]:
    return {n: random(2, *space, heads, dim, seed=i) for i, n in enumerate("qkv")}


def refuses(
    error: type[Exception], text: str, function: Callable[..., Any], *args: Any, **named: Any
) -> None:
    with pytest.raises(error, match=re.escape(text)):
        function(*args, **named)


def sent(run: Callable[[], Any]) -> list[int]:
    """Bytes that leave this rank point to point, by transfer of a tensor or more: forward, backward."""
    found: list[int] = []

    def counted(operations: list[dist.P2POp]) -> list[dist.Work]:
        out = [o.tensor.numel() * o.tensor.element_size() for o in operations if o.op is dist.isend]
        found.append(sum(out))
        return dist.batch_isend_irecv(operations)

    with patch("vicinal.distributed._exchange.batch", counted):
        run()
    half = len(found) // 2
    return [sum(found[:half]), sum(found[half:])]
