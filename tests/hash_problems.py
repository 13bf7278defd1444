"""The named problems of hash attention, for tests and benchmarks, and the rule that judges results.

Codes are signs, so a result jumps where a sum is near 0. Results are compared under the codes that the
backend found; the codes are compared apart from that: they may differ from those of float64 only where its
sums are within rounding of a boundary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from joint_problems import TOLERANCE, rms_ratio
from torch import Tensor

from vicinal import hash_attention
from vicinal._hash_op import hash_op
from vicinal._hash_reference import hash_, projections, unpack


@dataclass(frozen=True)
class Problem:
    """One problem of hash attention. layout: "contiguous", "heads" (before the tokens), "channels" (tokens
    last in memory). shared: the tables have no heads. zeros: a few tokens are zero vectors."""

    name: str
    tokens: int
    batch: int = 2
    heads: int = 2
    dim: int = 32
    width: int = 32
    anchors: int = 25
    bits: int = 16
    itself: bool = False
    offset: float | None = None
    layout: str = "contiguous"
    shared: bool = False
    zeros: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def constant(self) -> float:
        return self.bits + 1.0 if self.offset is None else self.offset


PROBLEMS = (
    Problem("ecoformer-stage1", 784, heads=1),
    Problem("ecoformer-stage3", 196, heads=5),
    Problem("self", 100, itself=True),
    Problem("offset", 100, offset=16.5),
    Problem("offset-self", 100, offset=40.0, itself=True),
    Problem("one-token", 1),
    Problem("tokens-17", 17),
    Problem("tokens-128", 128),
    Problem("tokens-513", 513, batch=1),
    Problem("tokens-1100", 1100, batch=1, itself=True),
    Problem("batch-0", 20, batch=0),
    Problem("bits-1", 60, bits=1, anchors=3),
    Problem("bits-8", 60, bits=8, anchors=20),
    Problem("one-anchor", 60, anchors=1),
    Problem("anchors-64", 60, anchors=64),
    Problem("dim-1-1", 60, dim=1, width=1),
    Problem("dim-17-5", 60, dim=17, width=5),
    Problem("dim-64-40", 60, dim=64, width=40, itself=True),
    Problem("dim-16-100", 60, dim=16, width=100),
    Problem("heads-first", 60, layout="heads"),
    Problem("channels", 60, layout="channels"),
    Problem("shared-tables", 60, heads=3, shared=True),
    Problem("zero-tokens", 60, zeros=True),
)
BY_NAME = {p.name: p for p in PROBLEMS}
assert len(BY_NAME) == len(PROBLEMS), "two problems share a name"
TABLES = ("anchors", "weight", "mean")


def make(
    p: Problem, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
) -> dict[str, Tensor]:
    """The tensors of a problem by argument name; qk and v are leaves that require a gradient."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tensors = {}
    for name, width in (("qk", p.dim), ("v", p.width)):
        x = normal(p.batch, p.tokens, p.heads, width)
        if p.zeros and name == "qk":
            x[:, ::7] = 0.0
        x = x.to(device, dtype)
        if p.layout == "heads":
            x = x.transpose(1, 2).contiguous().transpose(1, 2)
        if p.layout == "channels":
            x = x.transpose(1, 3).contiguous().transpose(1, 3)
        tensors[name] = x.detach().requires_grad_()
    lead = () if p.shared else (p.heads,)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    tables = {
        "anchors": F.normalize(normal(*lead, p.anchors, p.dim), dim=-1),
        "weight": 4.0 * p.anchors**-0.5 * normal(*lead, p.bits, p.anchors),
        "mean": 0.6 + 0.02 * normal(*lead, p.anchors),
    }
    return tensors | {name: x.to(device, acc) for name, x in tables.items()}


def run(p: Problem, tensors: dict[str, Tensor], backend: str | None = None) -> Tensor:
    numerator = "self" if p.itself else "sum"
    return hash_attention(**tensors, numerator=numerator, offset=p.offset, backend=backend)


def with_heads(p: Problem, tensors: dict[str, Tensor]) -> list[Tensor]:
    """The tables [H, ..], contiguous, as the op takes them."""
    return [x.expand(p.heads, *x.shape).contiguous() if p.shared else x for x in (tensors[n] for n in TABLES)]


def packed_codes(p: Problem, tensors: dict[str, Tensor], backend: str) -> Tensor:
    """The codes that a backend finds, int32 [B, H, N]."""
    options = (p.itself, p.constant)
    with torch.no_grad():
        return hash_op(backend, False, options, tensors["qk"], tensors["v"], *with_heads(p, tensors))[1]


def upstream(p: Problem, dtype: torch.dtype, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(99)
    grad = torch.randn(p.batch, p.tokens, p.heads, p.width, generator=generator, dtype=torch.float64)
    return grad.to(device, dtype)


def wide(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.detach().double() for name, x in tensors.items()}


def exact(p: Problem, tensors: dict[str, Tensor], words: Tensor) -> list[Tensor]:
    """out, dqk and dv in float64 under the given codes."""
    doubled = wide(tensors)
    leaves = [doubled["qk"].requires_grad_(), doubled["v"].requires_grad_()]
    tables = with_heads(p, doubled)
    out = hash_(*leaves, *tables, itself=p.itself, offset=p.constant, words=words)
    grad = upstream(p, tensors["qk"].dtype, str(out.device)).double()
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def violations(p: Problem, dtype: torch.dtype, backend: str, device: str = "cpu") -> list[str]:
    """What is wrong with a backend's codes, outputs and gradients; empty if nothing is."""
    tensors = make(p, dtype, device)
    words = packed_codes(p, tensors, backend)
    out = run(p, tensors, backend)
    leaves = [tensors["qk"], tensors["v"]]
    found = [out.detach(), *torch.autograd.grad(out, leaves, upstream(p, dtype, str(out.device)))]
    wrong = code_violations(p, dtype, tensors, words)
    for name, x, truth in zip(("out", "dqk", "dv"), found, exact(p, tensors, words)):
        if name == "dqk" and 1 in (p.tokens, p.dim):  # 0 but for rounding: nothing depends on qk
            ratio = float(x.double().square().mean().sqrt())
        else:
            ratio = rms_ratio(x, truth)
        if x.shape != truth.shape or not x.isfinite().all():
            wrong.append(f"{name} has shape {list(x.shape)}, finite: {bool(x.isfinite().all())}")
        elif not ratio <= TOLERANCE[dtype]:
            wrong.append(f"{name}: RMS ratio {ratio:.3g} is above {TOLERANCE[dtype]:.0e}")
    return wrong


def code_violations(p: Problem, dtype: torch.dtype, tensors: dict[str, Tensor], words: Tensor) -> list[str]:
    doubled = wide(tensors)
    y = projections(doubled["qk"], *with_heads(p, doubled))
    code, near = unpack(words, p.bits)
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    within = 100 * eps * (1 + doubled["weight"].abs().sum(-1).max())
    flipped = ((code > 0) != (y >= 0)) & (y.abs() > within)
    crossed = (near != (y.abs() < 1)) & ((y.abs() - 1).abs() > within)
    wrong = [f"{int(flipped.sum())} signs differ"] if flipped.any() else []
    return wrong + ([f"{int(crossed.sum())} straight-through masks differ"] if crossed.any() else [])
