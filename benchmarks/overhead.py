"""What a call costs besides its kernel: the public function on one 7 x 7 window of one head.

A Swin-T makes twelve such calls an image and direction, and the GPU's kernels for one image take about as
long as a slow launch. `raw` launches the compiled kernel on arguments that are already pointers, so public
minus raw is the overhead of Python, checks, the choice of a backend and PyTorch's dispatcher.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vicinal import Windows, _launch, windowed_attention, windowed_attention_qkvpacked
from vicinal._attend import AttendCall, flat
from vicinal.plan import AxisWindows, window_plan

from .measure import Contender, interleave, ratios
from .results import Report, Result
from .windowed import OURS, spread

WINDOWS = Windows(7)


def raw_launch(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], None]:
    """The cpu kernel on this problem, with arguments made beforehand."""
    from vicinal import _C

    axes = tuple(AxisWindows(n, 7, 0, 0, n, 7) for n in q.shape[1:3])
    plan = window_plan(axes, "none", "block", "pad_roll", "end", q.device)
    heads, dim = q.shape[-2:]
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:-1])
    call = AttendCall(
        plan=plan,
        q=flat(q),
        k=flat(k),
        v=flat(v),
        bias=None,
        q_scale=None,
        k_scale=None,
        extra_k=None,
        extra_v=None,
        key_bias=None,
        mask=None,
        seed=None,
        scale=dim**-0.5,
        mask_value=-100.0,
        edge_row=0,
        activation="softmax",
        dropout_p=0.0,
        head_offset=0,
        head_total=heads,
        out=flat(out),
        lse=lse.flatten(1, 2),
    )
    arguments = (*_launch._forward_arguments(call), torch.get_num_threads())
    kept = (call, out, lse)  # the arguments are pointers into these

    def launch() -> None:
        assert kept
        _C.attend_fwd(arguments)

    return launch


def forward(call: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        with torch.no_grad():
            return call()

    return run


def with_gradient(call: Callable[[], Any], leaves: tuple[Tensor, ...]) -> Callable[[], Any]:
    dout = torch.ones_like(call())
    return lambda: torch.autograd.grad(call(), leaves, dout)


def calls(backward: bool, backend: str | None) -> dict[str, Callable[[], Any]]:
    """What is timed: ours, packed and unpacked; the bare kernel; attention of the same window by PyTorch."""
    qkv = torch.randn(1, 7, 7, 3, 1, 32, requires_grad=backward)
    q, k, v = (x.detach().contiguous().requires_grad_(backward) for x in qkv.unbind(-3))
    qw, kw, vw = (x.detach().flatten(1, 2).transpose(1, 2).requires_grad_(backward) for x in (q, k, v))
    ways: dict[str, tuple[Callable[[], Any], tuple[Tensor, ...]]] = {
        OURS: (lambda: windowed_attention_qkvpacked(qkv, WINDOWS, backend=backend), (qkv,)),
        "vicinal, unpacked": (lambda: windowed_attention(q, k, v, WINDOWS, backend=backend), (q, k, v)),
        "sdpa": (lambda: F.scaled_dot_product_attention(qw, kw, vw), (qw, kw, vw)),
    }
    if backward:
        return {name: with_gradient(call, leaves) for name, (call, leaves) in ways.items()}
    found = {name: forward(call) for name, (call, _) in ways.items()}
    return {"raw": raw_launch(q, k, v), **found} if backend in (None, "cpu") else found


def run(report: Report, threads: tuple[int, ...], seconds: float, backend: str | None) -> Iterator[str]:
    """Time both directions; yields a line for each contender."""
    for count in threads:
        torch.set_num_threads(count)
        for backward in (False, True):
            direction = "fwd+bwd" if backward else "fwd"
            group = f"overhead/window7-h1-d32/float32/{direction}/{count}t"
            ready = [Contender(name, call) for name, call in calls(backward, backend).items()]
            timed = interleave(ready, seconds=seconds, rounds=(20, 400))
            params = {
                "problem": "window7-h1-d32",
                "dtype": "float32",
                "direction": direction,
                "threads": count,
            }
            for c in timed.contenders:
                result = Result(group, c.name, {**params, "device": "cpu"}, c.seconds, c.repeats)
                if c.name != OURS:
                    result.extra["ratio_to_ours"] = spread(ratios(c.seconds, timed[OURS]))
                if c.name == OURS and not backward and ready[0].name == "raw":
                    above = [a - b for a, b in zip(c.seconds, timed["raw"], strict=True)]
                    result.extra["above_raw_seconds"] = spread(above)
                report.results.append(result)
                yield line(group, c.name, spread(c.seconds))


def line(group: str, name: str, seconds: dict[str, float]) -> str:
    micro = {key: value * 1e6 for key, value in seconds.items()}
    return f"{group:<44} {name:<18} {micro['median']:7.2f} us ({micro['p20']:.2f}-{micro['p80']:.2f})"
