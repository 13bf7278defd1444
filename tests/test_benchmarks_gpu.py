"""benchmarks.gpu as far as it goes without a GPU: its baselines solve its problems, its parts are named."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import bench, cases, sweep, timing
from vicinal import Neighborhood

CASES = (
    cases.Case("2d", 2, (9, 10), 2, 8, Neighborhood(5, dilation=(1, 2)), True, torch.float32, device="cpu"),
    cases.Case(
        "1d", 1, (30,), 2, 8, Neighborhood((7, 0), border="truncate"), False, torch.float32, device="cpu"
    ),
)


@pytest.mark.parametrize("name", ["eager", "sdpa"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_baselines_solve_the_problem(case: cases.Case, name: str) -> None:
    given, table, dout = cases.tensors(case)
    expected = bench.outputs(cases.ours(case, "reference"), given, table, dout, True)
    found = bench.outputs(getattr(cases, name)(case), given, table, dout, True)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_errors_and_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "OURS", ("reference",))
    found = bench.errors(CASES[0])
    assert not bench.wrong(found)
    assert bench.wrong({"a": [1.0, 2.0, 3.0, 2.0], "b": [float("nan"), 1.0], "c": [0.0, 0.0]}) == ["a", "b"]


def test_sweeps_name_cases_and_tiles_that_fit() -> None:
    assert {*sweep.PLANS, *sweep.TRITON} <= set(cases.CASES)
    for name, tiles in sweep.PLANS.items():
        assert all(len(tile) == len(cases.CASES[name].space) for tile in tiles)
    assert len(list(sweep.candidates("kv"))) > 5


def test_chosen_goes_on_after_a_name() -> None:
    args = argparse.Namespace(only=None, after="b", minutes=1.0)
    assert list(timing.chosen("abcd", args)) == ["c", "d"]
    assert list(timing.chosen("abcd", argparse.Namespace(only=["c"], after=None, minutes=1.0))) == ["c"]


def test_chosen_stops_in_time(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 25))
    monkeypatch.setattr(timing.time, "monotonic", lambda: float(next(clock)))
    args = argparse.Namespace(only=None, after=None, minutes=1.5)
    assert list(timing.chosen("abcd", args)) == ["a"]
    assert "go on with --after a" in capsys.readouterr().out


def test_a_command_that_takes_too_long_is_stopped(tmp_path: Path) -> None:
    slow = [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)"]
    result = gpu.command(slow, tmp_path / "log", minutes=0.05)
    assert result["status"] == 124
    assert result["tail"] == ["begun"]
    assert "x: status 124\n    begun" in gpu.summary({"x": result})


def test_help_names_the_parts() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--help"], capture_output=True, text=True, cwd=gpu.ROOT
    )
    assert all(part in done.stdout for part in gpu.PARTS)
    tests = [t.split("::")[0] for part in gpu.TESTS.values() for t in part if not t.startswith("--")]
    assert all((gpu.ROOT / t).exists() for t in tests)
