"""The documents say what the package does."""

from pathlib import Path

from vicinal import info

ROOT = Path(__file__).parent.parent


def test_backends_table_is_current() -> None:
    """docs/backends.md holds the capability rows; `python -m vicinal.info --table` prints them."""
    assert info.capability_table() in (ROOT / "docs/backends.md").read_text()
