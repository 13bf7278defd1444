"""What the compiler makes of the Triton kernels for sm_80, sm_90 and sm_100, against committed budgets. No
GPU needed."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("nothing is compiled under TRITON_INTERPRET=1", allow_module_level=True)

import triton_compile as offline  # noqa: E402

from vicinal.kernels import attend_bwd, attend_bwd_keys, attend_fwd, tiles  # noqa: E402

BUDGETS: dict[str, Any] = json.loads(offline.BUDGETS.read_text())


def check(found: dict[str, dict[str, int]]) -> None:
    """Within the budget under the compiler that made it; registers and stack are another compiler's own
    affair."""
    limits = ("registers", "stack", "shared") if triton.__version__ == BUDGETS["triton"] else ("shared",)
    for name, values in found.items():
        budget = BUDGETS["configurations"][name]
        above = {limit: values[limit] for limit in limits if values[limit] > budget[limit]}
        assert not above, f"{name}: {above} above the budget {budget}"


def test_budgets_cover_the_table() -> None:
    passes = {
        "fwd": "attend_fwd_kernel",
        **{n: f"attend_bwd_{n}_kernel" for n in tiles.KERNELS if n != "fwd"},
    }
    wanted = {
        f"{passes[kernel]} {dtype_class} {dim} sm_{arch}"
        for kernel in tiles.KERNELS
        for dtype_class in tiles.CLASSES
        for dim in tiles.HEAD_DIMS
        for arch in offline.ARCHS
    }
    assert wanted <= set(BUDGETS["configurations"])


@pytest.mark.parametrize("arch", offline.ARCHS)
def test_half_within_budgets(arch: int) -> None:
    check(offline.measure("half", [arch]))


@pytest.mark.slow
@pytest.mark.parametrize("dtype_class", ["tf32", "fp32", "fp64"])
def test_other_types_within_budgets(dtype_class: str) -> None:
    check(offline.measure(dtype_class))


def every_option() -> list[Any]:
    """The launches of a call with every option on, in one tile and in several."""
    found = []
    for window in (4, 12):
        call, grads = offline.shifted_problem(torch.float16, 24, window)
        n = call.q.shape[1]
        call.q_scale, call.k_scale = torch.ones(2, n, 2), torch.ones(2, n, 2)
        call.key_bias, call.mask = torch.zeros(2, n), torch.zeros(18, 2, window**2, window**2)
        call.extra_k, call.extra_v = (torch.zeros(2, 3, 2, 24, dtype=torch.float16) for _ in range(2))
        call.edge_row, call.dropout_p, call.seed = 1, 0.25, torch.zeros(1, dtype=torch.int64)
        grads.dlse, grads.dextra_k, grads.dextra_v = (
            torch.zeros(2, n, 2),
            *(torch.zeros(2, 3, 2, 24) for _ in range(2)),
        )
        found += offline.launches(call, grads)
    return [*found, *every_option_of_neighborhoods()]


def every_option_of_neighborhoods() -> list[Any]:
    """The same for rows with ranges, keys with a plan of their own, and shared key heads."""
    call, grads = offline.neighborhood_problem(torch.float16, 24, grouped=True)
    call.k, call.v, grads.dk, grads.dv = (t[:, :, :1] for t in (call.k, call.v, grads.dk, grads.dv))
    call.extra_k, call.extra_v = (torch.zeros(2, 3, 1, 24, dtype=torch.float16) for _ in range(2))
    call.bias = torch.zeros(2, 13 * 13 + 3)
    call.key_bias, call.seed = torch.zeros(2, 21 * 21), torch.zeros(1, dtype=torch.int64)
    call.dropout_p, call.drop_by_token = 0.25, True
    grads.dlse, grads.dbias = torch.zeros(2, 21 * 21, 2), torch.zeros(2, 13 * 13 + 3)
    grads.dextra_k, grads.dextra_v = (torch.zeros(2, 3, 1, 24) for _ in range(2))
    return offline.launches(call, grads)


def test_every_option_compiles() -> None:
    launched = every_option()
    assert len({kernel.fn.__name__ for kernel, *_ in launched}) == 9
    for kernel, _, args, options in launched:
        offline.resources(offline.compile_launch(kernel, args, options, 90))


def test_lengths_and_scales_do_not_specialise() -> None:
    """One binary serves every batch, number of windows, number of heads and scale (1 included)."""
    call, grads = offline.shifted_problem(torch.float16, 32, 7)
    (kernel, _, args, options), *_ = offline.launches(call, grads)
    first = offline.compile_launch(kernel, args, options, 90)
    changed = {"scale": 1.0, "mask_value": -1.0, "n_rows": 1, "heads": 16, "q_tiles": 3, "n_extra": 0}
    assert set(changed) <= set(args)
    assert offline.compile_launch(kernel, args | changed, options, 90) is first


def test_no_transposed_result_is_a_left_operand() -> None:
    """Triton 3.4 to 3.7.0 miscompiles it on Hopper; see docs of attend_bwd."""
    for module in (attend_fwd, attend_bwd, attend_bwd_keys):
        text = Path(module.__file__).read_text()
        left = re.findall(r"tl\.dot\(tl\.trans\((\w+)\)", text)
        assert set(left) <= {"k"}, "only loaded tiles may be transposed into a left operand"
