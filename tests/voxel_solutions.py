"""Tensors of a problem of segment attention, the calls, and dense PyTorch over all pairs of rows."""

from __future__ import annotations

from typing import Any

import segment_oracles as oracle
import torch
from rule import TRAINED, Results, accumulator, differentiate, upstream, widened
from rule import dense_errors as errors_of
from torch import Tensor
from voxel_problems import Problem, voxels

from vicinal import ContextTable, KeyBias, RelTable, Rope3D, SegmentGroups, voxel_attention

BOUND, EXTENT = 3, 31  # of relative tables; offsets of context tables


def make(problem: Problem, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, Tensor]:
    """The tensors by name, those of TRAINED as leaves."""
    generator = torch.Generator().manual_seed(0)
    acc, (n_q, n_k), h, d = accumulator(dtype), problem.rows, problem.heads, problem.dim

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    drawn = [normal(n_q, h, d), normal(n_k, h, d), normal(n_k, h, problem.value_dim)]
    low = [x.to(device, dtype) for x in drawn]
    if problem.layout == "packed":
        low = [x.detach() for x in torch.stack(low, 1).unbind(1)]
    if problem.layout == "crop":
        low = [cropped(x) for x in low]
    tensors = dict(zip("qkv", low))
    small: dict[str, Tensor] = {}
    if "rel" in problem.terms:
        small["bias"] = normal(3, 2 * BOUND + 1, h)
    if "context" in problem.terms:
        small |= {n: normal(EXTENT, 3, h, d) * 0.5 for n in ("q_table", "k_table")}
        small["v_table"] = normal(EXTENT, 3, h, problem.value_dim)
    if "rope" in problem.terms:
        small["angles"] = normal(3, d // 6)
    if "key-fixed" in problem.terms:
        b = normal(n_k).masked_fill(torch.rand(n_k, generator=generator) < 0.4, -torch.inf)
        small["fixed"] = b
    for name in ("key", "key-heads"):
        if name in problem.terms:
            small["extra_bias"] = normal(n_k) if name == "key" else normal(n_k, h)
    tensors |= {name: t.to(device, acc) for name, t in small.items()}
    return {name: t.requires_grad_(name in TRAINED) for name, t in tensors.items()}


def cropped(x: Tensor) -> Tensor:
    buffer = x.new_full((x.shape[0] + 1, x.shape[1] + 1, x.shape[2] + 3), float("nan"))
    return buffer[1:, :-1, 2 : 2 + x.shape[2]].copy_(x).detach()


def cells(problem: Problem) -> Tensor:
    """Coordinates of the rows: those of the scene, folded into 0 .. 15."""
    coords = voxels("shell_64" if problem.name != "windows" else "waymo_pillar")[0]
    return (coords[: problem.rows[0], 1:] % 16).to(torch.int32)


def context_cells(problem: Problem) -> list[tuple[int, int, Tensor]]:
    """First head, last head + 1 and cells of the head groups."""
    s, found, first = problem.segments, [], 0
    groups = s.groups if isinstance(s, SegmentGroups) and "apart" in problem.terms else ((s, problem.heads),)
    for i, (_, n) in enumerate(groups):
        found.append((first, first + n, (cells(problem) + 5 * i) % 16))
        first += n
    return found


def terms(problem: Problem, tensors: dict[str, Tensor]) -> Any:
    where = tensors["q"].device
    found: list[Any] = []
    if "bias" in tensors:
        found.append(RelTable(cells(problem).to(where), tensors["bias"]))
    if "q_table" in tensors:
        tables = (tensors["q_table"], tensors["k_table"], tensors["v_table"])
        parts = tuple(c.to(where) for _, _, c in context_cells(problem))
        found.append(ContextTable(parts if "apart" in problem.terms else parts[0], *tables))
    if "angles" in tensors:
        found.append(Rope3D(cells(problem).to(where), tensors["angles"]))
    for name in ("fixed", "extra_bias"):
        if name in tensors:
            found.append(KeyBias(tensors[name]))
    return tuple(found) if len(found) != 1 else found[0]


def run(problem: Problem, tensors: dict[str, Tensor], backend: str | None = None) -> tuple[Tensor, Tensor]:
    device = tensors["q"].device
    segments = problem.segments if device.type == "cpu" else problem.segments.to(device)
    result = voxel_attention(
        tensors["q"],
        tensors["k"],
        tensors["v"],
        segments,
        bias=terms(problem, tensors) or None,
        scale=problem.scale,
        return_lse=True,
        backend=backend,
    )
    assert isinstance(result, tuple)
    return result


def solve(problem: Problem, tensors: dict[str, Tensor], backend: str | None = None) -> Results:
    outputs = run(problem, tensors, backend)
    return differentiate(outputs, gradients(problem, tensors["q"]), tensors)


def gradients(problem: Problem, q: Tensor) -> tuple[Tensor, Tensor]:
    return upstream((problem.rows[0], problem.heads), problem.value_dim, q.dtype, str(q.device))


def seen(problem: Problem) -> Tensor:
    """int64 [heads, Nq, Nk]: how often each query reads each key."""
    count = torch.zeros(problem.heads, *problem.rows, dtype=torch.int64)
    s = problem.segments
    first = 0
    for part, n in s.groups if isinstance(s, SegmentGroups) else ((s, problem.heads),):
        for q_rows, k_rows in oracle.pairs(part):
            for j in k_rows:
                count[first : first + n, q_rows, j] += 1
        first += n
    return count


def rotated(x: Tensor, problem: Problem, angles: Tensor) -> Tensor:
    """Complex multiplication of each pair by exp(i angle)."""
    f = x.shape[-1] // 6
    parts = []
    for a in range(3):
        one, two = x[..., 2 * a * f : (2 * a + 1) * f], x[..., (2 * a + 1) * f : (2 * a + 2) * f]
        turn = cells(problem)[:, a, None].to(x.dtype) * angles[a].to(x.dtype)
        c, s = turn.cos()[:, None], turn.sin()[:, None]
        parts += [one * c - two * s, two * c + one * s]
    return torch.cat(parts, -1)


def looked_up(problem: Problem, table: Tensor) -> Tensor:
    """[N, N, H, D]: the rows of every pair, added up over the axes."""
    parts = []
    for first, last, c in context_cells(problem):
        offset = (c[:, None] - c[None] + EXTENT // 2).long()
        parts.append(sum(table[offset[..., a], a, first:last] for a in range(3)))
    return torch.cat(parts, 2)  # type: ignore[arg-type]


def dense(problem: Problem, tensors: dict[str, Tensor], c: float, backwards: bool) -> Results:
    """Scores of all pairs, every step in the dtype of q; a key that is read twice counts twice."""
    q, k, v = tensors["q"], tensors["k"], tensors["v"]
    if "angles" in tensors:
        q, k = rotated(q, problem, tensors["angles"]), rotated(k, problem, tensors["angles"])
    scale = q.shape[-1] ** -0.5 if problem.scale is None else problem.scale
    parts = [x.flip(-1) if backwards else x for x in (q * c, k, v * c)]
    s = torch.einsum("nhd,mhd->hnm", parts[0], parts[1]) * (scale / c)
    value = None
    if "bias" in tensors:
        for a in range(3):
            offset = (cells(problem)[:, None, a] - cells(problem)[None, :, a]).clamp(-BOUND, BOUND) + BOUND
            s = s + tensors["bias"][a].to(q.dtype)[offset.long()].movedim(-1, 0)
    if "q_table" in tensors:
        tables: Any = [looked_up(problem, tensors[n].to(q.dtype)) for n in ("q_table", "k_table", "v_table")]
        s = (
            s
            + scale * torch.einsum("nhd,nmhd->hnm", q, tables[0])
            + torch.einsum("mhd,nmhd->hnm", k, tables[1])
        )
        value = tables[2]
    for name in ("fixed", "extra_bias"):
        if name in tensors:
            b = tensors[name].to(q.dtype)
            s = s + (b[:, None] if b.dim() == 1 else b).t()[:, None]
    count = seen(problem)
    s = torch.where(count > 0, s, -torch.inf) + count.clamp_min(1).to(q.dtype).log()
    some = (s > -torch.inf).any(-1, keepdim=True)
    top = torch.where(some, s.detach().amax(-1, keepdim=True), 0) if s.shape[-1] else some.to(s.dtype)
    e = torch.exp(s - top)
    total = e.sum(-1, keepdim=True)
    lse = torch.where(some, top + torch.log(torch.where(some, total, 1)), -torch.inf)
    p = e / torch.where(some, total, 1)
    out = torch.einsum("hnm,mhd->nhd", p, parts[2])
    out = (out.flip(-1) if backwards else out) / c
    if "v_table" in tensors:
        assert isinstance(value, Tensor)
        out = out + torch.einsum("hnm,nmhd->nhd", p, value)
    return differentiate((out, lse.squeeze(-1).t()), gradients(problem, q), tensors)


def exact(problem: Problem, tensors: dict[str, Tensor]) -> Results:
    wide = {name: t.cpu() for name, t in tensors.items()}
    return dense(problem, widened(wide), 1.0, False)


def dense_errors(problem: Problem, tensors: dict[str, Tensor], truth: Results) -> dict[str, float]:
    on_cpu = {name: t.detach().cpu().requires_grad_(t.requires_grad) for name, t in tensors.items()}
    return errors_of(
        on_cpu,
        truth,
        lambda t: exact(problem, t),
        lambda t, c, backwards: dense(problem, t, c, backwards),
    )
