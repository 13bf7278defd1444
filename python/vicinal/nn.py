"""Modules: attention with its projections, under the parameter names of published models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vicinal._multihead import MultiheadAttention
from vicinal._multihead_local import (
    LinearMultiheadAttention,
    NeighborhoodMultiheadAttention,
    WindowedMultiheadAttention,
)
from vicinal._neighborhood_nn import (
    NeighborhoodAttention1D,
    NeighborhoodAttention2D,
    NeighborhoodAttention3D,
)
from vicinal._short_attention import AgentAttention, LinformerAttention
from vicinal._voxel_nn import SegmentMultiheadAttention
from vicinal.windowed import RelativeBias, Windows, windowed_attention_qkvpacked

__all__ = [
    "AgentAttention",
    "LinearMultiheadAttention",
    "LinformerAttention",
    "MultiheadAttention",
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
    "NeighborhoodMultiheadAttention",
    "SegmentMultiheadAttention",
    "WindowedAttention",
    "WindowedMultiheadAttention",
    "packed_windowed_attention",
]


REL_POS_NAMES = {1: ("rel_pos",), 2: ("rel_pos_h", "rel_pos_w"), 3: ("rel_pos_x", "rel_pos_y", "rel_pos_z")}


def packed_windowed_attention(
    qkv: Tensor, qkv_bias: Tensor | None, windows: Windows, num_heads: int, **options: Any
) -> Tensor:
    """Windowed attention on the packed output of one projection.

    A window that overhangs the grid sees what zero padding before the projection would have given: keys and
    values that are the bias of the projection.

    Args:
        qkv: [B, *space, 3 C], queries, keys and values side by side, heads in the middle of each.
        qkv_bias: [3 C] bias that the projection added, or None.
        windows: the geometry, with `edge="const"`.
        num_heads: h, dividing C.
        **options: further arguments of `windowed_attention_qkvpacked`, without `return_lse`.

    Returns:
        [B, *space, C]
    """
    if qkv_bias is not None and windows.edge == "const":
        _, edge_k, edge_v = qkv_bias.unflatten(0, (3, num_heads, -1)).unbind(0)
        options = {"edge_k": edge_k, "edge_v": edge_v, **options}
    out = windowed_attention_qkvpacked(qkv.unflatten(-1, (3, num_heads, -1)), windows, **options)
    assert isinstance(out, Tensor)
    return out.flatten(-2)


class WindowedAttention(nn.Module):
    """Multi-head attention inside (shifted) windows of a 1-, 2- or 3-D grid; [B, *space, C] -> [B, *space,
    C].

    proj(softmax(scale q k^T + bias + region mask) v) with q, k, v = qkv(x), in place: nothing is rolled,
    padded or partitioned. The bias is a learned table over relative positions (Swin), or, with `cosine`, the
    scores are exp(logit_scale) cos(q, k) and the bias 16 sigmoid(cpb_mlp(log-spaced offsets)) (Swin V2).

    Parameters and buffers have the names and order of the window attention of the official Swin release and
    of timm, so state dicts load strictly both ways.

    Args:
        dim: C, channels of input and output. window_size: tokens of a window, one number per axis of the
        grid; its length is the rank. num_heads: h, dividing `dim`. shift_size: cyclic shift per axis, an int
        for all axes; 0 <= shift < window. qkv_bias: give queries, keys and values a bias (with `cosine`,
        queries and values). qk_scale: factor of the scores, default (C / h) ** -0.5; None with `cosine`.
        cosine: cosine attention and continuous position bias. relative_bias: learn a position bias.
        contextual: learn a table [2 w - 1, C / h] per axis, whose rows are multiplied by the queries (SAM,
        ViTDet, DiT-3D): `rel_pos_h` and `rel_pos_w`; `rel_pos_x`, `rel_pos_y` and `rel_pos_z` in 3-D,
        `rel_pos` in 1-D. pretrained_window_size: with `cosine`, the window that normalises the offsets,
        default `window_size`.
        mask_value: added between tokens that only the shift made neighbours. edge: what a window that
        overhangs the grid sees there; "const" is zero padding before the projection. pad_order, pad_side: of
        overhanging windows, see `Windows`. attn_drop: dropout of attention weights. proj_drop: dropout of the
        output. persistent_buffers: keep the index (and coordinates) in the state dict, as the official
        release does; timm and
            `False` do not. Loading accepts both.
        backend: None for the fastest that can run, or its name.

    Example:
        >>> attn = WindowedAttention(96, (7, 7), num_heads=3, shift_size=3)
        >>> attn(torch.randn(2, 56, 60, 96)).shape
        torch.Size([2, 56, 60, 96])

    Sources: Liu et al., arXiv:2103.14030 and arXiv:2111.09883.
    """

    relative_position_index: Tensor
    relative_coords_table: Tensor

    def __init__(
        self,
        dim: int,
        window_size: Sequence[int],
        num_heads: int,
        shift_size: int | Sequence[int] = 0,
        *,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        cosine: bool = False,
        relative_bias: bool = True,
        contextual: bool = False,
        pretrained_window_size: Sequence[int] | None = None,
        mask_value: float = -100.0,
        edge: str = "const",
        pad_order: str = "pad_roll",
        pad_side: str = "end",
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        persistent_buffers: bool = True,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        window = tuple(window_size)
        if dim % num_heads:
            raise ValueError(f"dim is {dim}, which num_heads = {num_heads} does not divide")
        if cosine and qk_scale is not None:
            raise ValueError("qk_scale must be None with cosine=True: logit_scale takes its place")
        self.dim = dim
        self.window_size = window
        self.num_heads = num_heads
        self.scale = None if cosine else (qk_scale if qk_scale is not None else (dim // num_heads) ** -0.5)
        self.cosine = cosine
        self.relative_bias = relative_bias
        self.backend = backend
        shift = (shift_size,) * len(window) if isinstance(shift_size, int) else tuple(shift_size)
        self.windows = Windows(
            window, shift=shift, edge=edge, mask_value=mask_value, pad_order=pad_order, pad_side=pad_side
        )
        if cosine:
            self._make_cosine_parameters(qkv_bias, pretrained_window_size, persistent_buffers)
        elif relative_bias:
            self.relative_position_bias_table = nn.Parameter(
                torch.empty(math.prod(2 * w - 1 for w in window), num_heads)
            )
            nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.rel_pos_names = REL_POS_NAMES[len(window)] if contextual else ()
        for name, w in zip(self.rel_pos_names, window):
            self.register_parameter(name, nn.Parameter(torch.zeros(2 * w - 1, dim // num_heads)))
        if relative_bias:
            index = relative_position_index(window)
            self.register_buffer("relative_position_index", index, persistent=persistent_buffers)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias and not cosine)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def _make_cosine_parameters(
        self, qkv_bias: bool, pretrained: Sequence[int] | None, persistent: bool
    ) -> None:
        window, h = self.window_size, self.num_heads
        self.logit_scale = nn.Parameter(torch.full((h, 1, 1), math.log(10.0)))
        if self.relative_bias:
            self.cpb_mlp = nn.Sequential(
                nn.Linear(len(window), 512), nn.ReLU(), nn.Linear(512, h, bias=False)
            )
            coords = log_spaced_offsets(window, window if pretrained is None else tuple(pretrained))
            self.register_buffer("relative_coords_table", coords, persistent=persistent)
        self.q_bias = nn.Parameter(torch.zeros(self.dim)) if qkv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(self.dim)) if qkv_bias else None

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # the buffers follow from the sizes: what a file holds is ignored, and a file may hold none
        for name in ("relative_position_index", "relative_coords_table"):
            own = self._buffers.get(name)
            if own is None or name in self._non_persistent_buffers_set:
                state_dict.pop(prefix + name, None)
            else:
                state_dict[prefix + name] = own
        super()._load_from_state_dict(state_dict, prefix, *args)

    def bias_table(self) -> Tensor | None:
        """[prod(2w - 1), h] bias of every relative position, or None."""
        if not self.relative_bias:
            return None
        if self.cosine:
            return 16 * torch.sigmoid(self.cpb_mlp(self.relative_coords_table)).flatten(0, -2)
        return self.relative_position_bias_table

    def packed_bias(self) -> Tensor | None:
        """[3 C] bias of the packed projection, or None."""
        if not self.cosine:
            return self.qkv.bias
        if self.q_bias is None or self.v_bias is None:
            return None
        return torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """Attend.

        Args:
            x: [B, *space, C], any extents.
            key_padding_mask: [B, *space] bool, True = ignored.

        Returns:
            [B, *space, C]
        """
        packed_bias = self.packed_bias()
        table = self.bias_table()
        out = packed_windowed_attention(
            F.linear(x, self.qkv.weight, packed_bias),
            packed_bias,
            self.windows,
            self.num_heads,
            bias=None if table is None else RelativeBias(table),
            rel_pos=tuple(getattr(self, name) for name in self.rel_pos_names) or None,
            scale=self.scale,
            logit_scale=self.logit_scale if self.cosine else None,
            key_padding_mask=key_padding_mask,
            dropout_p=self.attn_drop.p if self.training else 0.0,
            backend=self.backend,
        )
        return self.proj_drop(self.proj(out))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, cosine={self.cosine}, {self.windows}"


def relative_position_index(window: Sequence[int]) -> Tensor:
    """[N, N] row of the bias table for (query, key): offsets q - k, row-major over prod(2w - 1)."""
    coords = torch.cartesian_prod(*(torch.arange(w) for w in window)).view(-1, len(window))
    index = torch.zeros(len(coords), len(coords), dtype=torch.long)
    for axis, w in enumerate(window):
        offset = coords[:, None, axis] - coords[None, :, axis]
        index = index * (2 * w - 1) + offset + w - 1
    return index


def log_spaced_offsets(window: Sequence[int], pretrained: Sequence[int]) -> Tensor:
    """[1, *(2w - 1), rank] sign(c) log2(1 + |c|) / 3 with c = 8 offset / (pretrained - 1)."""
    axes = []
    for w, p in zip(window, pretrained):
        c = 8.0 * torch.arange(1 - w, w, dtype=torch.float32) / max((p or w) - 1, 1)
        axes.append(c.sign() * torch.log2(1 + c.abs()) / 3)
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).unsqueeze(0)
