"""nn.MultiheadAttention and the models of sets: ours against torch's modules, with the same parameters.

Whole modules, with their projections; models with their plans or padded index tables made anew in each call.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vicinal import accelerate
from vicinal.models import DSVT, FlatFormer, dsvt_pillar, flatformer_waymo
from vicinal.nn import MultiheadAttention

from .measure import Contender, interleave
from .results import Report
from .voxel import DTYPES, OURS, record, stepper, voxels

VOXELS = 20000


@dataclass(frozen=True)
class Case:
    """N sequences of L tokens, C channels, heads; the share of keys that are no padding."""

    name: str
    n: int
    length: int
    channels: int
    heads: int
    filled: float = 1.0

    def padding(self) -> Tensor | None:
        """bool [N, L], left-aligned lengths."""
        if self.filled == 1:
            return None
        share = torch.rand(self.n, generator=torch.Generator().manual_seed(0)) * 2 * self.filled
        lengths = (share * self.length).clamp(1, self.length)
        return torch.arange(self.length)[None] >= lengths[:, None]


CASES = (
    Case("vit-b", 16, 197, 768, 12),
    Case("dsvt-sets", 1000, 36, 192, 8, 0.5),
    Case("words", 1000, 17, 64, 4),
    Case("graphs", 64, 197, 64, 4, 0.25),
    Case("long-padded", 8, 1024, 256, 8, 0.15),
    Case("long", 2, 1024, 256, 8),
)
ASKED = {"weights": True, "no-weights": False}


def module_contenders(case: Case, asked: str, dtype: torch.dtype, backward: bool) -> list[Contender]:
    """torch's module and ours; with weights also ours that never makes them."""
    theirs = nn.MultiheadAttention(case.channels, case.heads, batch_first=True).to(dtype)
    modules: dict[str, nn.Module] = {OURS: MultiheadAttention(case.channels, case.heads, batch_first=True)}
    if ASKED[asked]:
        never = MultiheadAttention(case.channels, case.heads, batch_first=True, weights="never")
        modules['vicinal, weights="never"'] = never
    modules["torch"] = theirs
    x = torch.randn(case.n, case.length, case.channels).to(dtype).requires_grad_(backward)
    dout, padding = torch.randn(x.shape).to(dtype), case.padding()
    found = []
    for name, module in modules.items():
        module.to(dtype).load_state_dict(theirs.state_dict())
        module.train(backward)
        found.append(Contender(name, step(module, x, padding, ASKED[asked], dout, backward)))
    return found


def step(
    module: nn.Module, x: Tensor, padding: Tensor | None, weights: bool, dout: Tensor, backward: bool
) -> Callable[[], Any]:
    def run() -> Tensor:
        return module(x, x, x, padding, need_weights=weights)[0]

    return stepper(run, [x, *module.parameters()], dout, backward)


def block_contenders(name: str, backward: bool) -> list[Contender]:
    """One block of a model on a synthetic scene, with everything that coordinates decide."""
    coords, _, samples = voxels(VOXELS)
    coords = coords[:, [0, 3, 2, 1]].contiguous()
    if name == "dsvt-block":
        reference: Any = DSVT(dsvt_pillar(blocks=(1,)))
        call: Any = lambda model, x: model(x, coords, samples)[0]  # noqa: E731
    else:
        config = flatformer_waymo(blocks=1) if name == "flatformer-block" else None
        reference = FlatFormer(config or flatformer_waymo(blocks=1, window=(9, 9), group_size=69))
        call = lambda model, x: model(x, coords, samples)  # noqa: E731
    ours = copy.deepcopy(reference)
    accelerate(ours)
    x = torch.randn(len(coords), reference.config.embed_dim, requires_grad=backward)
    dout = torch.randn(x.shape)
    with torch.no_grad():
        outs = [call(model.eval(), x) for model in (ours, reference)]
    if not float((outs[0] - outs[1]).abs().max()) < 1e-4 * float(outs[1].abs().max()):
        raise ArithmeticError(f"{name}: accelerated and reference differ")
    found = []
    for label, model in ((OURS, ours), ("multihead-padded", reference)):
        model.train(backward)
        run = stepper(lambda m=model: call(m, x), [x, *model.parameters()], dout, backward)
        found.append(Contender(label, run))
    return found


BLOCKS = ("dsvt-block", "flatformer-block", "flatformer-69-block")


def run(
    report: Report,
    threads: tuple[int, ...],
    seconds: float,
    dtypes: tuple[str, ...],
    quick: bool,
    wanted: list[str] | None = None,
) -> Iterator[str]:
    """Measure on CPUs what has a part of its name in `wanted` (None: all); yields a line for each group."""
    limits: Any = {"seconds": seconds, "rounds": (3, 5) if quick else (5, 40)}
    chosen = [c for c in CASES if wanted is None or any(part in c.name for part in wanted)]
    blocks = [b for b in BLOCKS if wanted is None or any(part in b for part in wanted)]
    for count in threads:
        torch.set_num_threads(count)
        for backward in (False, True):
            direction = "fwd+bwd" if backward else "fwd"
            params = {"dtype": "float32", "direction": direction, "threads": count}
            for name in blocks:
                timed = interleave(block_contenders(name, backward), **limits).contenders
                group = f"mha/{name}/float32/{direction}/{count}t"
                yield from record(report, group, timed, {**params, "problem": name})
            for case in chosen[:2] if quick else chosen:
                for dtype in dtypes:
                    for asked in ASKED:
                        ready = module_contenders(case, asked, DTYPES[dtype], backward)
                        group = f"mha/{case.name}/{asked}/{dtype}/{direction}/{count}t"
                        timed = interleave(ready, **limits).contenders
                        yield from record(
                            report, group, timed, {**params, "problem": case.name, "dtype": dtype}
                        )
