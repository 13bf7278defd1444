"""The package as it is shipped: what sdist and wheels contain, builds without a compiler, vicinal.info."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import vicinal
from vicinal import info

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("csrc", "kernels", "python", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the sources, since a build leaves files beside them."""
    target = tmp_path / "checkout"
    target.mkdir()
    outputs = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.so")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, ignore=outputs)
        else:
            shutil.copy(ROOT / name, target / name)
    return target


def build(checkout: Path, hook: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a PEP 517 hook, which leaves its result in checkout/made, in a Python that cannot import torch."""
    blocked = checkout.parent / "blocked"
    blocked.mkdir(exist_ok=True)
    (blocked / "torch.py").write_text("raise ImportError('the build must not need torch')\n")
    command = [sys.executable, "-c", BUILD, hook, "made"]
    variables = {key: value for key, value in os.environ.items() if not key.startswith("VICINAL_")}
    # setuptools itself comes from this environment's path; the blocking folder is searched before it.
    variables |= {"PYTHONPATH": str(blocked)} | environment
    return subprocess.run(command, cwd=checkout, env=variables, capture_output=True, text=True)


def files(folder: Path) -> set[str]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder.parent).as_posix() for path in paths}


def test_sdist_contains_every_source(checkout: Path) -> None:
    expected = files(checkout / "csrc") | files(checkout / "kernels") | files(checkout / "python")
    result = build(checkout, "build_sdist")
    assert result.returncode == 0, result.stderr
    (archive,) = (checkout / "made").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    assert len(expected) > 10
    assert expected <= names


def test_build_requires_neither_torch_nor_cuda() -> None:
    requires = re.search(r"^requires = (\[.*\])$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert requires is not None
    assert {re.split("[<>=]", name)[0] for name in json.loads(requires[1])} == {
        "setuptools",
        "pybind11",
        "ninja",
    }
    for source in (ROOT / "csrc").rglob("*.[ch]*"):
        assert not re.search(r"#include\s*<(torch|ATen|c10)/", source.read_text()), source


def test_without_a_compiler_the_wheel_is_pure_and_warns(checkout: Path) -> None:
    result = build(checkout, "build_wheel", CXX="/nonexistent/c++", PATH="/nonexistent")
    assert result.returncode == 0, result.stderr
    assert "WARNING: no working C++ compiler" in result.stderr
    (wheel,) = (checkout / "made").glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert not [name for name in names if name.endswith(".so")]
    assert {"vicinal/py.typed", "vicinal/_C.pyi", "vicinal/kernels/__init__.py"} <= set(names)
    assert not [name for name in names if name.split("/")[0] not in ("vicinal", wheel_metadata(wheel))]


def wheel_metadata(wheel: Path) -> str:
    return "-".join(wheel.name.split("-")[:2]) + ".dist-info"


def test_required_native_code_fails_without_a_compiler(checkout: Path) -> None:
    result = build(checkout, "build_wheel", CXX="/nonexistent/c++", VICINAL_REQUIRE_NATIVE="1")
    assert result.returncode != 0
    assert "no working C++ compiler (/nonexistent/c++)" in result.stderr
    assert not list(checkout.glob("made/*.whl"))


def test_one_version_everywhere() -> None:
    assert importlib.metadata.version("vicinal") == vicinal.__version__
    assert info.info()["vicinal"] == vicinal.__version__
    newest = re.search(r"^## \[?(\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest[1] == vicinal.__version__
    assert f"version: {vicinal.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_each_instruction_set_is_compiled_with_its_own_flags() -> None:
    native = info.native()
    if native is None:
        pytest.skip("vicinal was installed without native code")
    assert native["version"] == vicinal.__version__
    lanes = {"portable": 4, "avx2": 8, "avx512": 16, "avx512bf16": 16}
    assert native["float_lanes"] == {isa: lanes[isa] for isa in native["isas"]}
    assert native["isas"][0] == "portable"
    assert native["isa"] in native["isas"]


def test_info_prints_one_json_object() -> None:
    command = [sys.executable, "-m", "vicinal.info", "--json"]
    facts = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert facts["vicinal"] == vicinal.__version__
    assert facts["devices"][0]["name"] == "cpu"
    assert facts["native"] == info.native()
    assert {"windowed"} <= {row["family"] for row in facts["backends"]}


def test_the_reference_is_ready_everywhere() -> None:
    rows = [row for row in info.backends() if row["backend"] == "reference"]
    assert rows
    assert all(row["here"]["cpu"] == "ready" for row in rows)


def test_info_for_people_names_every_fact() -> None:
    facts = info.info()
    text = info.render(facts)
    assert all(name in text for name in facts)
    without = info.render(facts | {"native": None, "triton": None})
    assert "No native code" in without
    assert all(row["backend"] in text for row in facts["backends"])
    assert re.search(r"^triton +none$", without, re.MULTILINE)
