"""Launches of linear attention: one job of numerators, and one more of denominators where those have
features of their own (their values are all 1)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import triton.language as tl
from torch import Tensor

from . import launch, linear_sums, tiles
from . import linear_kernels as kernels
from .attend import dtype_class
from .linear_maps import MAPS
from .linear_tokens import Lines, Strided, Sums

if TYPE_CHECKING:
    from vicinal._linear_op import LinearCall, LinearGrads, LinearResults

SCANNED = 1024  # elements of the sums that a program of a scan has
FEW_KEYS = 16  # up to here products are exact: with one key, gradients are what rounding leaves
Pair = tuple[Tensor | None, Tensor | None]  # of S and of z


def strided(x: Tensor | None) -> Strided:
    return Strided(None, 0, 0, 0, 0) if x is None else Strided(x, *x.stride())


@dataclass(frozen=True)
class Parts:
    """How the tokens of one role are cut: `count` parts of `size` tokens, `each` per sample; packed sequences
    have a table int32 [count, 3] of (sequence, begin, end) and the first part of each sequence, int32
    [sequences + 1]; parts behind the last are empty."""

    tokens: int
    size: int
    each: int
    count: int
    table: Tensor | None = None
    firsts: Tensor | None = None


def cut(tokens: int, size: int, batch: int, ends: Tensor | None) -> Parts:
    if ends is None:
        each = -(-tokens // size)
        return Parts(tokens, size, each, batch * each)
    sequences, count = ends.shape[0] - 1, tokens // size + ends.shape[0] - 1
    counts = (ends[1:] - ends[:-1] + (size - 1)) // size
    firsts = torch.zeros_like(ends)
    torch.cumsum(counts, 0, out=firsts[1:])
    part = torch.arange(count, dtype=torch.int32, device=ends.device)
    r = torch.searchsorted(firsts[1:], part, right=True, out_int32=True)
    inside, r = r < sequences, r.clamp(max=sequences - 1)
    begin = ends[r] + (part - firsts[r]) * size
    end = torch.minimum(begin + size, ends[r + 1])
    table = torch.stack((r, begin * inside, end * inside), 1)
    return Parts(tokens, size, 0, count, table, firsts)


def part_size(mask: str, keys: int, block: int, wish: int, tile: tiles.LinearTile) -> int:
    """Tokens of a part; of the problem's length alone, so that a sample's sums do not depend on the batch."""
    if mask == "full":
        return max(tile.part, -(-keys // (64 * tile.tokens)) * tile.tokens)
    if mask == "causal":
        size = min(1024, tiles.power_of_two(wish)) if wish else tile.part
        return min(size, tiles.power_of_two(keys))
    return max(block, tile.tokens // block * block)


@dataclass(frozen=True)
class Job:
    """Sums over keys that queries read. norm: "" not normalised, "own" denominators of the same features,
    "given" they come from a job of their own."""

    call: LinearCall
    norm: str

    @property
    def full(self) -> bool:
        return self.call.mask == "full"

    @cached_property
    def kind(self) -> str:
        dtype = self.call.q.dtype
        if self.full and self.call.k.shape[1] <= FEW_KEYS and dtype != torch.float64:
            return "fp32"
        return "tf32" if dtype == torch.float16 else dtype_class(dtype)

    @cached_property
    def tile(self) -> tiles.LinearTile:
        call = self.call
        longest = max(call.q.shape[1], call.k.shape[1])
        if call.mask == "causal" and call.chunk_size:
            longest = min(longest, call.chunk_size)
        return tiles.choose_linear(self.kind, longest, self.width, call.v.shape[3])

    @property
    def acc(self) -> torch.dtype:
        return torch.float64 if self.call.q.dtype == torch.float64 else torch.float32

    @property
    def width(self) -> int:
        return int(self.call.k.shape[3]) + (self.call.constant != 0)

    @property
    def heads(self) -> int:
        return int(self.call.v.shape[2])

    @property
    def sizes(self) -> tuple[int, int]:
        """Elements of S and of z."""
        return self.width * self.call.v.shape[3], self.width if self.norm == "own" else 0

    @property
    def pairs(self) -> bool:
        """Tokens of one part see each other."""
        return self.call.mask == "causal" or 0 < self.call.block_size <= self.tile.tokens

    @cached_property
    def size(self) -> int:
        call = self.call
        return part_size(call.mask, call.k.shape[1], call.block_size, call.chunk_size, self.tile)

    @cached_property
    def of_keys(self) -> Parts:
        return cut(self.call.k.shape[1], self.size, self.call.k.shape[0], self.call.cu_seqlens)

    @cached_property
    def of_queries(self) -> Parts:
        if self.call.q.shape[1] == self.call.k.shape[1]:
            return self.of_keys
        return cut(self.call.q.shape[1], self.size, self.call.q.shape[0], None)

    def parts(self, keys: bool) -> Parts:
        return self.of_keys if keys else self.of_queries

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.acc, device=self.call.q.device)

    def per_query(self) -> Tensor:
        """[B, H, N]"""
        return self.empty(self.call.q.shape[0], self.heads, self.call.q.shape[1])

    @cached_property
    def lines(self) -> Lines:
        decay, ignored = self.call.decay, self.call.key_mask
        head, b = None, None
        if decay is not None and decay.dim() == 1:
            head = decay.contiguous()
        elif decay is not None:
            b = self.per_query()
            args = self.place(True) | {"decay": decay, "b_out": b, **self.block}
            args |= dict(zip(("stride_b", "stride_n", "stride_h"), decay.stride()))
            run(linear_sums.linear_decay_kernel, (self.of_keys.count * self.heads,), args, self.tile)
        return Lines(None, None, b, head, None if ignored is None else ignored.view(torch.uint8))

    @property
    def block(self) -> dict[str, Any]:
        return {"BLOCK": tiles.power_of_two(self.size), "ACC": self.constants["ACC"]}

    def place(self, keys: bool) -> dict[str, Any]:
        parts = self.parts(keys)
        names = ("table", "n", "heads", "parts", "size")
        return dict(zip(names, (parts.table, parts.tokens, self.heads, parts.each, parts.size)))

    def role(self, name: str, keys: bool, dout: Tensor | None) -> dict[str, Any]:
        """The arguments of one role, own or other."""
        call = self.call
        x, values = (call.k, call.v) if keys else (call.q, dout)
        numbers = (call.param_k, 1.0, call.constant) if keys else (call.param_q, call.scale, 1.0)
        named: dict[str, Any] = {
            f"{name}_{n}": float(x) for n, x in zip(("param", "scale", "constant"), numbers)
        }
        named |= {name: strided(x), f"{name}_values": strided(values)}
        return named | {f"{name.upper()}_PHI": self.maps(keys).phi}

    def maps(self, keys: bool) -> Any:
        return MAPS[self.call.map_k if keys else self.call.map_q]

    @cached_property
    def constants(self) -> dict[str, Any]:
        tile, call = self.tile, self.call
        return {
            "DECAY": call.decay is not None, "CONST": int(call.constant != 0), "KIND": self.kind,
            "ACC": tl.float64 if self.acc == torch.float64 else tl.float32, "D": call.k.shape[3],
            "PRECISION": "tf32" if self.kind == "tf32" else "ieee", "DV": call.v.shape[3],
            "BLOCK_T": tile.tokens, "BLOCK_K": tile.features, "BLOCK_V": tile.values,
        }  # fmt: skip

    def tokens(
        self, kernel: Any, keys: bool, columns: int, dout: Tensor | None, sums: Sums, **args: Any
    ) -> None:
        """A kernel with a program per tile of tokens of one role and tile of columns."""
        parts, after = self.parts(keys), self.call.mask == "inclusive" and not self.pairs
        tiles_of_part = -(-parts.size // self.tile.tokens)
        args |= self.place(keys) | self.role("own", keys, dout) | self.role("other", not keys, dout)
        args |= self.constants | {
            "sums": sums, "group": self.heads // self.call.q.shape[2], "tiles": tiles_of_part,
            "block": max(1, self.call.block_size), "slots_over": int(after != keys), "MASK": self.call.mask,
            "PAIRS": self.pairs, "SUMS_PRECISION": "ieee" if self.kind in ("fp32", "fp64") else "tf32",
        }  # fmt: skip
        if kernel is not kernels.linear_values_kernel:
            args["BLOCK_V"] = self.tile.summed
        run(kernel, (parts.count * tiles_of_part * self.heads, columns), args, self.tile)

    def whole(self, sums: Pair) -> Sums:
        """Of whole sequences."""
        return Sums(*sums, *self.sizes)

    def states(self, states: Tensor) -> Sums:
        """Of slots [slots, heads, S and z]."""
        s, z = self.sizes
        return Sums(states, states.view(-1)[s:] if z else None, s + z, s + z)

    def sum_parts(self, lines: Lines, keys: bool, dout: Tensor | None) -> Tensor:
        """[slots, heads, S and z], the sums of each part in one slot, one more slot per sequence."""
        parts, tile = self.parts(keys), self.tile
        made = self.empty(parts.count + self.call.sequences, self.heads, sum(self.sizes))
        tiles_v = -(-self.call.v.shape[3] // tile.values)
        args = self.place(keys) | self.role("own", keys, dout) | self.constants | {
            "sums": self.states(made), "lines": lines, "group": self.heads // self.call.q.shape[2],
            "slots_over": int(keys), "KEYS": keys, "NORM": self.norm, "TILES_V": tiles_v,
        }  # fmt: skip
        grid = (parts.count * self.heads, -(-self.width // tile.features) * tiles_v)
        run(linear_sums.linear_state_kernel, grid, args, tile)
        return made

    def scan(
        self, states: Tensor, lines: Lines, keys: bool, initial: Pair, final: Pair,
        leaving: Tensor | None = None,
    ) -> Tensor | None:  # fmt: skip
        """Over the parts, in place unless all read the last sums; the dots for the decay's gradient."""
        parts, (s, z) = self.parts(keys), self.sizes
        blocks = -(-(s + z) // SCANNED)
        dots = None if leaving is None else self.empty(parts.count, self.heads, blocks)
        args = self.place(keys) | {
            "states": states, "leaving": leaving, "initial_s": initial[0], "initial_z": initial[1],
            "final_s": final[0], "final_z": final[1], "dots": dots, "lines": lines, "firsts": parts.firsts,
            "slots_over": int(keys), "BACKWARD": not keys, "EACH": not self.full, "SIZE_S": s, "SIZE_Z": z,
            "DECAY": self.constants["DECAY"], "ACC": self.constants["ACC"], "BLOCK": SCANNED,
        }  # fmt: skip
        run(linear_sums.linear_scan_kernel, (self.call.sequences * self.heads, blocks), args, self.tile)
        return dots

    def enter(self, final: Pair) -> Sums:
        """The sums that queries read; `final`, if there, is written."""
        states = self.sum_parts(self.lines, True, None)
        self.scan(states, self.lines, True, (self.call.initial_s, self.call.initial_z), final)
        return self.whole(final) if self.full else self.states(states)


def run(kernel: Any, grid: tuple[int, ...], args: dict[str, Any], tile: tiles.LinearTile) -> None:
    names = set(kernel.arg_names)
    if 0 not in grid:
        launch.run(kernel, grid, {n: x for n, x in args.items() if n in names}, tile.warps, tile.stages)


def of_denominators(call: LinearCall) -> LinearCall:
    """Sums of fd_i . pd_j: values are 1."""
    assert call.q_den is not None
    assert call.k_den is not None
    ones = torch.ones(1, dtype=accumulator(call.v), device=call.v.device).expand(*call.v.shape[:3], 1)
    s = None if call.initial_z is None else call.initial_z[..., None]
    changed = {"map_q": "identity", "map_k": "identity", "param_q": 0.0, "param_k": 0.0, "normalize": False}
    given = {"q": call.q_den, "k": call.k_den, "v": ones, "initial_s": s, "initial_z": None}
    return replace(call, **given, **changed, q_den=None, k_den=None)


def accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def jobs(call: LinearCall) -> tuple[Job, Job | None]:
    if call.q_den is None:
        return Job(call, "own" if call.normalize else ""), None
    return Job(call, "given"), Job(of_denominators(call), "")


def forward(call: LinearCall, results: LinearResults) -> None:
    out, den = results.out, results.den
    if call.cu_seqlens is not None:  # tokens behind the last sequence
        out.zero_()
        if den is not None:
            den.fill_(1.0)
    job, denominators = jobs(call)
    raw = None
    if denominators is not None:
        assert results.final_z is not None
        raw = job.per_query()
        read_values(denominators, raw.transpose(1, 2)[..., None], (results.final_z, None))
    read_values(job, out, (results.final_s, None if denominators else results.final_z), den, raw)


def read_values(
    job: Job, out: Tensor, final: Pair, den: Tensor | None = None, raw: Tensor | None = None
) -> None:
    """out, den and the final sums."""
    args = {"out": strided(out), "raw_den": raw, "eps": float(job.call.eps), "KEYS": False, "NORM": job.norm}
    sums, lines = job.enter(final), job.lines._replace(den=den)
    columns = -(-job.call.v.shape[3] // job.tile.values)
    job.tokens(kernels.linear_values_kernel, False, columns, None, sums, lines=lines, **args)


def backward(call: LinearCall, results: LinearResults, grads: LinearGrads) -> None:
    job, denominators = jobs(call)
    written = [grads.dq, grads.dk, grads.dv, grads.dq_den, grads.dk_den, grads.ddecay]
    if call.cu_seqlens is not None:
        for x in written:
            if x is not None:
                x.zero_()
    d = job.per_query() if call.normalize else None
    differentiate(
        job, grads.dout, results.den, d, (results.final_s, results.final_z), (grads.dfinal_s, grads.dfinal_z),
        (grads.dq, grads.dk, grads.dv), grads.ddecay, (grads.dinitial_s, grads.dinitial_z),
    )  # fmt: skip
    if denominators is None or d is None or results.final_z is None:
        return
    ddecay = None if grads.ddecay is None else torch.zeros_like(grads.ddecay)
    differentiate(
        denominators, d.transpose(1, 2)[..., None], None, None, (results.final_z, None),
        (grads.dfinal_z, None), (grads.dq_den, grads.dk_den, None), ddecay, (grads.dinitial_z, None),
    )  # fmt: skip
    if grads.ddecay is not None and ddecay is not None:
        grads.ddecay += ddecay


def differentiate(
    job: Job, dout: Tensor, den: Tensor | None, d: Tensor | None, final: Pair, dfinal: Pair,
    grads: tuple[Tensor | None, Tensor | None, Tensor | None], ddecay: Tensor | None, dinitial: Pair,
) -> None:  # fmt: skip
    """All gradients of one job."""
    if job.norm != "own":
        final, dfinal, dinitial = (final[0], None), (dfinal[0], None), (dinitial[0], None)
    entering = job.whole(final) if job.full else job.enter((None, None))
    lines = job.lines._replace(den=den, d=d)
    columns = -(-job.width // job.tile.features)
    own_d = job.norm != "" and job.full and columns == 1
    if job.norm != "" and not own_d:
        job.tokens(kernels.linear_inner_kernel, False, 1, dout, entering, lines=lines)
    slopes = [None, None]
    if ddecay is not None:
        slopes = [job.empty(columns, *ddecay.transpose(1, 2).shape) for _ in range(2)]
    features(job, grads[0], False, dout, entering, lines, own_d, slopes[0])
    states = job.sum_parts(lines, False, dout)
    if job.full:  # the sums that keys read are those that the initial state has
        s, z = job.sizes
        shape = (job.call.sequences, job.heads)
        made = job.empty(*shape, s), job.empty(*shape, z) if z else None
        dinitial = tuple(m if x is None else x for x, m in zip(dinitial, made))  # type: ignore[assignment]
    dots = job.scan(states, lines, False, dfinal, dinitial, entering.s if ddecay is not None else None)
    leaving = job.whole(dinitial) if job.full else job.states(states)
    features(job, grads[1], True, dout, leaving, lines, False, slopes[1])
    if grads[2] is not None:
        args = {"out": strided(grads[2]), "raw_den": None, "eps": 0.0, "KEYS": True, "NORM": job.norm}
        values = -(-job.call.v.shape[3] // job.tile.values)
        job.tokens(kernels.linear_values_kernel, True, values, dout, leaving, lines=lines, **args)
    if ddecay is not None and dots is not None:
        args = {"of_queries": slopes[0], "of_keys": slopes[1], "dots": dots, "ddecay": ddecay}
        args |= {"tokens": ddecay.numel(), "tiles": columns, "blocks": dots.shape[2]}
        args |= job.place(True) | job.block | {"BLOCK_DOTS": tiles.power_of_two(dots.shape[2])}
        run(linear_sums.linear_bwd_decay_kernel, (job.of_keys.count * job.heads,), args, job.tile)


def features(
    job: Job, grad: Tensor | None, keys: bool, dout: Tensor, sums: Sums, lines: Lines, own_d: bool,
    slopes: Tensor | None,
) -> None:  # fmt: skip
    """dq or dk; heads that share q and k write apart and are summed in order."""
    assert grad is not None
    heads, shared = job.heads, grad.shape[2]
    each = grad if heads == shared else job.empty(*grad.shape[:2], heads, grad.shape[3])
    if each is not grad and job.call.cu_seqlens is not None:
        each.zero_()
    columns = -(-job.width // job.tile.features)
    args = {
        "out": strided(each), "slopes": slopes, "slopes_step": each.shape[0] * heads * each.shape[1],
        "OWN_SLOPE": job.maps(keys).slope, "KEYS": keys, "OWN_D": own_d, "NORM": job.norm, "lines": lines,
    }  # fmt: skip
    job.tokens(kernels.linear_features_kernel, keys, columns, dout, sums, **args)
    if each is not grad:
        grad.copy_(each.unflatten(2, (shared, heads // shared)).sum(3))
