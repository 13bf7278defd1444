"""The benchmarks' command line, their refusal of wrong results, their JSON, and the generated tables."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import check, report, table, windowed
from benchmarks.machine import ROOT, commit_info, machine_info
from benchmarks.measure import Contender, interleave, median, percentile
from benchmarks.results import Report, load
from benchmarks.windowed_problems import PROBLEMS, Problem, make_inputs
from benchmarks.windowed_published import Published, matmul_softmax, sdpa

STATS = (
    "min max mean stddev rounds median iqr q1 q3 iqr_outliers stddev_outliers outliers ld15iqr hd15iqr ops"
)
TINY = next(p for p in PROBLEMS if p.name == "tiny-windows")


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    whole = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(whole, cwd=ROOT, capture_output=True, text=True)


def tiny(**changes: object) -> windowed.Options:
    given = {"dtypes": (torch.float32,), "directions": (False, True), "threads": (1,), "memory": False}
    given |= {"baselines": ("eager", "sdpa"), "seconds": 0.0, "rounds": (3, 3), **changes}
    return windowed.Options(problems=[TINY], **given)  # type: ignore[arg-type]


def test_list_names_every_case_of_the_selection() -> None:
    result = command("windowed", "--list", "--full", "--dtype", "float32", "--threads", "1")
    assert result.returncode == 0, result.stderr
    for problem in PROBLEMS:
        for direction in ("fwd", "fwd+bwd"):
            assert f"windowed/{problem.name}/float32/{direction}/1t " in result.stdout


def test_quick_run_writes_json_that_pytest_benchmark_reads(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    selection = ("--problem", "tiny", "--dtype", "float32", "--threads", "1", "--backend", "reference")
    result = command("windowed", "--quick", *selection, "--seconds", "0.1", "--json", str(path))
    assert result.returncode == 0, result.stdout + result.stderr
    run = load(path)
    assert {"machine_info", "commit_info", "benchmarks", "datetime", "version"} <= set(run)
    groups = table.grouped(run["benchmarks"])
    assert list(groups) == [f"windowed/tiny-windows/float32/{d}/1t" for d in ("fwd", "fwd+bwd")]
    for members in groups.values():
        assert set(members) == {"vicinal", "eager", "sdpa"}
        for benchmark in members.values():
            assert set(STATS.split()) <= set(benchmark["stats"])
        extra = members["vicinal"]["extra_info"]
        assert extra["best_baseline"] in ("eager", "sdpa")
        assert extra["ratio"]["p20"] <= extra["ratio"]["median"] <= extra["ratio"]["p80"]
    pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")
    read = [sys.executable, "-m", "pytest_benchmark", "compare", str(path), "--group-by", "group"]
    shown = subprocess.run(read, capture_output=True, text=True, cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "fwd+bwd" in shown.stdout


def test_a_wrong_implementation_is_refused_and_not_timed() -> None:
    def wrong(problem: Problem) -> check.Run:
        right = windowed.ours(problem, "reference")

        def run(tensors: tuple[Tensor, ...], bias: Tensor | None) -> Tensor:
            return right(tensors, bias) * (1 + 1e-4)

        return run

    outcome = Report("cpu")
    assert len(list(windowed.run(tiny(), outcome, wrong))) == 2
    assert not outcome.results
    assert len(outcome.refused) == 2
    assert "error of out is" in outcome.refused[0]["reason"]
    assert "Refused" in table.final(outcome.as_json())


def test_a_wrong_gradient_refuses_only_what_computes_it() -> None:
    def wrong(problem: Problem) -> check.Run:
        right = windowed.ours(problem, "reference")

        def run(tensors: tuple[Tensor, ...], bias: Tensor | None) -> Tensor:
            out = right(tensors, bias)
            return out.detach() + (out - out.detach()) * 1.01

        return run

    outcome = Report("cpu")
    list(windowed.run(tiny(), outcome, wrong))
    assert [entry["group"].split("/")[3] for entry in outcome.refused] == ["fwd+bwd"]
    assert {r.params["direction"] for r in outcome.results} == {"fwd"}


def test_a_wrong_baseline_is_listed_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = windowed.baseline

    def sabotaged(name: str, case: windowed.Case) -> check.Run:
        run = original(name, case)
        return (lambda tensors, bias: run(tensors, bias) + 0.1) if name == "sdpa" else run

    monkeypatch.setattr(windowed, "baseline", sabotaged)
    outcome = Report("cpu")
    list(windowed.run(tiny(directions=(False,)), outcome))
    assert {r.contender for r in outcome.results} == {"vicinal", "eager"}
    assert outcome.unavailable[0]["impl"] == "sdpa"
    assert "error of out" in outcome.unavailable[0]["reason"]


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
def test_baselines_compute_the_reference(problem: Problem) -> None:
    """In float64, on one sample of a smaller grid where the windows allow it."""
    small = smaller(problem)
    inputs = make_inputs(small, torch.float64, "cpu")
    expected = check.outputs(windowed.ours(small, "reference"), inputs, True)
    for attend in (matmul_softmax, sdpa):
        baseline = Published(small, attend, torch.float64, "cpu")
        for name, error in check.errors(check.outputs(baseline, inputs, True), expected).items():
            assert error < 1e-12, (attend.__name__, name)


def smaller(problem: Problem) -> Problem:
    from dataclasses import replace

    group = problem.groups[0]
    if problem.windows.head_groups or problem.q_space or len(problem.space) == 1:
        return replace(problem, batch=1)
    overhang = problem.name == "swin-padded"
    return replace(problem, batch=1, space=tuple(2 * w + 3 * overhang for w in group.window))


def test_work_of_a_known_problem() -> None:
    """B8 56x56, 3 heads of 32, windows of 49: 4 * B * windows * h * N^2 * D flops, 4 tensors of 9.6 MB."""
    problem = next(p for p in PROBLEMS if p.name == "swin-stage1-shift")
    assert problem.flops == 4 * 8 * 64 * 3 * 49 * 49 * 32
    assert problem.bytes_of(torch.float32, False) == 4 * 4 * 8 * 56 * 56 * 96
    assert problem.bytes_of(torch.bfloat16, True) == 2 * 12 * 8 * 56 * 56 * 96


def test_rounds_alternate_and_repeat_short_calls() -> None:
    order: list[str] = []
    contenders = [Contender(name, lambda name=name: order.append(name)) for name in "ab"]  # type: ignore[misc]
    timed = interleave(contenders, seconds=0.0, rounds=(4, 9), probe=lambda: 1.0)
    assert [len(c.seconds) for c in timed.contenders] == [4, 4]
    assert timed.probe == [1.0] * 4
    assert contenders[0].repeats > 1
    runs = [name for i, name in enumerate(order) if i == 0 or order[i - 1] != name]
    assert "".join(runs) == "abababa"  # warm-up ab, rounds ab, ba, ab, ba: equal neighbours merge


def test_percentiles() -> None:
    assert median([3.0, 1.0, 2.0]) == 2.0
    assert percentile([0.0, 10.0], 20) == 2.0
    assert percentile([5.0], 80) == 5.0


def test_results_name_no_host_and_no_path() -> None:
    import platform

    text = json.dumps([machine_info("cpu"), commit_info()])
    assert platform.node() not in text
    assert str(ROOT) not in text
    assert str(Path.home()) + "/" not in text


def test_tables_of_the_documentation_are_current() -> None:
    for page in report.PAGES:
        text = (ROOT / page).read_text()
        assert report.rendered(text) == text, f"{page} is stale: run python -m benchmarks.report"
        assert len(report.MARKED.findall(text)) == text.count("<!-- benchmarks "), page


def test_committed_results_refuse_nothing() -> None:
    for path in sorted((ROOT / "benchmarks" / "results").glob("*/*.json")):
        run = load(path)
        assert run["benchmarks"], path
        assert not run["refused"], path
        assert re.fullmatch(r"[a-z0-9-]+", path.parent.name)


def test_plot_is_drawn(tmp_path: Path) -> None:
    plot = pytest.importorskip("benchmarks.plot", reason="matplotlib is not installed")
    outcome = Report("cpu")
    list(windowed.run(tiny(directions=(False,)), outcome))
    plot.draw(outcome.as_json(), tmp_path / "run.png")
    assert (tmp_path / "run.png").stat().st_size > 10_000


def test_comparison_with_an_older_run() -> None:
    outcome = Report("cpu")
    list(windowed.run(tiny(directions=(False,)), outcome))
    run = outcome.as_json()
    text = table.comparison(run, run)
    assert "windowed/tiny-windows/float32/fwd/1t" in text
    assert "+0%" in text
    assert table.comparison(run, {**run, "benchmarks": []}) == "The two runs have no case in common."
