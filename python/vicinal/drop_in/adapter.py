"""What an adapter of a library's module is, and the report of a walk over a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn


def _nothing_against(module: Any) -> str | None:
    return None


def _always(module: Any) -> bool:
    return True


def _all_of(module: Any) -> Iterable[nn.Module]:
    return module.modules()


@dataclass(frozen=True)
class Adapter:
    """A class of a library and the subclass of it that calls vicinal.

    `reason_against(module)` says why one instance cannot be replaced, or returns None. Where
    `applies(module)` is False the walk goes on into the module as if nobody knew it. `covers(module)` are
    the module and those inside it that get no row of their own.
    """

    family: str
    original: type[nn.Module]
    accelerated: type[nn.Module]
    what: str
    reason_against: Callable[[Any], str | None] = _nothing_against
    applies: Callable[[Any], bool] = _always
    covers: Callable[[Any], Iterable[nn.Module]] = _all_of


@dataclass(frozen=True)
class Row:
    """One module of the walk: its name, its class, the class it got (None: left alone), and why."""

    name: str
    module: type[nn.Module]
    became: type[nn.Module] | None
    note: str


@dataclass(frozen=True)
class Report:
    """What a walk over a model did; `print` shows it as a table."""

    rows: tuple[Row, ...]

    @property
    def replaced(self) -> tuple[Row, ...]:
        """Modules that got another class."""
        return tuple(row for row in self.rows if row.became is not None)

    @property
    def left_alone(self) -> tuple[Row, ...]:
        """Modules that look like attention and kept their class."""
        return tuple(row for row in self.rows if row.became is None)

    def __str__(self) -> str:
        table = [("module", "was", "became", "note")]
        for row in self.rows:
            became = "(left alone)" if row.became is None else row.became.__name__
            table.append((row.name or "(the model)", row.module.__name__, became, row.note))
        widths = [max(len(line[column]) for line in table) for column in range(3)]
        lines = ["  ".join([*(cell.ljust(w) for cell, w in zip(line, widths)), line[3]]) for line in table]
        lines.append(f"{len(self.replaced)} replaced, {len(self.left_alone)} left alone")
        return "\n".join(lines)
