"""What may be added to the scores of segment attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import _check as checks


def _cells(name: str, value: Tensor) -> None:
    checks.tensor(name, value)
    if value.dim() != 2 or value.dtype not in (torch.int32, torch.int64) or not 1 <= value.shape[1] <= 3:
        raise ValueError(
            f"{name} has shape {list(value.shape)} and {value.dtype}; it must be int [N, A] with 1 to 3 axes"
        )


def _check_cells(parts: tuple[Tensor, ...], most: int) -> None:
    """On CPUs; elsewhere a look would synchronise, and kernels clamp."""
    if torch.compiler.is_compiling():
        return
    for part in parts:
        if part.device.type == "cpu" and part.numel() and (int(part.min()) < 0 or int(part.max()) > most):
            raise ValueError(
                f"cells has values from {int(part.min())} to {int(part.max())}; they must be from 0 to "
                f"(L - 1) / 2 = {most}"
            )


@dataclass(frozen=True, eq=False)
class RelTable:
    """A bias by the offset between two voxels, axis by axis: sum over a of table[a, clip(c_i[a] - c_j[a], -b,
    b) + b, h].

    Args:
        coords: int [N, A], A up to 3, of the queries and of the keys, which are the same voxels.
        table: [A, 2 b + 1, H], any float dtype, trainable.
    """

    coords: Tensor
    table: Tensor

    def __post_init__(self) -> None:
        _cells("coords", self.coords)
        checks.floating("table", self.table)
        if (
            self.table.dim() != 3
            or self.table.shape[0] != self.coords.shape[1]
            or self.table.shape[1] % 2 == 0
        ):
            raise ValueError(
                f"table has shape {list(self.table.shape)}; it must be [{self.coords.shape[1]}, 2 b + 1, H]"
            )


@dataclass(frozen=True, eq=False)
class ContextTable:
    """Contextual terms by the offset between two cells, r[a] = c_i[a] - c_j[a] + (L - 1) / 2 and T[r] the sum
    over a of T_a[r[a]]: q_i.Tq[r] times the scale and k_j.Tk[r] are added to the score, Tv[r] to v_j
    (Stratified Transformer, ConDaFormer).

    Args:
        cells: int [N, A], A up to 3, from 0 to (L - 1) / 2; or a tuple with one for each group of a
            `SegmentGroups`, as ConDaFormer's planes have (`segments.condaformer_planes`).
        q_table: [L, A, H, D], any float dtype, trainable. k_table: the same. v_table: [L, A, H, Dv].
    """

    cells: Tensor | tuple[Tensor, ...]
    q_table: Tensor
    k_table: Tensor
    v_table: Tensor

    def __post_init__(self) -> None:
        parts = self.cells if isinstance(self.cells, tuple) else (self.cells,)
        if not parts:
            raise ValueError("cells is an empty tuple; it must have a tensor for each group of heads")
        for part in parts:
            _cells("cells", part)
        if len({part.shape for part in parts}) > 1:
            raise ValueError(f"cells has shapes {[list(p.shape) for p in parts]}; they must be equal")
        axes = parts[0].shape[1]
        for name in ("q_table", "k_table", "v_table"):
            table = getattr(self, name)
            checks.floating(name, table)
            if table.dim() != 4 or table.shape[1] != axes or table.shape[0] % 2 == 0:
                raise ValueError(
                    f"{name} has shape {list(table.shape)}; it must be [L, {axes}, H, D] with L odd"
                )
        _check_cells(parts, self.q_table.shape[0] // 2)


@dataclass(frozen=True, eq=False)
class KeyBias:
    """b_j, or b_j[h], added to the scores of key j; -inf excludes it.

    Args:
        b: float [Nk] or [Nk, H]; trainable.
    """

    b: Tensor

    def __post_init__(self) -> None:
        checks.floating("b", self.b)
        if self.b.dim() not in (1, 2):
            raise ValueError(f"b has shape {list(self.b.shape)}; it must be [Nk] or [Nk, H]")


@dataclass(frozen=True, eq=False)
class Rope3D:
    """Rotation of q and k by their coordinates: D splits into three parts, one per axis, and in each part
    entry f of the first half and entry f of the second half turn by coords[a] * angles[a, f].

    Args:
        coords: [N, 3], of the queries and of the keys, which are the same voxels.
        angles: float [D / 6] for all axes, or [3, D / 6].
    """

    coords: Tensor
    angles: Tensor

    def __post_init__(self) -> None:
        checks.tensor("coords", self.coords)
        checks.floating("angles", self.angles)
        if self.coords.dim() != 2 or self.coords.shape[1] != 3:
            raise ValueError(f"coords has shape {list(self.coords.shape)}; it must be [N, 3]")
        if self.angles.dim() not in (1, 2) or (self.angles.dim() == 2 and self.angles.shape[0] != 3):
            raise ValueError(f"angles has shape {list(self.angles.shape)}; it must be [D / 6] or [3, D / 6]")

    def rotate(self, x: Tensor) -> Tensor:
        """x [N, H, D] turned, in its dtype."""
        acc = torch.float64 if x.dtype == torch.float64 else torch.float32
        angle = self.coords.to(acc)[:, :, None] * self.angles.to(acc)  # [N, 3, D / 6]
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        first, second = x.to(acc).unflatten(-1, (3, 2, -1)).unbind(-2)
        turned = torch.stack([first * cos - second * sin, first * sin + second * cos], -2)
        return turned.flatten(-3).to(x.dtype)


Bias = RelTable | ContextTable | KeyBias | Rope3D
