"""Reference models in plain PyTorch, from the papers' formulas; `vicinal.accelerate` makes them fast."""

from vicinal.models.causal_lm import CausalLM, CausalLMConfig, Scope
from vicinal.models.condaformer import ConDaFormerConfig, ConDaFormerStage
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
from vicinal.models.configs_neighborhood import (
    causal_lm_test,
    dformer_base,
    dformer_test,
    dinat_base,
    dinat_large,
    dinat_large_384,
    dinat_mini,
    dinat_small,
    dinat_test,
    dinat_tiny,
    masformer,
    meshtron,
    nat_base,
    nat_mini,
    nat_small,
    nat_tiny,
)
from vicinal.models.configs_sequences import hnet_test, hnet_two_stage, lra_test, lra_text
from vicinal.models.configs_sets import dsvt_pillar, dsvt_test, flatformer_test, flatformer_waymo
from vicinal.models.cswin import CSWinConfig, CSWinTransformer
from vicinal.models.dformer import DFormer, DFormerConfig
from vicinal.models.dinat import DiNAT, DiNATConfig
from vicinal.models.dinat_keys import official_dinat_state_dict
from vicinal.models.dit3d import DiT3D, DiT3DConfig
from vicinal.models.dlgsanet import ChannelAttention, DLGSABlock, DynamicLocalAttention
from vicinal.models.dsvt import DSVT, DSVTConfig
from vicinal.models.ecoformer import EcoFormer, EcoFormerConfig
from vicinal.models.flatformer import FlatFormer, FlatFormerConfig
from vicinal.models.graph_layers import GatedGCN, GPSLayer, GraphTransformerLayer, HCMTEdgeLayer
from vicinal.models.hnet import HNet, HNetConfig
from vicinal.models.ifactformer import FactorizedAttention
from vicinal.models.lmuformer import LegendreMemory, SpikingSelfAttention
from vicinal.models.lra import LRAConfig, TextClassifier
from vicinal.models.mamba2 import Mamba2Config, Mamba2Mixer
from vicinal.models.mossformer2 import MossFormer2, MossFormer2Config
from vicinal.models.parts import PartAttention
from vicinal.models.performer import PerformerAttention
from vicinal.models.point_ssm import PointSSM, PointSSMLayer
from vicinal.models.sret import RecursiveBlock, SlicedAttention
from vicinal.models.swin import SwinConfig, SwinTransformer
from vicinal.models.swin_keys import official_state_dict
from vicinal.models.vitdet import WindowBlock

__all__ = [
    "DSVT",
    "CSWinConfig",
    "CSWinTransformer",
    "CausalLM",
    "CausalLMConfig",
    "ChannelAttention",
    "ConDaFormerConfig",
    "ConDaFormerStage",
    "DFormer",
    "DFormerConfig",
    "DLGSABlock",
    "DSVTConfig",
    "DiNAT",
    "DiNATConfig",
    "DiT3D",
    "DiT3DConfig",
    "DynamicLocalAttention",
    "EcoFormer",
    "EcoFormerConfig",
    "FactorizedAttention",
    "FlatFormer",
    "FlatFormerConfig",
    "GPSLayer",
    "GatedGCN",
    "GraphTransformerLayer",
    "HCMTEdgeLayer",
    "HNet",
    "HNetConfig",
    "LRAConfig",
    "LegendreMemory",
    "Mamba2Config",
    "Mamba2Mixer",
    "MossFormer2",
    "MossFormer2Config",
    "PartAttention",
    "PerformerAttention",
    "PointSSM",
    "PointSSMLayer",
    "RecursiveBlock",
    "Scope",
    "SlicedAttention",
    "SpikingSelfAttention",
    "SwinConfig",
    "SwinTransformer",
    "TextClassifier",
    "WindowBlock",
    "causal_lm_test",
    "cswin_base",
    "cswin_small",
    "cswin_test",
    "cswin_tiny",
    "dformer_base",
    "dformer_test",
    "dinat_base",
    "dinat_large",
    "dinat_large_384",
    "dinat_mini",
    "dinat_small",
    "dinat_test",
    "dinat_tiny",
    "dsvt_pillar",
    "dsvt_test",
    "ecoformer_pvt_v2_b0",
    "ecoformer_test",
    "flatformer_test",
    "flatformer_waymo",
    "hnet_test",
    "hnet_two_stage",
    "lra_test",
    "lra_text",
    "masformer",
    "meshtron",
    "mossformer2",
    "mossformer2_test",
    "nat_base",
    "nat_mini",
    "nat_small",
    "nat_tiny",
    "official_dinat_state_dict",
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
