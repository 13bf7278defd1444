"""Parts of LMUFormer in plain PyTorch (Liu et al., LMUFormer, arXiv:2402.04882): the Legendre memory that it
is built on, and the spiking self-attention that it is compared with.

The memory (Voelker et al., 2019) keeps, per channel, the coefficients of the last `theta` inputs in Legendre
polynomials: m_t = A m_{t-1} + B u_t. Its response to one input is the same at any time, so that a sequence is
one long convolution. The attention (Zhou et al., Spikformer, arXiv:2209.15425) multiplies queries, keys and
values of zeros and ones, without a softmax. The parameters' names are our own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["LegendreMemory", "SpikingSelfAttention"]


class LegendreMemory(nn.Module):
    """m_t = A m_{t-1} + B u_t for every channel of u: [B, N, C] -> [B, N, C, order].

    Args:
        order: coefficients of a channel. theta: tokens that they describe. length: longest sequence.
    """

    response: Tensor
    transition: Tensor
    inflow: Tensor

    def __init__(self, order: int, theta: float, length: int) -> None:
        super().__init__()
        transition, inflow = legendre_matrices(order, theta)
        state, states = inflow, []
        for _ in range(length):
            states.append(state)
            state = transition @ state
        self.register_buffer("transition", transition.float(), persistent=False)
        self.register_buffer("inflow", inflow.float(), persistent=False)
        self.register_buffer("response", torch.stack(states, 1).float(), persistent=False)  # [order, length]

    def forward(self, u: Tensor) -> Tensor:
        n = u.shape[1]
        if n > self.response.shape[1]:
            raise ValueError(f"u has {n} tokens; length is {self.response.shape[1]}")
        wide = torch.promote_types(u.dtype, torch.float32)
        inputs = torch.fft.rfft(u.to(wide).mT, 2 * n)[:, :, None]  # [B, C, 1, n + 1]
        responses = torch.fft.rfft(self.response[:, :n].to(wide), 2 * n)
        return torch.fft.irfft(inputs * responses, 2 * n)[..., :n].permute(0, 3, 1, 2).to(u.dtype)

    def step(self, u: Tensor, memory: Tensor) -> Tensor:
        """The memory [B, C, order] after one more token u [B, C]."""
        return memory @ self.transition.T.to(memory.dtype) + u[..., None] * self.inflow.to(memory.dtype)


def legendre_matrices(order: int, theta: float) -> tuple[Tensor, Tensor]:
    """A [order, order] and B [order] for steps of one token, the input being held in between; float64."""
    i = torch.arange(order, dtype=torch.float64)
    sign = torch.where(i[:, None] < i, -1.0, (-1.0) ** (i[:, None] - i + 1))
    a = (2 * i[:, None] + 1) / theta * sign
    b = (2 * i + 1) * (-1.0) ** i / theta
    held = torch.zeros(order + 1, order + 1, dtype=torch.float64)
    held[:order, :order], held[:order, order] = a, b
    both = torch.linalg.matrix_exp(held)
    return both[:order, :order], both[:order, order]


class Spike(torch.autograd.Function):
    """[x >= 0]; the gradient is that of a sigmoid of slope 4 (a surrogate)."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        return (x >= 0).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        y = torch.sigmoid(4 * ctx.saved_tensors[0])
        return grad * 4 * y * (1 - y)


def fire(x: Tensor, threshold: float = 1.0) -> Tensor:
    """Leaky neurons along the first axis, time: v += (x - v) / 2, a spike and v = 0 where v >= threshold."""
    v, spikes = torch.zeros_like(x[0]), []
    for now in x:
        v = v + (now - v) / 2
        spike = Spike.apply(v - threshold)
        spikes.append(spike)
        v = v * (1 - spike.detach())
    return torch.stack(spikes)


class SpikingSelfAttention(nn.Module):
    """Neurons after each of q, k, v, after (q k^T) v / 4 and after the projection: [T, B, N, C] -> same.

    Args:
        dim: C. num_heads: h, dividing `dim`.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim is {dim}, which num_heads = {num_heads} does not divide")
        self.num_heads = num_heads
        for name in ("q", "k", "v", "proj"):
            setattr(self, f"{name}_linear", nn.Linear(dim, dim))
            setattr(self, f"{name}_norm", nn.BatchNorm1d(dim))

    def normed(self, name: str, x: Tensor) -> Tensor:
        """A linear layer and its batch norm over all times, samples and tokens."""
        y = getattr(self, f"{name}_linear")(x)
        return getattr(self, f"{name}_norm")(y.flatten(0, 2)).view_as(y)

    def forward(self, x: Tensor) -> Tensor:
        spikes = [fire(self.normed(name, x)).flatten(0, 1) for name in "qkv"]
        q, k, v = (s.unflatten(-1, (self.num_heads, -1)) for s in spikes)
        out = self.attention(q, k, v).flatten(-2).unflatten(0, x.shape[:2])
        return fire(self.normed("proj", fire(out, 0.5)))

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(q k^T) v / 4: [B, N, h, d] -> [B, N, h, d]."""
        return torch.einsum("bihd,bjhd,bjhe->bihe", q, k, v) * 0.25
