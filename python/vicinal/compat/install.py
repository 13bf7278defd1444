"""Stand in for the package natten in this process."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__ = ["install_as_natten"]

_MODULES = [f"NeighborhoodAttention{rank}D" for rank in (1, 2, 3)]

# compatibility package -> where its versions had their modules: submodule, names
_SUBMODULES: dict[str, dict[str, list[str]]] = {
    "natten0144": {
        "natten1d": [_MODULES[0]],
        "natten2d": [_MODULES[1], "NeighborhoodAttention"],
    },
    "natten015": {f"natten{rank}d": [_MODULES[rank - 1]] for rank in (1, 2, 3)},
    "natten017": {f"{stem}{rank}d": [_MODULES[rank - 1]] for stem in ("na", "natten") for rank in (1, 2, 3)},
    "natten020": {"modules": _MODULES},
}


def _package_for(version: str) -> str:
    """The compatibility package of a version; ValueError for one that has none."""
    match = re.fullmatch(r"0\.(\d+)(?:\.(\d+))?", version)
    if match is None:
        raise ValueError(f'version is {version!r}; it must read like "0.17" or "0.17.5"')
    minor, patch = int(match[1]), int(match[2] or 0)
    if minor < 14 or (minor == 14 and patch <= 4):
        return "natten0144"
    if minor <= 15:
        return "natten015"
    return "natten017" if minor < 20 else "natten020"


def install_as_natten(version: str) -> ModuleType:
    """Register this package's modules as `natten` in `sys.modules`, for code that imports it.

    Until the process ends, `import natten`, `from natten.functional import ...` and
    `importlib.util.find_spec("natten")` give the interface of the version asked for, on vicinal's kernels.
    Call it before the code that imports natten is imported.

    Args:
        version: the natten release that the code was written for, such as "0.14.4", "0.15.1", "0.17.5" or
            "0.20". Versions up to 0.14.4, up to 0.15, up to 0.17 (0.19) and from 0.20 on share an interface
            each.

    Returns:
        The module that `import natten` gives.

    Raises:
        ValueError: `version` is no version of natten.
        RuntimeError: natten is installed, or another version stands in already.

    Example:
        >>> from vicinal.compat import install_as_natten
        >>> install_as_natten("0.17.5")  # doctest: +SKIP
        >>> from natten.functional import na2d_qk  # doctest: +SKIP
    """
    name = _package_for(version)
    present = sys.modules.get("natten")
    if present is not None:
        ours = getattr(present, "__vicinal__", None)
        if ours == name:
            return present
        what = f"vicinal.compat.{ours}" if ours else f"natten from {getattr(present, '__file__', None)}"
        raise RuntimeError(f"natten is imported already, as {what}; it cannot become vicinal.compat.{name}")
    found = importlib.util.find_spec("natten")
    if found is not None:
        raise RuntimeError(f"natten is installed, in {found.origin}; uninstall it to let vicinal stand in")
    package = importlib.import_module(f"vicinal.compat.{name}")
    functional = importlib.import_module(f"vicinal.compat.{name}.functional")
    top = _module("natten", package, list(package.__all__), is_package=True)
    top.__dict__["__vicinal__"] = name
    if version.count(".") == 2:
        top.__dict__["__version__"] = version
    parts = [_module("natten.functional", functional, list(functional.__all__))]
    parts += [_module(f"natten.{sub}", package, names) for sub, names in _SUBMODULES[name].items()]
    if name in ("natten017", "natten020"):
        toggles = [n for n in package.__all__ if n[0] != "N" and not n.startswith("__") and n[:2] != "na"]
        parts.append(_module("natten.context", package, toggles))
    for part in parts:
        setattr(top, part.__name__.removeprefix("natten."), part)
    sys.modules.update({module.__name__: module for module in (top, *parts)})
    return top


def _module(name: str, source: ModuleType, names: list[str], is_package: bool = False) -> ModuleType:
    """A module of this name with some of the source's names."""
    module = ModuleType(name, source.__doc__)
    module.__spec__ = ModuleSpec(name, None, origin=source.__name__, is_package=is_package)
    module.__package__ = "natten"
    if is_package:
        module.__path__ = []
    module.__dict__.update({n: getattr(source, n) for n in names}, __all__=names)
    return module
