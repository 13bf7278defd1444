"""Writes docs/api.md, the list of public names for the API reference: python docs/api.py."""

from __future__ import annotations

import inspect
from pathlib import Path

import vicinal
from vicinal import distributed, nn, segments

GROUPS = (
    ("Attention functions", lambda o: inspect.isfunction(o) and "attention" in o.__name__),
    ("Other functions", inspect.isfunction),
    ("Values", inspect.isclass),
)


def page() -> str:
    """The page: every public name once, under its kind; their text is in the docstrings."""
    parts = ["# Functions and modules\n"]
    names = [
        n for n in vicinal.__all__ if not n.startswith("_") and not inspect.ismodule(getattr(vicinal, n))
    ]
    for title, belongs in GROUPS:
        chosen = [n for n in names if belongs(getattr(vicinal, n))]
        names = [n for n in names if n not in chosen]
        parts.append(f"## {title}\n\n" + "\n".join(_entry(getattr(vicinal, n)) for n in chosen))
    for title, module in (
        ("vicinal.nn", nn),
        ("vicinal.segments", segments),
        ("vicinal.distributed", distributed),
    ):
        parts.append(f"## {title}\n\n" + "\n".join(_entry(getattr(module, n)) for n in module.__all__))
    return "\n".join(parts)


def _entry(thing: object) -> str:
    return f"::: {thing.__module__}.{thing.__qualname__}\n"  # type: ignore[attr-defined]


if __name__ == "__main__":
    (Path(__file__).parent / "api.md").write_text(page())
