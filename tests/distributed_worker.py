"""One process of the tests of vicinal.distributed: runs every case and writes what differs to a file.

Each case computes the whole on its own and compares its part of the outputs and gradients.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import distributed_cases
import distributed_frameworks
import torch
import torch.distributed as dist

CASES: dict[str, Callable[[], None]] = {
    name.removeprefix("case_"): case
    for module in (distributed_cases, distributed_frameworks)
    for name, case in vars(module).items()
    if name.startswith("case_")
}


def main(rank: int, ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=60))
    failures = {}
    for name, case in CASES.items():
        try:
            case()
            failures[name] = ""
        except Exception:  # a rank that stops would leave the others waiting
            failures[name] = traceback.format_exc()
        dist.barrier()
    (folder / f"rank{rank}.json").write_text(json.dumps(failures))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
