"""Neighborhood attention as modules, one class per rank of the grid."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn, zeros

from ._neighborhood_check import check_rank
from ._neighborhood_types import Kernel, Neighborhood, Size, per_axis, resolve
from .neighborhood import neighborhood_attention_qkvpacked

__all__ = ["NeighborhoodAttention1D", "NeighborhoodAttention2D", "NeighborhoodAttention3D"]


class _NeighborhoodAttention(nn.Module):
    rank: int

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        kernel_size: Kernel,
        *,
        dilation: Size = 1,
        stride: Size = 1,
        is_causal: bool | tuple[bool, ...] = False,
        border: str = "shift",
        rel_pos_bias: bool = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        pad_small_inputs: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim is {embed_dim}, which num_heads = {num_heads} does not divide")
        if pad_small_inputs and border != "shift":
            raise ValueError(f'pad_small_inputs=True needs border="shift", got {border!r}: it fits any input')
        self.neighborhood = Neighborhood(kernel_size, dilation, stride, is_causal, border)
        check_rank(self.neighborhood, self.rank)
        axes = resolve(self.neighborhood, self.rank, rel_pos_bias).axes
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.scale = self.head_dim**-0.5 if qk_scale is None else qk_scale
        self.kernel_size = kernel_size
        self.dilation = dilation
        self.stride = stride
        self.is_causal = is_causal
        self.pad_small_inputs = pad_small_inputs
        self.backend = backend
        self.rpb: nn.Parameter | None = None
        if rel_pos_bias:
            if any(a.left < 0 or a.right < 0 for a in axes):
                raise ValueError(f"rel_pos_bias=True needs a limited kernel_size, got {kernel_size}")
            self.rpb = nn.Parameter(zeros(num_heads, *(2 * (a.left + a.right) + 1 for a in axes)))
            nn.init.trunc_normal_(self.rpb, std=0.02)
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(embed_dim, embed_dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def window(self, space: tuple[int, ...]) -> Neighborhood:
        """The neighborhood on a grid of this size."""
        return self.neighborhood

    def _padding(self, window: Neighborhood, space: tuple[int, ...]) -> list[int]:
        """Tokens to append to each axis so that a dilated kernel fits."""
        kernel = per_axis(window.kernel_size, self.rank)
        dilation = per_axis(window.dilation, self.rank)
        return [max(0, k * d - n) for k, d, n in zip(kernel, dilation, space)]

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """Attend.

        Args:
            x: [B, *space, embed_dim].
            key_padding_mask: [B, *space] bool, True = ignored.

        Returns:
            [B, *space, embed_dim]
        """
        if x.dim() != self.rank + 2 or x.shape[-1] != self.embed_dim:
            lengths = ", ".join(f"L{a + 1}" for a in range(self.rank))
            raise ValueError(f"x must be [B, {lengths}, {self.embed_dim}], got {list(x.shape)}")
        space = tuple(x.shape[1:-1])
        window = self.window(space)
        padding = self._padding(window, space) if self.pad_small_inputs else []
        if any(padding):
            ends = [size for after in reversed(padding) for size in (0, after)]
            x = F.pad(x, [0, 0, *ends])
            if key_padding_mask is not None:
                key_padding_mask = F.pad(key_padding_mask, ends)
        out = neighborhood_attention_qkvpacked(
            self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)),
            window,
            bias=self.rpb,
            scale=self.scale,
            key_padding_mask=key_padding_mask,
            dropout_p=self.attn_drop.p if self.training else 0.0,
            backend=self.backend,
        )
        assert isinstance(out, Tensor)
        if any(padding):
            for axis, n in enumerate(space):
                out = out.narrow(1 + axis, 0, n)
        return self.proj_drop(self.proj(out.flatten(-2)))

    def extra_repr(self) -> str:
        fields = f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, {self.neighborhood}"
        return f"{fields}, rel_pos_bias={self.rpb is not None}"


_ARGUMENTS = """

    proj(softmax(scale q k^T + rpb) v) with q, k, v = qkv(x), every query with the keys of a window around it.

    The parameters are `qkv.weight` [3C, C] (queries, keys, values; heads inside each), `qkv.bias`, `proj.*`
    and, with `rel_pos_bias`, `rpb` [heads, 2k - 1 per axis]: state dicts of all natten versions load.

    Args:
        embed_dim: C, channels of input and output.
        num_heads: heads, dividing `embed_dim`.
        kernel_size, dilation, stride, is_causal, border: which keys a query reads, see `Neighborhood`.
        rel_pos_bias: learn a bias per head and relative position.
        qkv_bias: give the projection to queries, keys and values a bias.
        qk_scale: factor of the scores, default (C / heads) ** -0.5.
        attn_drop: dropout of attention weights.
        proj_drop: dropout of the output.
        pad_small_inputs: append zeros to axes of x that are shorter than kernel_size * dilation, before the
            projection, and crop the output; natten did so up to 0.15. Otherwise such an input is an error.
        backend: None for the fastest that can run, or its name.

    Example:
        >>> attn = NeighborhoodAttention{rank}D(64, 2, 7, dilation=2, rel_pos_bias=True)
        >>> attn(torch.randn(1, {space}64)).shape
        torch.Size([1, {space}64])

    Source: Hassani et al., arXiv:2204.07143.
    """


class NeighborhoodAttention1D(_NeighborhoodAttention):
    rank = 1
    __doc__ = "Neighborhood attention over a sequence [B, L, C]." + _ARGUMENTS.format(rank=1, space="20, ")


class NeighborhoodAttention2D(_NeighborhoodAttention):
    rank = 2
    __doc__ = "Neighborhood attention over a map [B, H, W, C]." + _ARGUMENTS.format(rank=2, space="14, 20, ")


class NeighborhoodAttention3D(_NeighborhoodAttention):
    rank = 3
    __doc__ = "Neighborhood attention over a volume [B, D, H, W, C]." + _ARGUMENTS.format(
        rank=3, space="14, 14, 15, "
    )
