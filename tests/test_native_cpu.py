"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer: tests/native/attend_cpu.cpp."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
KERNELS = [*ROOT.glob("csrc/cpu/attend*.cpp"), *ROOT.glob("csrc/cpu/gemm*.cpp")]
SOURCES = [*(str(path.relative_to(ROOT)) for path in sorted(KERNELS)), "tests/native/attend_cpu.cpp"]
FLAGS = [
    "-std=c++17",
    "-O1",
    "-g1",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
ISA_FLAGS = {"portable": [], "avx2": AVX2, "avx512": AVX512, "avx512bf16": [*AVX512, "-mavx512bf16"]}


def best_isa() -> str:
    native = pytest.importorskip("vicinal._C", reason="the native module is not built")
    return [isa for isa in native.available_isas() if isa in ISA_FLAGS][-1]


def build(folder: Path, isa: str) -> Path:
    """Compile the sources of one instruction set side by side and link the driver."""
    cxx = shutil.which(os.environ.get("CXX", "g++"))
    if cxx is None:
        pytest.skip("no C++ compiler")
    flags = [*FLAGS, *SANITIZERS, *ISA_FLAGS[isa], f"-DVICINAL_ISA={isa}", f"-I{ROOT / 'csrc'}"]
    objects = [folder / (Path(source).stem + f".{i}.o") for i, source in enumerate(SOURCES)]
    jobs = [
        subprocess.Popen([cxx, *flags, "-c", str(ROOT / source), "-o", str(target)])
        for source, target in zip(SOURCES, objects, strict=True)
    ]
    assert [job.wait() for job in jobs] == [0] * len(jobs)
    driver = folder / "attend_cpu"
    subprocess.run([cxx, *FLAGS, *SANITIZERS, *map(str, objects), "-o", str(driver)], check=True)
    return driver


def test_sanitized_kernels_match_plain_loops(tmp_path: Path) -> None:
    driver = build(tmp_path, best_isa())
    run = subprocess.run([str(driver), "25"], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "25 problems in 4 dtypes, 0 failures" in run.stdout
