"""Launches of hash attention. Partials of blocks of tokens are summed by PyTorch, in a fixed order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from . import hash_kernels as kernels
from . import launch
from .tiles import power_of_two

TOKENS, WARPS = 64, 4  # of a program; not timed on a GPU


def rows(x: Tensor) -> kernels.Rows:
    return kernels.Rows(x, x.stride(0), x.stride(1), x.stride(2))


class Call:
    """One forward or backward: sizes, and the arguments that the kernels share."""

    def __init__(self, tensors: Sequence[Tensor], options: Sequence[Any]) -> None:
        self.qk, self.v, self.anchors, weight, mean = tensors
        itself, offset = options
        self.batch, self.n, self.heads, self.dim = self.qk.shape
        self.width, self.bits = self.v.shape[-1], weight.shape[1]
        self.pairs, self.blocks = self.batch * self.heads, -(-self.n // TOKENS)
        self.size = (self.bits + 1) * self.width + self.bits  # of a state without sigma
        self.acc = torch.float64 if self.qk.dtype == torch.float64 else torch.float32
        acc = tl.float64 if self.acc == torch.float64 else tl.float32
        self.sizes = {"n": self.n, "heads": self.heads, "blocks": self.blocks, "BLOCK_T": TOKENS, "ACC": acc}
        self.dims = {"D": self.dim, "BLOCK_D": power_of_two(self.dim)}
        self.values = {
            "size": self.size, "BITS": self.bits, "DV": self.width, "BLOCK_V": power_of_two(self.width)
        }  # fmt: skip
        self.sums = {"offset": float(offset), "SELF": itself}
        count = self.anchors.shape[1]
        self.tables = {
            "tables": kernels.Tables(self.anchors, weight, mean, count), "BLOCK_M": power_of_two(count)
        }  # fmt: skip

    def run(self, kernel: Any, *shared: dict[str, Any], **args: Any) -> None:
        for given in (self.sizes, *shared):
            args |= given
        launch.run(kernel, (self.pairs * self.blocks,), args, WARPS)

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.acc, device=self.qk.device)


def forward(tensors: Sequence[Tensor], options: Sequence[Any], outputs: Sequence[Tensor]) -> None:
    out, codes, state = outputs
    call = Call(tensors, options)
    units = call.empty(call.pairs, call.blocks, call.dim)
    call.run(kernels.hash_units_kernel, call.dims, qk=rows(call.qk), partial=units)
    mean = (units.sum(1) / call.n).view(call.batch, call.heads, call.dim)
    of_anchors = call.anchors.mean(1), call.anchors.square().sum(-1).mean(1)
    state[..., -1] = 1.0 + of_anchors[1] - 2.0 * (mean * of_anchors[0]).sum(-1)
    partial = call.empty(call.pairs, call.blocks, call.size)
    moved = {"qk": rows(call.qk), "v": rows(call.v), "codes": codes, "state": state, "partial": partial}
    call.run(kernels.hash_codes_kernel, call.dims, call.values, call.tables, **moved)
    state[..., :-1] = partial.sum(1).view(call.batch, call.heads, -1)
    moved = {"v": rows(call.v), "out": rows(out), "codes": codes, "state": state}
    call.run(kernels.hash_fwd_kernel, call.values, call.sums, **moved)


def backward(
    dout: Tensor,
    saved: Sequence[Tensor],
    tensors: Sequence[Tensor],
    options: Sequence[Any],
    results: Sequence[Tensor],
) -> None:
    codes, state = saved
    dqk, dv = results
    call = Call(tensors, options)
    given = {"v": rows(call.v), "dout": rows(dout), "codes": codes, "state": state}
    partial = call.empty(call.pairs, call.blocks, call.size)
    call.run(kernels.hash_bwd_sums_kernel, call.values, call.sums, **given, partial=partial)
    total = partial.sum(1)
    dx, slopes = call.empty(call.pairs, call.n, call.dim), call.empty(call.pairs, call.n)
    written = {"dv": rows(dv), "dx": dx, "slopes": slopes, "total": total, "qk": rows(call.qk)}
    call.run(kernels.hash_bwd_kernel, call.dims, call.values, call.sums, call.tables, **given, **written)
    sigma = state[..., -1].reshape(-1)
    each = slopes.sum(1) / (2.0 * sigma.square() * call.n * call.anchors.shape[1])
    of_anchors = -2.0 * call.anchors.sum(1).repeat(call.batch, 1)  # [B * heads, D]
    constant = each[:, None] * of_anchors
    call.run(kernels.hash_bwd_qk_kernel, call.dims, qk=rows(call.qk), dqk=rows(dqk), dx=dx, constant=constant)
