"""Small models of timm and torchvision, whose windowed attention `vicinal.accelerate` knows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from models_support import library
from torch import nn


@dataclass(frozen=True)
class Published:
    """A model, the shape of its input, and what accelerate has to do with it.

    `replaced` modules get another class and call an operation once each (or `calls` in all); the names of the
    classes that are left alone are `left`. `limit` is the error of the original in float64, more than
    rounding where it computes its softmax in float32."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    replaced: int
    calls: int = 0
    left: tuple[str, ...] = ()
    limit: float = 1e-9


def _timm(module: str, name: str, **options: Any) -> nn.Module:
    library("timm")
    model: nn.Module = getattr(library(f"timm.models.{module}"), name)(num_classes=10, **options)
    return model


def _swin_cr(size: tuple[int, int], **options: Any) -> nn.Module:
    sizes = {"img_size": size, "window_size": 7, "embed_dim": 32, "depths": (2, 2), "num_heads": (2, 4)}
    return _timm("swin_transformer_v2_cr", "SwinTransformerV2Cr", **{**sizes, **options})


def _maxxvit(kind: str, size: int, **transformer: Any) -> nn.Module:
    maxxvit = library("timm.models.maxxvit")
    window = {"partition_ratio": 8} if kind == "M" or kind == "PM" else {}
    cfg = maxxvit.MaxxVitCfg(
        embed_dim=(32, 64),
        depths=(1, 1),
        block_type=("C", "T") if kind == "T" else (kind, kind),
        stem_width=16,
        transformer_cfg=maxxvit.MaxxVitTransformerCfg(dim_head=16, **window, **transformer),
    )
    model: nn.Module = maxxvit.MaxxVit(cfg, img_size=size, num_classes=10)
    return model


def _hiera(size: int, **options: Any) -> nn.Module:
    sizes = {"embed_dim": 16, "num_heads": 1, "stages": (2, 2, 2), "q_pool": 2, "mask_unit_size": (4, 4)}
    attn = {"mask_unit_attn": (True, True, False), "img_size": (size, size)}
    return _timm("hiera", "Hiera", **{**sizes, **attn, **options})


def _efficientvit(size: int) -> nn.Module:
    sizes = {"embed_dim": (32, 64, 96), "depth": (1, 1, 1), "num_heads": (2, 2, 3), "key_dim": (8, 16, 16)}
    return _timm("efficientvit_msra", "EfficientVitMsra", img_size=size, window_size=(7, 7, 7), **sizes)


def _davit() -> nn.Module:
    return _timm("davit", "DaVit", depths=(1, 1), embed_dims=(32, 64), num_heads=(2, 4))


def _twins(size: tuple[int, int]) -> nn.Module:
    sizes = {"embed_dims": (32, 64), "num_heads": (2, 4), "mlp_ratios": (2, 2), "depths": (2, 2)}
    more = {"sr_ratios": (4, 2), "wss": (7, 7), "img_size": size}
    return _timm("twins", "Twins", **sizes, **more)


def _levit(**options: Any) -> nn.Module:
    sizes = {"embed_dim": (32, 48), "key_dim": 8, "depth": (1, 1), "num_heads": (2, 3)}
    return _timm("levit", "Levit", img_size=112, **sizes, **options)


def _efficientformer() -> nn.Module:
    sizes = {"depths": (1, 1, 1, 2), "embed_dims": (8, 16, 24, 32), "layer_scale_init_value": 0.5}
    return _timm("efficientformer", "EfficientFormer", num_vit=1, **sizes)


def _sam() -> nn.Module:
    sizes = {"img_size": 64, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2, "window_size": 6}
    more = {"use_rel_pos": True, "global_attn_indexes": (1,), "neck_chans": 0}
    return _timm("vision_transformer_sam", "VisionTransformerSAM", **sizes, **more)


def _swin3d(window: list[int]) -> nn.Module:
    video = library("torchvision.models.video.swin_transformer")
    model: nn.Module = video.SwinTransformer3d(
        [2, 4, 4], 24, [2, 2], [2, 4], window, stochastic_depth_prob=0.0, num_classes=10
    )
    return model


PUBLISHED: dict[str, Published] = {
    "torchvision-swin3d": Published(lambda: _swin3d([2, 3, 3]), (1, 3, 9, 44, 52), 4),
    "torchvision-swin3d-shrunk": Published(lambda: _swin3d([4, 3, 6]), (1, 3, 4, 36, 16), 4),
    "timm-swin-cr": Published(lambda: _swin_cr((56, 56)), (2, 3, 56, 56), 4),
    "timm-swin-cr-odd": Published(lambda: _swin_cr((68, 44), always_partition=True), (2, 3, 68, 44), 4),
    "timm-maxvit": Published(lambda: _maxxvit("M", 64, head_first=False), (2, 3, 64, 64), 4),
    "timm-maxvit-tf": Published(lambda: _maxxvit("M", 64, rel_pos_type="bias_tf"), (2, 3, 64, 64), 4),
    "timm-maxvit-mlp": Published(lambda: _maxxvit("M", 64, rel_pos_type="mlp"), (2, 3, 64, 64), 4),
    "timm-maxvit-nchw": Published(
        lambda: _maxxvit("M", 64, use_nchw_attn=True, rel_pos_type="none"), (2, 3, 64, 64), 4
    ),
    "timm-maxvit-parallel": Published(lambda: _maxxvit("PM", 64), (2, 3, 64, 64), 2, 4),
    "timm-coatnet": Published(lambda: _maxxvit("T", 48), (2, 3, 48, 48), 1),
    "timm-hiera": Published(lambda: _hiera(64), (2, 3, 64, 64), 5, left=("MaskUnitAttention",)),
    "timm-efficientvit": Published(lambda: _efficientvit(224), (2, 3, 224, 224), 3, 7),
    "timm-efficientvit-odd": Published(lambda: _efficientvit(160), (2, 3, 160, 160), 3, 7),
    "timm-davit-odd": Published(_davit, (2, 3, 60, 44), 2, left=("ChannelAttention",) * 2),
    "timm-twins-odd": Published(
        lambda: _twins((64, 40)), (2, 3, 64, 40), 2, left=("GlobalSubSampleAttn",) * 2
    ),
    "timm-sam-odd": Published(_sam, (2, 3, 64, 64), 2, left=("Block",)),
    "timm-levit": Published(lambda: _levit(), (2, 3, 112, 112), 3),
    "timm-levit-conv": Published(lambda: _levit(use_conv=True), (2, 3, 112, 112), 3),
    "timm-efficientformer": Published(_efficientformer, (2, 3, 224, 224), 1),
}
