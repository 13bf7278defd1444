"""The documents say what the package does."""

import re
import runpy
from pathlib import Path

import pytest

from vicinal import info

ROOT = Path(__file__).parent.parent


def test_backends_table_is_current() -> None:
    """docs/backends.md holds the capability rows; `python -m vicinal.info --table` prints them."""
    assert info.capability_table() in (ROOT / "docs/backends.md").read_text()


def test_the_picture_of_neighborhoods_is_current() -> None:
    """`python docs/pictures/neighborhood.py` draws it from the plans."""
    drawn = runpy.run_path(str(ROOT / "docs/pictures/neighborhood.py"))["draw"]()
    assert drawn == (ROOT / "docs/pictures/neighborhood.svg").read_text()


def test_the_list_of_public_names_is_current() -> None:
    """`python docs/api.py` writes it; the documentation's reference is made of it."""
    assert runpy.run_path(str(ROOT / "docs/api.py"))["page"]() == (ROOT / "docs/api.md").read_text()


def test_the_first_page_runs() -> None:
    pytest.importorskip("timm", reason="timm is not installed")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/index.md").read_text(), flags=re.DOTALL)
    assert len(blocks) == 4
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)
