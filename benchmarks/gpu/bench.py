"""Neighborhoods against PyTorch: device time with a cold cache, forward, and forward and backward.

Ours are checked before they are timed: on one sample, against dense attention in float32, their error is at
most twice that of PyTorch in the case's own type (plus four units of rounding); where a dense matrix does not
fit, against each other.
"""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import cases
from .cases import CASES, Case, Solve
from .timing import arguments, chosen, median_of, write

OURS = ("cuda", "triton")


def outputs(
    solve: Solve, given: list[Tensor], table: Tensor | None, dout: Tensor, backward: bool
) -> list[Tensor]:
    """The output and, with `backward`, the gradients of q, k, v and the table."""
    q, k, v = given
    out = solve(q, k, v, table)
    if not backward:
        return [out.detach()]
    leaves = [*given, *([table] if table is not None else [])]
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def one_sample(case: Case) -> tuple[Case, list[Tensor], Tensor | None, Tensor]:
    small = replace(case, batch=1)
    given, table, dout = cases.tensors(small)
    return small, given, table, dout


def largest(x: Tensor, y: Tensor) -> float:
    return float((x.double() - y.double()).abs().max())


def errors(case: Case) -> dict[str, list[float]]:
    """Per implementation, [error, limit] of every tensor, in turn: out, dq, dk, dv, dbias."""
    small, given, table, dout = one_sample(case)
    results = {name: outputs(cases.ours(small, name), given, table, dout, case.backward) for name in OURS}
    eps = torch.finfo(case.dtype).eps
    if small.heads * small.tokens**2 > 2e9:
        scale = [float(x.double().abs().max()) for x in results["cuda"]]
        pairs = zip(results["cuda"], results["triton"], scale, strict=True)
        return {"cuda-triton": [x for a, b, c in pairs for x in (largest(a, b), 8 * eps * c)]}
    wide = [x.detach().float().requires_grad_() for x in given]
    dense = cases.eager(replace(small, dtype=torch.float32))
    truth = outputs(dense, wide, table, dout.float(), case.backward)
    own = outputs(cases.eager(small), given, table, dout, case.backward)
    limits = [2 * largest(x, y) + 4 * eps * float(y.abs().max()) for x, y in zip(own, truth, strict=True)]
    return {
        name: [x for r, y, limit in zip(result, truth, limits, strict=True) for x in (largest(r, y), limit)]
        for name, result in results.items()
    }


def wrong(found: dict[str, list[float]]) -> list[str]:
    return [n for n, e in found.items() if any(not x <= y for x, y in zip(e[::2], e[1::2], strict=True))]


def timed(case: Case, backward: bool) -> dict[str, Any]:
    """Median seconds per implementation; what failed, by name."""
    given, table, dout = cases.tensors(case)
    calls, failed = {}, {}
    for name, make in cases.contenders(case).items():
        try:
            solve = make()
            call = lambda solve=solve: outputs(solve, given, table, dout, backward)  # noqa: E731
            call()
            calls[name] = call
        except Exception as error:
            if name in OURS:
                raise
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
    with torch.set_grad_enabled(backward):
        seconds = dict(zip(calls, median_of(list(calls.values())), strict=True))
    return {"seconds": seconds, "failed": failed}


def measure(case: Case) -> dict[str, Any]:
    torch.cuda.empty_cache()
    torch._dynamo.reset()
    found = errors(case)
    result: dict[str, Any] = {"case": case.name, "errors": found, "wrong": wrong(found)}
    for backward in (False, True) if case.backward else (False,):
        gc.collect()
        result["fwd+bwd" if backward else "fwd"] = timed(case, backward)
    return result


def row(result: dict[str, Any]) -> str:
    text = f"{result['case']}: {'WRONG ' + ' '.join(result['wrong']) if result['wrong'] else 'right'}"
    for direction in ("fwd", "fwd+bwd"):
        if direction in result:
            seconds = result[direction]["seconds"]
            text += f"; {direction} " + ", ".join(f"{n} {s * 1e3:.3f} ms" for n, s in seconds.items())
    return text


def main() -> None:
    args = arguments(__doc__.splitlines()[0])
    results: list[dict[str, Any]] = []
    for name in chosen(CASES, args):
        results.append(measure(CASES[name]))
        print(row(results[-1]), flush=True)
        write(args.json, results)
    if any(r["wrong"] for r in results):
        raise SystemExit("wrong results")


if __name__ == "__main__":
    main()
