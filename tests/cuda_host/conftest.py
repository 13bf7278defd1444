"""Builds of CUDA sources for a CPU with csrc/cuda/on_host, kept in build/cuda_host by hash."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CSRC, BUILD = ROOT / "csrc", ROOT / "build/cuda_host"
FLAVORS = {
    "plain": ["-O2"],
    "asan": ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "tsan": ["-O1", "-g1", "-fsanitize=thread"],
}
EMULATOR = [CSRC / "cuda/on_host" / f"{name}.cpp" for name in ("collectives", "cuda_on_host", "fibers")]


def nvcc() -> list[str]:
    found = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if not found:
        pytest.skip("no nvcc: the CUDA headers come with it")
    return [found]


@functools.cache
def cuda_includes() -> list[str]:
    """-isystem flags of the toolkit's headers as nvcc itself names them (nvcc on PATH may be a wrapper)."""
    command = [*nvcc(), "--dryrun", "-E", "-x", "cu", os.devnull]
    text = subprocess.run(command, capture_output=True, text=True).stderr
    flags: list[str] = []
    for line in text.splitlines():
        if line.startswith(("#$ INCLUDES=", "#$ SYSTEM_INCLUDES=")):
            words = line.split("=", 1)[1].replace('"', " ").split()
            flags += [word[2:] if word.startswith("-I") else word for word in words if word != "-isystem"]
    return [part for folder in flags for part in ("-isystem", folder)]


@functools.cache
def sources_digest() -> bytes:
    digest = hashlib.sha256()
    for path in sorted([*CSRC.rglob("*.h"), *CSRC.rglob("*.cuh"), *HERE.glob("*.h")]):
        digest.update(path.read_bytes())
    return digest.digest()


@contextmanager
def once(path: Path) -> Iterator[bool]:
    """True for the one process that has to make `path`, after which it exists."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield not path.exists()


def run(command: list[str], output: Path) -> None:
    done = subprocess.run([*command, "-o", f"{output}.new"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    os.replace(f"{output}.new", output)


def compiled(source: Path, flags: list[str]) -> Path:
    """The object of a source, made if it is not in build/cuda_host."""
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("the emulator switches stacks on x86-64 only")
    if not shutil.which("g++"):
        pytest.skip("no g++")
    command = ["g++", "-std=c++20", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas", *flags]
    command += [f"-I{CSRC}", *cuda_includes(), "-x", "c++", "-c", str(source)]
    digest = hashlib.sha256(repr(command).encode() + sources_digest() + source.read_bytes()).hexdigest()
    output = BUILD / f"{source.stem}-{digest[:16]}.o"
    with once(output) as needed:
        if needed:
            run(command, output)
    return output


class HostBuild(Protocol):
    def __call__(self, sources: list[Path], flavor: str, shared: bool = False) -> Path: ...


@pytest.fixture(scope="session")
def host_build() -> HostBuild:
    """build(sources, flavor, shared): a program or library of CUDA sources, with the emulator."""

    @functools.cache
    def build(names: tuple[Path, ...], flavor: str, shared: bool) -> Path:
        jobs = [(source, FLAVORS[flavor]) for source in names] + [(source, ["-O2"]) for source in EMULATOR]
        with ThreadPoolExecutor(2) as pool:
            objects = [str(path) for path in pool.map(lambda job: compiled(*job), jobs)]
        digest = hashlib.sha256(repr((objects, flavor, shared)).encode()).hexdigest()
        output = BUILD / f"{names[0].stem}-{flavor}-{digest[:16]}{'.so' if shared else ''}"
        with once(output) as needed:
            if needed:
                run(["g++", *FLAVORS[flavor], *(["-shared"] if shared else []), *objects], output)
        return output

    return lambda sources, flavor, shared=False: build(tuple(sources), flavor, shared)


def run_program(program: Path, *args: str, flavor: str) -> subprocess.CompletedProcess[str]:
    """Runs a host build; the race detector needs memory addresses that are not randomised."""
    command = [str(program), *args]
    if flavor == "tsan":
        if subprocess.run(["setarch", "-R", "true"], capture_output=True).returncode:
            pytest.skip("setarch -R is not permitted here: ThreadSanitizer cannot run")
        command = ["setarch", "-R", *command]
    env = os.environ | {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
