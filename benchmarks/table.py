"""Results as text: a row as soon as a case is done, the whole table at the end, and a comparison with an
older run.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

Benchmark = dict[str, Any]
COLUMNS = (
    "case", "ours ms", "p20-p80", "best baseline", "ms", "ratio", "p20-p80",
    "GFLOP/s", "GB/s", "of FMA", "peak mem", "max error",
)  # fmt: skip


def number(value: float) -> str:
    """Three significant digits without an exponent."""
    if value == 0 or abs(value) >= 100:
        return f"{value:.0f}"
    digits = 2
    while digits < 6 and abs(value) < 10 ** (2 - digits):
        digits += 1
    return f"{value:.{digits if abs(value) < 10 else 1}f}"


def milliseconds(seconds: float) -> str:
    return number(seconds * 1e3)


def between(spread: dict[str, float], scale: float = 1.0) -> str:
    return f"{number(spread['p20'] * scale)}-{number(spread['p80'] * scale)}"


def grouped(benchmarks: Iterable[Benchmark]) -> dict[str, dict[str, Benchmark]]:
    """{group: {implementation: benchmark}}, in order."""
    groups: dict[str, dict[str, Benchmark]] = {}
    for benchmark in benchmarks:
        groups.setdefault(benchmark["group"], {})[benchmark["params"]["impl"]] = benchmark
    return groups


def cells(group: str, members: dict[str, Benchmark]) -> list[str]:
    """One row of the table: ours against the best baseline."""
    mine = members["vicinal"]
    stats, extra = mine["stats"], mine["extra_info"]
    row = [group.partition("/")[2], milliseconds(stats["median"]), between(stats, 1e3)]
    best = extra.get("best_baseline")
    if best is None:
        row += ["-"] * 4
    else:
        row += [best, milliseconds(members[best]["stats"]["median"])]
        row += [number(extra["ratio"]["median"]) + "x", between(extra["ratio"])]
    row += [number(extra["gflops"]), number(extra["gbps"])] if "gflops" in extra else ["-", "-"]
    row.append(f"{extra['share_of_probe']['median']:.0%}" if "share_of_probe" in extra else "-")
    if "peak_extra_bytes" in extra:
        row.append(f"{number(extra['peak_extra_bytes'] / 1e6)} MB {extra['peak_over_least']:.2f}x")
    else:
        row.append("-")
    row.append(f"{max(extra['errors'].values()):.1e}" if "errors" in extra else "-")
    return row


def others(members: dict[str, Benchmark]) -> str:
    """Every baseline of one case with its ratio to ours."""
    listed = [
        f"{name} {number(member['extra_info']['ratio_to_ours']['median'])}x"
        for name, member in members.items()
        if name != "vicinal"
    ]
    return ", ".join(listed)


def render(rows: list[list[str]], header: tuple[str, ...] = COLUMNS) -> str:
    """Aligned columns, the first to the left."""
    table = [list(header), *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    lines = []
    for row in table:
        padded = [
            c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def final(run: dict[str, Any]) -> str:
    """The table of a run, then what was refused and what could not run."""
    groups = grouped(run["benchmarks"])
    parts = [render([cells(group, members) for group, members in groups.items()])] if groups else []
    if run["refused"]:
        parts.append("Refused, because the result is wrong:")
        parts += [f"  {entry['group']}: {entry['reason']}" for entry in run["refused"]]
    if run["unavailable"]:
        parts.append("Baselines that did not run:")
        parts += unavailable(run["unavailable"])
    return "\n".join(parts)


def unavailable(entries: list[dict[str, str]]) -> list[str]:
    """One line per baseline and reason, with how many cases it concerns."""
    counts: dict[tuple[str, str], list[str]] = {}
    for entry in entries:
        counts.setdefault((entry["impl"], entry["reason"]), []).append(entry["group"])
    lines = []
    for (impl, why), groups in counts.items():
        more = f" and {len(groups) - 1} more" if len(groups) > 1 else ""
        lines.append(f"  {impl} in {groups[0]}{more}: {why}")
    return lines


def comparison(new: dict[str, Any], old: dict[str, Any]) -> str:
    """Cases of both runs. Milliseconds of two runs do not compare; ratios to baselines and shares of the
    probe do.
    """
    before = grouped(old["benchmarks"])
    rows = []
    for group, members in grouped(new["benchmarks"]).items():
        if group not in before or "vicinal" not in before[group]:
            continue
        pair = [before[group]["vicinal"], members["vicinal"]]
        times = [milliseconds(b["stats"]["median"]) for b in pair]
        rows.append([group, *times, *_change(pair, "ratio", "x"), *_change(pair, "share_of_probe", "")])
    if not rows:
        return "The two runs have no case in common."
    header = ("case", "old ms", "ms", "old ratio", "ratio", "change", "old share", "share", "change")
    return render(rows, header)


def _change(pair: list[Benchmark], key: str, unit: str) -> list[str]:
    values = [b["extra_info"].get(key, {}).get("median") for b in pair]
    if None in values:
        return ["-", "-", "-"]
    old, new = values
    shown = [f"{v:.0%}" if unit == "" else number(v) + unit for v in values]
    return [*shown, f"{new / old - 1:+.0%}"]
