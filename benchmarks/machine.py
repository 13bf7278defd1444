"""What a result has to say about where it was made: the machine but not its name, versions, the commit."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from vicinal import info

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def cpu_facts() -> dict[str, str]:
    """Fields of the first processor of /proc/cpuinfo; empty where there is none."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine_name(device: str) -> str:
    """A folder name from the processor's or GPU's model, such as `amd-epyc-family-26-model-2-2-cores`."""
    if device != "cpu":
        text = torch.cuda.get_device_name()
    else:
        facts = cpu_facts()
        text = info.cpu_model()
        if "cpu family" in facts and not re.search(r"\d{4}", text):  # virtual machines may hide it
            text += f" family {facts['cpu family']} model {facts['model']}"
        text += f" {cores()} cores"
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((R|TM)\)", "", text).lower()).strip("-")


def machine_info(device: str) -> dict[str, Any]:
    """pytest-benchmark's machine_info, without host name and paths."""
    facts, native = cpu_facts(), info.native()
    return {
        "name": machine_name(device),
        "processor": platform.processor(),
        "machine": platform.machine(),
        "python_compiler": platform.python_compiler(),
        "python_implementation": platform.python_implementation(),
        "python_version": platform.python_version(),
        "system": platform.system(),
        "cpu": {
            "brand_raw": info.cpu_model(),
            "family": facts.get("cpu family", ""),
            "model": facts.get("model", ""),
            "cores": cores(),
            "isa": isa(),
        },
        "gpu": torch.cuda.get_device_name() if device != "cpu" else None,
        "torch": torch.__version__,
        "triton": info.installed_version("triton"),
        "compiler": None if native is None else native["compiler"],
    }


def isa() -> str | None:
    """The instruction set that the CPU kernels use."""
    try:
        from vicinal import _C
    except ImportError:
        return None
    return str(_C.isa())


def git(*arguments: str) -> str:
    try:
        result = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return result.stdout.strip()


def commit_info() -> dict[str, Any]:
    """pytest-benchmark's commit_info; `dirty` looks at what the package is made of."""
    changed = git("status", "--porcelain", "--", "csrc", "python", "kernels", "setup.py")
    return {
        "id": git("rev-parse", "HEAD") or None,
        "time": git("log", "-1", "--format=%cI") or None,
        "dirty": bool(changed),
        "project": "vicinal",
        "branch": "",
    }
