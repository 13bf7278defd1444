"""The parts of the demo that no other test covers: its two trainings agree, and its picture is drawn."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

DEMO = Path(__file__).resolve().parents[1] / "examples" / "demo.py"


@pytest.fixture
def demo() -> ModuleType:
    pytest.importorskip("sklearn", reason="the demo needs scikit-learn")
    pytest.importorskip("matplotlib", reason="the demo needs matplotlib")
    spec = importlib.util.spec_from_file_location("demo", DEMO)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_demo(demo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "EPOCHS", 1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    curves = {
        name: demo.train_digits(name == "accelerated", "cpu")[0] for name in ("reference", "accelerated")
    }
    pairs = list(zip(curves["reference"], curves["accelerated"], strict=True))
    assert len(pairs) > 10
    assert curves["reference"][-1] < curves["reference"][0]
    # Losses are about 2, where float32 has steps of 2.4e-7; each optimiser step carries rounding on.
    assert max(abs(a - b) for a, b in pairs) < 1e-3
    picture = tmp_path / "demo.png"
    demo.draw(picture, demo.load_photographs(), curves)
    assert picture.stat().st_size > 10_000
