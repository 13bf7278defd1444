"""What this installation is and can do: `python -m vicinal.info` for people, with `--json` for programs."""

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

from vicinal import _backends
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
        "backends": backends(),
    }


def installed_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def bundled_ptxas() -> str | None:
    """The version of the PTX assembler that Triton ships; it bounds the GPUs that its kernels serve."""
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
    return dict(module.build_info()) | {"isa": module.isa()}


def devices() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{"name": "cpu", "model": cpu_model(), "threads": torch.get_num_threads()}]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        arch = f"sm_{properties.major}{properties.minor}"
        found.append({"name": f"cuda:{index}", "model": properties.name, "arch": arch})
    return found


def backends() -> list[dict[str, Any]]:
    """The capability rows; `here` says, by kind of device in this machine, "ready" or why not."""
    present = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    found = []
    for row in _backends.rows():
        served = [device for device in present if {device, "any"} & set(row.devices)]
        facts = {
            "family": row.family,
            "backend": row.backend,
            "devices": list(row.devices),
            "dtypes": [str(dtype).removeprefix("torch.") for dtype in row.dtypes],
            "max_head_dim": row.max_head_dim,
            "min_arch": row.min_arch,
            "missing": sorted(row.missing),
            "here": {device: row.available(device) or "ready" for device in served},
        }
        found.append(facts)
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
        if name == "backends":
            lines += [name, *(f"  {line}" for row in value for line in backend_lines(row))]
        elif isinstance(value, dict):
            lines += [name, *(f"  {key:<14}{words(entry)}" for key, entry in value.items())]
        elif isinstance(value, list):
            lines += [name, *(f"  {words(entry)}" for entry in value)]
        else:
            lines.append(f"{name:<16}{words(value)}")
    if facts["native"] is None:
        lines.append(
            "No native code, so no cpu and cuda backends: install with a C++17 compiler to have them."
        )
    return "\n".join(lines)


def backend_lines(row: dict[str, Any]) -> list[str]:
    limits = [f"head_dim <= {row['max_head_dim']}"] if row["max_head_dim"] else []
    limits += [f"GPUs from sm_{row['min_arch']}"] if row["min_arch"] else []
    limits += [f"not {name}" for name in row["missing"]]
    head = f"{row['family']:<14}{row['backend']:<11}{' '.join(row['dtypes'])}"
    here = [f"  on {device}: {state}" for device, state in row["here"].items()]
    return [", ".join([head, *limits]), *(here or [f"  no {' or '.join(row['devices'])} device here"])]


def capability_table() -> str:
    """The capability rows as a Markdown table, in order of preference and then of families' names, whatever
    was imported first; docs/backends.md holds it."""
    lines = [
        "| family | backend | devices | dtypes | head_dim | GPU from | missing |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in sorted(_backends.rows(), key=lambda row: (_backends.ORDER.index(row.backend), row.family)):
        dtypes = " ".join(str(dtype).removeprefix("torch.") for dtype in row.dtypes)
        head_dim = f"<= {row.max_head_dim}" if row.max_head_dim else "any"
        arch = f"sm_{row.min_arch}" if row.min_arch else "-"
        missing = " ".join(sorted(row.missing)) or "-"
        cells = (row.family, f"`{row.backend}`", " ".join(row.devices), dtypes, head_dim, arch, missing)
        lines.append(f"| {' | '.join(cells)} |")
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
    parser.add_argument("--table", action="store_true", help="print the backends' capabilities as Markdown")
    arguments = parser.parse_args()
    if arguments.table:
        print(capability_table())
        return
    facts = info()
    print(json.dumps(facts, indent=2) if arguments.json else render(facts))


if __name__ == "__main__":
    main()
