"""Segment attention: index building, attention, both together, and whole layers, against padded forms.

Attention alone ("attend") is gather, padded attention and scatter of the baselines against `voxel_attention`;
"layer" adds the projections, which the padded form does for every slot; "build" is the index building.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vicinal import Segments, segments, voxel_attention
from vicinal.nn import SegmentMultiheadAttention

from . import voxel_context
from .measure import Contender, interleave, median, ratios
from .results import Report, Result
from .scenes import batch, scene
from .table import number
from .voxel_published import padded, padded_attention, padded_sets
from .windowed import DTYPES, OURS, reason, spread

VOXELS = 20000
DSVT = (((12, 12, 1), (0, 0, 0)), ((24, 24, 1), (6, 6, 0)))  # window and shift of the two configurations


@dataclass(frozen=True)
class Case:
    """Segments of `VOXELS` voxels of a street scene, channels and heads."""

    name: str
    make: Callable[[Tensor, tuple[int, ...], int], Segments]
    channels: int
    heads: int
    quick: bool = False


def dsvt(coords: Tensor, grid: tuple[int, ...], size: int) -> Segments:
    return segments.dsvt_sets(coords, grid, size, *DSVT[0], 36)[0]


def dsvt_shifted(coords: Tensor, grid: tuple[int, ...], size: int) -> Segments:
    return segments.dsvt_sets(coords, grid, size, *DSVT[1], 36)[1]


def flatformer(coords: Tensor, grid: tuple[int, ...], size: int) -> Segments:
    return segments.flatformer_groups(coords, grid, size, (9, 9), 69)


def ptv3(coords: Tensor, grid: tuple[int, ...], size: int) -> Segments:
    return segments.serialize(coords, grid, size, "hilbert").patches(1024)


CASES = (
    Case("dsvt-s0", dsvt, 192, 8, quick=True),
    Case("dsvt-s1", dsvt_shifted, 192, 8),
    Case("flatformer-69", flatformer, 128, 8),
    Case("ptv3-1024", ptv3, 64, 4),
)


def voxels(count: int) -> tuple[Tensor, tuple[int, ...], int]:
    """`count` voxels of street scenes, a sample per scene, in shuffled rows."""
    samples: list[Any] = []
    grid: tuple[int, ...] = (1, 1, 1)
    left = count
    while left > 0:
        coords, grid = scene("waymo_pillar", len(samples))
        samples.append(coords[:left])
        left -= len(samples[-1])
    return torch.from_numpy(batch(samples, shuffle=0)), tuple(grid), len(samples)


# Attention alone. A baseline takes (q, k, v) [N, h, D] and the padded index.

Index = tuple[Tensor, Tensor, Tensor]


def sdpa(q: Tensor, k: Tensor, v: Tensor, index: Index) -> Tensor:
    """Gather, scaled_dot_product_attention with a mask, scatter."""
    rows, empty, slot_of = index
    q, k, v = (x[rows].transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=~empty[:, None, None])
    return out.transpose(1, 2).flatten(0, 1)[slot_of]


def matmul_softmax(q: Tensor, k: Tensor, v: Tensor, index: Index) -> Tensor:
    """Gather, two products and a softmax, scatter."""
    rows, empty, slot_of = index
    q, k, v = (x[rows].transpose(1, 2) for x in (q * q.shape[-1] ** -0.5, k, v))
    scores = (q @ k.transpose(-1, -2)).masked_fill(empty[:, None, None], -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(0, 1)[slot_of]


def nested(made: Segments) -> Callable[..., Tensor]:
    """SDPA on jagged nested tensors of gathered rows."""
    offsets, order = made.q_ptr.long(), made.q_index.long()
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order))

    def attend(q: Tensor, k: Tensor, v: Tensor, index: Index) -> Tensor:
        q, k, v = (
            torch.nested.nested_tensor_from_jagged(x[order], offsets).transpose(1, 2) for x in (q, k, v)
        )
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return out.values()[back]

    return attend


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def attends(case: Case, made: Segments, backend: str | None) -> dict[str, Attend]:
    """Ours and the baselines; a sample's incomplete last group reads more keys than it has queries, which the
    padded forms leave out."""
    index = padded(made)
    plain = {"sdpa": sdpa, "matmul-softmax": matmul_softmax, "nested": nested(made)}
    found: dict[str, Attend] = {
        OURS: lambda q, k, v: voxel_attention(q, k, v, made, backend=backend)  # type: ignore[dict-item,return-value]
    }
    for name, function in plain.items():
        found[name] = lambda q, k, v, f=function: f(q, k, v, index)  # type: ignore[misc]
    return found


def stepper(function: Callable[..., Tensor], leaves: list[Tensor], dout: Tensor, backward: bool) -> Any:
    if backward:
        return lambda: torch.autograd.grad(function(), leaves, dout)

    def forward() -> Tensor:
        with torch.no_grad():
            return function()

    return forward


def disagreement(got: Tensor, want: Tensor, made: Segments) -> float:
    """Largest difference over the rows whose keys are their queries."""
    own = (made.k_begin == made.q_ptr[:-1]).repeat_interleave((made.q_ptr[1:] - made.q_ptr[:-1]).long())
    rows = made.q_index.long()[own]
    return float((got.detach()[rows] - want.detach()[rows]).abs().max() / want.detach().abs().max())


def attention(
    case: Case, dtype: torch.dtype, backward: bool, backend: str | None, report: Report
) -> list[Contender]:
    coords, grid, size = voxels(VOXELS)
    made = case.make(coords, grid, size)
    generator = torch.Generator().manual_seed(0)
    shape = (len(coords), case.heads, case.channels // case.heads)
    q, k, v, dout = (torch.randn(shape, generator=generator).to(dtype) for _ in range(4))
    leaves = [x.requires_grad_(backward) for x in (q, k, v)]
    want, ready = None, []
    for name, function in attends(case, made, backend).items():
        try:
            out = function(q, k, v)
            want = out if want is None else want
            if (error := disagreement(out, want, made)) > 64 * torch.finfo(dtype).eps:
                raise ArithmeticError(f"differs by {error:.1e}")
            step = stepper(lambda f=function: f(q, k, v), leaves, dout, backward)
            step()
        except Exception as error:
            report.unavailable.append({"group": f"voxel/{case.name}", "impl": name, "reason": reason(error)})
            continue
        ready.append(Contender(name, step))
    return ready


def layer(
    case: Case, dtype: torch.dtype, backward: bool, backend: str | None, report: Report
) -> list[Contender]:
    """With projections: nn.MultiheadAttention on padded sets, and ours on rows, with the same weights."""
    coords, grid, size = voxels(VOXELS)
    made = case.make(coords, grid, size)
    index = padded(made)
    published = nn.MultiheadAttention(case.channels, case.heads, batch_first=True).to(dtype)
    ours = SegmentMultiheadAttention(case.channels, case.heads, backend=backend).to(dtype)
    ours.load_state_dict(published.state_dict())
    x, pos, dout = (torch.randn(len(coords), case.channels).to(dtype) for _ in range(3))
    x.requires_grad_(backward)

    def run_ours() -> Tensor:
        qk = x + pos
        return ours(qk, qk, x, made)[0]

    def run_padded() -> Tensor:
        return padded_attention(published, x + pos, x, *index)

    found = []
    for name, run, module in ((OURS, run_ours, ours), ("multihead-padded", run_padded, published)):
        leaves = [x, *module.parameters()]
        found.append(Contender(name, stepper(run, leaves, dout, backward)))
    if (error := disagreement(run_ours(), run_padded(), made)) > 256 * torch.finfo(dtype).eps:
        report.refused.append({"group": f"voxel/{case.name}", "reason": f"layers differ by {error:.1e}"})
        return []
    return found


def build(count: int) -> list[Contender]:
    """The four plans of a DSVT block: both orders, both window configurations."""
    coords, grid, size = voxels(count)

    def ours() -> Any:
        return [segments.dsvt_sets(coords, grid, size, w, s, 36) for w, s in DSVT]

    def published() -> Any:
        return [padded_sets(coords, list(w), list(s), 36, o) for w, s in DSVT for o in (0, 1)]

    return [Contender(OURS, ours), Contender("unique-bincount-sort", published)]


def block(count: int, backend: str | None) -> list[Contender]:
    """Four plans against the attention of the four layers that use them."""
    from vicinal._voxel_plan import plan_of

    coords, grid, size = voxels(count)
    q, k, v = torch.randn(3, len(coords), 8, 24).unbind(0)

    def plans() -> list[Segments]:
        made = [s for w, shift in DSVT for s in segments.dsvt_sets(coords, grid, size, w, shift, 36)]
        for s in made:
            plan_of(s)
        return made

    known = plans()

    def attend() -> None:
        with torch.no_grad():
            for s in known:
                voxel_attention(q, k, v, s, backend=backend)

    return [Contender("plans", plans), Contender("four attentions", attend)]


def run(
    report: Report,
    threads: tuple[int, ...],
    seconds: float,
    dtypes: tuple[str, ...],
    quick: bool,
    backend: str | None = None,
) -> Iterator[str]:
    """Measure everything on CPUs; yields a line for each group."""
    limits: Any = {"seconds": seconds, "rounds": (3, 5) if quick else (7, 40)}
    for count in threads:
        torch.set_num_threads(count)
        for rows in (VOXELS,) if quick else (VOXELS, 60000):
            group = f"voxel/dsvt-{rows // 1000}k/build/{count}t"
            yield from record(report, group, interleave(build(rows), **limits).contenders, {})
            group = f"voxel/dsvt-{rows // 1000}k/plans-of-block/{count}t"
            yield from record(report, group, interleave(block(rows, backend), **limits).contenders, {})
        if not quick:
            yield from context(count, tuple(d for d in dtypes if d == "float32"), backend, report, limits)
        for case in CASES:
            if quick and not case.quick:
                continue
            for dtype in dtypes:
                for kind, prepare in (("attend", attention), ("layer", layer)):
                    for backward in (False, True):
                        direction = "fwd+bwd" if backward else "fwd"
                        group = f"voxel/{case.name}/{kind}/{dtype}/{direction}/{count}t"
                        ready = prepare(case, DTYPES[dtype], backward, backend, report)
                        if ready:
                            params = {"problem": case.name, "dtype": dtype, "direction": direction}
                            timed = interleave(ready, **limits).contenders
                            yield from record(report, group, timed, {**params, "threads": count})


def context(
    threads: int, dtypes: tuple[str, ...], backend: str | None, report: Report, limits: dict[str, Any]
) -> Iterator[str]:
    """ConDaFormer's planes with contextual tables, in float32 as published."""
    for dtype in dtypes:
        for backward in (False, True):
            direction = "fwd+bwd" if backward else "fwd"
            group = f"voxel/condaformer-planes/attend/{dtype}/{direction}/{threads}t"
            params = {"problem": "condaformer-planes", "dtype": dtype, "direction": direction}
            timed = interleave(voxel_context.attention(DTYPES[dtype], backward, backend), **limits).contenders
            yield from record(report, group, timed, {**params, "threads": threads})


def record(report: Report, group: str, timed: list[Contender], params: dict[str, Any]) -> Iterator[str]:
    """A result each: the first contender is what the others are compared with."""
    first, others = timed[0], timed[1:]
    best = min(others, key=lambda c: median(c.seconds), default=None)
    for c in timed:
        result = Result(group, c.name, params, c.seconds, c.repeats)
        if c is first and best is not None:
            result.extra |= {"best_baseline": best.name, "ratio": spread(ratios(best.seconds, first.seconds))}
        elif c is not first:
            result.extra["ratio_to_ours"] = spread(ratios(c.seconds, first.seconds))
        report.results.append(result)
    rest = ", ".join(f"{c.name} {number(median(ratios(c.seconds, first.seconds)))}x" for c in others)
    yield f"{group:<50} {first.name} {number(median(first.seconds) * 1e3)} ms  ({rest})"
