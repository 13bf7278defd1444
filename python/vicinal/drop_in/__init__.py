"""Drop-ins: give a published model the fused attention, and take it back.

`accelerate(model)` walks a model and changes the class of every module that it knows to a subclass whose
forward calls vicinal. Parameters, buffers, hooks, names and the module objects themselves stay as they are,
so state dicts, optimisers, copies and pickles are not affected; `restore(model)` changes the classes back.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Iterator
from functools import cache

from torch import nn

from vicinal.drop_in.adapter import Adapter, Report, Row

__all__ = ["Report", "Row", "accelerate", "restore"]

# library module -> module here that adapts it; one is imported only where the library already is
_ADAPTER_MODULES = {
    "vicinal.models.swin": "vicinal.drop_in.swin",
    "vicinal.models.cswin": "vicinal.drop_in.cswin",
    "vicinal.models.ecoformer": "vicinal.drop_in.ecoformer",
    "vicinal.models.mossformer2": "vicinal.drop_in.mossformer2",
    "vicinal.models.dinat": "vicinal.drop_in.dinat",
    "vicinal.models.dformer": "vicinal.drop_in.dformer",
    "vicinal.models.causal_lm": "vicinal.drop_in.causal_lm",
    "vicinal.models.mamba2": "vicinal.drop_in.mamba2",
    "vicinal.models.hnet": "vicinal.drop_in.hnet",
    "vicinal.models.performer": "vicinal.drop_in.performer",
    "vicinal.models.lra": "vicinal.drop_in.lra",
    "natten.modules": "vicinal.drop_in.natten_modules",
    "timm.models.swin_transformer": "vicinal.drop_in.timm_swin",
    "timm.models.efficientvit_mit": "vicinal.drop_in.timm_efficientvit_mit",
    "torch_geometric.nn": "vicinal.drop_in.geometric_gps",
    "torchvision.models.swin_transformer": "vicinal.drop_in.torchvision_swin",
    "transformers.models.dinat.modeling_dinat": "vicinal.drop_in.transformers_dinat",
    "transformers.models.mamba2.modeling_mamba2": "vicinal.drop_in.transformers_mamba2",
    "transformers.models.swin.modeling_swin": "vicinal.drop_in.transformers_swin",
}
FAMILIES = ("windowed", "neighborhood", "linear", "voxel")


@cache
def _adapters_of(module: str) -> tuple[Adapter, ...]:
    return importlib.import_module(module).ADAPTERS


def _adapters() -> Iterator[Adapter]:
    for library, module in _ADAPTER_MODULES.items():
        if library in sys.modules:
            yield from _adapters_of(module)


def accelerate(model: nn.Module, *, families: Iterable[str] | None = None, dry_run: bool = False) -> Report:
    """Replace the attention of every module that is recognised, in place.

    Known are vicinal's own reference models; Swin in timm, torchvision and transformers; EfficientViT's
    linear attention in timm; Dinat and the Mamba-2 mixer in transformers; the global attention of GPS in
    torch_geometric; the modules of natten from 0.20 on.
    A block computes the same function as before, with one fused operation in the place of roll, pad,
    partition, mask and softmax.

    Args:
        model: any module; it is changed in place unless `dry_run`.
        families: which families to use, of "windowed", "neighborhood", "linear" and "voxel"; None for all.
        dry_run: only report what would happen.

    Returns:
        A report: print it for a table of what each module became, and of each module that looks like
        attention and was left alone, with the reason.

    Raises:
        ValueError: `families` names something that is no family.

    Example:
        >>> from vicinal.models import SwinTransformer, swin_test
        >>> model = SwinTransformer(swin_test())
        >>> report = accelerate(model)  # print it for the table
        >>> len(report.replaced)
        4
    """
    asked = FAMILIES if families is None else tuple(families)
    unknown = sorted(set(asked) - set(FAMILIES))
    if unknown:
        raise ValueError(f"families names {unknown}, it may name {list(FAMILIES)}")
    by_original = {adapter.original: adapter for adapter in _adapters()}
    accelerated = {adapter.accelerated for adapter in _adapters()}
    rows: list[Row] = []
    inside: set[nn.Module] = set()  # parts of modules that have their row
    for name, module in model.named_modules():
        if module in inside:
            continue
        cls = type(module)
        adapter = by_original.get(cls)
        if adapter is not None and adapter.applies(module):
            inside.update(adapter.covers(module))
            refusal = _refusal(adapter, module, asked)
            rows.append(Row(name, cls, None if refusal else adapter.accelerated, refusal or adapter.what))
            if not refusal and not dry_run:
                module.__class__ = adapter.accelerated
        elif cls in accelerated:
            inside.update(module.modules())
            rows.append(Row(name, cls, None, "it is accelerated already"))
        elif adapter is None and (reason := _unknown(module, tuple(by_original))):
            rows.append(Row(name, cls, None, reason))
    return Report(tuple(rows))


def restore(model: nn.Module) -> Report:
    """Give every module that `accelerate` changed its original class back, in place.

    Args:
        model: any module.

    Returns:
        A report of what was restored.
    """
    by_accelerated = {adapter.accelerated: adapter for adapter in _adapters()}
    rows = []
    for name, module in model.named_modules():
        adapter = by_accelerated.get(type(module))
        if adapter is not None:
            module.__class__ = adapter.original
            rows.append(Row(name, adapter.accelerated, adapter.original, "restored"))
    return Report(tuple(rows))


def _refusal(adapter: Adapter, module: nn.Module, families: tuple[str, ...]) -> str | None:
    if adapter.family not in families:
        return f"the {adapter.family} family was not asked for"
    return adapter.reason_against(module)


def _unknown(module: nn.Module, originals: tuple[type, ...]) -> str | None:
    """Why a module that looks like attention is left alone; None for one that does not look like it."""
    cls = type(module)
    if isinstance(module, originals):
        base = next(base for base in cls.__mro__ if base in originals)
        return f"a subclass of {base.__module__}.{base.__qualname__} may compute something else"
    if "attention" in cls.__name__.lower() or cls.__name__.lower().endswith("attn"):
        own = cls.__module__.startswith(("vicinal.compat", "vicinal.nn", "vicinal._"))
        return "it is vicinal's own" if own else f"no adapter for {cls.__module__}.{cls.__qualname__}"
    return None
