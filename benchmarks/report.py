"""The tables of the documentation, generated from committed results: `python -m benchmarks.report`
(`--check`: only look).

A table stands between `<!-- benchmarks NAME -->` and `<!-- end -->`; NAME is a function of this module, so a
table cannot say what no result says. A test fails when one is stale.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from typing import Any

from .machine import RESULTS, ROOT
from .results import load
from .table import Benchmark, grouped, milliseconds, number

PAGES = ("README.md", "docs/benchmarks.md")
MARKED = re.compile(r"(<!-- benchmarks (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
Groups = dict[str, dict[str, Benchmark]]


def runs(name: str) -> list[dict[str, Any]]:
    """Committed results of one family, one for each machine and device."""
    return [load(path) for path in sorted(RESULTS.glob(f"*/{name}-*.json"))]


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """The first column to the left, the others to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def where(run: dict[str, Any]) -> str:
    """One sentence about the machine and the versions."""
    machine, cpu, commit = run["machine_info"], run["machine_info"]["cpu"], run["commit_info"]
    place = (
        machine["gpu"]
        or f"{cpu['brand_raw']} (family {cpu['family']}, model {cpu['model']}), {cpu['cores']} cores"
    )
    isa = "" if machine["gpu"] else f", vicinal on {cpu['isa']}"
    made = f"{run['datetime'][:10]}, commit {(commit['id'] or 'unknown')[:9]}"
    return f"{place}{isa}, PyTorch {machine['torch'].split('+')[0]}; {made}."


def pairs(run: dict[str, Any]) -> dict[tuple[str, str, int], dict[str, dict[str, Benchmark]]]:
    """{(problem, dtype, threads): {direction: members}}, in order."""
    found: dict[tuple[str, str, int], dict[str, dict[str, Benchmark]]] = {}
    for members in grouped(run["benchmarks"]).values():
        p = next(iter(members.values()))["params"]
        found.setdefault((p["problem"], p["dtype"], p["threads"]), {})[p["direction"]] = members
    return found


def ratio(members: dict[str, Benchmark] | None) -> str:
    """Median ratio to the best baseline, with its spread and the baseline's name."""
    extra = None if members is None else members["vicinal"]["extra_info"]
    if extra is None or "ratio" not in extra:
        return "-"
    r = extra["ratio"]
    return f"**{number(r['median'])}x** ({number(r['p20'])}-{number(r['p80'])}) {extra['best_baseline']}"


def extra(members: dict[str, Benchmark] | None, key: str, write: Callable[[Any], str]) -> str:
    info = {} if members is None else members["vicinal"]["extra_info"]
    return write(info[key]) if key in info else "-"


def windowed() -> str:
    """Every case of every machine."""
    header = [
        "problem",
        "dtype",
        "threads",
        "fwd ms",
        "fwd ratio",
        "fwd+bwd ms",
        "fwd+bwd ratio",
        "FMA share",
    ]
    header += ["peak memory", "fwd+bwd memory"]
    parts = []
    for run in runs("windowed"):
        rows = []
        for (problem, dtype, threads), directions in pairs(run).items():
            forward, both = directions.get("fwd"), directions.get("fwd+bwd")
            row = [problem, dtype, str(threads)]
            for members in (forward, both):
                row.append("-" if members is None else milliseconds(members["vicinal"]["stats"]["median"]))
                row.append(ratio(members))
            row.append(extra(forward, "share_of_probe", lambda share: f"{share['median']:.0%}"))
            row += [
                extra(members, "peak_over_least", lambda peak: f"{peak:.2f}x") for members in (forward, both)
            ]
            rows.append(row)
        parts.append(f"{where(run)}\n\n{markdown(header, rows)}")
        parts += [f"Refused: {entry['group']}, {entry['reason']}." for entry in run["refused"]]
    return "\n\n".join(parts)


def baselines() -> str:
    """How much longer each baseline takes, per case."""
    parts = []
    for run in runs("windowed"):
        groups = grouped(run["benchmarks"])
        names = list(
            dict.fromkeys(name for members in groups.values() for name in members if name != "vicinal")
        )
        rows = []
        for group, members in groups.items():
            cells = [
                f"{number(members[n]['extra_info']['ratio_to_ours']['median'])}x" if n in members else "-"
                for n in names
            ]
            rows.append([group.partition("/")[2], *cells])
        parts.append(f"{where(run)}\n\n{markdown(['case', *names], rows)}")
        parts.append(absent(run))
    return "\n\n".join(part for part in parts if part)


def absent(run: dict[str, Any]) -> str:
    """Which baselines could not run, once for each reason."""
    reasons: dict[tuple[str, str], int] = {}
    for entry in run["unavailable"]:
        key = (entry["impl"], entry["reason"])
        reasons[key] = reasons.get(key, 0) + 1
    lines = [f"- `{impl}` did not run in {n} cases: `{why}`" for (impl, why), n in reasons.items()]
    return "\n".join(lines)


def headline() -> str:
    """The README's table: the usual problems in float32 and bfloat16, ratios only."""
    parts = []
    for run in runs("windowed"):
        most = max((threads for _, _, threads in pairs(run)), default=0)
        rows = []
        for (problem, dtype, threads), directions in pairs(run).items():
            if threads == most and any("ratio" in m["vicinal"]["extra_info"] for m in directions.values()):
                members = directions.get("fwd") or directions["fwd+bwd"]
                model = members["vicinal"]["extra_info"]["model"]
                ratios = [ratio(directions.get(d)) for d in ("fwd", "fwd+bwd")]
                rows.append([f"{model} (`{problem}`)", dtype, *ratios])
        parts.append(
            f"{where(run)}\n\n{markdown(['problem', 'dtype', 'forward', 'forward and backward'], rows)}"
        )
    return "\n\n".join(parts)


def models() -> str:
    """Images a second of whole models."""
    parts = []
    for run in runs("models"):
        groups = grouped(run["benchmarks"])
        names = list(dict.fromkeys(name for members in groups.values() for name in members))
        rows = []
        for group, members in groups.items():
            batch = next(iter(members.values()))["params"]["batch"]
            rates = [number(batch / members[n]["stats"]["median"]) if n in members else "-" for n in names]
            rows.append([group.partition("/")[2], *rates, ratio(members)])
        header = ["model and step, images/s", *names, "ratio to the best baseline"]
        parts.append(f"{where(run)}\n\n{markdown(header, rows)}")
    return "\n\n".join(parts)


def overhead() -> str:
    """Microseconds of a call on one small window."""
    parts = []
    for run in runs("overhead"):
        groups = grouped(run["benchmarks"])
        names = list(dict.fromkeys(name for members in groups.values() for name in members))
        rows = []
        for group, members in groups.items():
            micro = [number(members[n]["stats"]["median"] * 1e6) if n in members else "-" for n in names]
            rows.append([group.partition("/")[2], *micro])
        parts.append(f"{where(run)}\n\n{markdown(['microseconds a call', *names], rows)}")
    return "\n\n".join(parts)


TABLES = {table.__name__: table for table in (windowed, baselines, headline, models, overhead)}


def rendered(text: str) -> str:
    """The page with its tables as the results say now."""

    def fill(match: re.Match[str]) -> str:
        return f"{match[1]}{TABLES[match[2]]() or 'No results are committed yet.'}\n{match[3]}"

    return MARKED.sub(fill, text)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a table is stale")
    check = parser.parse_args().check
    stale = []
    for page in PAGES:
        path = ROOT / page
        old = path.read_text()
        new = rendered(old)
        if new != old:
            stale.append(page)
            if not check:
                path.write_text(new)
    print(", ".join(stale) + (" is stale" if check else " written") if stale else "the tables are current")
    return 1 if stale and check else 0


if __name__ == "__main__":
    sys.exit(main())
