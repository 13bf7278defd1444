"""vicinal.distributed on 2 and 4 processes of this machine: outputs and gradients as in one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import distributed_worker
import pytest
import torch
import torch.distributed as dist

from vicinal import distributed
from vicinal.distributed._exchange import route

if not dist.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)


@pytest.fixture(scope="module", params=[2, 4])
def failures(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What went wrong on each rank, by case."""
    ranks, folder = request.param, tmp_path_factory.mktemp("ranks")
    script = Path(distributed_worker.__file__)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(script.parent)}
    command = [sys.executable, str(script)]
    processes = [
        subprocess.Popen([*command, str(r), str(ranks), str(folder)], env=environment) for r in range(ranks)
    ]
    for process in processes:
        process.wait(timeout=300)
    found = [json.loads((folder / f"rank{r}.json").read_text()) for r in range(ranks)]
    return {
        name: "".join(f"rank {r}: {f[name]}" for r, f in enumerate(found) if f[name]) for name in found[0]
    }


@pytest.mark.parametrize("name", distributed_worker.CASES)
def test_equals_one_process(failures: dict[str, str], name: str) -> None:
    assert not failures[name], failures[name]


def test_needs_a_process_group() -> None:
    q = torch.randn(1, 8, 8, 1, 4)
    with pytest.raises(RuntimeError, match=r"torch\.distributed is not initialised"):
        distributed.windowed_attention(q, q, q, 4)


def test_a_route_sends_each_row_once() -> None:
    """Rows of three ranks; rank 1 sends what the others want of its own and keeps the rest."""
    held = (((0, 4),), ((4, 8),), ((8, 12),))
    wanted = (((0, 6),), ((2, 10),), ((0, 2), (7, 12)))
    way = route(held, wanted, 1)
    assert [rows.tolist() for rows in way.send] == [[0, 1], [0, 1, 2, 3], [3]]
    assert [rows.tolist() for rows in way.place] == [[0, 1], [2, 3, 4, 5], [6, 7]]
    assert (way.rows, way.held, way.sent_rows(1)) == (8, 4, 3)
