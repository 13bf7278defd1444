"""The hash of geometry objects, which key the memory of earlier calls."""

from __future__ import annotations

from dataclasses import fields
from typing import Any


class HashedOnce:
    """Base of frozen dataclasses that call `remember_hash` in __post_init__: the hash of all fields is
    computed once. Copies and pickles are made anew from the fields, because strings hash differently in
    another process."""

    def remember_hash(self) -> None:
        object.__setattr__(self, "_hash", hash(self._values()))

    def _values(self) -> tuple[Any, ...]:
        return tuple(getattr(self, field.name) for field in fields(self))  # type: ignore[arg-type]

    def __hash__(self) -> int:
        return self._hash  # type: ignore[attr-defined]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._values()
