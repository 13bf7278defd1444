"""Attention to few keys: Linformer's projected keys, and Agent attention's pooled queries.

No kernels of their own: both are compositions of PyTorch's fused softmax attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["AgentAttention", "LinformerAttention"]


def _check_heads(dim: int, num_heads: int) -> None:
    if num_heads < 1 or dim % num_heads:
        raise ValueError(f"dim is {dim}, which num_heads = {num_heads} does not divide")


class LinformerAttention(nn.Module):
    """softmax(q (E^T K)^T / sqrt(d)) (F^T V) with E, F [max_len, k] trained: [B, N, C] -> [B, N, C].

    Not causal. A sequence of N <= max_len tokens uses the first N rows of E and F, so results depend on where
    a sequence begins.

    Args:
        dim: C. num_heads: h, dividing `dim`. max_len: the longest sequence. k: projected keys.
        share_kv: F is E. one_kv_head: keys and values have one head, shared by all queries.
        bias: of the projections of q, k and v.

    Example:
        >>> layer = LinformerAttention(64, 4, max_len=512, k=128)
        >>> layer(torch.randn(2, 300, 64)).shape
        torch.Size([2, 300, 64])

    Source: Wang et al., arXiv:2006.04768.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        max_len: int,
        k: int = 256,
        *,
        share_kv: bool = False,
        one_kv_head: bool = False,
        bias: bool = False,
        dropout_p: float = 0.0,
    ) -> None:
        super().__init__()
        _check_heads(dim, num_heads)
        if max_len < 1 or k < 1:
            raise ValueError(f"max_len and k are {max_len} and {k}; they must be at least 1")
        self.num_heads, self.max_len, self.dropout_p = num_heads, max_len, dropout_p
        width = dim // num_heads if one_kv_head else dim
        self.to_q = nn.Linear(dim, dim, bias=bias)
        self.to_k = nn.Linear(dim, width, bias=bias)
        self.to_v = nn.Linear(dim, width, bias=bias)
        self.proj_k = nn.Parameter(torch.empty(max_len, k).uniform_(-(k**-0.5), k**-0.5))
        self.proj_v = None
        if not share_kv:
            self.proj_v = nn.Parameter(torch.empty(max_len, k).uniform_(-(k**-0.5), k**-0.5))
        self.to_out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        if n > self.max_len:
            raise ValueError(f"x has {n} tokens; max_len is {self.max_len}")
        project_v = self.proj_k if self.proj_v is None else self.proj_v
        keys = self.proj_k[:n].T @ self.to_k(x)  # [B, k, width]
        values = project_v[:n].T @ self.to_v(x)
        size = x.shape[-1] // self.num_heads
        q, k, v = (y.unflatten(-1, (-1, size)).transpose(1, 2) for y in (self.to_q(x), keys, values))
        k, v = k.expand(-1, self.num_heads, -1, -1), v.expand(-1, self.num_heads, -1, -1)
        dropout_p = self.dropout_p if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p)
        return self.to_out(out.transpose(1, 2).flatten(-2))


class AgentAttention(nn.Module):
    """Two short softmax attentions by way of pooled queries: [B, H, W, C] -> [B, H, W, C].

    With agents A = q pooled to `agents` x `agents` tokens::

        U = softmax(A k^T / sqrt(d) + b1) v        out = softmax(q A^T / sqrt(d) + b2) U + dwconv3x3(v)

    b1 [h, A, H W] and b2 [h, H W, A] are learned on a grid of `bias_size` and interpolated to the map.

    Args:
        dim: C. num_heads: h, dividing `dim`. agents: side of the pooled map. bias_size: side of the grid on
            which the biases are learned.

    Example:
        >>> layer = AgentAttention(64, 4)
        >>> layer(torch.randn(2, 14, 20, 64)).shape
        torch.Size([2, 14, 20, 64])

    Source: Han et al., arXiv:2312.08874.
    """

    def __init__(
        self, dim: int, num_heads: int, agents: int = 7, bias_size: int = 7, *, qkv_bias: bool = True
    ) -> None:
        super().__init__()
        _check_heads(dim, num_heads)
        if agents < 1 or bias_size < 1:
            raise ValueError(f"agents and bias_size are {agents} and {bias_size}; they must be at least 1")
        self.num_heads, self.agents = num_heads, agents
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.dwc = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        shape = (num_heads, agents**2, bias_size, bias_size)
        self.agent_bias = nn.Parameter(nn.init.trunc_normal_(torch.empty(shape), std=0.02))
        self.token_bias = nn.Parameter(nn.init.trunc_normal_(torch.empty(shape), std=0.02))

    def forward(self, x: Tensor) -> Tensor:
        _, H, W, C = x.shape
        q, k, v = self.qkv(x).chunk(3, -1)  # [B, H, W, C]
        pooled = F.adaptive_avg_pool2d(q.permute(0, 3, 1, 2), self.agents).flatten(2).mT  # [B, A, C]
        tokens = (y.flatten(1, 2) for y in (q, k, v))
        heads = (y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for y in (*tokens, pooled))
        queries, keys, values, agents = heads
        to_agents = self._on_map(self.agent_bias, H, W)  # [h, A, H W]
        to_tokens = self._on_map(self.token_bias, H, W).mT
        gathered = F.scaled_dot_product_attention(agents, keys, values, to_agents.to(x.dtype))
        out = F.scaled_dot_product_attention(queries, agents, gathered, to_tokens.to(x.dtype))
        local = self.dwc(v.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.proj(out.transpose(1, 2).reshape(-1, H, W, C) + local)

    @staticmethod
    def _on_map(bias: Tensor, H: int, W: int) -> Tensor:
        return F.interpolate(bias, (H, W), mode="bilinear").flatten(2)
