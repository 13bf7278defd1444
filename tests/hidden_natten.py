"""Hide an installed natten from this process, so that vicinal can stand in for it."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from typing import Any


class _Without:
    """A finder of modules that does not know natten."""

    def __init__(self, finder: Any) -> None:
        self.finder = finder

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name.split(".")[0] == "natten":
            return None
        found: ModuleSpec | None = self.finder.find_spec(name, path, target)
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self.finder, name)


def hide_natten() -> None:
    """From now on nothing but `sys.modules` knows natten."""
    sys.meta_path[:] = [_Without(finder) for finder in sys.meta_path]
