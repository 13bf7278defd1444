"""natten up to 0.14.4: kernel_size before num_heads, a bias always, small inputs padded."""

from __future__ import annotations

from dataclasses import replace

from vicinal import nn
from vicinal._neighborhood_types import Neighborhood

__all__ = ["NeighborhoodAttention", "NeighborhoodAttention1D", "NeighborhoodAttention2D", "__version__"]
__version__ = "0.14.4"


class _Legacy:
    """The constructor of these versions, before a module of vicinal.nn."""

    def __init__(
        self,
        dim: int,
        kernel_size: int,
        num_heads: int,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        dilation: int | str | None = None,
    ) -> None:
        self.follows_input = isinstance(dilation, str)
        super().__init__(  # type: ignore[call-arg]
            dim,
            num_heads,
            kernel_size,
            dilation=1 if isinstance(dilation, str) else dilation or 1,
            rel_pos_bias=True,
            qkv_bias=qkv_bias,
            qk_scale=qk_scale or None,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            pad_small_inputs=True,
        )

    def window(self, space: tuple[int, ...]) -> Neighborhood:
        """With a string as dilation, the widest that fits the shortest axis."""
        window: Neighborhood = self.neighborhood  # type: ignore[attr-defined]
        if not self.follows_input:
            return window
        return replace(window, dilation=max(min(space) // int(window.kernel_size), 1))  # type: ignore[arg-type]


class NeighborhoodAttention1D(_Legacy, nn.NeighborhoodAttention1D):
    """[B, L, C] -> [B, L, C]; `dilation` a string: as wide as each input allows."""


class NeighborhoodAttention2D(_Legacy, nn.NeighborhoodAttention2D):
    """[B, H, W, C] -> [B, H, W, C]; `dilation` a string: as wide as each input allows."""


class NeighborhoodAttention(NeighborhoodAttention2D):
    """The name of NeighborhoodAttention2D before 0.13."""
