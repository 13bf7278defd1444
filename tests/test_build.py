"""setup.py on a small source tree: instruction sets, incremental builds, compilers that lack something."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMPILER = shutil.which(os.environ.get("CXX", "g++"))
X86 = platform.machine() in ("x86_64", "AMD64")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")

MODULE = """
#include "vicinal_config.h"
#define DECLARE(isa) namespace vicinal::isa { int kernel(); }
VICINAL_FOR_EACH_ISA(DECLARE)
int all() {
  int sum = VICINAL_WITH_CUDA;
#define ADD(isa) sum += vicinal::isa::kernel();
  VICINAL_FOR_EACH_ISA(ADD)
  return sum;
}
"""
KERNEL = """
#include "shared.h"
namespace vicinal::VICINAL_ISA { int kernel() { return shared; } }
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The build files of this project around three sources that compile at once."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    for name, text in {
        "python/vicinal/_version.py": '__version__ = "9.9"\n',
        "python/vicinal/__init__.py": "",
        "kernels/vicinal_triton/__init__.py": "",
        "csrc/module.cpp": MODULE,
        "csrc/shared.h": "#pragma once\nconstexpr int shared = 1;\n",
        "csrc/cpu/kernel.cpp": KERNEL,
        "csrc/cpu/dispatch.cpp": "int dispatch() { return 0; }\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def build(tree: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {key: value for key, value in os.environ.items() if not key.startswith("VICINAL_")}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    return subprocess.run(command, cwd=tree, env=variables | environment, capture_output=True, text=True)


def compiled(result: subprocess.CompletedProcess[str]) -> set[str]:
    assert result.returncode == 0, result.stdout + result.stderr
    return {line.split()[-1] for line in result.stdout.splitlines() if "] cxx " in line}


def isas(tree: Path) -> list[str]:
    (header,) = tree.glob("build/native-*/vicinal_config.h")
    line = next(line for line in header.read_text().splitlines() if "FOR_EACH_ISA" in line)
    return [word[2:-1] for word in line.split()[2:]]


def test_kernels_once_per_instruction_set_and_dispatch_once(tree: Path) -> None:
    objects = compiled(build(tree))
    expected = ["portable", "avx2", "avx512", "avx512bf16"] if X86 else ["portable"]
    assert isas(tree) == expected
    assert objects == {"module.o", "cpu.dispatch.o", *(f"cpu.kernel.{isa}.o" for isa in expected)}
    assert list(tree.glob("python/vicinal/_C.*"))


def test_only_what_changed_is_compiled_again(tree: Path) -> None:
    everything = compiled(build(tree))
    assert compiled(build(tree)) == set()
    (tree / "csrc/shared.h").write_text("#pragma once\nconstexpr int shared = 2;\n")
    kernels = {name for name in everything if name.startswith("cpu.kernel.")}
    assert compiled(build(tree)) == kernels
    assert compiled(build(tree, CXXFLAGS="-DOTHER")) == everything


@pytest.mark.skipif(not X86, reason="only x86-64 has several instruction sets")
def test_an_older_compiler_leaves_an_instruction_set_out_and_says_so(tree: Path) -> None:
    older = tree / "older-g++"
    older.write_text(f'#!/bin/sh\ncase "$*" in *bf16*) exit 1;; esac\nexec {COMPILER} "$@"\n')
    older.chmod(0o755)
    result = build(tree, CXX=str(older))
    assert "cpu.kernel.avx512.o" in compiled(result)
    assert isas(tree) == ["portable", "avx2", "avx512"]
    assert f"WARNING: {older} does not know -mavx512bf16: no avx512bf16 code is compiled" in result.stderr
    required = build(tree, CXX=str(older), VICINAL_REQUIRE_NATIVE="1")
    assert required.returncode != 0
    assert "does not know -mavx512bf16" in required.stderr


def test_code_that_does_not_compile_is_an_error_not_a_pure_install(tree: Path) -> None:
    (tree / "csrc/module.cpp").write_text("this is no C++\n")
    result = build(tree)
    assert result.returncode != 0
    assert "did not compile; VICINAL_NATIVE=0 installs without it" in result.stderr
    assert not list(tree.glob("python/vicinal/_C.*"))
    assert build(tree, VICINAL_NATIVE="0").returncode == 0


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_gpu_architectures_can_be_chosen(tree: Path) -> None:
    (tree / "csrc/cuda").mkdir()
    (tree / "csrc/cuda/kernel.cu").write_text("__global__ void kernel() {}\n")
    result = build(tree, VICINAL_CUDA_ARCHS="80;12345")
    assert "WARNING" in result.stderr
    assert "does not know sm_12345" in result.stderr
    assert compiled(result)
    (ninja,) = tree.glob("build/native-*/build.ninja")
    text = ninja.read_text().replace("$\n", "")
    assert "code=sm_80" in text
    assert "code=compute_80" in text
    assert "code=sm_90a" not in text
    assert "VICINAL_WITH_CUDA=1" in text
    assert compiled(build(tree, VICINAL_CUDA="0")) >= {"module.o"}
    assert "nvcc" not in ninja.read_text()
