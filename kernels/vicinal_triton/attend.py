"""Launchers of the attend kernels: what csrc/attend.h asks of a backend, for the tensors of one call."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import attend_bwd as bwd
from . import attend_bwd_keys as bwd_keys
from . import launch, softmax, tiles
from .attend_fwd import attend_fwd_kernel
from .bias_grad import add_bias_grad, row_classes
from .rows import Plan, Rows
from .scores import Bias, Dropout, Mask, Terms

if TYPE_CHECKING:
    from vicinal._attend import AttendCall, AttendGrads

ACTIVATIONS = {
    "softmax": (softmax.softmax_step, softmax.softmax_finish, softmax.softmax_weights, softmax.softmax_slope),
    "relu2": (softmax.relu2_step, softmax.pointwise_finish, softmax.relu2_weights, softmax.relu2_slope),
    "relu": (softmax.relu_step, softmax.pointwise_finish, softmax.relu_weights, softmax.relu_slope),
    "none": (
        softmax.identity_step,
        softmax.pointwise_finish,
        softmax.identity_weights,
        softmax.identity_slope,
    ),
}
BIAS_PROGRAMS = 1024  # programs that share the windows of a bias gradient; bounds the memory of their sums
EXTRA_PROGRAMS = 1024  # programs that share the rows of the gradient of extra rows
DELTA_BLOCK = 32


def attend_fwd(call: AttendCall) -> None:
    """Writes call.out and call.lse."""
    run = Run.of(call)
    if run.windows == 0 or call.q.shape[2] == 0:
        return
    tile = run.tile("fwd")
    step, finish, *_ = ACTIVATIONS[call.activation]
    q_tiles = triton.cdiv(call.plan.q_slots, tile.block_q)
    args = {
        "Q": rows(call.q), "K": rows(call.k), "V": rows(call.v), "ExtraK": rows(run.extra_k),
        "ExtraV": rows(run.extra_v), "Out": rows(call.out), "Lse": rows(call.lse), "q_tiles": q_tiles,
        "STEP": step, "FINISH": finish, **run.args(),
    }  # fmt: skip
    with device_of(call.q):
        run_tile(attend_fwd_kernel, run.windows * q_tiles * run.heads, args, tile)


def attend_bwd(call: AttendCall, grads: AttendGrads) -> None:
    """Writes dq, dk, dv and, where wanted, dbias, dextra_k and dextra_v."""
    run = Run.of(call)
    if run.windows == 0 or run.heads == 0:
        for total in (grads.dbias, grads.dextra_k, grads.dextra_v):
            if total is not None:
                total.zero_()
        return
    tile, keys_apart = run.tile("tile"), call.plan.key_plan is not None
    if keys_apart and call.dropout_p > 0.0 and not call.drop_by_token:
        raise ValueError("keys with a plan of their own have other slots: dropout must count tokens")
    one_tile = not keys_apart and call.plan.q_slots <= tile.block_q and run.key_slots <= tile.block_k
    with device_of(call.q):
        (_bwd_tiles if one_tile else _bwd_passes)(run, grads)


@dataclass(frozen=True)
class Run:
    """A call and what its launches have in common. `extra_k`, `extra_v` are None where no row of theirs is
    seen."""

    call: AttendCall
    windows: int  # samples * plan rows
    heads: int
    extra_k: Tensor | None
    extra_v: Tensor | None
    edge: int
    appended: int
    dtype_class: str
    block_d: int
    block_dv: int

    @staticmethod
    def of(call: AttendCall) -> Run:
        edge, extra_k, extra_v = call.edge_row, call.extra_k, call.extra_v
        n_extra = 0 if extra_k is None else extra_k.shape[1]
        if n_extra == edge and not call.plan.flags & 2:  # the edge row stands for pads, and there are none
            edge, extra_k, extra_v, n_extra = 0, None, None, 0
        return Run(
            call, call.q.shape[0] * call.plan.n_rows, call.q.shape[2], extra_k, extra_v, edge, n_extra - edge,
            dtype_class(call.q.dtype), tiles.power_of_two(call.q.shape[3]),
            tiles.power_of_two(call.v.shape[3]),
        )  # fmt: skip

    @property
    def group(self) -> int:
        """Query heads of a key head."""
        return self.heads // max(1, self.call.k.shape[2])

    @property
    def key_slots(self) -> int:
        return self.call.plan.k_slots + self.appended

    @property
    def acc(self) -> torch.dtype:
        return torch.float64 if self.call.q.dtype == torch.float64 else torch.float32

    def tile(self, kernel: str) -> tiles.Tile:
        dim = max(self.block_d, self.block_dv)
        return tiles.choose(kernel, self.dtype_class, dim, self.call.plan.q_slots, self.key_slots)

    def args(self) -> dict[str, Any]:
        """The arguments that every pass over scores takes."""
        call = self.call
        return {
            "plan": Plan(call.plan.axes, call.plan.rows, call.plan.guard), "terms": terms(call),
            "dropout": dropout(call), "scale": float(call.scale), "mask_value": float(call.mask_value),
            "keep_scale": 1.0 / (1.0 - call.dropout_p) if call.dropout_p < 1.0 else 0.0,
            "n_rows": call.plan.n_rows, "heads": self.heads, "group": self.group,
            "n_extra": self.edge + self.appended,
            "ACC": tl.float64 if self.acc == torch.float64 else tl.float32,
            "PRECISION": "tf32" if self.dtype_class == "tf32" else "ieee",
            "EDGE": self.edge, "APPENDED": self.appended > 0, "REGIONS": bool(call.plan.flags & 1),
            "RANGES": bool(call.plan.flags & 8), "D": call.q.shape[3], "DV": call.v.shape[3],
            "BLOCK_D": self.block_d, "BLOCK_DV": self.block_dv,
        }  # fmt: skip

    def inputs(self, grads: AttendGrads, delta: Tensor | None) -> bwd.Inputs:
        call = self.call
        extra = rows(self.extra_k), rows(self.extra_v)
        return bwd.Inputs(rows(call.q), rows(call.k), rows(call.v), *extra, rows(grads.dout), rows(call.lse),
                          rows(delta))  # fmt: skip


def dtype_class(dtype: torch.dtype) -> str:
    if dtype == torch.float64:
        return "fp64"
    if dtype == torch.float32:
        return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "fp32"
    return "half"


def run_tile(kernel: Any, programs: int, args: dict[str, Any], tile: tiles.Tile) -> None:
    blocks = {"BLOCK_Q": tile.block_q, "BLOCK_K": tile.block_k}
    launch.run(kernel, (programs,), args | blocks, tile.warps, tile.stages)


def device_of(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def rows(x: Tensor | None) -> Rows | None:
    return None if x is None else Rows(x, *x.stride()[:3])


def terms(call: AttendCall) -> Terms:
    bias = None if call.bias is None else Bias(call.bias, call.bias.stride(0), call.bias.shape[1])
    key_bias = None if call.key_bias is None else Rows(call.key_bias, *call.key_bias.stride(), 0)
    mask = call.mask
    if mask is not None:
        stride_m, stride_h, *strides = mask.stride()
        mask = Mask(mask, mask.shape[0], stride_m, stride_h if mask.shape[1] > 1 else 0, *strides)
    return Terms(bias, rows(call.q_scale), rows(call.k_scale), key_bias, mask)


def dropout(call: AttendCall) -> Dropout | None:
    if call.dropout_p == 0.0 or call.seed is None:
        return None
    threshold = min(int(call.dropout_p * 2.0**32), 2**32 - 1)
    bits, n_k = threshold - 2**32 * (threshold >= 2**31), call.k.shape[1] if call.drop_by_token else None
    return Dropout(call.seed, bits, call.head_offset, call.head_total, n_k)


@dataclass(frozen=True)
class Shares:
    """Per window and key tile, or chunk of windows, the gradients of the extra rows: acc [parts, E, H, D], or
    None: not wanted."""

    k: Tensor | None
    v: Tensor | None

    @staticmethod
    def of(run: Run, grads: AttendGrads, parts: int) -> Shares:
        def share(total: Tensor | None) -> Tensor | None:
            if total is None or run.extra_k is None:
                return None
            return total.new_zeros(parts, *total.shape[1:])

        return Shares(share(grads.dextra_k), share(grads.dextra_v))

    def sum_into(self, grads: AttendGrads) -> None:
        for share, total in ((self.k, grads.dextra_k), (self.v, grads.dextra_v)):
            if share is not None and total is not None:
                total.copy_(share.unflatten(0, (total.shape[0], -1)).sum(1))
            elif total is not None:
                total.zero_()


def _bwd_tiles(run: Run, grads: AttendGrads) -> None:
    """Windows of one tile each."""
    call, tile = run.call, run.tile("tile")
    shares = Shares.of(run, grads, run.windows)
    _, _, weights, slope = ACTIVATIONS[call.activation]
    args = {
        "x": run.inputs(grads, grads.dlse), "DQ": rows(grads.dq),
        "grads": bwd.KeyGrads(rows(grads.dk), rows(grads.dv), rows(shares.k), rows(shares.v)),
        "WEIGHTS": weights, "SLOPE": slope, "SOFTMAX": call.activation == "softmax", **run.args(),
    }  # fmt: skip
    if grads.dbias is None:
        args["dbias"] = None
        run_tile(bwd.attend_bwd_tile_kernel, run.windows * run.heads, args, tile)
    else:
        _bias_sums(run, grads.dbias, bwd.attend_bwd_tile_kernel, args, tile, (1, 1))
    shares.sum_into(grads)


def _bwd_passes(run: Run, grads: AttendGrads) -> None:
    """Windows of several tiles, or keys with a plan of their own: delta, dq, dk and dv, extra rows, dbias."""
    call = run.call
    _, _, weights, slope = ACTIVATIONS[call.activation]
    x = run.inputs(grads, _delta(run, grads))
    common = run.args() | {"x": x, "WEIGHTS": weights, "SLOPE": slope}

    tile = run.tile("q")
    q_tiles = triton.cdiv(call.plan.q_slots, tile.block_q)
    args = common | {"DQ": rows(grads.dq), "q_tiles": q_tiles}
    run_tile(bwd.attend_bwd_q_kernel, run.windows * q_tiles * run.heads, args, tile)

    if call.plan.key_plan is None:
        _key_pass(run, common, grads)
    else:
        no_mask = {"plan": call.plan.key_plan, "mask": None}
        of_keys = Run.of(replace(call, extra_k=None, extra_v=None, edge_row=0, **no_mask))
        no_extra = x._replace(extra_k=None, extra_v=None)
        _key_pass(
            of_keys, common | of_keys.args() | {"x": no_extra}, replace(grads, dextra_k=None, dextra_v=None)
        )
        _extra_pass(run, common, grads)

    if grads.dbias is not None:
        tile = run.tile("bias")
        grid = triton.cdiv(call.plan.q_slots, tile.block_q), triton.cdiv(run.key_slots, tile.block_k)
        args = common | {"q_tiles": grid[0], "k_tiles": grid[1]}
        _bias_sums(run, grads.dbias, bwd.attend_bwd_bias_kernel, args, tile, grid)


def _key_pass(run: Run, common: dict[str, Any], grads: AttendGrads) -> None:
    """dk, dv, and extra rows where they are wanted."""
    tile, heads = run.tile("kv"), run.heads // run.group
    k_tiles = triton.cdiv(run.key_slots, tile.block_k)
    shares = Shares.of(run, grads, run.windows * k_tiles)
    key_grads = bwd.KeyGrads(rows(grads.dk), rows(grads.dv), rows(shares.k), rows(shares.v))
    args = common | {"grads": key_grads, "k_tiles": k_tiles, "heads": heads}
    run_tile(bwd_keys.attend_bwd_kv_kernel, run.windows * k_tiles * heads, args, tile)
    shares.sum_into(grads)


def _extra_pass(run: Run, common: dict[str, Any], grads: AttendGrads) -> None:
    """Extra rows where the key pass has none."""
    if grads.dextra_k is None and grads.dextra_v is None:
        return
    samples, heads = run.call.q.shape[0], run.heads // run.group
    slots = run.call.plan.q_slots
    tile = tiles.choose("kv", run.dtype_class, max(run.block_d, run.block_dv), slots, run.appended)
    k_tiles = triton.cdiv(run.appended, tile.block_k)
    chunk = triton.cdiv(run.windows * heads * k_tiles, EXTRA_PROGRAMS)
    chunks = triton.cdiv(run.call.plan.n_rows, chunk)
    shares = Shares.of(run, grads, samples * chunks)
    if run.appended:
        key_grads = bwd.KeyGrads(None, None, rows(shares.k), rows(shares.v))
        args = common | {
            "grads": key_grads,
            "k_tiles": k_tiles,
            "heads": heads,
            "chunks": chunks,
            "chunk": chunk,
        }
        run_tile(bwd_keys.attend_bwd_extra_kernel, samples * chunks * k_tiles * heads, args, tile)
    shares.sum_into(grads)


def _delta(run: Run, grads: AttendGrads) -> Tensor | None:
    """acc [B, Nq, H]: rowsum(dout * out) - dlse for softmax, -dlse or None for the others."""
    call, is_softmax = run.call, run.call.activation == "softmax"
    if not is_softmax and grads.dlse is None:
        return None
    b, n_q, heads, _ = call.q.shape
    delta = torch.empty(b, n_q, heads, dtype=run.acc, device=call.q.device)
    args = {
        "Out": rows(call.out), "DOut": rows(grads.dout), "DLse": rows(grads.dlse), "Delta": rows(delta),
        "n_tokens": b * n_q, "n_q": n_q, "heads": heads, "SOFTMAX": is_softmax,
        "ACC": tl.float64 if run.acc == torch.float64 else tl.float32,
        "DV": call.v.shape[3], "BLOCK_DV": run.block_dv, "BLOCK_N": DELTA_BLOCK,
    }  # fmt: skip
    launch.run(bwd.attend_bwd_delta_kernel, (triton.cdiv(b * n_q, DELTA_BLOCK) * heads,), args, warps=4)
    return delta


def _bias_sums(
    run: Run, dbias: Tensor, kernel: Any, args: dict[str, Any], tile: tiles.Tile, grid: tuple[int, int]
) -> None:
    """Runs a kernel that sums ds over chunks of windows of one class each, and adds the sums into dbias
    [H, T]."""
    plan, heads = run.call.plan, run.heads
    q_side, k_side = grid[0] * tile.block_q, grid[1] * tile.block_k
    wanted = max(1, BIAS_PROGRAMS // (heads * grid[0] * grid[1]))
    all_classes = row_classes(plan.axes, plan.rows, run.appended, dbias.shape[1], heads, q_side, k_side)
    for i, classes in enumerate(all_classes):
        chunks, first = classes.chunks(run.call.q.shape[0], wanted)
        sums = torch.empty(len(chunks), heads, q_side, k_side, dtype=run.acc, device=dbias.device)
        to = bwd.BiasGrad(sums, *sums.stride()[:3], chunks, classes.rows)
        run_tile(kernel, len(chunks) * grid[0] * grid[1] * heads, args | {"dbias": to}, tile)
        add_bias_grad(sums, first, classes, dbias, add=i > 0)
