"""Command line: `python -m benchmarks` and a family, such as windowed, mha or models."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from . import joint, layers, linear, mha, models, neighborhood, overhead, table, voxel, windowed
from .results import Report, default_path, load

FAMILIES = ("windowed", "neighborhood", "voxel", "linear", "joint", "mha", "overhead", "layers", "models")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    p.add_argument(
        "family", nargs="?", choices=FAMILIES, default="windowed", help="what to measure (default: windowed)"
    )
    p.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    p.add_argument("--dtype", nargs="+", choices=tuple(windowed.DTYPES), default=["float32", "bfloat16"])
    p.add_argument(
        "--threads", nargs="+", type=int, default=[torch.get_num_threads()], help="default: as PyTorch"
    )
    p.add_argument("--fwd", action="store_true", help="only the forward")
    p.add_argument("--bwd", action="store_true", help="only forward and backward together")
    p.add_argument(
        "--quick", action="store_true", help="two problems, few rounds, nothing compiled, no memory"
    )
    p.add_argument("--full", action="store_true", help="every problem, not only the usual five")
    p.add_argument(
        "--problem", nargs="+", metavar="NAME", help="only problems whose name has one of these parts"
    )
    p.add_argument(
        "--impl",
        nargs="+",
        metavar="NAME",
        choices=(*windowed.BASELINES, *neighborhood.BASELINES),
        help="only these baselines",
    )
    p.add_argument("--backend", help="measure this backend instead of the one that a call would choose")
    p.add_argument("--seconds", type=float, help="time for the rounds of one case (default 6, quick 1)")
    p.add_argument(
        "--json", nargs="?", const="", metavar="FILE", help="write results (default: benchmarks/results/)"
    )
    p.add_argument("--plot", type=Path, metavar="FILE", help="draw times and ratios")
    p.add_argument("--compare", type=Path, metavar="OLD.json", help="compare with an older result")
    p.add_argument("--compile", action="store_true", help="whole models: also compiled by torch.compile")
    p.add_argument("--list", action="store_true", help="list the cases and stop")
    return p


def options(args: argparse.Namespace) -> windowed.Options:
    baselines = tuple(args.impl or (windowed.BASELINES[:2] if args.quick else windowed.BASELINES))
    return windowed.Options(
        problems=windowed.problems(args.problem, quick=args.quick, full=args.full),
        dtypes=tuple(windowed.DTYPES[name] for name in args.dtype),
        directions=(False, True) if args.fwd == args.bwd else (args.bwd,),
        threads=tuple(args.threads),
        device=args.device,
        backend=args.backend,
        baselines=baselines,
        seconds=args.seconds or (1.0 if args.quick else 6.0),
        rounds=(3, 10) if args.quick else (7, 40),
        memory=not args.quick,
    )


def linear_options(args: argparse.Namespace) -> linear.Options:
    return linear.Options(
        problems=linear.selected(args.problem, quick=args.quick, full=args.full),
        dtypes=tuple(windowed.DTYPES[name] for name in args.dtype),
        directions=(False, True) if args.fwd == args.bwd else (args.bwd,),
        threads=tuple(args.threads),
        backend=args.backend,
        quick=args.quick,
        seconds=args.seconds or (1.0 if args.quick else 6.0),
        rounds=(3, 10) if args.quick else (7, 40),
    )


def remaining(started: float, done: int, total: int) -> str:
    seconds = (time.monotonic() - started) / done * (total - done)
    return f"{seconds / 60:.0f} min left" if seconds >= 90 else f"{seconds:.0f} s left"


def run_windowed(args: argparse.Namespace, report: Report) -> None:
    """Run the cases, with a row as soon as one is done."""
    asked = options(args)
    cases, started = asked.cases(), time.monotonic()
    for done, case in enumerate(windowed.run(asked, report), start=1):
        members = table.grouped(r.as_json() for r in report.results if r.group == case.group)
        left = remaining(started, done, len(cases))
        if not members:
            text = f"{case.group}  REFUSED: {report.refused[-1]['reason']}"
        else:
            row = table.cells(case.group, members[case.group])
            rest = table.others(members[case.group])
            text = f"{row[0]:<44} {row[1]:>7} ms  {row[9]:>4} of FMA  {row[5]:>6}  ({rest})"
        print(f"[{done}/{len(cases)}, {left}] {text}", flush=True)
        if args.json is not None:  # a run that is cut off keeps what it has
            report.write(json_path(args))


def run_lines(args: argparse.Namespace, report: Report) -> Iterator[str]:
    """The other families: a line for each thing that they measure."""
    threads = tuple(args.threads)
    if args.family == "neighborhood":
        asked = neighborhood_cases(args)
        baselines = tuple(args.impl or neighborhood.BASELINES[: 3 if args.quick else None])
        seconds = args.seconds or (1.0 if args.quick else 6.0)
        return neighborhood.run(report, asked, baselines, seconds, args.quick, args.backend)
    if args.family == "overhead":
        return overhead.run(report, threads, args.seconds or (1.0 if args.quick else 4.0), args.backend)
    if args.family == "voxel":
        seconds = args.seconds or (1.0 if args.quick else 4.0)
        return voxel.run(report, threads, seconds, tuple(args.dtype), args.quick, args.backend)
    if args.family == "linear":
        return linear.run(linear_options(args), report)
    if args.family == "joint":
        problems = joint.selected(args.problem, quick=args.quick, full=args.full)
        return joint.run(problems, linear_options(args), report)
    if args.family == "mha":
        seconds = args.seconds or (1.0 if args.quick else 4.0)
        return mha.run(report, threads, seconds, tuple(args.dtype), args.quick, args.problem)
    if args.family == "layers":
        return layers.run(
            report, threads, args.seconds or (1.0 if args.quick else 6.0), args.quick, args.problem
        )
    seconds = args.seconds or (2.0 if args.quick else 15.0)
    return models.run(report, threads, seconds, args.quick, args.problem, args.compile)


def neighborhood_cases(args: argparse.Namespace) -> list[neighborhood.Case]:
    dtypes = tuple(windowed.DTYPES[name] for name in args.dtype)
    directions = (False, True) if args.fwd == args.bwd else (args.bwd,)
    return neighborhood.cases(args.problem, dtypes, directions, tuple(args.threads), args.quick, args.full)


def json_path(args: argparse.Namespace) -> Path:
    return Path(args.json) if args.json else default_path(args.family, args.device)


def show_list(args: argparse.Namespace) -> None:
    rows = []
    for case in options(args).cases():
        p = case.problem
        gflop = p.flops_of(case.backward) * 1e-9
        megabytes = p.bytes_of(case.dtype, case.backward) * 1e-6
        shape = f"B{p.batch} {'x'.join(map(str, p.space))} h{p.heads} d{p.head_dim}"
        rows.append(
            [case.group, p.model, shape, repr(p.windows), table.number(gflop), table.number(megabytes)]
        )
    print(table.render(rows, ("case", "model", "shape", "windows", "GFLOP", "least MB")))


def deliver(args: argparse.Namespace, run: dict[str, Any], report: Report) -> None:
    """Print the table, and what else was asked for."""
    print("\n" + table.final(run))
    if args.json is not None:
        report.write(json_path(args))
        print(f"wrote {json_path(args)}")
    if args.plot is not None:
        from . import plot

        plot.draw(run, args.plot)
        print(f"wrote {args.plot}")
    if args.compare is not None:
        print("\n" + table.comparison(run, load(args.compare)))


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no GPU is visible to PyTorch", file=sys.stderr)
        return 2
    if args.list and args.family == "neighborhood":
        print("\n".join(case.group for case in neighborhood_cases(args)))
        return 0
    if args.list:
        show_list(args)
        return 0
    report = Report(args.device)
    if args.family == "windowed":
        run_windowed(args, report)
    else:
        for text in run_lines(args, report):
            print(text, flush=True)
    deliver(args, report.as_json(), report)
    return 1 if report.refused else 0


if __name__ == "__main__":
    sys.exit(main())
