"""Draws docs/pictures/neighborhood.svg: the keys that queries read, taken from the plans that kernels run on.

python docs/pictures/neighborhood.py
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

from vicinal import Neighborhood, pattern
from vicinal._neighborhood_plan import neighborhood_plan
from vicinal._neighborhood_types import resolve
from vicinal.plan import ROW_RANGES

TARGET = Path(__file__).with_suffix(".svg")
CELL, GAP, TITLE = 11, 26, 18
QUERY, KEY, EMPTY = "#1f4e8c", "#f2b134", "#eef0f2"
STYLE = "text { font: 11px sans-serif; fill: #333 }"

N = Neighborhood
LINES = (  # 12 tokens: a row per query, a column per key
    ("kernel 5, shift", N(5)),
    ("kernel 5, truncate", N(5, border="truncate")),
    ("kernel 5, causal", N(5, is_causal=True)),
    ("kernel 4: one more on the left", N(4)),
    ("kernel 3, dilation 3", N(3, dilation=3)),
    ("kernel 5, stride 3", N(5, stride=3)),
    ("kernel 4, stride 4: blocks", N(4, stride=4)),
    ("(3, 1), truncate", N((3, 1), border="truncate")),
)
GRIDS = (  # 9 x 9 tokens and some queries
    ("kernel 3, shift", N(3), ((0, 0), (4, 4), (8, 5))),
    ("kernel 3, truncate", N(3, border="truncate"), ((0, 0), (4, 4), (8, 5))),
    ("kernel 3, dilation 3: dense groups", N(3, dilation=3), ((0, 0), (4, 5))),
    ("kernel 3, dilation (1, 4)", N(3, dilation=(1, 4)), ((0, 1), (5, 4))),
    ("kernel 3, stride 3: blocks", N(3, stride=3), ((0, 0), (4, 5), (7, 1))),
    ("kernel 5, stride 2, shared by 4", N(5, stride=2), ((4, 4), (4, 5), (5, 4), (5, 5))),
    ("kernel 3, rows causal", N(3, is_causal=(True, False)), ((0, 0), (4, 4), (8, 5))),
    ("kernel (5, 3)", N((5, 3)), ((2, 0), (6, 5))),
)


def keys(where: Neighborhood, space: tuple[int, ...]) -> list[set[int]]:
    """Per query token, the key tokens that the plan lets it see."""
    axes = resolve(where, len(space), False).on(space, space)
    plan = neighborhood_plan(axes, False, (4,) * len(space), (4,) * len(space))
    entries: list[list[int]] = plan.axes.tolist()
    found: list[set[int]] = [set() for _ in range(plan.n_k)]

    def slots(begin: list[int], extent: list[int]) -> list[list[int]]:
        boxes = product(*[range(b, b + e) for b, e in zip(begin, extent, strict=True)])
        return [[sum(entries[i][field] for i in slot) for field in range(4)] for slot in boxes]

    for row in plan.rows.tolist():
        box = slots(row[6:9], row[9:12])
        for q in slots(row[0:3], row[3:6]):
            for k in box:
                if not row[12] & ROW_RANGES or pattern.visible(q[1], q[3], k[3], plan.guard):
                    found[q[0]].add(k[0])
    return found


def panel(x: int, y: int, title: str, colors: list[list[str]]) -> str:
    shapes = [f'<text x="{x}" y="{y - 5}">{title}</text>']
    for color in (QUERY, KEY, EMPTY):
        side, path = CELL - 1, ""
        for i, line in enumerate(colors):
            for j, found in enumerate(line):
                if found == color:
                    path += f"M{x + CELL * j} {y + CELL * i}h{side}v{side}h-{side}z"
        if path:
            shapes.append(f'<path fill="{color}" d="{path}"/>')
    return "\n".join(shapes)


def line_colors(where: Neighborhood, tokens: int) -> list[list[str]]:
    found = keys(where, (tokens,))
    return [
        [(QUERY if i == j else KEY) if j in found[i] else EMPTY for j in range(tokens)] for i in range(tokens)
    ]


def grid_colors(where: Neighborhood, side: int, queries: tuple[tuple[int, int], ...]) -> list[list[str]]:
    found, chosen = keys(where, (side, side)), [y * side + x for y, x in queries]
    read: set[int] = set().union(*[found[i] for i in chosen])
    colors = [QUERY if i in chosen else KEY if i in read else EMPTY for i in range(side * side)]
    return [colors[i : i + side] for i in range(0, side * side, side)]


def draw() -> str:
    """The picture as SVG text."""
    columns, panels = 4, list[str]()
    width, heights = 12 * CELL + 2 * GAP, (12 * CELL + GAP + TITLE, 9 * CELL + GAP + TITLE)
    top = TITLE + 6
    for n, (title, where) in enumerate(LINES):
        x, y = GAP // 2 + n % columns * width, top + n // columns * heights[0]
        panels.append(panel(x, y, title, line_colors(where, 12)))
    top += len(LINES) // columns * heights[0]
    for n, (title, where, queries) in enumerate(GRIDS):
        x, y = GAP // 2 + n % columns * width, top + n // columns * heights[1]
        panels.append(panel(x, y, title, grid_colors(where, 9, queries)))
    height = top + len(GRIDS) // columns * heights[1]
    size = f'width="{columns * width}" height="{height}"'
    style = f'<style>{STYLE}</style><rect width="100%" height="100%" fill="#fff"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n{style}\n' + "\n".join(panels) + "\n</svg>\n"


if __name__ == "__main__":
    TARGET.write_text(draw())
