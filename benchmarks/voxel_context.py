"""ConDaFormer's planes with contextual tables: a room of 20,000 points, windows of 10, tables of 79 offsets.

The baseline is the model's attention in plain PyTorch over lists of pairs (`vicinal.models.condaformer`), the
form that the published kernels have too; padding the windows to the largest one takes several times as long.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from vicinal import ContextTable, voxel_attention
from vicinal.models.condaformer import ConDaFormerConfig, ConDaFormerStage, PlaneAttention, Planes

from .measure import Contender
from .scenes import scene
from .windowed import OURS

POINTS = 20000
CONFIG = ConDaFormerConfig(dim=96, num_heads=6, depth=1, window=10.0)


@lru_cache
def planes() -> Planes:
    """Of the points of a room that are nearest to a corner of it."""
    generator = torch.Generator().manual_seed(0)
    coords = torch.from_numpy(scene("room_04", 0)[0])[:, -3:].float()
    points = coords[torch.argsort(coords.sum(1), stable=True)[:POINTS]]
    points = points + torch.rand(points.shape, generator=generator) * 0.99
    points = points[torch.randperm(len(points), generator=generator)]
    return ConDaFormerStage(CONFIG).planes(points, torch.zeros(len(points), dtype=torch.long), 1, False)


def attention(dtype: torch.dtype, backward: bool, backend: str | None) -> list[Contender]:
    made, attn = planes(), PlaneAttention(CONFIG).to(dtype)
    generator = torch.Generator().manual_seed(0)
    shape = (POINTS, attn.num_heads, attn.head_dim)
    q, k, v, dout = (torch.randn(shape, generator=generator).to(dtype) for _ in range(4))
    leaves = [*(x.requires_grad_(backward) for x in (q, k, v)), attn.q_table, attn.k_table, attn.v_table]

    def ours() -> Tensor:
        term = ContextTable(tuple(made.cells), *attn.tables())
        out = voxel_attention(q, k, v, made.groups, bias=term, backend=backend)
        assert isinstance(out, Tensor)
        return out

    def pairs() -> Tensor:
        return attn.attend(q, k, v, made)

    def step(function: Any) -> Any:
        if backward:
            return lambda: torch.autograd.grad(function(), leaves, dout)

        def forward() -> Tensor:
            with torch.no_grad():
                return function()

        return forward

    difference = (ours().detach() - pairs().detach()).abs().max()
    if difference > 256 * torch.finfo(dtype).eps:
        raise ArithmeticError(f"the two forms differ by {float(difference):.1e}")
    return [Contender(OURS, step(ours)), Contender("pairs", step(pairs))]
