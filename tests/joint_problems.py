"""The named problems of joint attention, for tests and benchmarks, and the rule that judges results."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vicinal import joint_attention

# RMS of the error over RMS of the float64 result
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 5e-3}
NAMES = ("quad_q", "quad_k", "lin_q", "lin_k", "v", "u", "bias")


@dataclass(frozen=True)
class Problem:
    """One problem of joint attention. mask: "" none, "some" keys of every sample, "sample" all of one.
    layout: "contiguous", "chunks" (all of one wide tensor), "channels" (tokens last in memory)."""

    name: str
    tokens: int
    group: int | None = 16
    batch: int = 2
    dim: int = 8
    width: int = 24
    with_u: bool = True
    gate: bool = False
    causal: bool = False
    mask: str = ""
    activation: str = "relu2"
    bias: bool = False
    quad_scale: float | None = 0.3
    lin_scale: float | None = None
    dropout_p: float = 0.0
    layout: str = "contiguous"

    def __str__(self) -> str:
        return self.name


PROBLEMS = (
    Problem("plain", 64),
    Problem("gate", 64, gate=True),
    Problem("without-u", 50, with_u=False),
    Problem("default-scales", 80, quad_scale=None, gate=True),
    Problem("scales", 40, quad_scale=0.7, lin_scale=-0.4),
    Problem("no-linear-part", 40, lin_scale=0.0, gate=True),
    Problem("short-group", 37, gate=True),
    Problem("one-group", 16),
    Problem("group-above-n", 10),
    Problem("whole", 37, group=None, gate=True),
    Problem("one-token", 1, group=1),
    Problem("group-1", 9, group=1, gate=True),
    Problem("batch-1", 40, batch=1),
    Problem("batch-0", 20, batch=0),
    Problem("causal", 64, causal=True),
    Problem("causal-gate", 53, causal=True, gate=True),
    Problem("causal-without-u", 53, causal=True, with_u=False),
    Problem("causal-long-group", 150, group=100, causal=True),
    Problem("causal-whole", 21, group=None, causal=True),
    Problem("mask", 50, mask="some"),
    Problem("mask-gate", 50, mask="some", gate=True),
    Problem("mask-sample", 40, mask="sample", gate=True),
    Problem("mask-causal", 50, mask="some", causal=True, gate=True),
    Problem("laplace", 50, activation="laplace"),
    Problem("laplace-mask-causal", 50, activation="laplace", mask="some", causal=True, gate=True),
    Problem("bias", 50, bias=True),
    Problem("bias-laplace", 50, bias=True, activation="laplace", mask="some", gate=True),
    Problem("bias-causal", 50, bias=True, causal=True),
    Problem("bias-group-above-n", 10, bias=True),
    Problem("dropout", 50, dropout_p=0.3),
    Problem("dropout-causal-gate", 50, dropout_p=0.5, causal=True, gate=True),
    Problem("dropout-laplace", 41, dropout_p=0.2, activation="laplace", bias=True, mask="some"),
    Problem("chunks", 50, layout="chunks", gate=True),
    Problem("channels", 50, layout="channels", mask="some"),
    Problem("dim-1", 40, dim=1, width=1),
    Problem("dim-17-53", 70, group=33, dim=17, width=53, gate=True),
    Problem("dim-32-130", 70, group=64, dim=32, width=130),
    Problem("dim-64-7", 70, group=20, dim=64, width=7, with_u=False),
    Problem("wide-without-u", 40, dim=16, width=300, with_u=False, batch=1),
    Problem("many-groups", 700, dim=16, width=32, bias=True, batch=1),
    Problem("mossformer", 600, group=256, batch=1, dim=128, width=160, gate=True, quad_scale=None),
    Problem("flash-causal", 600, group=256, batch=1, dim=128, width=96, causal=True, quad_scale=None),
)
BY_NAME = {p.name: p for p in PROBLEMS}
assert len(BY_NAME) == len(PROBLEMS), "two problems share a name"


def make(
    p: Problem, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
) -> dict[str, Tensor]:
    """The tensors of a problem by argument name; those of NAMES are leaves that require a gradient."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    widths = [p.dim] * 4 + [p.width] * (2 if p.with_u else 1)
    drawn = normal(p.batch, p.tokens, sum(widths)).to(device, dtype)
    if p.layout == "channels":
        drawn = drawn.transpose(1, 2).contiguous().transpose(1, 2)
    parts = drawn.split(widths, -1)
    if p.layout == "contiguous":
        parts = tuple(x.contiguous() for x in parts)
    tensors = {name: x.detach().requires_grad_() for name, x in zip(NAMES, parts)}
    if p.bias:
        group = p.tokens if p.group is None else p.group
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        tensors["bias"] = (0.3 * normal(group, group)).to(device, acc).requires_grad_()
    if p.mask:
        ignored = torch.rand(p.batch, p.tokens, generator=generator) < 0.3
        if p.mask == "sample":
            ignored = torch.arange(p.batch)[:, None].expand(-1, p.tokens) == 0
        tensors["key_padding_mask"] = ignored.to(device)
    return tensors


def run(p: Problem, tensors: dict[str, Tensor], backend: str | None = None) -> tuple[Tensor, ...]:
    """The outputs of the public function; the dropout bits are the same in every run."""
    torch.manual_seed(1234)
    result = joint_attention(
        **tensors,
        group_size=p.group,
        is_causal=p.causal,
        activation=p.activation,
        quad_scale=p.quad_scale,
        lin_scale=p.lin_scale,
        dropout_p=p.dropout_p,
        gate=p.gate,
        backend=backend,
    )
    return result if isinstance(result, tuple) else (result,)


def solve(
    p: Problem, tensors: dict[str, Tensor], backend: str | None = None, rounded: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Outputs and the gradients of every tensor. rounded: the dtype that the upstream gradients are rounded
    to before; default that of v."""
    outputs = run(p, tensors, backend)
    generator = torch.Generator().manual_seed(99)
    low = rounded or tensors["v"].dtype
    drawn = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in outputs]
    grads = [g.to(low).to(x) for g, x in zip(drawn, outputs)]
    leaves = {name: x for name, x in tensors.items() if x.requires_grad}
    found = torch.autograd.grad(outputs, list(leaves.values()), grads)
    results = {f"out{i}": x.detach() for i, x in enumerate(outputs)}
    return results | {f"d{name}": g for name, g in zip(leaves, found)}


def widened(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same numbers in float64, as leaves."""
    return {
        name: x.detach().double().requires_grad_() if x.is_floating_point() else x
        for name, x in tensors.items()
    }


def rms_ratio(x: Tensor, truth: Tensor) -> float:
    """RMS of the error over RMS of the truth; of the error alone where the truth is 0."""
    if truth.numel() == 0:
        return 0.0
    error = (x.double() - truth.double()).square().mean().sqrt()
    size = truth.double().square().mean().sqrt()
    return float(error / size) if size > 0 else float(error)


def violations(
    p: Problem, dtype: torch.dtype, backend: str | None = None, device: str = "cpu", seed: int = 0
) -> list[str]:
    """What is wrong with a backend's outputs and gradients; empty if nothing is."""
    tensors = make(p, dtype, device, seed)
    truth = solve(p, widened(tensors), "reference", dtype)
    wrong = []
    for name, x in solve(p, tensors, backend).items():
        ratio = rms_ratio(x, truth[name])
        if x.shape != truth[name].shape or not x.isfinite().all():
            wrong.append(f"{name} has shape {list(x.shape)}, finite: {bool(x.isfinite().all())}")
        elif not ratio <= TOLERANCE[dtype]:
            wrong.append(f"{name}: RMS ratio {ratio:.3g} is above {TOLERANCE[dtype]:.0e}")
    return wrong
