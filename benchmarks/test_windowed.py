"""The cases of `python -m benchmarks` for pytest-benchmark: `pytest benchmarks --benchmark-only`.

Groups are cases, so its table puts implementations side by side. They run one after the other, not
interleaved: for ratios that hold on a busy machine use `python -m benchmarks`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import check, windowed
from benchmarks.windowed import Case

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")

OPTIONS = windowed.Options(
    problems=windowed.problems(None, quick=False, full=False),
    dtypes=(torch.float32, torch.bfloat16),
    directions=(False, True),
    threads=(torch.get_num_threads(),),
)


@pytest.mark.parametrize("impl", [windowed.OURS, *windowed.BASELINES])
@pytest.mark.parametrize("case", OPTIONS.cases(), ids=lambda case: case.group)
def test_windowed(benchmark: Any, case: Case, impl: str) -> None:
    benchmark.group = case.group
    benchmark.extra_info.update(case.params)
    ours = windowed.ours(case.problem, None)
    torch.compiler.reset()
    known = windowed.checked(case, ours, case.backward)
    if impl == windowed.OURS:
        assert not known.complaint(case)
        run = ours
    else:
        try:
            run = windowed.baseline(impl, case)
            check.outputs(run, known.inputs, case.backward)
        except Exception as error:
            pytest.skip(windowed.reason(error))
    known.inputs.requires_grad_(case.backward)
    benchmark.pedantic(windowed.stepper(run, known.inputs, case.backward), rounds=7, warmup_rounds=1)
