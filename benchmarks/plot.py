"""A picture of a run: the time of every implementation, and by how much ours is faster than the best of the
others.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter

from .table import Benchmark, grouped, number

ACCENT, INK, QUIET, GRID = "#c2410c", "#1f2937", "#6b7280", "#e5e7eb"
STYLES = {  # colour and marker of each baseline, in the order of the legend
    "eager": ("#475569", "o"),
    "sdpa": ("#0284c7", "s"),
    "eager-compiled": ("#94a3b8", "^"),
    "sdpa-compiled": ("#7dd3fc", "v"),
    "flex": ("#65a30d", "P"),
    "reference": ("#475569", "o"),
    "timm": ("#0284c7", "s"),
}
TITLES = {
    "fwd": "Forward",
    "fwd+bwd": "Forward and backward",
    "inference": "Inference",
    "training": "Training step",
}
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def label(members: dict[str, Benchmark], threads: bool) -> str:
    params = members["vicinal"]["params"]
    text = f"{params['problem']}  {SHORT.get(params['dtype'], params['dtype'])}"
    return f"{text}  {params['threads']}T" if threads else text


def draw(run: dict[str, Any], path: Path) -> None:
    """One row of panels for each direction: times to the left, ratios to the right."""
    groups = [m for m in grouped(run["benchmarks"]).values() if "ratio" in m["vicinal"]["extra_info"]]
    directions = list(dict.fromkeys(m["vicinal"]["params"]["direction"] for m in groups))
    if not directions:
        raise ValueError("nothing to draw: no case has a baseline")
    by_direction = [[m for m in groups if m["vicinal"]["params"]["direction"] == d] for d in directions]
    heights = [len(members) for members in by_direction]
    figure, axes = plt.subplots(
        len(directions),
        2,
        figsize=(11.5, 1.5 + 0.36 * sum(heights) + 0.75 * len(directions)),
        gridspec_kw={"height_ratios": heights, "width_ratios": [1.35, 1]},
        squeeze=False,
        layout="constrained",
    )
    threads = len({m["vicinal"]["params"]["threads"] for m in groups}) > 1
    for (left, right), direction, members in zip(axes, directions, by_direction, strict=True):
        names = [label(m, threads) for m in members]
        times(left, names, members)
        speedups(right, members)
        left.set_title(
            TITLES.get(direction, direction), loc="left", fontsize=12, fontweight="bold", color=INK
        )
    axes[-1][0].set_xlabel(
        "milliseconds, logarithmic; line: 20th to 80th percentile", fontsize=9, color=QUIET
    )
    axes[-1][1].set_xlabel("times as fast as the best baseline", fontsize=9, color=QUIET)
    legend(figure, groups)
    figure.suptitle(heading(run, groups), fontsize=10, color=QUIET, x=0.01, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)
    plt.close(figure)


def heading(run: dict[str, Any], groups: list[dict[str, Benchmark]]) -> str:
    machine = run["machine_info"]
    where = machine["gpu"] or f"{machine['cpu']['brand_raw']}, {machine['cpu']['isa']}"
    counts = sorted({m["vicinal"]["params"]["threads"] for m in groups})
    threads = " and ".join(map(str, counts)) + (" thread" if counts == [1] else " threads")
    return f"vicinal against PyTorch {machine['torch'].split('+')[0]} on {where}, {threads}"


def plain(axis: Axes) -> None:
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.spines["bottom"].set_color(GRID)
    axis.tick_params(length=0, labelsize=9, colors=INK)
    axis.grid(axis="x", color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)


def times(axis: Axes, names: list[str], members: list[dict[str, Benchmark]]) -> None:
    """A line a case: a mark for each implementation, with its spread."""
    for y, row in enumerate(members):
        medians = [b["stats"]["median"] * 1e3 for b in row.values()]
        axis.hlines(y, min(medians), max(medians), color=GRID, linewidth=3, zorder=1)
        for name, benchmark in row.items():
            stats = benchmark["stats"]
            mine = name == "vicinal"
            color, marker = (ACCENT, "D") if mine else STYLES.get(name, (QUIET, "x"))
            axis.hlines(y, stats["p20"] * 1e3, stats["p80"] * 1e3, color=color, linewidth=1.6, zorder=2)
            axis.plot(
                stats["median"] * 1e3,
                y,
                marker,
                color=color,
                markersize=8 if mine else 6,
                zorder=4 if mine else 3,
            )
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    plain(axis)


def speedups(axis: Axes, members: list[dict[str, Benchmark]]) -> None:
    """A bar a case, from 1 (as fast as the best baseline) on a logarithmic axis, with its number."""
    for y, row in enumerate(members):
        extra = row["vicinal"]["extra_info"]
        ratio = extra["ratio"]
        color = ACCENT if ratio["median"] >= 1 else QUIET
        axis.barh(y, ratio["median"], height=0.62, color=color, alpha=0.85)
        axis.hlines(y, ratio["p20"], ratio["p80"], color=INK, linewidth=1.4)
        text, end = f"{number(ratio['median'])}x", max(ratio["median"], ratio["p80"])
        beside: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": 9}
        axis.annotate(text, (end, y), (5, 0), color=INK, fontweight="bold", **beside)
        axis.annotate(
            f"vs {extra['best_baseline']}", (end, y), (11 + 6.2 * len(text), 0), color=QUIET, **beside
        )
    axis.axvline(1, color=INK, linewidth=1)
    axis.set_yticks([])
    axis.set_ylim(len(members) - 0.4, -0.6)
    axis.set_xlim(0, 1.6 * max(m["vicinal"]["extra_info"]["ratio"]["p80"] for m in members))
    plain(axis)


def legend(figure: Any, groups: list[dict[str, Benchmark]]) -> None:
    present = {name for row in groups for name in row}
    marks = [plt.Line2D([], [], color=ACCENT, marker="D", linestyle="", markersize=8, label="vicinal")]
    for name, (color, marker) in STYLES.items():
        if name in present:
            marks.append(
                plt.Line2D([], [], color=color, marker=marker, linestyle="", markersize=6, label=name)
            )
    figure.legend(handles=marks, loc="outside lower center", ncols=len(marks), frameon=False, fontsize=9)
