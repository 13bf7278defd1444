"""Runs the parts that need a GPU, each in less than ten minutes, and writes JSON and a summary.

    python -m benchmarks.gpu build          # the package, for this GPU, from the working tree
    python -m benchmarks.gpu tests          # tests on the device, and the primitives against their emulation
    python -m benchmarks.gpu tests-rest     # what "tests" leaves out
    python -m benchmarks.gpu sanitize       # compute-sanitizer: memcheck racecheck synccheck initcheck
    python -m benchmarks.gpu tiles          # tiles of Triton's kernels and of plans, checked and timed
    python -m benchmarks.gpu bench          # neighborhoods against PyTorch
    python -m benchmarks.gpu bench-windows  # windows against PyTorch

A part builds first where nothing is built. `--only NAME` and `--after NAME` choose among the cases of tiles
and bench, which stop before `--minutes` are over and name the case to go on after. Results go to --out,
$OUT or gpu-results.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("build", "tests", "tests-rest", "sanitize", "tiles", "bench", "bench-windows")
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
TESTS = {
    "tests": [
        "tests/test_neighborhood_backends.py", "tests/test_windowed_backends.py", "tests/test_backends.py",
        "tests/cuda_host/test_emulator.py::test_primitives_on_a_gpu", "tests/cuda_host/test_budgets.py",
        "tests/cuda_host/test_binding.py",
    ],
    "tests-rest": ["tests", "--deselect=tests/test_neighborhood_backends.py",
                   "--deselect=tests/test_windowed_backends.py", "--deselect=tests/test_backends.py",
                   "--ignore=tests/cuda_host", "--ignore=tests/test_build.py",
                   "--ignore=tests/test_packaging.py"],
}  # fmt: skip


def tail(text: str, lines: int = 40) -> list[str]:
    return text.strip().splitlines()[-lines:]


def command(words: list[str], log: Path, minutes: float, **env: str) -> dict[str, Any]:
    """Runs it with its output in `log`; how it ended, how long it took, its last lines."""
    begin = time.monotonic()
    with log.open("w") as file:
        try:
            given = {"cwd": ROOT, "stdout": file, "stderr": subprocess.STDOUT, "env": {**os.environ, **env}}
            code = subprocess.run(words, timeout=60 * minutes, **given).returncode  # type: ignore[call-overload]
        except subprocess.TimeoutExpired:
            code = 124
    seconds = round(time.monotonic() - begin, 1)
    print(f"{' '.join(words[:8])} ..: exit status {code} after {seconds} s", flush=True)
    return {"command": words, "status": code, "seconds": seconds, "tail": tail(log.read_text())}


def built() -> bool:
    check = "from vicinal import _backends; assert _backends._C.build_info()['with_cuda']"
    return subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True).returncode == 0


def build(out: Path, minutes: float) -> dict[str, Any]:
    words = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-index",
        "--no-build-isolation",
        "--no-deps",
        "-e",
        ".",
    ]
    archs = subprocess.run(
        ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"], capture_output=True, text=True
    ).stdout.split()
    arch = archs[0].replace(".", "") if archs else "90"
    arch += "a" if int(arch) >= 90 else ""
    env = {"VICINAL_REQUIRE_NATIVE": "1", "VICINAL_CUDA_ARCHS": arch, "MAX_JOBS": str(os.cpu_count() or 2)}
    return command(words, out / "build.log", minutes, **env)


def tests(part: str, out: Path, minutes: float) -> dict[str, Any]:
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", "-n", "8"]
    words += ["-o", "addopts=", f"--junitxml={out / part}.xml", *TESTS[part]]
    return command(words, out / f"{part}.log", minutes, OMP_NUM_THREADS="1")


def sanitize(out: Path, minutes: float) -> dict[str, Any]:
    """Every tool on small shapes; no caching allocator, so that memcheck knows each tensor's end."""
    results = {}
    for tool in TOOLS:
        words = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--print-limit", "20"]
        words += [sys.executable, "-m", "benchmarks.gpu.small"]
        env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        results[tool] = command(words, out / f"{tool}.log", minutes / len(TOOLS), **env)
    status = max(r["status"] for r in results.values())
    return {"status": status, "tools": results}


def cases(part: str, args: argparse.Namespace) -> dict[str, Any]:
    module = {"tiles": "benchmarks.gpu.sweep", "bench": "benchmarks.gpu.bench"}[part]
    words = [sys.executable, "-m", module, "--json", str(args.out / f"{part}.json")]
    words += ["--minutes", str(args.minutes - 0.5), *(["--only", *args.only] if args.only else [])]
    words += ["--after", args.after] if args.after else []
    return command(words, args.out / f"{part}.log", args.minutes)


def windows(out: Path, minutes: float) -> dict[str, Any]:
    results = {}
    for backend in ("cuda", "triton"):
        words = [sys.executable, "-m", "benchmarks", "windowed", "--device", "cuda", "--backend", backend]
        words += ["--dtype", "bfloat16", "--seconds", "1", "--json", str(out / f"windows-{backend}.json")]
        results[backend] = command(words, out / f"windows-{backend}.log", minutes / 2)
    return {"status": max(r["status"] for r in results.values()), "backends": results}


def run(part: str, args: argparse.Namespace) -> dict[str, Any]:
    if part == "build" or not built():
        done = build(args.out, args.minutes)
        if part == "build" or done["status"]:
            return done
    if part in TESTS:
        return tests(part, args.out, args.minutes)
    if part == "sanitize":
        return sanitize(args.out, args.minutes)
    return windows(args.out, args.minutes) if part == "bench-windows" else cases(part, args)


def summary(results: dict[str, Any]) -> str:
    lines = []
    for part, result in results.items():
        lines.append(f"{part}: {'done' if result['status'] == 0 else 'status ' + str(result['status'])}")
        for part_of in (result, *result.get("tools", {}).values(), *result.get("backends", {}).values()):
            lines += [f"    {line}" for line in part_of.get("tail", [])]
    return "\n".join(lines) + "\n"


def main() -> None:
    p = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    p.add_argument("parts", nargs="*", metavar="PART", choices=PARTS, help=f"of {', '.join(PARTS)}")
    p.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "gpu-results")))
    p.add_argument("--minutes", type=float, default=9.0, help="of a part, at most")
    p.add_argument("--only", nargs="+", metavar="NAME", help="cases whose name has one of these parts")
    p.add_argument("--after", metavar="NAME", help="cases from the one behind NAME on")
    args = p.parse_args()
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    results = {}
    for part in args.parts or PARTS:
        results[part] = run(part, args)
        (args.out / "gpu.json").write_text(json.dumps(results, indent=1))
        (args.out / "summary.txt").write_text(summary(results))
    print(summary(results))
    sys.exit(max(r["status"] != 0 for r in results.values()))


if __name__ == "__main__":
    main()
