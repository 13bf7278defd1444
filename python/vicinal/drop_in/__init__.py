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

import torch
from torch import nn
from torch.nn.utils import parametrize

from vicinal.drop_in.adapter import Adapter, Report, Row

__all__ = ["Report", "Row", "accelerate", "restore"]

# library module -> module here that adapts it; one is imported only where the library already is
_ADAPTER_MODULES = {
    "torch.nn.modules.activation": "vicinal.drop_in.torch_multihead",
    "vicinal.models.swin": "vicinal.drop_in.swin",
    "vicinal.models.cswin": "vicinal.drop_in.cswin",
    "vicinal.models.vitdet": "vicinal.drop_in.vitdet",
    "vicinal.models.condaformer": "vicinal.drop_in.condaformer",
    "vicinal.models.ecoformer": "vicinal.drop_in.ecoformer",
    "vicinal.models.mossformer2": "vicinal.drop_in.mossformer2",
    "vicinal.models.dinat": "vicinal.drop_in.dinat",
    "vicinal.models.dformer": "vicinal.drop_in.dformer",
    "vicinal.models.dsvt": "vicinal.drop_in.dsvt",
    "vicinal.models.flatformer": "vicinal.drop_in.flatformer",
    "vicinal.models.parts": "vicinal.drop_in.parts",
    "vicinal.models.causal_lm": "vicinal.drop_in.causal_lm",
    "vicinal.models.graph_layers": "vicinal.drop_in.graph_layers",
    "vicinal.models.mamba2": "vicinal.drop_in.mamba2",
    "vicinal.models.hnet": "vicinal.drop_in.hnet",
    "vicinal.models.performer": "vicinal.drop_in.performer",
    "vicinal.models.lra": "vicinal.drop_in.lra",
    "vicinal.models.lmuformer": "vicinal.drop_in.lmuformer",
    "vicinal.models.sret": "vicinal.drop_in.sret",
    "vicinal.models.dlgsanet": "vicinal.drop_in.dlgsanet",
    "natten.modules": "vicinal.drop_in.natten_modules",
    "timm.models.swin_transformer": "vicinal.drop_in.timm_swin",
    "timm.models.swin_transformer_v2_cr": "vicinal.drop_in.timm_swin_cr",
    "timm.models.maxxvit": "vicinal.drop_in.timm_maxxvit",
    "timm.models.hiera": "vicinal.drop_in.timm_hiera",
    "timm.models.efficientvit_msra": "vicinal.drop_in.timm_efficientvit",
    "timm.models.davit": "vicinal.drop_in.timm_davit",
    "timm.models.twins": "vicinal.drop_in.timm_twins",
    "timm.models.levit": "vicinal.drop_in.timm_levit",
    "timm.models.efficientformer": "vicinal.drop_in.timm_efficientformer",
    "timm.models.vision_transformer_sam": "vicinal.drop_in.timm_sam",
    "timm.models.efficientvit_mit": "vicinal.drop_in.timm_efficientvit_mit",
    "torch_geometric.nn": "vicinal.drop_in.geometric_gps",
    "torchvision.models.swin_transformer": "vicinal.drop_in.torchvision_swin",
    "torchvision.models.video.swin_transformer": "vicinal.drop_in.torchvision_swin3d",
    "transformers.models.dinat.modeling_dinat": "vicinal.drop_in.transformers_dinat",
    "transformers.models.donut.modeling_donut_swin": "vicinal.drop_in.transformers_donut",
    "transformers.models.gemma2.modeling_gemma2": "vicinal.drop_in.transformers_sliding",
    "transformers.models.longformer.modeling_longformer": "vicinal.drop_in.transformers_longformer",
    "transformers.models.mamba2.modeling_mamba2": "vicinal.drop_in.transformers_mamba2",
    "transformers.models.maskformer.modeling_maskformer_swin": "vicinal.drop_in.transformers_donut",
    "transformers.models.mistral.modeling_mistral": "vicinal.drop_in.transformers_sliding",
    "transformers.models.swin.modeling_swin": "vicinal.drop_in.transformers_swin",
    "transformers.models.swin2sr.modeling_swin2sr": "vicinal.drop_in.transformers_swinv2",
    "transformers.models.swinv2.modeling_swinv2": "vicinal.drop_in.transformers_swinv2",
    "transformers.models.vitdet.modeling_vitdet": "vicinal.drop_in.transformers_vitdet",
}
FAMILIES = ("windowed", "neighborhood", "linear", "voxel", "edge", "multihead")


@cache
def _adapters_of(module: str) -> tuple[Adapter, ...]:
    return importlib.import_module(module).ADAPTERS


def _adapters() -> Iterator[Adapter]:
    for library, module in _ADAPTER_MODULES.items():
        if library in sys.modules:
            yield from _adapters_of(module)


def accelerate(model: nn.Module, *, families: Iterable[str] | None = None, dry_run: bool = False) -> Report:
    """Replace the attention of every module that is recognised, in place.

    Known are torch's nn.MultiheadAttention, vicinal's own reference models, the modules of natten from 0.20
    on, and models of timm, torchvision, transformers and torch_geometric that docs/models.md lists.
    A block computes the same function as before, with one fused operation in the place of roll, pad,
    partition, mask and softmax.

    Args:
        model: any module; it is changed in place unless `dry_run`.
        families: which families to use, of "windowed", "neighborhood", "linear", "voxel", "edge" and
            "multihead"; None for all.
        dry_run: only report what would happen.

    Returns:
        A report: print it for a table of what each module became, and of each module that looks like
        attention and was left alone, with the reason.

    Raises:
        ValueError: `families` names something that is no family, or the model is scripted.
        TypeError: `model` is no module. After any error the model is what it was.

    Example:
        >>> from vicinal.models import SwinTransformer, swin_test
        >>> model = SwinTransformer(swin_test())
        >>> report = accelerate(model)  # print it for the table
        >>> len(report.replaced)
        4
    """
    _check_model(model)
    asked = FAMILIES if families is None else tuple(families)
    unknown = sorted(set(asked) - set(FAMILIES))
    if unknown:
        raise ValueError(f"families names {unknown}, it may name {list(FAMILIES)}")
    rows, changes = _planned(model, asked)
    if not dry_run:
        _change(changes)
    return Report(tuple(rows))


def _planned(model: nn.Module, asked: tuple[str, ...]) -> tuple[list[Row], list[tuple[nn.Module, type]]]:
    """What the walk says of each module, and the classes to give."""
    by_original = {adapter.original: adapter for adapter in _adapters()}
    by_accelerated = {adapter.accelerated: adapter for adapter in _adapters()}
    rows: list[Row] = []
    changes: list[tuple[nn.Module, type]] = []
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
            if not refusal:
                changes.append((module, adapter.accelerated))
        elif cls in by_accelerated:
            inside.update(by_accelerated[cls].covers(module))
            rows.append(Row(name, cls, None, "it is accelerated already"))
        elif adapter is None and (reason := _unknown(module, tuple(by_original))):
            rows.append(Row(name, cls, None, reason))
    return rows, changes


def _change(changes: list[tuple[nn.Module, type]]) -> None:
    """Give modules their new classes: all of them, or after an error none."""
    before = [(module, type(module)) for module, _ in changes]
    try:
        for module, cls in changes:
            module.__class__ = cls
    except BaseException:
        for module, cls in before:
            module.__class__ = cls
        raise


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; it must be a torch.nn.Module")
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError("model is scripted; accelerate it before torch.jit.script or torch.jit.trace")


def restore(model: nn.Module) -> Report:
    """Give every module that `accelerate` changed its original class back, in place.

    Args:
        model: any module.

    Returns:
        A report of what was restored.

    Raises:
        ValueError: a module's class was changed once more since, by a parametrization for example; nothing is
            restored then.
    """
    _check_model(model)
    by_accelerated = {adapter.accelerated: adapter for adapter in _adapters()}
    rows, changes = [], []
    for name, module in model.named_modules():
        adapter = by_accelerated.get(type(module))
        if adapter is not None:
            changes.append((module, adapter.original))
            rows.append(Row(name, adapter.accelerated, adapter.original, "restored"))
        elif isinstance(module, tuple(by_accelerated)):
            raise ValueError(
                f"{name or 'the model'} is a {type(module).__name__}, made of an accelerated class; remove "
                "its parametrizations before restore"
            )
    _change(changes)
    return Report(tuple(rows))


def _refusal(adapter: Adapter, module: nn.Module, families: tuple[str, ...]) -> str | None:
    if adapter.family not in families:
        return f"the {adapter.family} family was not asked for"
    return adapter.reason_against(module)


def _unknown(module: nn.Module, originals: tuple[type, ...]) -> str | None:
    """Why a module that looks like attention is left alone; None for one that does not look like it."""
    cls = type(module)
    if isinstance(module, torch.jit.ScriptModule):
        name = str(getattr(module, "original_name", ""))
        return "it is scripted; accelerate it before" if "attention" in name.lower() else None
    looks = "attention" in cls.__name__.lower() or cls.__name__.lower().endswith("attn")
    if looks and cls.__module__.startswith(("vicinal.compat", "vicinal.nn", "vicinal._")):
        return "it is vicinal's own"
    if parametrize.is_parametrized(module) and isinstance(module, originals):
        return "it has parametrizations, which are a class of their own: register them afterwards"
    if isinstance(module, originals):
        base = next(base for base in cls.__mro__ if base in originals)
        return f"a subclass of {base.__module__}.{base.__qualname__} may compute something else"
    if any(isinstance(part, originals) for part in module.modules()):
        return None  # what is inside has its row
    return f"no adapter for {cls.__module__}.{cls.__qualname__}" if looks else None
