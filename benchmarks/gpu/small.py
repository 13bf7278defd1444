"""Small calls of every kernel of both GPU backends, for compute-sanitizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vicinal import Neighborhood, Windows, neighborhood_attention, windowed_attention

DTYPES = (torch.bfloat16, torch.float32)
BACKENDS = ("cuda", "triton")


def normal(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype, requires_grad=True)


def backward(result: Tensor | tuple[Tensor, Tensor]) -> None:
    assert isinstance(result, tuple)
    out, lse = result
    (out.float().square().sum() + lse.where(lse.isfinite(), 0).sum()).backward()


def windows(backend: str, dtype: torch.dtype, dim: int) -> None:
    """Shifted windows with overhang, a dense bias, padding, extra keys and dropout."""
    q, k, v = (normal(2, 9, 10, 2, dim, dtype=dtype) for _ in range(3))
    bias = torch.randn(2, 25, 25, device="cuda", requires_grad=True)
    extra = [normal(2, 3, 2, dim, dtype=dtype) for _ in range(2)]
    mask = torch.rand(2, 9, 10, device="cuda") < 0.3
    options: dict[str, Any] = {
        "extra_k": extra[0],
        "extra_v": extra[1],
        "key_padding_mask": mask,
        "dropout_p": 0.2,
    }
    backward(
        windowed_attention(
            q, k, v, Windows(5, shift=2), bias=bias, return_lse=True, backend=backend, **options
        )
    )


def neighborhoods(backend: str, dtype: torch.dtype, dim: int) -> None:
    """Strided and dilated neighborhoods; grouped heads, extra keys, padding and dropout; a long window."""
    q = normal(1, 11, 20, 4, dim, dtype=dtype)
    k, v = (normal(1, 11, 20, 2, dim, dtype=dtype) for _ in range(2))
    bias = torch.randn(4, 9, 9, device="cuda", requires_grad=True)
    extra = [normal(1, 3, 2, dim, dtype=dtype) for _ in range(2)]
    mask = torch.rand(1, 11, 20, device="cuda") < 0.2
    options: dict[str, Any] = {
        "extra_k": extra[0],
        "extra_v": extra[1],
        "key_padding_mask": mask,
        "dropout_p": 0.2,
    }
    for where in (Neighborhood(5), Neighborhood(5, dilation=(1, 2), stride=(2, 1), is_causal=(True, False))):
        backward(
            neighborhood_attention(q, k, v, where, bias=bias, return_lse=True, backend=backend, **options)
        )
    q, k, v = (normal(1, 150, 2, dim, dtype=dtype) for _ in range(3))
    where = Neighborhood((70, 0), is_causal=True, border="truncate")
    backward(neighborhood_attention(q, k, v, where, return_lse=True, backend=backend))


def main() -> None:
    torch.manual_seed(0)
    for backend in BACKENDS:
        for dtype in DTYPES:
            for dim in (32, 53):
                windows(backend, dtype, dim)
                neighborhoods(backend, dtype, dim)
                torch.cuda.synchronize()
                print(backend, dtype, dim, "done", flush=True)


if __name__ == "__main__":
    main()
