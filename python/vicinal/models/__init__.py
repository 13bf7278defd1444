"""Reference models in plain PyTorch, from the papers' formulas; `vicinal.accelerate` makes them fast."""

from vicinal.models.configs import (
    cswin_base,
    cswin_small,
    cswin_test,
    cswin_tiny,
    ecoformer_pvt_v2_b0,
    ecoformer_test,
    mossformer2,
    mossformer2_test,
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
from vicinal.models.ecoformer import EcoFormer, EcoFormerConfig
from vicinal.models.mossformer2 import MossFormer2, MossFormer2Config
from vicinal.models.swin import SwinConfig, SwinTransformer
from vicinal.models.swin_keys import official_state_dict

__all__ = [
    "CSWinConfig",
    "CSWinTransformer",
    "EcoFormer",
    "EcoFormerConfig",
    "MossFormer2",
    "MossFormer2Config",
    "SwinConfig",
    "SwinTransformer",
    "cswin_base",
    "cswin_small",
    "cswin_test",
    "cswin_tiny",
    "ecoformer_pvt_v2_b0",
    "ecoformer_test",
    "mossformer2",
    "mossformer2_test",
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
