"""Build of vicinal: packages from python/ and kernels/, native code in csrc/ compiled into vicinal._C.

The native code includes no torch header, so neither torch nor CUDA is a build requirement. Environment:

VICINAL_REQUIRE_NATIVE=1  fail where the compiler or nvcc is missing, instead of leaving that code out
VICINAL_NATIVE=0          leave all native code out
VICINAL_CUDA=0            leave the CUDA kernels out
VICINAL_CPU_ISAS          e.g. "avx512": the instruction sets to compile for besides the portable one
VICINAL_CUDA_ARCHS        e.g. "80;90a": the GPU architectures to compile for
CXX, CXXFLAGS, MAX_JOBS   as everywhere
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
VERSION = (ROOT / "python/vicinal/_version.py").read_text().split('"')[1]

# No -ffast-math: a library linked with it makes the whole process flush denormals.
CXX_FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
CXX_FLAGS += ["-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
X86_ISAS = {"avx2": AVX2, "avx512": AVX512, "avx512bf16": [*AVX512, "-mavx512bf16"]}
CUDA_ARCHS = "80;90a;100a"


def enabled(name: str) -> bool:
    return os.environ.get(name, "") not in ("", "0")


def missing(what: str, consequence: str) -> None:
    if enabled("VICINAL_REQUIRE_NATIVE"):
        raise SystemExit(f"vicinal: {what}, and VICINAL_REQUIRE_NATIVE=1 asks for all native code")
    print(f"vicinal: WARNING: {what}: {consequence}", file=sys.stderr)


def runs(command: list[str], stdin: str = "") -> bool:
    try:
        return subprocess.run(command, input=stdin, text=True, capture_output=True).returncode == 0
    except OSError:
        return False


def write_if_changed(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


@dataclass(frozen=True)
class Toolchain:
    """What was found on this machine and how the sources are compiled with it."""

    cxx: list[str]
    cxx_flags: list[str]
    openmp: bool
    isas: dict[str, list[str]]
    nvcc: list[str]
    cuda_archs: list[str]


def find_cxx() -> list[str]:
    """The first C++ compiler that links a shared library, or an empty list."""
    if os.environ.get("VICINAL_NATIVE") == "0":
        return []
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    for candidate in map(shlex.split, candidates):
        if shutil.which(candidate[0]) and links(candidate):
            return candidate
    missing(f"no working C++ compiler ({', '.join(candidates)})", "the cpu and cuda backends are left out")
    return []


def links(cxx: list[str], *flags: str) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        output = str(Path(folder) / "probe.so")
        return runs(
            [*cxx, "-shared", "-fPIC", *flags, "-x", "c++", "-", "-o", output], "int probe() { return 1; }"
        )


def find_isas(cxx: list[str]) -> dict[str, list[str]]:
    """Flags by instruction set, the portable one first (the order matters, see `link`)."""
    isas: dict[str, list[str]] = {"portable": []}
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return isas
    wanted = re.split(r"[;,\s]+", os.environ.get("VICINAL_CPU_ISAS") or ";".join(X86_ISAS))
    if unknown := set(wanted) - {*X86_ISAS, "portable"}:
        raise SystemExit(f"vicinal: VICINAL_CPU_ISAS names {sorted(unknown)}; there are {list(X86_ISAS)}")
    for isa, flags in X86_ISAS.items():
        if isa not in wanted:
            continue
        if runs([*cxx, *flags, "-E", "-x", "c++", "-"]):
            isas[isa] = flags
        else:
            missing(f"{cxx[0]} does not know {flags[-1]}", f"no {isa} code is compiled")
    return isas


def find_nvcc(cxx: list[str]) -> tuple[list[str], list[str]]:
    """nvcc with its host compiler, and the GPU architectures to compile for; both empty without CUDA."""
    if os.environ.get("VICINAL_CUDA") == "0" or not list(ROOT.glob("csrc/cuda/*.cu")):
        return [], []
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    places = [shutil.which("nvcc"), *(shutil.which("nvcc", path=f"{home}/bin") for home in homes if home)]
    nvcc = next(([place] for place in places if place), [])
    if not nvcc:
        missing("no nvcc", "the cuda backend is left out")
        return [], []
    if os.environ.get("CXX"):
        nvcc += ["-ccbin", cxx[0]]
    if not runs([*nvcc, "-E", "-x", "cu", "-"]):
        missing(f"{nvcc[0]} does not work with the host compiler", "the cuda backend is left out")
        return [], []
    listed = subprocess.run([nvcc[0], "--list-gpu-arch"], text=True, capture_output=True).stdout.split()
    archs = []
    for arch in re.split(r"[;,\s]+", os.environ.get("VICINAL_CUDA_ARCHS") or CUDA_ARCHS):
        if f"compute_{arch.rstrip('af')}" in listed:
            archs.append(arch)
        else:
            missing(f"{nvcc[0]} does not know sm_{arch}", "no code is compiled for it")
    return (nvcc, archs) if archs else ([], [])


def find_toolchain() -> Toolchain | None:
    cxx = find_cxx()
    if not cxx:
        return None
    openmp = links(cxx, "-fopenmp")
    if not openmp:
        missing(f"{cxx[0]} has no OpenMP", "the cpu backend runs on one thread")
    flags = CXX_FLAGS + ["-fopenmp"] * openmp + shlex.split(os.environ.get("CXXFLAGS", ""))
    nvcc, archs = find_nvcc(cxx)
    return Toolchain(cxx, flags, openmp, find_isas(cxx), nvcc, archs)


def gencode(archs: list[str]) -> list[str]:
    """Machine code for each architecture, and PTX of the first one for GPUs newer than all of them."""
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return [*flags, f"-gencode=arch=compute_{archs[0]},code=compute_{archs[0]}"]


def config_header(tools: Toolchain) -> str:
    """vicinal_config.h: what module.cpp and csrc/cpu/dispatch*.cpp have to know about the build."""
    version = subprocess.run([*tools.cxx, "--version"], text=True, capture_output=True).stdout.splitlines()[0]
    defines = {
        "VICINAL_FOR_EACH_ISA(X)": " ".join(f"X({isa})" for isa in tools.isas),
        "VICINAL_VERSION": json.dumps(VERSION),
        "VICINAL_COMPILER": json.dumps(version),
        "VICINAL_CXX_FLAGS": json.dumps(shlex.join(tools.cxx_flags)),
        "VICINAL_CUDA_ARCHS": json.dumps(" ".join(tools.cuda_archs)),
    }
    return "#pragma once\n" + "".join(f"#define {name} {value}\n" for name, value in defines.items())


@dataclass(frozen=True)
class Object:
    """One edge of build.ninja: a source compiled with one set of flags."""

    rule: str
    source: Path
    flags: list[str]
    suffix: str = ""

    @property
    def name(self) -> str:
        stem = self.source.relative_to(ROOT / "csrc").with_suffix("").as_posix()
        return stem.replace("/", ".") + self.suffix + ".o"


def objects(tools: Toolchain, folder: Path) -> list[Object]:
    """All objects in link order.

    Portable code comes before the instruction sets: of an inline function that several objects contain (from
    std::, say) the linker keeps the first definition, which has to be one that every machine can run.
    """
    import pybind11

    common = [*tools.cxx_flags, f"-I{ROOT / 'csrc'}", f"-I{folder}"]
    generic = [*common, f"-DVICINAL_WITH_CUDA={int(bool(tools.nvcc))}"]
    python = [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_paths()["include"])]
    found = [Object("cxx", source, [*generic, *python]) for source in sorted(ROOT.glob("csrc/*.cpp"))]
    cpu = sorted(ROOT.glob("csrc/cpu/*.cpp"))
    found += [Object("cxx", source, generic) for source in cpu if source.name.startswith("dispatch")]
    for isa, flags in tools.isas.items():
        for source in cpu:
            if not source.name.startswith("dispatch"):
                found.append(Object("cxx", source, [*common, *flags, f"-DVICINAL_ISA={isa}"], f".{isa}"))
    if tools.nvcc:
        host = "-fPIC,-fvisibility=hidden,-Wall" + ",-fopenmp" * tools.openmp
        flags = ["-O3", "-std=c++17", "-Xcompiler", host, *gencode(tools.cuda_archs), *common[-2:]]
        found += [Object("nvcc", source, flags) for source in sorted(ROOT.glob("csrc/cuda/*.cu"))]
    return found


def write_ninja(tools: Toolchain, folder: Path) -> None:
    """Write build.ninja, which makes _C.so in its folder."""
    ninja_syntax: Any = importlib.import_module("ninja.ninja_syntax")  # annotated wrongly upstream
    write_if_changed(folder / "vicinal_config.h", config_header(tools))
    with open(folder / "build.ninja.new", "w") as text:
        ninja = ninja_syntax.Writer(text, width=110)
        compilers = {"cxx": tools.cxx} | ({"nvcc": tools.nvcc} if tools.nvcc else {})
        for rule, program in compilers.items():
            command = f"{shlex.join(program)} -MMD -MF $out.d $flags -c $in -o $out"
            ninja.rule(rule, command, f"{rule} $out", "$out.d", deps="gcc")
        if tools.nvcc:
            # nvcc knows where its own libraries lie; its path, often a wrapper's, does not tell.
            link = [*tools.nvcc, "-shared", "-cudart", "static", "-Xlinker", "--exclude-libs=ALL"]
            link += ["-Xcompiler", "-fopenmp"] if tools.openmp else []
        else:
            link = [*tools.cxx, "-shared", *(["-fopenmp"] if tools.openmp else [])]
        ninja.rule("link", f"{shlex.join(link)} $in -o $out", "link $out")
        found = objects(tools, folder)
        for item in found:
            source = ninja_syntax.escape_path(str(item.source))
            ninja.build([item.name], item.rule, [source], variables={"flags": shlex.join(item.flags)})
        ninja.build(["_C.so"], "link", [item.name for item in found])
    (folder / "build.ninja.new").replace(folder / "build.ninja")


class BuildWithNinja(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import ninja

        folder = ROOT / "build" / f"native-{sys.version_info.major}.{sys.version_info.minor}"
        folder.mkdir(parents=True, exist_ok=True)
        assert TOOLS is not None, "without a compiler there is no extension to build"
        write_ninja(TOOLS, folder)
        jobs = min(os.cpu_count() or 1, int(os.environ.get("MAX_JOBS") or 256))
        # An isolated build environment may have the ninja module's program off the PATH.
        program = shutil.which("ninja") or str(Path(ninja.BIN_DIR) / "ninja")
        if subprocess.run([program, "-C", str(folder), f"-j{jobs}"]).returncode:
            raise SystemExit("vicinal: the native code did not compile; VICINAL_NATIVE=0 installs without it")
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(folder / "_C.so"), str(target))


COMPILING = {"build", "build_ext", "bdist_wheel", "editable_wheel", "install", "develop"} & set(sys.argv)
TOOLS = find_toolchain() if COMPILING else None

setup(
    version=VERSION,
    package_dir={"": "python", "vicinal.kernels": "kernels/vicinal_triton"},
    packages=[
        *find_packages("python"),
        "vicinal.kernels",
        *(f"vicinal.kernels.{name}" for name in find_packages("kernels/vicinal_triton")),
    ],
    package_data={"vicinal": ["py.typed", "*.pyi"]},
    include_package_data=False,
    ext_modules=[Extension("vicinal._C", sources=["csrc/module.cpp"])] if TOOLS else [],
    cmdclass={"build_ext": BuildWithNinja},
)
