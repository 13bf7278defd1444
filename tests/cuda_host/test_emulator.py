"""The emulator that runs CUDA kernels on a CPU: its primitives, and bugs that it has to find."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from .conftest import CSRC, FLAVORS, HERE, HostBuild, nvcc, run_program

# bug: what the plain build, the one with address and undefined-behaviour sanitizers, and the race detector
# say under some schedule. None: nothing, because no schedule can show it there.
WRONG, RACE, POISON = "wrong result", "ThreadSanitizer: data race", "AddressSanitizer: use-after-poison"
OVERRUN = "AddressSanitizer: heap-buffer-overflow"
BUGS: dict[str, tuple[str | None, str | None, str | None]] = {
    "none": (None, None, None),
    "no_sync_after_wait": (WRONG, WRONG, RACE),
    "no_sync_before_reuse": (WRONG, WRONG, RACE),
    "swapped_fragment": (WRONG, WRONG, WRONG),
    "row_past_array": (WRONG, POISON, WRONG),
    "tail_not_zeroed": (WRONG, WRONG, WRONG),
    "wait_too_short": ("cp.async copies under way",) * 3,
    "wrong_shuffle": (WRONG, WRONG, WRONG),
    "warp_skips_sync": ("reached from two places: bugs.cpp:", "reached from two places: bugs.cpp:", RACE),
    "swizzle_differs": (WRONG, WRONG, WRONG),
    "read_past_tensor": (None, OVERRUN, None),
    "misaligned_ldmatrix": ("ldmatrix row not aligned to 16 bytes at bugs.cpp:",) * 3,
    "too_little_shared": ("shared memory: 17152 bytes taken, the launch gave 17136, at bugs.cpp:",) * 3,
    "no_swizzle": (None, None, None),
    "no_sync_warp": (WRONG, WRONG, RACE),
    "ordered_by_shuffle": (None, None, RACE),
    "foreign_row": (WRONG, WRONG, RACE),
    "misaligned_vector": (None, "misaligned address", None),
    "divergent_shuffle": ("divergent collectives in warp",) * 3,
    "lane_outside_mask": ("is outside the mask of the collective at bugs.cpp:",) * 3,
    "copies_left": ("exits with cp.async copies under way",) * 3,
    "table_unordered": (None, None, RACE),
    "entry_of_two_lanes": (None, None, RACE),
    "one_table": (None, None, RACE),
    "deadlock": ("deadlock in block (0, 0, 0); threads 0-7 in ldmatrix at bugs.cpp:",) * 3,
}


@pytest.mark.parametrize("flavor", FLAVORS)
@pytest.mark.parametrize("bug", BUGS)
def test_finds_bug(bug: str, flavor: str, host_build: HostBuild) -> None:
    program = host_build([HERE / "bugs.cpp"], flavor)
    done = run_program(program, bug, "2" if flavor == "tsan" else "5", flavor=flavor)
    said = done.stdout + done.stderr
    expected = BUGS[bug][list(FLAVORS).index(flavor)]
    if expected is None:
        assert done.returncode == 0, said
    else:
        assert done.returncode != 0, said
        assert expected in said
    conflicts = "bank conflicts: " in said and "bank conflicts: 0" not in said
    assert conflicts == (bug == "no_swizzle"), said


@pytest.mark.parametrize("flavor", FLAVORS)
def test_primitives(flavor: str, host_build: HostBuild) -> None:
    done = run_program(host_build([HERE / "primitives.cpp"], flavor), flavor=flavor)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("right") == 5


def test_primitives_on_a_gpu(tmp_path: Path) -> None:
    """The same program through nvcc: the PTX halves of the primitives give what their emulations give."""
    if not torch.cuda.is_available():
        pytest.skip("PyTorch sees no GPU")
    command = [*nvcc(), "-std=c++17", f"-I{CSRC}", "-arch=native", "-x", "cu", str(HERE / "primitives.cpp")]
    subprocess.run([*command, "-o", str(tmp_path / "primitives")], check=True)
    done = subprocess.run([tmp_path / "primitives"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
