"""The bindings of the CUDA kernels, as far as they go without a GPU: counts, refusals, error texts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vicinal
from vicinal import _backends

from .emulated import LAYOUTS

needs_cuda_build = pytest.mark.skipif(
    _backends._C is None or not _backends._C.build_info()["with_cuda"],
    reason="vicinal was built without nvcc",
)
# Members of struct Attend by place: dtype, batch, heads, kv_heads, head dims, n_q, n_k, n_rows, slots.
SIZES = {0: 0, 2: 1, 3: 1, 4: 1, 5: 8, 6: 8, 7: 1, 8: 1, 23: 1, 24: 1, 25: 1}


def arguments(kind: str, handles: int, **changed: int) -> tuple[int | float, ...]:
    """All zero but for SIZES, and the stream or workspace and stream at the end."""
    places = SIZES | {int(name.removeprefix("at_")): value for name, value in changed.items()}
    return (
        *(places.get(i, 0.0 if code == "d" else 0) for i, code in enumerate(LAYOUTS[kind])),
        *[0] * handles,
    )


@needs_cuda_build
@pytest.mark.parametrize(
    ("function", "kind", "handles"),
    [("cuda_attend_fwd", "fwd", 1), ("cuda_attend_bwd", "bwd", 2), ("cuda_attend_bwd_workspace", "bwd", 0)],
)
def test_counts_arguments(function: str, kind: str, handles: int) -> None:
    launch, given = getattr(_backends._C, function), arguments(kind, handles, at_2=0)
    launch(given)  # an empty batch: nothing to launch
    with pytest.raises(TypeError, match=f"expected {len(given)} launch arguments, got {len(given) + 1}"):
        launch((*given, 0))
    with pytest.raises(TypeError, match="expected one tuple"):
        launch([*given])


@needs_cuda_build
@pytest.mark.parametrize("changed", [{"at_0": 1}, {"at_5": 257}, {"at_6": 257}, {"at_5": 0}])
def test_refuses_what_no_kernel_computes(changed: dict[str, int]) -> None:
    for function, kind, handles in (("cuda_attend_fwd", "fwd", 1), ("cuda_attend_bwd", "bwd", 2)):
        with pytest.raises(RuntimeError, match="CUDA error 1: invalid argument"):
            getattr(_backends._C, function)(arguments(kind, handles, **changed))


@pytest.mark.parametrize(
    ("dtype", "dims", "reason"),
    [
        (torch.float64, (8, 8), "dtype float64 is not one of"),
        (torch.float16, (8, 257), "head_dim 257 is above 256"),
    ],
)
def test_capability_row_names_every_limit(dtype: torch.dtype, dims: tuple[int, int], reason: str) -> None:
    q, v = (torch.zeros(1, 4, 1, d, dtype=dtype) for d in dims)
    explained: Any = vicinal.explain(vicinal.windowed_attention, q, q, v, 4)
    assert explained.reasons["cuda"][0] == "device cpu is not one of cuda"
    assert any(why.startswith(reason) for why in explained.reasons["cuda"])
