"""Named problems of linear attention, shared by the tests and the benchmarks, and the rule that a result is
judged by.

`make` draws the tensors of a problem, `run` calls `linear_attention`, `solve` also differentiates, `exact` is
the float64 solution, and `compare` is the rule. Nothing here imports pytest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vicinal import FeatureMap, LinearState, favor_projection, linear_attention

# rms(x - x64) / rms(x64) at most this, for outputs and gradients, and for gradients of the decay
LIMITS = {
    torch.float64: (1e-12, 1e-12),
    torch.float32: (1e-5, 1e-4),
    torch.float16: (2e-3, 5e-3),
    torch.bfloat16: (5e-3, 1e-2),
}
ROUNDED = ("q", "k", "v", "q_den", "k_den")  # tensors that have the problem's dtype; others have the wide one


@dataclass(frozen=True)
class Problem:
    """Everything but the numbers.

    tokens, keys: N and M (0: as N). heads, shared: heads of v, and how many of them share one of q and k.
    decay: "", "head" or "step". den: width of q_den and k_den, 0: none. mask: "some" of the keys are ignored,
    or "all" of the first sample too. ends: cu_seqlens. layout: memory order of q, k and v. size: of q and k.
    """

    name: str
    tokens: int
    keys: int = 0
    batch: int = 2
    heads: int = 2
    shared: int = 1
    dim: int = 16
    dim_v: int = 0
    feature_map: str | tuple[str, str] = "elu1"
    param: float = 0.0
    causal: bool = False
    decay: str = ""
    steepness: float = 0.2
    normalize: bool = True
    scale: float | None = None
    eps: float = 1e-6
    const: float = 0.0
    den: int = 0
    mask: str = ""
    ends: tuple[int, ...] = ()
    block_size: int | None = None
    block_mode: str = "previous"
    chunk_size: int | None = None
    state: bool = False
    layout: str = "tokens"
    size: float = 1.0
    final: bool = True  # the final state is an output

    def __str__(self) -> str:
        return self.name

    @property
    def value_dim(self) -> int:
        return self.dim_v or self.dim

    @property
    def width(self) -> int:
        """Features, with the channel of const."""
        return (24 if "favor" in self.feature_map else self.dim) + int(self.const != 0)

    @property
    def width_den(self) -> int:
        return self.den + int(self.const != 0) if self.den else self.width

    @property
    def sequences(self) -> int:
        return len(self.ends) - 1 if self.ends else self.batch


def _problems() -> list[Problem]:
    found = [Problem(f"n{n}", n) for n in (1, 15, 16, 17, 63, 64, 65, 500, 1000, 1025)]
    found += [Problem(f"causal-n{n}", n, causal=True) for n in (1, 15, 16, 17, 63, 64, 65, 500, 1025)]
    for dk, dv in ((1, 1), (8, 24), (53, 32), (16, 96), (128, 64), (24, 256), (256, 8)):
        found.append(Problem(f"dims-{dk}-{dv}", 70, dim=dk, dim_v=dv))
        found.append(Problem(f"causal-dims-{dk}-{dv}", 70, dim=dk, dim_v=dv, causal=True, decay="step"))
    found += [
        Problem("wide-v", 40, batch=1, dim=128, dim_v=2048, heads=1, normalize=False),
        Problem("cross", 70, keys=130, dim_v=24),
        Problem("cross-long-queries", 1100, keys=33),
        Problem("no-keys", 5, keys=0, batch=2, mask="all"),
        Problem("relu", 130, feature_map="relu", eps=1e-15),
        Problem("relu-param", 130, feature_map="relu", param=1e-3, eps=0.0),
        Problem("relu2", 130, feature_map="relu2", normalize=False, scale=0.25),
        Problem("exp", 130, feature_map="exp", param=0.5),
        Problem("identity", 130, feature_map="identity", normalize=False, scale=0.25),
        Problem("map-pair", 130, feature_map=("relu", "elu1")),
        Problem("softmax", 130, feature_map="softmax", normalize=False, scale=0.25, mask="some"),
        Problem("focused", 130, feature_map="focused", eps=1e-4),
        Problem("focused-all-heads", 130, feature_map="focused-all", heads=3, eps=1e-4),
        Problem("favor", 130, feature_map="favor", eps=0.0, mask="some"),
        Problem("favor-causal", 130, feature_map="favor", causal=True),
        Problem("scale-eps", 130, scale=0.3, eps=0.7),
        Problem("const", 130, const=0.3, scale=0.5),
        Problem("mask", 130, mask="some", heads=3),
        Problem("mask-all", 130, mask="all", const=0.2),
        Problem("den", 130, feature_map="identity", den=8, scale=0.5),
        Problem("den-options", 130, keys=70, feature_map="relu", den=21, const=0.4, mask="some", shared=2),
        Problem("shared", 130, heads=6, shared=3, dim_v=24, mask="some"),
        Problem("one-qk-head", 130, heads=4, shared=4, normalize=False),
        Problem("state", 130, state=True, const=0.2, dim_v=21),
        Problem("packed", 300, batch=1, ends=(0, 0, 1, 65, 65, 200, 300)),
        Problem("packed-rest", 300, batch=1, ends=(0, 7, 130), state=True, mask="some"),
    ]
    causal: dict[str, Any] = {"causal": True, "tokens": 203}
    found += [
        Problem("causal-head-decay", decay="head", **causal),
        Problem("causal-step-decay", decay="step", **causal),
        Problem("causal-steep-decay", decay="step", steepness=16.0, **causal),
        Problem(
            "causal-retention", decay="head", feature_map="identity", normalize=False, scale=0.25, **causal
        ),
        Problem("causal-const-mask", decay="step", const=0.3, mask="some", **causal),
        Problem("causal-no-decay-const", const=0.3, mask="some", state=True, **causal),
        Problem("causal-den", decay="step", feature_map="identity", den=9, scale=0.5, **causal),
        Problem("causal-den-options", den=9, const=0.2, mask="some", heads=4, shared=2, **causal),
        Problem("causal-shared", decay="step", heads=6, shared=3, dim_v=40, **causal),
        Problem("causal-shared-head-decay", decay="head", heads=4, shared=4, normalize=False, **causal),
        Problem("causal-state", decay="step", state=True, const=0.1, **causal),
        Problem("causal-state-head", decay="head", state=True, normalize=False, **causal),
        Problem("causal-packed", decay="step", batch=1, ends=(0, 0, 64, 65, 190, 203), state=True, **causal),
        Problem("causal-packed-rest", decay="head", batch=1, ends=(0, 100, 150), **causal),
        Problem("causal-chunk-20", decay="step", chunk_size=20, **causal),
        Problem("causal-one-feature", decay="step", dim=1, dim_v=40, shared=2, normalize=False, **causal),
        Problem("blocks-previous", block_size=30, state=True, **causal),
        Problem("blocks-inclusive", block_size=100, block_mode="inclusive", const=0.1, **causal),
        Problem("blocks-den-shared", block_size=64, den=5, heads=4, shared=2, mask="some", **causal),
        Problem(
            "blocks-packed", block_size=16, batch=1, ends=(0, 40, 40, 203), block_mode="inclusive", **causal
        ),
        Problem("blocks-of-one", block_size=1, **causal),
        Problem("huge-logits", size=1e4, final=False, **causal),
        Problem("tiny-logits", size=1e-4, **causal),
        Problem("huge-exp", 130, size=1e3, feature_map="exp", final=False),
    ]
    for layout in ("nchw", "heads", "crop", "strided"):
        found.append(Problem(f"layout-{layout}", 130, dim=20, dim_v=33, mask="some", layout=layout))
        found.append(
            Problem(f"causal-layout-{layout}", 130, dim=20, causal=True, decay="step", layout=layout)
        )
    return found


PROBLEMS = _problems()
BY_NAME = {p.name: p for p in PROBLEMS}
assert len(BY_NAME) == len(PROBLEMS)


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def make(
    p: Problem, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
) -> dict[str, Tensor]:
    """The tensors of a problem; all of float type are leaves that require a gradient."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    keys, qk_heads = p.keys or p.tokens, p.heads // p.shared
    made = {
        "q": normal(p.batch, p.tokens, qk_heads, p.dim) * p.size,
        "k": normal(p.batch, keys, qk_heads, p.dim) * p.size,
        "v": normal(p.batch, keys, p.heads, p.value_dim),
    }
    if p.den:
        made["q_den"] = normal(p.batch, p.tokens, qk_heads, p.den).abs() + 0.1
        made["k_den"] = normal(p.batch, keys, qk_heads, p.den).abs() + 0.1
    if p.decay:
        shape = (p.heads,) if p.decay == "head" else (p.batch, p.tokens, p.heads)
        made["decay"] = -normal(*shape).abs() * p.steepness
    if p.state:
        made["s"] = normal(p.sequences, p.heads, p.width, p.value_dim)
        if p.normalize:
            made["z"] = normal(p.sequences, p.heads, p.width_den).abs() * 3
    if str(p.feature_map).startswith("focused"):
        made["map_scale"] = normal(p.dim)
    leaves = {}
    for name, x in made.items():
        x = x.to(dtype if name in ROUNDED else wide(dtype)).to(device)
        leaves[name] = (
            _laid_out(x, p.layout).detach().requires_grad_() if name in ROUNDED else x.requires_grad_()
        )
    if p.mask:
        ignored = torch.rand(p.batch, keys, generator=generator) < 0.3
        if p.mask == "all":
            ignored[0] = True
        leaves["ignored"] = ignored.to(device)
    if p.ends:
        leaves["ends"] = torch.tensor(p.ends, dtype=torch.int32, device=device)
    if "favor" in p.feature_map:
        leaves["projection"] = favor_projection(p.dim, 24, generator=generator).to(device)
    return leaves


def _laid_out(x: Tensor, layout: str) -> Tensor:
    """The same numbers in another memory order."""
    if layout == "nchw":
        return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    if layout == "heads":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout in ("crop", "strided"):
        step = 2 if layout == "strided" else 1
        batch, n, heads, dim = x.shape
        buffer = x.new_full((batch + 1, n, heads + 1, (dim + 3) * step), float("nan"))
        view = buffer[1:, :, :heads, 2 : 2 + dim * step : step]
        return view.copy_(x)
    return x


def feature_maps(p: Problem, tensors: dict[str, Tensor]) -> Any:
    if p.feature_map == "favor":
        return FeatureMap("favor", projection=tensors["projection"])
    if isinstance(p.feature_map, str) and p.feature_map.startswith("focused"):
        scope = "all" if p.feature_map == "focused-all" else "head"
        return FeatureMap("focused", scale=tensors["map_scale"], norm_scope=scope)
    if p.param:
        assert isinstance(p.feature_map, str)
        return FeatureMap(p.feature_map, param=p.param)
    return p.feature_map


def arguments(p: Problem, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The keyword arguments of `linear_attention`."""
    state = LinearState(tensors["s"], tensors.get("z")) if "s" in tensors else None
    return {
        "feature_map": feature_maps(p, tensors),
        "is_causal": p.causal,
        "decay": tensors.get("decay"),
        "normalize": p.normalize,
        "scale": p.scale,
        "eps": p.eps,
        "const": p.const,
        "q_den": tensors.get("q_den"),
        "k_den": tensors.get("k_den"),
        "key_padding_mask": tensors.get("ignored"),
        "cu_seqlens": tensors.get("ends"),
        "block_size": p.block_size,
        "block_mode": p.block_mode,
        "chunk_size": p.chunk_size,
        "initial_state": state,
    }


def run(p: Problem, tensors: dict[str, Tensor], backend: str | None = None) -> dict[str, Tensor]:
    """out, and s and z of the final state where the feature map lets keys be summed one after the other."""
    options = arguments(p, tensors)
    if not p.final or (p.feature_map in ("softmax", "favor") and not p.causal):
        out = linear_attention(tensors["q"], tensors["k"], tensors["v"], backend=backend, **options)
        assert isinstance(out, Tensor)
        return {"out": out}
    result = linear_attention(
        tensors["q"], tensors["k"], tensors["v"], backend=backend, output_final_state=True, **options
    )
    assert isinstance(result, tuple)
    out, state = result
    found = {"out": out, "s": state.s}
    return found if state.z is None else {**found, "z": state.z}


def differentiate(
    outputs: dict[str, Tensor], tensors: dict[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Outputs, and gradients of all leaves; the gradients of the outputs are fixed numbers of the dtype."""
    generator = torch.Generator().manual_seed(99)
    upstream = [
        torch.randn(x.shape, generator=generator, dtype=torch.float64).to(dtype).to(x)
        for x in outputs.values()
    ]
    leaves = {n: x for n, x in tensors.items() if x.requires_grad}
    grads = torch.autograd.grad(list(outputs.values()), list(leaves.values()), upstream)
    return {n: x.detach() for n, x in outputs.items()} | {f"d{n}": g for n, g in zip(leaves, grads)}


def solve(p: Problem, tensors: dict[str, Tensor], backend: str | None = None) -> dict[str, Tensor]:
    """Outputs and gradients of the public function."""
    return differentiate(run(p, tensors, backend), tensors, tensors["q"].dtype)


def exact(p: Problem, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The reference in float64 on the same numbers."""
    widened = {
        n: (x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x)
        for n, x in tensors.items()
    }
    return differentiate(run(p, widened, "reference"), widened, tensors["q"].dtype)


def rms(x: Tensor) -> float:
    return float(x.detach().double().square().mean().sqrt()) if x.numel() else 0.0


def error(x: Tensor, truth: Tensor) -> float:
    """rms(x - truth) / rms(truth); 0 where both are zero."""
    difference = rms(x.double() - truth.double())
    return 0.0 if difference == 0 else difference / max(rms(truth), 1e-300)


def plain_errors(p: Problem, tensors: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """Per output and gradient rms(x - truth) of plain PyTorch in the problem's own types; for float64 that in
    float32, scaled by the ratio of the two precisions.

    Gradients may cancel: with one key, dq is 0 and every implementation returns what rounding left.
    """
    ratio = 1.0
    if tensors["q"].dtype == torch.float64:
        tensors = {
            n: x.detach().float().requires_grad_(x.requires_grad) if x.is_floating_point() else x
            for n, x in tensors.items()
        }
        truth = exact(p, tensors)
        ratio = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    plain = solve(p, tensors, "reference")
    return {n: ratio * rms(x.double() - truth[n]) for n, x in plain.items()}


def compare(
    got: dict[str, Tensor], truth: dict[str, Tensor], plain: dict[str, float], dtype: torch.dtype
) -> list[str]:
    """The rule: for every output and gradient, all values are finite and

        rms(x - x64) <= LIMITS * rms(x64) + 4 * plain

    with plain = `plain_errors`. Returns a line per violation.
    """
    wrong = []
    if set(got) != set(truth):
        wrong.append(f"results are {sorted(got)}; expected {sorted(truth)}")
    for name in sorted(set(got) & set(truth)):
        x, expected = got[name], truth[name]
        assert bool(expected.isfinite().all()), f"the float64 {name} is not finite"
        if x.shape != expected.shape:
            wrong.append(f"{name} has shape {list(x.shape)}; expected {list(expected.shape)}")
            continue
        if not bool(x.isfinite().all()):
            wrong.append(f"{name} is not finite")
            continue
        found, bound = (
            rms(x.double() - expected),
            LIMITS[dtype][name == "ddecay"] * rms(expected) + 4 * plain[name],
        )
        assert bound < float("inf"), f"plain PyTorch's {name} is not finite, so nothing could fail"
        if not found <= bound:
            wrong.append(f"{name}: error {found:.3g} is above {bound:.3g}")
    return wrong


def violations(
    p: Problem, dtype: torch.dtype, backend: str | None = None, device: str = "cpu", seed: int = 0
) -> list[str]:
    """What is wrong with a backend's outputs and gradients for a problem; empty if nothing is."""
    tensors = make(p, dtype, device, seed)
    truth = exact(p, tensors)
    return compare(solve(p, tensors, backend), truth, plain_errors(p, tensors, truth), dtype)
