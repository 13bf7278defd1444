"""The models that `python -m benchmarks models` times: vicinal's reference, and other libraries'."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vicinal.models import (
    CSWinTransformer,
    DiNAT,
    SwinTransformer,
    cswin_tiny,
    dinat_mini,
    swin_tiny,
    swin_v2_tiny,
)

from . import torchvision_operators


@dataclass(frozen=True)
class Problem:
    """Makers of one model by the name of their library, first the one that tables call ours; its pixels."""

    makers: dict[str, Callable[[], nn.Module]]
    pixels: int = 224
    batches: tuple[int, ...] = (1, 8)


class Logits(nn.Module):
    """A model of transformers that returns its logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        logits = self.model(images).logits
        assert isinstance(logits, Tensor)
        return logits


def timm(name: str, **options: Any) -> nn.Module:
    torchvision_operators.declare()
    import timm as library

    model: nn.Module = library.create_model(name, **options)
    return model


def torchvision(name: str) -> nn.Module:
    torchvision_operators.declare()
    from torchvision import models

    model: nn.Module = getattr(models, name)()
    for module in model.modules():
        if type(module).__name__ == "StochasticDepth":
            module.p = 0.0  # type: ignore[assignment]
    return model


def transformers_swin(version: int) -> nn.Module:
    torchvision_operators.declare()
    import transformers as library

    sizes: dict[str, Any] = {"depths": [2, 2, 6, 2], "drop_path_rate": 0.0, "num_labels": 1000}
    if version == 1:
        config = library.SwinConfig(image_size=224, window_size=7, **sizes)
        return Logits(library.SwinForImageClassification(config))
    config = library.Swinv2Config(image_size=256, window_size=8, **sizes)
    return Logits(library.Swinv2ForImageClassification(config))


PROBLEMS: dict[str, Problem] = {
    "swin-t": Problem(
        {
            "reference": lambda: SwinTransformer(swin_tiny()),
            "timm": lambda: timm("swin_tiny_patch4_window7_224", drop_path_rate=0.0),
            "torchvision": lambda: torchvision("swin_t"),
            "transformers": lambda: transformers_swin(1),
        }
    ),
    "swinv2-t": Problem(
        {
            "reference": lambda: SwinTransformer(swin_v2_tiny()),
            "timm": lambda: timm("swinv2_tiny_window8_256", drop_path_rate=0.0),
            "torchvision": lambda: torchvision("swin_v2_t"),
            "transformers": lambda: transformers_swin(2),
        },
        pixels=256,
    ),
    "cswin-t": Problem({"reference": lambda: CSWinTransformer(cswin_tiny())}),
    "dinat-mini": Problem({"reference": lambda: DiNAT(dinat_mini())}),
    "efficientvit-m0": Problem({"timm": lambda: timm("efficientvit_m0")}),
}
