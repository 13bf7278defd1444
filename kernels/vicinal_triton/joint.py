"""Launches of joint attention. A kernel sums the linear memory in chunks of tokens, PyTorch over chunks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from vicinal._joint_op import Options

from . import joint_kernels as kernels
from . import launch
from .attend import dtype_class
from .tiles import power_of_two

CHUNK = 512  # tokens of a partial state

# most tokens and columns of a program, and its warps; not timed on a GPU
TILES = {"half": (64, 64, 4), "tf32": (32, 64, 4), "fp32": (32, 32, 8), "fp64": (16, 16, 4)}


def matrix(x: Tensor | None) -> kernels.Matrix:
    there = x is not None and x.dim() == 3
    return kernels.Matrix(x, x.stride(0), x.stride(1)) if there else kernels.Matrix(None, 0, 0)  # type: ignore[union-attr]


class Call:
    """One forward or backward: sizes, tiles, and the arguments that the kernels share."""

    def __init__(self, tensors: Sequence[Any], o: Options) -> None:
        quad_q, quad_k, lin_q, lin_k, self.v, u, bias, ignored, _ = tensors
        self.o, self.lin_q, self.lin_k, self.has_u = o, lin_q, lin_k, u is not None
        self.batch, self.n, width = self.v.shape
        dim, kind = quad_q.shape[-1], dtype_class(self.v.dtype)
        self.group, self.width = min(o.group, self.n), width * (1 + self.has_u)
        self.groups = -(-self.n // o.group)
        tokens, columns, self.warps = TILES[kind]
        self.block = min(tokens, power_of_two(self.group))
        self.columns = min(columns, power_of_two(width))
        self.tiles, self.blocks = -(-width // self.columns), -(-self.group // self.block)
        self.states = self.groups if o.causal else 1
        if bias is not None:
            bias = bias[: self.group, : self.group].contiguous()
        if ignored is not None:
            ignored = ignored.view(torch.uint8)
        scales = (float(o.quad_scale), float(o.lin_scale))
        rows = (matrix(x) for x in (quad_q, quad_k, lin_q, lin_k, self.v, u))
        sizes = (self.n, self.group, self.groups)
        self.inputs = kernels.Inputs(*rows, bias, ignored, *sizes, *scales)
        acc = torch.float64 if self.v.dtype == torch.float64 else torch.float32
        self.acc = acc
        precision = "tf32" if kind == "tf32" else "ieee"
        self.constants = {
            "GATE": o.gate, "HAS_U": self.has_u, "D": dim, "DV": width, "BLOCK_D": power_of_two(dim),
            "BLOCK_V": self.columns, "BLOCK_T": self.block,
            "ACC": tl.float64 if acc == torch.float64 else tl.float32, "PRECISION": precision,
        }  # fmt: skip
        state_precision = "tf32" if kind in ("half", "tf32") else "ieee"  # tf32 holds 16-bit operands exactly
        options = {"CAUSAL": o.causal, "LAPLACE": o.activation == "laplace"}
        self.options = self.constants | options | {"STATE_PRECISION": state_precision}

    def run(self, kernel: Any, columns: bool, **args: Any) -> None:
        """One program per block of tokens, and tile of columns if they are divided."""
        shared = {"p": self.inputs, "states": self.states, "width": self.width, "blocks": self.blocks}
        programs = (self.batch * self.groups * self.blocks, self.tiles if columns else 1)
        launch.run(kernel, programs, args | shared | self.options, self.warps)

    def sum_states(self, left: Tensor, upstream: kernels.Upstream | None, scale: float) -> Tensor:
        """[B, states, D, width]: the linear memory, or its gradient where upstream is given."""
        chunk = self.group if self.o.causal else min(self.n, CHUNK)
        chunks = -(-self.n // chunk)
        dim = left.shape[-1]
        parts = torch.empty(self.batch, chunks, dim, self.width, dtype=self.acc, device=left.device)
        nothing = kernels.Upstream(*[matrix(None)] * 4)
        args = {
            "p": self.inputs, "left": matrix(left), "upstream": nothing if upstream is None else upstream,
            "state": parts, "chunk": chunk, "chunks": chunks, "width": self.width, "scale": scale,
            "BACKWARD": upstream is not None,
        }  # fmt: skip
        launch.run(
            kernels.joint_state_kernel, (self.batch * chunks, self.tiles), args | self.constants, self.warps
        )
        if not self.o.causal:
            return parts.sum(1, keepdim=True)
        if upstream is not None:
            parts = parts.flip(1)
        before = torch.zeros_like(parts)  # of the chunks before (after)
        torch.cumsum(parts[:, :-1], 1, out=before[:, 1:])
        return before if upstream is None else before.flip(1)


def forward(tensors: Sequence[Any], o: Options, outputs: Sequence[Tensor]) -> None:
    out, other, inner_v, inner_u, state = outputs
    if out.numel() == 0:
        state.zero_()
        return
    call = Call(tensors, o)
    state.copy_(call.sum_states(call.lin_k, None, 1.0))
    written = {"out": out, "other": other, "inner_v": inner_v, "inner_u": inner_u}
    written = {name: matrix(x) for name, x in written.items()}
    call.run(kernels.joint_fwd_kernel, True, **written, state=state)


def backward(
    grads: Sequence[Any],
    saved: Sequence[Tensor],
    tensors: Sequence[Any],
    o: Options,
    results: Sequence[Tensor],
) -> None:
    dquad_q, dquad_k, dlin_q, dlin_k, dv, du, dbias = results
    v, bias = tensors[4], tensors[6]
    if v.numel() == 0:
        for x in results:
            x.zero_()
        return
    call = Call(tensors, o)
    inner_v, inner_u, state = saved
    dout, dother = (torch.zeros_like(v) if x is None else x for x in grads)
    upstream = kernels.Upstream(*(matrix(x) for x in (dout, dother, inner_v, inner_u)))
    dstate = call.sum_states(call.lin_q, upstream, float(o.lin_scale))
    given = {"upstream": upstream}
    call.run(kernels.joint_bwd_values_kernel, True, **given, dv=matrix(dv), du=matrix(du), dstate=dstate)
    pairs = None
    if bias is not None:
        pairs = torch.zeros(call.batch * call.groups, call.group, call.group, dtype=call.acc, device=v.device)
    written = {"dquad_q": matrix(dquad_q), "dlin_q": matrix(dlin_q), "state": state, "pairs": pairs}
    call.run(kernels.joint_bwd_queries_kernel, False, **given, **written)
    written = {"dquad_k": matrix(dquad_k), "dlin_k": matrix(dlin_k), "dstate": dstate}
    call.run(kernels.joint_bwd_keys_kernel, False, **given, **written)
    if pairs is not None:
        dbias.zero_()
        dbias[: call.group, : call.group] = pairs.sum(0)
