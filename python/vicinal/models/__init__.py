"""Reference models in plain PyTorch, from the papers' formulas; `vicinal.accelerate` makes them fast."""

from vicinal.models.configs import (
    cswin_base,
    cswin_small,
    cswin_test,
    cswin_tiny,
    swin_base,
    swin_small,
    swin_test,
    swin_tiny,
    swin_v2_base,
    swin_v2_small,
    swin_v2_test,
    swin_v2_tiny,
)
from vicinal.models.cswin import CSWinConfig, CSWinTransformer
from vicinal.models.swin import SwinConfig, SwinTransformer
from vicinal.models.swin_keys import official_state_dict

__all__ = [
    "CSWinConfig",
    "CSWinTransformer",
    "SwinConfig",
    "SwinTransformer",
    "cswin_base",
    "cswin_small",
    "cswin_test",
    "cswin_tiny",
    "official_state_dict",
    "swin_base",
    "swin_small",
    "swin_test",
    "swin_tiny",
    "swin_v2_base",
    "swin_v2_small",
    "swin_v2_test",
    "swin_v2_tiny",
]
