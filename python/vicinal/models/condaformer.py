"""ConDaFormer's stage: attention in three planes with contextual tables, local structure by depth-wise
convolutions over voxel neighbours. From the formulas, in plain PyTorch over lists of pairs.

Source: Duan et al., ConDaFormer: Disassembled Transformer with Local Structure Enhancement for 3D Point Cloud
Understanding (arXiv 2312.11112).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vicinal import segments
from vicinal.segments import SegmentGroups, Segments

__all__ = ["ConDaFormerConfig", "ConDaFormerStage", "PlaneAttention", "Planes"]


class Planes(NamedTuple):
    """What `segments.condaformer_planes` gives: three head groups, their cells, the offsets of an axis."""

    groups: SegmentGroups
    cells: list[Tensor]
    offsets: int


@dataclass(frozen=True)
class ConDaFormerConfig:
    """One stage.

    Args:
        dim: C. num_heads: divisible by 3. depth: blocks; odd ones shift their windows. window: w, in voxels
            of the level. quant: size of a cell. mlp_ratio: hidden channels over C.
    """

    dim: int = 96
    num_heads: int = 6
    depth: int = 2
    window: float = 10.0
    quant: float = 0.25
    mlp_ratio: float = 4.0

    def __post_init__(self) -> None:
        if self.num_heads < 3 or self.num_heads % 3 or self.dim % self.num_heads:
            raise ValueError(
                f"num_heads is {self.num_heads}; it must be a multiple of 3 that divides dim = {self.dim}"
            )

    @property
    def offsets(self) -> int:
        """Offsets of an axis of the tables, the longest that a window has."""
        return 2 * int((self.window + 1e-4) / self.quant) - 1


def pairs(s: Segments) -> tuple[Tensor, Tensor]:
    """int64 [P]: query row and key row of every pair."""
    n_q, n_k = (s.q_ptr[1:] - s.q_ptr[:-1]).long(), (s.k_end - s.k_begin).long()
    segment = torch.repeat_interleave(torch.arange(s.count, device=n_q.device), n_q)
    counts = n_k[segment]
    slot = torch.repeat_interleave(torch.arange(len(segment), device=n_q.device), counts)
    place = torch.arange(len(slot), device=n_q.device) - (torch.cumsum(counts, 0) - counts)[slot]
    return s.q_index.long()[slot], s.k_index.long()[s.k_begin.long()[segment][slot] + place]


class PlaneAttention(nn.Module):
    """Attention of every point in its window of each plane, a third of the heads in each.

    s_ij = scale q_i.(k_j + Tq) + k_j.Tk, out_i = sum_j softmax(s)_ij (v_j + Tv), with T the sum over the axes
    of the rows of their tables for the offset of the points' cells. The thirds share the tables.

    Args:
        config: of the stage.
    """

    q_table: nn.Parameter
    k_table: nn.Parameter
    v_table: nn.Parameter

    def __init__(self, config: ConDaFormerConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.head_dim = config.dim // config.num_heads
        self.scale = self.head_dim**-0.5
        shape = (config.offsets, 3, config.num_heads // 3, self.head_dim)
        for name in ("q_table", "k_table", "v_table"):
            self.register_parameter(name, nn.Parameter(nn.init.trunc_normal_(torch.empty(shape), std=0.02)))
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.proj = nn.Linear(config.dim, config.dim)

    def tables(self) -> list[Tensor]:
        """The tables of all heads, [L, 3, H, D] each."""
        return [getattr(self, f"{name}_table").repeat(1, 1, 3, 1) for name in "qkv"]

    def forward(self, x: Tensor, planes: Planes) -> Tensor:
        """[N, C] -> [N, C]"""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(1)
        return self.proj(self.attend(q, k, v, planes).flatten(1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, planes: Planes) -> Tensor:
        """[N, H, D], over lists of pairs."""
        outs, first = [], 0
        for (plane, n), cells in zip(planes.groups.groups, planes.cells):
            heads = slice(first, first + n)
            i, j = pairs(plane)
            offset = (cells[i] - cells[j]).long() + planes.offsets // 2
            of_q, of_k, of_v = (
                sum(table[:, a, heads].index_select(0, offset[:, a]) for a in range(3))
                for table in self.tables()
            )
            key = k[:, heads][j]
            s = ((q[:, heads][i] * self.scale) * (key + of_q)).sum(-1) + (key * of_k).sum(-1)
            top = s.new_full((len(q), n), -torch.inf)
            top = top.scatter_reduce(0, i[:, None].expand(-1, n), s.detach(), "amax")
            e = (s - top[i]).exp()
            total = e.new_zeros(len(q), n).index_add(0, i, e)
            values = (e / total[i])[..., None] * (v[:, heads][j] + of_v)
            outs.append(values.new_zeros(len(q), n, self.head_dim).index_add(0, i, values))
            first += n
        return torch.cat(outs, 1)


class NeighbourConv(nn.Module):
    """Depth-wise 3 x 3 x 3 convolution over the voxels there are: sum over k of weight[k] x[neighbour k]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(27, dim) * 27**-0.5)

    def forward(self, x: Tensor, neighbours: Tensor) -> Tensor:
        """x [N, C], neighbours [N, 27], -1 where there is none -> [N, C]"""
        padded = F.pad(x, (0, 0, 0, 1))  # row -1
        return torch.einsum("nkc,kc->nc", padded[neighbours], self.weight)


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Convolution, attention and convolution around a residual, then an MLP."""

    def __init__(self, config: ConDaFormerConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim)
        self.conv_before = NeighbourConv(config.dim)
        self.attn = PlaneAttention(config)
        self.conv_after = NeighbourConv(config.dim)
        self.norm2 = nn.LayerNorm(config.dim)
        self.mlp = Mlp(config.dim, int(config.mlp_ratio * config.dim))

    def forward(self, x: Tensor, planes: Planes, neighbours: Tensor) -> Tensor:
        y = self.norm1(x)
        y = y + self.conv_before(y, neighbours)
        y = self.attn(y, planes)
        x = x + y + self.conv_after(y, neighbours)
        return x + self.mlp(self.norm2(x))


class ConDaFormerStage(nn.Module):
    """Blocks of one level; [N, C] -> [N, C].

    Args:
        config: `ConDaFormerConfig`.

    Example:
        >>> stage = ConDaFormerStage(ConDaFormerConfig(dim=48, num_heads=3, window=4.0))
        >>> points = torch.cartesian_prod(*[torch.arange(5.0)] * 3) + 0.5
        >>> stage(torch.randn(125, 48), points, torch.zeros(125, dtype=torch.long), 1).shape
        torch.Size([125, 48])
    """

    def __init__(self, config: ConDaFormerConfig) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))

    def planes(self, points: Tensor, batch: Tensor, batch_size: int, shifted: bool) -> Planes:
        """The planes of even blocks, or of odd ones, whose windows are shifted."""
        c = self.config
        made = segments.condaformer_planes(
            points, batch, batch_size, c.window, c.quant, shifted=shifted, heads=c.num_heads
        )
        return Planes(*made)

    def forward(self, x: Tensor, points: Tensor, batch: Tensor, batch_size: int) -> Tensor:
        """x [N, C], points float [N, 3] in voxels of the level, one in each voxel, batch int [N] -> [N, C]"""
        voxel = torch.floor(points).long()
        voxel = voxel - voxel.amin(0)
        grid = (voxel.amax(0) + 1).tolist()
        neighbours = segments.neighbour_table(torch.cat([batch[:, None], voxel], 1), grid, batch_size)
        planes = [self.planes(points, batch, batch_size, shifted) for shifted in (False, True)]
        for i, block in enumerate(self.blocks):
            x = block(x, planes[i % 2], neighbours)
        return x
