"""What this installation is and can do: `python -m vicinal.info`, for people and bug reports; `--json` for
programs."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from vicinal._version import __version__


def info() -> dict[str, Any]:
    """Versions, how the native code was built, devices, and what each backend can do; JSON types only."""
    return {
        "vicinal": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "triton": installed_version("triton"),
        "ptxas": bundled_ptxas(),
        "native": native(),
        "devices": devices(),
    }


def installed_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def bundled_ptxas() -> str | None:
    """The version of the PTX assembler that Triton ships: it bounds the GPUs that Triton's kernels can
    serve."""
    try:
        package = importlib.import_module("triton.backends.nvidia")
        program = Path(str(package.__file__)).parent / "bin" / "ptxas"
        text = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    except (ImportError, OSError, subprocess.CalledProcessError):
        return None
    version = re.search(r"release (\S+?),", text)
    return version[1] if version else None


def native() -> dict[str, Any] | None:
    """How vicinal._C was compiled, or None where the package was installed without native code."""
    try:
        module = importlib.import_module("vicinal._C")
    except ModuleNotFoundError:
        return None
    return dict(module.build_info())


def devices() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{"name": "cpu", "model": cpu_model(), "threads": torch.get_num_threads()}]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        arch = f"sm_{properties.major}{properties.minor}"
        found.append({"name": f"cuda:{index}", "model": properties.name, "arch": arch})
    return found


def cpu_model() -> str:
    try:
        model = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        model = None
    return model[1] if model else platform.processor() or platform.machine()


def render(facts: dict[str, Any]) -> str:
    """The same facts as lines for people."""
    lines = []
    for name, value in facts.items():
        if isinstance(value, dict):
            lines += [name, *(f"  {key:<14}{words(entry)}" for key, entry in value.items())]
        elif isinstance(value, list):
            lines += [name, *(f"  {words(entry)}" for entry in value)]
        else:
            lines.append(f"{name:<16}{words(value)}")
    if facts["native"] is None:
        lines.append(
            "No native code: the cpu and cuda backends are absent. "
            "Install with a C++17 compiler to have them."
        )
    return "\n".join(lines)


def words(value: Any) -> str:
    if isinstance(value, dict):
        return "  ".join(f"{key}={words(entry)}" for key, entry in value.items())
    if isinstance(value, list):
        return " ".join(map(words, value)) or "none"
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m vicinal.info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    facts = info()
    print(json.dumps(facts, indent=2) if parser.parse_args().json else render(facts))


if __name__ == "__main__":
    main()
