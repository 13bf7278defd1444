"""The documents say what the package does."""

import runpy
from pathlib import Path

from vicinal import info

ROOT = Path(__file__).parent.parent


def test_backends_table_is_current() -> None:
    """docs/backends.md holds the capability rows; `python -m vicinal.info --table` prints them."""
    assert info.capability_table() in (ROOT / "docs/backends.md").read_text()


def test_the_picture_of_neighborhoods_is_current() -> None:
    """`python docs/pictures/neighborhood.py` draws it from the plans."""
    drawn = runpy.run_path(str(ROOT / "docs/pictures/neighborhood.py"))["draw"]()
    assert drawn == (ROOT / "docs/pictures/neighborhood.svg").read_text()
