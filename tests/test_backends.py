"""Capability rows: reasons, the choice, the forced backend, explain, and the fallback that is logged once."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from vicinal import Explanation, Windows, _backends, explain, windowed_attention, windowed_attention_qkvpacked
from vicinal._backends import Problem, Row, reasons, select

FLOATS = (torch.float32, torch.float16)


def available(device: str) -> str:
    return ""


def broken(device: str) -> str:
    return "it is broken"


def row(backend: str, **changes: object) -> Row:
    fields = {"family": "made_up", "devices": ("cpu",), "dtypes": FLOATS, "available": available, **changes}
    return Row(backend, **fields)  # type: ignore[arg-type]


def problem(**changes: object) -> Problem:
    fields = {
        "family": "made_up",
        "device": "cpu",
        "dtype": torch.float32,
        "head_dim": 8,
        "head_dim_v": 8,
        **changes,
    }
    return Problem(**fields)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def rows() -> Iterator[None]:
    """Rows that a test registers are gone after it."""
    before = list(_backends._rows)
    yield
    _backends._rows[:] = before
    _backends._choice.cache_clear()
    for forget in _backends._listeners:
        forget()


def test_a_capable_row_has_no_reason() -> None:
    assert reasons(row("cpu"), problem()) == []
    assert reasons(row("cpu", max_head_dim=8, min_arch=80), problem(arch=80)) == []
    assert reasons(row("reference", devices=("any",)), problem(device="xpu")) == []


FLOAT16_IS_WRONG = "float16 on cpu would give wrong numbers"


@pytest.mark.parametrize(
    ("changes", "asked", "reason"),
    [
        ({}, {"device": "cuda"}, "device cuda is not one of cpu"),
        ({"available": broken}, {}, "it is broken"),
        ({}, {"dtype": torch.float64}, "dtype float64 is not one of float32, float16"),
        ({"max_head_dim": 8}, {"head_dim": 9}, "head_dim 9 is above 8"),
        ({"max_head_dim": 8}, {"head_dim_v": 10}, "head_dim 10 is above 8"),
        ({"min_arch": 80}, {"arch": 75}, "GPU architecture sm_75 is below sm_80"),
        ({"wrong": frozenset({("cpu", torch.float16)})}, {"dtype": torch.float16}, FLOAT16_IS_WRONG),
        (
            {"missing": frozenset({"dropout"})},
            {"features": frozenset({"dropout", "relu"})},
            "dropout is missing",
        ),
    ],
)
def test_each_reason(changes: dict[str, object], asked: dict[str, object], reason: str) -> None:
    assert reasons(row("cpu", **changes), problem(**asked)) == [reason]


def test_all_reasons_are_given_at_once() -> None:
    limited = row("cpu", max_head_dim=4, missing=frozenset({"relu", "dropout"}))
    asked = problem(device="cuda", dtype=torch.float64, features=frozenset({"relu", "dropout"}))
    assert len(reasons(limited, asked)) == 5


def test_an_unavailable_device_is_not_asked_for_availability() -> None:
    assert reasons(row("cpu", available=broken), problem(device="cuda")) == ["device cuda is not one of cpu"]


def test_the_first_capable_row_in_order_is_chosen() -> None:
    _backends.register(row("reference", devices=("any",), dtypes=(torch.float64, *FLOATS)))
    _backends.register(row("triton", max_head_dim=4))
    _backends.register(row("cpu", max_head_dim=16))
    names = [r.backend for r in _backends.rows("made_up")]
    assert names == sorted(names, key=_backends.ORDER.index)
    assert select(problem()) == "cpu"
    assert select(problem(head_dim=17)) == "reference"
    assert select(problem(dtype=torch.float64)) == "reference"


def test_a_new_row_changes_the_choice() -> None:
    _backends.register(row("reference", devices=("any",)))
    assert select(problem()) == "reference"
    _backends.register(row("cpu"))
    assert select(problem()) == "cpu"


def test_no_capable_row_names_the_problem_and_every_reason() -> None:
    _backends.register(row("cpu", max_head_dim=4))
    _backends.register(row("triton", available=broken, dtypes=(torch.float16,)))
    with pytest.raises(NotImplementedError) as caught:
        select(problem(features=frozenset({"relu"})))
    message = str(caught.value)
    for part in (
        "made_up on cpu in float32, head_dim 8 with relu",
        "cpu: head_dim 8 is above 4",
        "triton: it is broken; dtype float32 is not one of float16",
    ):
        assert part in message


def test_a_forced_backend_is_taken_or_refused_with_its_reasons() -> None:
    _backends.register(row("cpu"))
    _backends.register(row("reference", devices=("any",)))
    assert select(problem(), "reference") == "reference"
    _backends.register(row("triton", available=broken, max_head_dim=4))
    with pytest.raises(NotImplementedError, match="triton: it is broken; head_dim 8 is above 4") as caught:
        select(problem(), "triton")
    assert "cpu:" not in str(caught.value)
    with pytest.raises(ValueError, match="backend is 'cuda'; made_up has 'cpu', 'triton', 'reference'"):
        select(problem(), "cuda")
    with pytest.raises(TypeError, match="None or a string, got int"):
        select(problem(), 1)  # type: ignore[arg-type]


def test_a_fallback_to_the_reference_is_logged_once_per_problem(caplog: pytest.LogCaptureFixture) -> None:
    _backends.register(row("cpu", max_head_dim=4))
    _backends.register(row("reference", devices=("any",)))
    with caplog.at_level(logging.WARNING, "vicinal"):
        for _ in range(3):
            assert select(problem()) == "reference"
        assert len(caplog.records) == 1
        assert "made_up runs on the reference backend (cpu: head_dim 8 is above 4)" in caplog.text
        select(problem(head_dim=9))
        assert len(caplog.records) == 2
        select(problem(head_dim=4, head_dim_v=4))
        select(problem(), "reference")  # asked for: no fallback
    assert len(caplog.records) == 2


def test_the_choice_of_a_call_follows_the_rows() -> None:
    q = torch.randn(1, 4, 4, 1, 8)

    def chosen() -> str:
        assert isinstance(windowed_attention(q, q, q, 2), Tensor)
        return explain(windowed_attention, q, q, q, 2).backend

    first = chosen()
    assert chosen() == first
    _backends._rows[:] = [r for r in _backends._rows if r.backend == "reference"]
    _backends._choice.cache_clear()
    assert chosen() == "reference"


def test_explain_lists_every_row() -> None:
    q = torch.randn(1, 14, 14, 3, 32)
    found = explain(windowed_attention, q, q, q, Windows(7, shift=3), backend="reference")
    assert isinstance(found, Explanation)
    assert found.backend == "reference"
    assert list(found.reasons) == [r.backend for r in _backends.rows("windowed")]
    assert found.reasons["reference"] == []
    lines = str(found).splitlines()
    assert lines[0] == "windowed: reference"
    assert len(lines) == 1 + len(found.reasons)
    for line, (name, why) in zip(lines[1:], found.reasons.items()):
        assert line.split()[0] == name
        assert all(reason in line for reason in why)
    assert lines[-1].endswith("chosen")


def test_explain_says_what_the_call_runs() -> None:
    qkv = torch.randn(1, 4, 4, 3, 2, 8)
    q, k, v = qkv.unbind(-3)
    for call in (
        explain(windowed_attention, q, k, v, 2),
        explain(windowed_attention, q, k=k, v=v, windows=2, return_lse=True),
        explain(windowed_attention_qkvpacked, qkv, windows=2),
    ):
        asked = Problem("windowed", "cpu", torch.float32, 8, 8)
        assert call.problem == asked
        assert call.backend == select(asked)
    features = explain(windowed_attention, q, k, v, 2, dropout_p=0.5, activation="relu").problem.features
    assert features == {"dropout", "relu"}
    with torch.autocast("cpu", torch.bfloat16):
        assert explain(windowed_attention, q, k, v, 2).problem.dtype == torch.bfloat16


def test_every_backend_of_windowed_is_told_apart() -> None:
    names = [r.backend for r in _backends.rows("windowed")]
    assert len(names) == len(set(names))
    assert names[-1] == "reference"
    assert set(names) <= set(_backends.ORDER)


def test_availability_gives_a_reason_or_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backends, "_C", None)
    assert _backends.have_cpu("cpu") == "vicinal was built without a C++ compiler"
    assert _backends.have_cuda("cuda") == "vicinal was built without nvcc"
    monkeypatch.setattr(_backends.importlib.util, "find_spec", lambda name: None)
    assert _backends.have_triton("cuda") == "triton is not installed"
    monkeypatch.undo()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if _backends.importlib.util.find_spec("triton"):
        assert "TRITON_INTERPRET=1" in _backends.have_triton("cpu")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        assert _backends.have_triton("cpu") == ""
