"""The terms of a ContextTable in the forms that kernels take: packed tables for CPUs, channels for others.

In channels, with C = (L + 1) / 2 cells per axis and c over them, the rows of the three tensors grow::

    q'_i = [q_i, q_i.Tq_a[cell_i - c], 1 / scale at cell_i]      v'_j = [v_j, 1 at cell_j]
    k'_j = [k_j, 1 at cell_j, k_j.Tk_a[c - cell_j]]              out_i = out' + sum_c out'[c] Tv_a[cell_i - c]

which is exact and differentiable by autograd, at 2 C channels an axis for the scores and C for the values.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ._attend import accumulator
from ._voxel_context_op import padded_width

if TYPE_CHECKING:
    from ._voxel_types import ContextTable


def head_channels(term: ContextTable) -> tuple[int, int]:
    """Channels that heads of q, and of v, get."""
    classes = term.q_table.shape[1] * (term.q_table.shape[0] // 2 + 1)
    return 2 * classes, classes


def packed_tables(term: ContextTable, dim: int, dtype: torch.dtype) -> Tensor:
    """[H, 3, L, 2 W + Wv] in the accumulation type: rows of Tq, Tk and Tv with zeros behind, and zeros for
    axes that are not there. dim: channels of q and k, more than the tables' where some were added."""
    acc, width = accumulator(dtype), padded_width(dim)
    width_v = padded_width(term.v_table.shape[-1])
    rows = [
        F.pad(table.to(acc), (0, w - table.shape[-1]))
        for table, w in ((term.q_table, width), (term.k_table, width), (term.v_table, width_v))
    ]
    tables = torch.cat(rows, -1).permute(2, 1, 0, 3)
    return F.pad(tables, (0, 0, 0, 0, 0, 3 - tables.shape[1])).contiguous()


def packed_cells(term: ContextTable) -> Tensor:
    """int32 [1 or head groups, N, 3], within the tables."""
    cells = torch.stack(term.cells) if isinstance(term.cells, tuple) else term.cells[None]
    cells = cells.clamp(0, term.q_table.shape[0] // 2).to(torch.int32)
    return F.pad(cells, (0, 3 - cells.shape[-1])).contiguous()


def _of_cells(x: Tensor, table: Tensor, rows: Tensor) -> Tensor:
    """x [N, h, D] . table [L, h, D] -> [N, h, C], for the rows [N, C] of each x."""
    return torch.einsum("nhd,lhd->nhl", x, table).gather(2, rows[:, None].expand(-1, x.shape[1], -1))


class Channels:
    """The longer rows of a call's head groups; `narrow` brings the longer output back."""

    def __init__(self, term: ContextTable, groups: list[tuple[int, int]]) -> None:
        self.term, self.groups = term, groups
        self.classes = term.q_table.shape[0] // 2 + 1
        cells = packed_cells(term)[..., : term.q_table.shape[1]].long()
        self.cells = [cells[min(i, len(cells) - 1)] for i in range(len(groups))]

    def _table(self, name: str, group: int, axis: int, dtype: torch.dtype) -> Tensor:
        first, last = self.groups[group]
        return getattr(self.term, name)[:, axis, first:last].to(accumulator(dtype))

    def _rows(self, cells: Tensor) -> tuple[Tensor, Tensor]:
        """[N, C]: the rows of tables for cell - c, and for c - cell."""
        c = torch.arange(self.classes, device=cells.device)
        return cells[:, None] - c + self.classes - 1, c - cells[:, None] + self.classes - 1

    def longer(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v [N, H, D] with their channels; scale: the factor of their product."""
        acc, made = accumulator(q.dtype), []
        for i, (first, last) in enumerate(self.groups):
            part_q, part_k = q[:, first:last], k[:, first:last]
            more: tuple[list[Tensor], ...] = ([part_q], [part_k], [v[:, first:last]])
            for axis in range(self.cells[i].shape[1]):
                ahead, behind = self._rows(self.cells[i][:, axis])
                one_hot = F.one_hot(self.cells[i][:, axis], self.classes)[:, None]
                there = one_hot.to(q.dtype).expand(-1, last - first, -1)
                of_q = _of_cells(part_q.to(acc), self._table("q_table", i, axis, q.dtype), ahead)
                of_k = _of_cells(part_k.to(acc), self._table("k_table", i, axis, q.dtype), behind)
                more[0].extend([of_q.to(q.dtype), there / scale])
                more[1].extend([there, of_k.to(q.dtype)])
                more[2].append(there)
            made.append(tuple(torch.cat(parts, -1) for parts in more))
        return tuple(torch.cat(parts, 1) for parts in zip(*made, strict=True))  # type: ignore[return-value]

    def narrow(self, out: Tensor, dim_v: int) -> Tensor:
        """out [N, H, Dv + channels] -> [N, H, Dv]."""
        acc, made = accumulator(out.dtype), []
        for i, (first, last) in enumerate(self.groups):
            part = out[:, first:last].to(acc)
            total = part[..., :dim_v]
            for axis in range(self.cells[i].shape[1]):
                begin = dim_v + axis * self.classes
                shares = part[..., begin : begin + self.classes]
                rows, _ = self._rows(self.cells[i][:, axis])
                table = self._table("v_table", i, axis, out.dtype)
                spread = shares.new_zeros(*shares.shape[:2], table.shape[0])
                spread = spread.scatter(2, rows[:, None].expand_as(shares), shares)
                total = total + torch.einsum("nhl,lhd->nhd", spread, table)
            made.append(total)
        return torch.cat(made, 1).to(out.dtype)
