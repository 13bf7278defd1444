"""The examples in docstrings run and print what they say."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest
import torch

import vicinal

LIBRARIES = ("geometric", "natten_modules", "timm", "torchvision", "transformers")


def modules() -> list[str]:
    """All modules of the package but those that need another library or the GPU compilers."""
    found = [m.name for m in pkgutil.walk_packages(vicinal.__path__, "vicinal.")]
    skipped = ("_C", "kernels", "__main__", *LIBRARIES)
    return ["vicinal", *[n for n in found if not any(word in n for word in skipped)]]


@pytest.mark.parametrize("name", modules())
def test_examples(name: str) -> None:
    module = importlib.import_module(name)
    known = {"torch": torch, "vicinal": vicinal, "nn": torch.nn}
    result = doctest.testmod(module, extraglobs=known, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


@pytest.mark.parametrize(
    "function",
    [getattr(vicinal, n) for n in vicinal.__all__ if callable(getattr(vicinal, n))],
    ids=lambda f: f.__name__,
)
def test_public_names_are_documented(function: object) -> None:
    assert function.__doc__


def test_public_functions_have_examples() -> None:
    for name in ("windowed_attention", "windowed_attention_qkvpacked", "explain"):
        assert ">>>" in (getattr(vicinal, name).__doc__ or ""), name
