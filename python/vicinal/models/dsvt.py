"""DSVT (Wang et al., arXiv:2301.06051), the backbone of a detector: attention in rotated sets of voxels.

Voxels of a window are split evenly into sets of at most `set_size`, along y in the first layer of a block and
along x in the second; windows alternate between two sizes and shifts from block to block. Here sets are
padded with repeated voxels, which a key mask hides, and attention is torch's nn.MultiheadAttention.

Parameters have the published names: state dicts of released backbones load strictly. One oddity of the
released code is kept because its weights were trained with it: layer 0 of every block gets the position
embedding of the unshifted windows and layer 1 that of the shifted ones, whichever windows the block uses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["DSVT", "DSVTConfig"]

Size = tuple[int, int, int]


@dataclass(frozen=True)
class DSVTConfig:
    """Sizes of a DSVT; the default is the pillar model for Waymo.

    Args:
        grid: voxels along x, y and z, of the first stage.
        embed_dim: C. num_heads: heads. feedforward: hidden channels of the MLPs.
        windows: per stage, the two window sizes (x, y, z).
        shift: of the second one; along z it is 0 where the window is as high as the grid.
        set_sizes: per stage, most voxels of a set. blocks: per stage.
        strides: between stages, the voxels (x, y, z) that are pooled into one.
    """

    grid: Size = (468, 468, 1)
    embed_dim: int = 192
    num_heads: int = 8
    feedforward: int = 384
    windows: tuple[tuple[Size, Size], ...] = (((12, 12, 1), (24, 24, 1)),)
    shift: Size = (6, 6, 0)
    set_sizes: tuple[int, ...] = (36,)
    blocks: tuple[int, ...] = (4,)
    strides: tuple[Size, ...] = ()

    def __post_init__(self) -> None:
        stages = len(self.blocks)
        if not len(self.windows) == len(self.set_sizes) == len(self.strides) + 1 == stages:
            raise ValueError(
                f"blocks has {stages} stages, windows {len(self.windows)}, set_sizes "
                f"{len(self.set_sizes)} and strides {len(self.strides)}; strides must have one entry less "
                "than the others"
            )
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"embed_dim is {self.embed_dim}, which num_heads = {self.num_heads} does not divide"
            )

    def grid_of(self, stage: int) -> Size:
        sizes = list(self.grid)
        for stride in self.strides[:stage]:
            sizes = [-(-n // s) for n, s in zip(sizes, stride)]
        x, y, z = sizes
        return x, y, z

    def windows_of(self, stage: int) -> list[tuple[Size, Size]]:
        """(window, shift) of both configurations."""
        plain, hybrid = self.windows[stage]
        x, y, z = self.shift
        whole = hybrid[2] == self.grid_of(stage)[2]
        return [(plain, (0, 0, 0)), (hybrid, (x, y, 0 if whole else z))]


class PositionEmbedding(nn.Module):
    def __init__(self, inputs: int, dim: int) -> None:
        super().__init__()
        layers = (nn.Linear(inputs, dim), nn.BatchNorm1d(dim), nn.ReLU(), nn.Linear(dim, dim))
        self.position_embedding_head = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.position_embedding_head(x)


class InputLayer(nn.Module):
    """The position embeddings, [stage][block][shift]."""

    def __init__(self, config: DSVTConfig) -> None:
        super().__init__()
        self.posembed_layers = nn.ModuleList()
        for stage, blocks in enumerate(config.blocks):
            inputs = 2 if config.windows[stage][0][2] == 1 else 3
            made = [[PositionEmbedding(inputs, config.embed_dim) for _ in range(2)] for _ in range(blocks)]
            self.posembed_layers.append(nn.ModuleList([nn.ModuleList(pair) for pair in made]))


class SetAttention(nn.Module):
    def __init__(self, dim: int, heads: int, feedforward: int) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.linear1 = nn.Linear(dim, feedforward)
        self.linear2 = nn.Linear(feedforward, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x [N, C] and what it attended to."""
        x = self.norm1(x + context)
        return self.norm2(x + self.linear2(F.gelu(self.linear1(x))))


class EncoderLayer(nn.Module):
    def __init__(self, dim: int, heads: int, feedforward: int) -> None:
        super().__init__()
        self.win_attn = SetAttention(dim, heads, feedforward)
        self.norm = nn.LayerNorm(dim)


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, feedforward: int) -> None:
        super().__init__()
        self.encoder_list = nn.ModuleList([EncoderLayer(dim, heads, feedforward) for _ in range(2)])


class AttentionPooling(nn.Module):
    """Voxels of a cell into one: the largest of each channel attends to all slots of the cell, empty ones
    too, whose key is their position alone and whose value is 0, as in the released code."""

    def __init__(self, dim: int, slots: int) -> None:
        super().__init__()
        self.pos_embedding = nn.Parameter(torch.randn(slots, dim))
        self.self_attn = nn.MultiheadAttention(dim, 8, batch_first=True)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """[cells, slots, C], 0 where there is no voxel -> [cells, C]"""
        query = x.amax(1, keepdim=True)
        pooled = self.self_attn(query, x + self.pos_embedding, x, need_weights=False)[0]
        return self.norm(pooled + query).squeeze(1)


@dataclass(frozen=True, eq=False)
class PaddedSets:
    """Sets as the released code has them: rows int64 [S, set_size], where `hidden` bool [S, set_size] marks
    repeats; `source` int64 [N]: the slot of each voxel's first copy."""

    rows: Tensor
    hidden: Tensor
    source: Tensor


class DSVT(nn.Module):
    """A DSVT backbone: features of sparse voxels to features of the voxels of its last stage.

    Example:
        >>> from vicinal.models import DSVT, dsvt_test
        >>> model = DSVT(dsvt_test())
        >>> one = torch.tensor([0])
        >>> coords = torch.cartesian_prod(torch.arange(2), one, torch.arange(9), torch.arange(7))
        >>> model(torch.randn(126, 48), coords, 2)[0].shape
        torch.Size([126, 48])
    """

    def __init__(self, config: DSVTConfig) -> None:
        super().__init__()
        self.config = config
        c = config.embed_dim
        sizes = (c, config.num_heads, config.feedforward)
        self.input_layer = InputLayer(config)
        for stage, blocks in enumerate(config.blocks):
            self.add_module(f"stage_{stage}", nn.ModuleList([Block(*sizes) for _ in range(blocks)]))
            norms = nn.ModuleList([nn.LayerNorm(c) for _ in range(blocks)])
            self.add_module(f"residual_norm_stage_{stage}", norms)
            if stage < len(config.strides):
                self.add_module(f"stage_{stage}_reduction", AttentionPooling(c, prod(config.strides[stage])))

    def forward(self, x: Tensor, coords: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
        """x [N, C], coords int64 [N, 4] (sample, z, y, x) without repeats -> the same of the last stage."""
        first_block = 0
        for stage, blocks in enumerate(self.config.blocks):
            windows, grid = self.config.windows_of(stage), self.config.grid_of(stage)
            used = [b % 2 for b in range(first_block, first_block + blocks)]
            sets = {
                c: self.sets(coords, grid, batch_size, *windows[c], self.config.set_sizes[stage])
                for c in sorted(set(used))
            }
            places = [self._places(coords, *pair) for pair in windows]
            x = self._stage(x, stage, [sets[c] for c in used], places)
            first_block += blocks
            if stage < len(self.config.strides):
                x, coords = self._pool(x, coords, stage)
        return x, coords

    def _stage(self, x: Tensor, stage: int, sets: Sequence[Any], places: Sequence[Tensor]) -> Tensor:
        blocks: Any = getattr(self, f"stage_{stage}")
        norms: Any = getattr(self, f"residual_norm_stage_{stage}")
        embeddings: Any = self.input_layer.posembed_layers[stage]
        for b, block in enumerate(blocks):
            before = x
            for layer, encoder in enumerate(block.encoder_list):
                position = embeddings[b][layer](places[layer])  # by layer, not by the block's windows
                attention = encoder.win_attn
                context = self.attend(attention.self_attn, x, position, sets[b][layer])
                x = encoder.norm(x + attention(x, context))
            x = norms[b](x + before)
        return x

    def _places(self, coords: Tensor, window: Size, shift: Size) -> Tensor:
        """float [N, 2 or 3] place in the window, from its middle, in the order x, y, z."""
        axes = (0, 1) if window[2] == 1 else (0, 1, 2)
        found = [(coords[:, 3 - a] + shift[a]) % window[a] - window[a] / 2 for a in axes]
        return torch.stack(found, 1).to(next(self.parameters()).dtype)

    def sets(
        self, coords: Tensor, grid: Size, batch_size: int, window: Size, shift: Size, size: int
    ) -> tuple[Any, Any]:
        """The sets of both orientations."""
        return tuple(padded_sets(coords, grid, window, shift, size, axis) for axis in ("y", "x"))  # type: ignore[return-value]

    def attend(self, attention: nn.MultiheadAttention, x: Tensor, position: Tensor, sets: Any) -> Tensor:
        """Attention of every voxel to its set: gather, attend, and one copy of each voxel back."""
        values = x[sets.rows]
        keys = values + position[sets.rows]
        out = attention(keys, keys, values, sets.hidden)[0]
        return out.flatten(0, 1)[sets.source]

    def _pool(self, x: Tensor, coords: Tensor, stage: int) -> tuple[Tensor, Tensor]:
        """Voxels of the next stage, by ascending (sample, z, y, x)."""
        sx, sy, sz = self.config.strides[stage]
        sample, z, y, u = coords.unbind(1)
        cells = torch.stack([sample, z // sz, y // sy, u // sx], 1)
        pooled, cell = torch.unique(cells, dim=0, return_inverse=True)
        slot = (u % sx * sy + y % sy) * sz + z % sz
        dense = x.new_zeros(len(pooled) * sx * sy * sz, x.shape[1])
        dense = dense.index_copy(0, cell * (sx * sy * sz) + slot, x)
        pooling: Any = getattr(self, f"stage_{stage}_reduction")
        return pooling(dense.unflatten(0, (len(pooled), -1))), pooled


def padded_sets(coords: Tensor, grid: Size, window: Size, shift: Size, size: int, axis: str) -> PaddedSets:
    """Rank r of a window of n voxels and m = ceil(n / size) sets stands at slot k of set j where
    r = (j size + k) n // (m size); ranks are by (y, x, z) or (x, y, z)."""
    moved = [coords[:, 3 - a] + shift[a] for a in range(3)]
    place = [m % w for m, w in zip(moved, window)]
    key = coords[:, 0]
    for m, n, s, w in zip(moved, grid, shift, window):
        key = key * ((n - 1 + s) // w + 1) + m // w
    for a in (1, 0, 2) if axis == "y" else (0, 1, 2):
        key = key * window[a] + place[a]
    order = torch.argsort(key)
    _, counts = torch.unique_consecutive(key[order] // prod(window), return_counts=True)
    parts = (counts + size - 1) // size
    window_of_set = torch.repeat_interleave(torch.arange(len(counts), device=key.device), parts)
    j = torch.arange(len(window_of_set), device=key.device) - (torch.cumsum(parts, 0) - parts)[window_of_set]
    n, m = counts[window_of_set][:, None], parts[window_of_set][:, None]
    slots = torch.arange(size, device=key.device)
    rank = (j[:, None] * size + slots) * n // (m * size)
    rows = order[(torch.cumsum(counts, 0) - counts)[window_of_set][:, None] + rank]
    hidden = torch.zeros_like(rows, dtype=torch.bool)
    hidden[:, 1:] = rows[:, 1:] == rows[:, :-1]
    source = torch.empty_like(order)
    first = (~hidden).flatten().nonzero().flatten()
    source[rows.flatten()[first]] = first
    return PaddedSets(rows, hidden, source)
