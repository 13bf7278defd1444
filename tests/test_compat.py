"""The interfaces of released natten versions: files written for them run, train and load their weights."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models_support import library, redraw, rms_ratio

from vicinal import nn
from vicinal.compat import install_as_natten, natten0144, natten015, natten017, natten020
from vicinal.compat.natten015 import functional as f015
from vicinal.compat.natten017 import functional as f017
from vicinal.compat.natten020 import functional as f020

TESTS = Path(__file__).parent


def _run(*arguments: str) -> dict[str, Any]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}
    command = [sys.executable, str(TESTS / "run_as_natten.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    results: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return results


@pytest.mark.parametrize(
    ("version", "shown", "kinds"),
    [
        ("0.14.4", "0.14.4", ["modules", "functions"]),
        ("0.15", "0.15.1", ["modules", "functions"]),
        ("0.17.3", "0.17.3", ["modules", "functions"]),
        ("0.21", "0.20.1", ["modules"]),
    ],
)
def test_published_model_files_run_and_train(version: str, shown: str, kinds: list[str]) -> None:
    results = _run(version)
    assert results["version"] == shown
    assert "natten is imported already, as vicinal.compat." in results["second"]
    for kind in kinds:
        assert results[kind]["error"] < 1e-11, (kind, results[kind])
        assert results[kind]["last"] < 0.5 * results[kind]["first"], (kind, results[kind])


def test_dinat_of_transformers_runs_and_trains() -> None:
    library("regex")  # without it transformers fails with another error than ImportError
    library("transformers")
    results = _run("0.15.1", "--dinat")
    for kind in ("accelerated", "functions"):
        assert results[kind]["error"] < 1e-11, (kind, results[kind])
        assert results[kind]["last"] < 0.5 * results[kind]["first"], (kind, results[kind])


def test_the_example_trains() -> None:
    program = "from hidden_natten import hide_natten; hide_natten(); import runpy, sys; "
    program += "runpy.run_path(sys.argv[1], run_name='__main__')"
    example = TESTS.parent / "examples" / "migrate_natten.py"
    environment = os.environ | {"PYTHONPATH": str(TESTS)}
    done = subprocess.run(
        [sys.executable, "-c", program, str(example)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    losses = [float(word) for word in done.stdout.splitlines()[0].split()[1:]]
    assert len(losses) == 10
    assert losses[-1] < 0.7 * losses[0]


def test_an_installed_natten_is_left_alone() -> None:
    library("natten")
    with pytest.raises(RuntimeError, match=r"natten is (installed|imported already)"):
        install_as_natten("0.17")
    assert not hasattr(sys.modules["natten"], "__vicinal__")


@pytest.mark.parametrize("version", ["17", "0.17b", "1.0", ""])
def test_versions_that_do_not_exist(version: str) -> None:
    with pytest.raises(ValueError, match=r"version is .*; it must read like"):
        install_as_natten(version)


ORDERS: dict[Any, str] = {
    natten0144.NeighborhoodAttention2D: (
        "dim kernel_size num_heads qkv_bias qk_scale attn_drop proj_drop dilation"
    ),
    natten015.NeighborhoodAttention2D: (
        "dim num_heads kernel_size dilation bias qkv_bias qk_scale attn_drop proj_drop"
    ),
    natten015.NeighborhoodAttention3D: (
        "dim num_heads kernel_size kernel_size_d dilation dilation_d bias qkv_bias qk_scale attn_drop "
        "proj_drop"
    ),
    natten017.NeighborhoodAttention1D: (
        "dim num_heads kernel_size dilation is_causal rel_pos_bias qkv_bias qk_scale attn_drop proj_drop "
        "use_experimental_ops"
    ),
    natten020.NeighborhoodAttention3D: (
        "embed_dim num_heads kernel_size stride dilation is_causal qkv_bias qk_scale proj_drop"
    ),
    f017.na2d_qk: "query key kernel_size dilation additional_keys is_causal rpb",
    f017.na2d_av: "attn value kernel_size dilation additional_values is_causal",
    f017.na2d: (
        "query key value kernel_size dilation is_causal rpb scale additional_keys additional_values tuning"
    ),
    f020.neighborhood_attention_generic: (
        "query key value kernel_size stride dilation is_causal scale additional_keys additional_values "
        "return_lse tuning"
    ),
    f015.na2d_qk_with_bias: "query key bias kernel_size dilation additional_keys",
    f015.na3d_av: "attn value kernel_size_d kernel_size dilation_d dilation additional_values",
}


@pytest.mark.parametrize("name", ORDERS, ids=lambda f: f"{f.__module__}.{f.__qualname__}")
def test_positional_orders(name: Any) -> None:
    assert " ".join(inspect.signature(name).parameters) == ORDERS[name]


def _native(module: Any, **options: Any) -> Any:
    """The native module with the same weights."""
    rank = module.rank
    made = getattr(nn, f"NeighborhoodAttention{rank}D")(module.embed_dim, module.num_heads, **options)
    made.load_state_dict(module.state_dict(), strict=True)
    return made


@pytest.mark.parametrize(
    ("module", "options"),
    [
        (
            natten0144.NeighborhoodAttention2D(16, 3, 2, True, 0.3, 0.0, 0.0, 2),
            {"kernel_size": 3, "dilation": 2, "qk_scale": 0.3, "rel_pos_bias": True},
        ),
        (
            natten0144.NeighborhoodAttention(16, kernel_size=3, num_heads=2, dilation=None),
            {"kernel_size": 3, "rel_pos_bias": True},
        ),
        (
            natten0144.NeighborhoodAttention1D(16, 5, 2, False),
            {"kernel_size": 5, "qkv_bias": False, "rel_pos_bias": True},
        ),
        (
            natten015.NeighborhoodAttention2D(16, 2, 3, 2, False, False),
            {"kernel_size": 3, "dilation": 2, "qkv_bias": False},
        ),
        (natten015.NeighborhoodAttention1D(16, 2, 3), {"kernel_size": 3, "rel_pos_bias": True}),
        (
            natten015.NeighborhoodAttention3D(16, 2, 3, 5, 2, 1),
            {"kernel_size": (5, 3, 3), "dilation": (1, 2, 2), "rel_pos_bias": True},
        ),
        (
            natten017.NeighborhoodAttention2D(16, 2, [3, 5], (2, 1), (True, False), False, False),
            {"kernel_size": (3, 5), "dilation": (2, 1), "is_causal": (True, False), "qkv_bias": False},
        ),
        (
            natten017.NeighborhoodAttention3D(16, 2, 3, None, None, True, True, 0.0),
            {"kernel_size": 3, "rel_pos_bias": True},
        ),
        (
            natten020.NeighborhoodAttention2D(16, 2, 5, 2, 1, True, False, 0.5),
            {"kernel_size": 5, "stride": 2, "is_causal": True, "qkv_bias": False, "qk_scale": 0.5},
        ),
    ],
    ids=lambda value: f"{type(value).__module__}.{type(value).__name__}" if hasattr(value, "rank") else None,
)
def test_modules_mean_what_their_version_meant(module: Any, options: dict[str, Any]) -> None:
    redraw(module)
    x = torch.randn(2, *(8, 9, 7)[: module.rank], 16)
    assert torch.equal(module(x), _native(module, **options)(x))


@pytest.mark.parametrize(("size", "dilation"), [((13, 20), 4), ((7, 5), 1), ((2, 9), 1)])
def test_a_string_of_dilation_follows_the_input(size: tuple[int, int], dilation: int) -> None:
    module = redraw(natten0144.NeighborhoodAttention2D(16, 3, 2, dilation="auto"))
    native = _native(module, kernel_size=3, dilation=dilation, rel_pos_bias=True, pad_small_inputs=True)
    x = torch.randn(2, *size, 16)
    assert torch.equal(module(x), native(x))


@pytest.mark.parametrize(
    "make",
    [
        lambda: natten0144.NeighborhoodAttention2D(16, 5, 2, dilation=2),
        lambda: natten015.NeighborhoodAttention2D(16, 2, 5, 2),
        lambda: natten015.NeighborhoodAttention3D(16, 2, 3, 5),
    ],
    ids=["0.14.4", "0.15", "0.15-3d"],
)
def test_small_inputs_are_padded_until_0_15(make: Any) -> None:
    module = redraw(make())
    x = torch.randn(2, *(4, 2, 11)[: module.rank], 16)
    assert module(x).shape == x.shape
    least = (10, 10) if module.rank == 2 else (5, 3, 3)
    padding = [n for k, L in zip(reversed(least), reversed(x.shape[1:-1])) for n in (0, max(0, k - L))]
    padded = torch.nn.functional.pad(x, [0, 0, *padding])
    assert rms_ratio(module(x), module(padded)[tuple(slice(n) for n in x.shape[:-1])]) < 1e-6


@pytest.mark.parametrize("package", [natten017, natten020])
def test_small_inputs_are_refused_since_0_17(package: Any) -> None:
    with pytest.raises(ValueError, match="kernel_size"):
        package.NeighborhoodAttention2D(16, 2, 5)(torch.zeros(1, 4, 9, 16))


@pytest.mark.parametrize("package", [natten0144, natten015, natten017, natten020])
def test_toggles_do_nothing_and_answer(package: Any) -> None:
    assert package.__all__ == sorted(package.__all__)
    for name in package.__all__:
        value = getattr(package, name)
        if name.startswith(("use_", "enable_", "disable_", "set_", "allow_")):
            assert value() is None
            assert value(True) is None
        elif name.startswith(("is_", "has_", "are_")):
            assert isinstance(value(), bool)


def test_names_of_the_installed_natten_are_here() -> None:
    theirs = set(library("natten").__all__)
    ours = {name for name in theirs if "configs_for" not in name}  # lists of its own tile shapes
    assert ours <= set(natten020.__all__)
