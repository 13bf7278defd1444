"""The reference Swin models against timm, torchvision and transformers with the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models_support import double, gradients, library, redraw, rms_ratio
from torch import Tensor, nn

from vicinal.models import (
    SwinTransformer,
    official_state_dict,
    swin_test,
    swin_tiny,
    swin_v2_test,
    swin_v2_tiny,
)
from vicinal.models.swin import (
    WindowAttention,
    WindowAttentionV2,
    shift_mask,
    window_partition,
    window_reverse,
)

CONFIGS = {"v1": swin_test, "v2": swin_v2_test}


def _timm(version: str, size: tuple[int, int]) -> nn.Module:
    library("timm")
    config = CONFIGS[version]()
    sizes: dict[str, Any] = {
        "img_size": size,
        "window_size": config.window_size,
        "embed_dim": 32,
        "depths": (2, 2),
        "num_heads": (2, 4),
        "num_classes": 10,
    }
    if version == "v1":
        return library("timm.models.swin_transformer").SwinTransformer(**sizes)
    return library("timm.models.swin_transformer_v2").SwinTransformerV2(**sizes)


def _torchvision(version: str, size: tuple[int, int]) -> nn.Module:
    swin = library("torchvision.models.swin_transformer")
    block = swin.SwinTransformerBlock if version == "v1" else swin.SwinTransformerBlockV2
    merging = swin.PatchMerging if version == "v1" else swin.PatchMergingV2
    window = [CONFIGS[version]().window_size] * 2
    return swin.SwinTransformer(
        [4, 4], 32, [2, 2], [2, 4], window, num_classes=10, block=block, downsample_layer=merging
    )


def _transformers(version: str, size: tuple[int, int]) -> nn.Module:
    library("regex")  # transformers fails with other errors than ImportError without it
    transformers = library("transformers")
    config = transformers.SwinConfig(
        image_size=size[0],
        patch_size=4,
        embed_dim=32,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=7,
        num_labels=10,
    )
    model = transformers.SwinForImageClassification(config)

    class Logits(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return model(x).logits

    logits = Logits()
    logits.state_dict = model.state_dict  # type: ignore[method-assign]
    logits.add_module("model", model)
    return logits


@pytest.mark.parametrize(
    ("peer", "version"),
    [(_timm, "v1"), (_timm, "v2"), (_torchvision, "v1"), (_torchvision, "v2"), (_transformers, "v1")],
)
def test_same_weights_give_the_same_logits_as_other_libraries(peer: Any, version: str) -> None:
    size = CONFIGS[version]().image_size
    theirs = redraw(peer(version, (size, size))).double().eval()
    ours = SwinTransformer(CONFIGS[version]()).double().eval()
    ours.load_state_dict(official_state_dict(theirs.state_dict(), ours), strict=True)
    images = torch.randn(2, 3, size, size, dtype=torch.float64)
    with torch.no_grad():
        assert rms_ratio(ours(images), theirs(images)) < 1e-12


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("size", [(60, 44), (44, 100), (30, 22)])
def test_odd_sizes_agree_with_torchvision(version: str, size: tuple[int, int]) -> None:
    # torchvision has the same rule: pad before the projection, then roll; no shift where one window suffices
    theirs = redraw(_torchvision(version, size)).double().eval()
    # built for maps larger than the window: the last stage keeps its shift at any size, as theirs does
    ours = SwinTransformer(CONFIGS[version](image_size=128)).double().eval()
    ours.load_state_dict(official_state_dict(theirs.state_dict(), ours), strict=True)
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    # the embedding of torchvision crops where ours pads, so both get a multiple of the patch
    images = torch.nn.functional.pad(images, (0, -size[1] % 4, 0, -size[0] % 4))
    with torch.no_grad():
        assert rms_ratio(ours(images), theirs(images)) < 1e-12


@pytest.mark.parametrize("config", [swin_tiny(), swin_v2_tiny()], ids=["v1", "v2"])
def test_names_and_shapes_are_the_official_ones(config: Any) -> None:
    with torch.device("meta"):
        state = {name: tuple(t.shape) for name, t in SwinTransformer(config).state_dict().items()}
    w = config.window_size
    block = "layers.0.blocks.1."
    assert list(state)[:5] == [
        f"patch_embed.{n}" for n in ("proj.weight", "proj.bias", "norm.weight", "norm.bias")
    ] + ["layers.0.blocks.0.norm1.weight"]
    assert state[f"{block}attn_mask"] == ((56 // 7) ** 2 if w == 7 else (64 // 8) ** 2, w * w, w * w)
    assert f"{block}attn.relative_position_index" in state
    assert state["layers.0.downsample.reduction.weight"] == (192, 384)
    assert state["layers.0.downsample.norm.weight"] == ((384,) if w == 7 else (192,))
    assert state["head.weight"] == (1000, 768)
    last = [name for name in state if name.startswith("layers.3.") and name.endswith("attn_mask")]
    assert not last  # the last map is one window
    attention = [name.removeprefix(f"{block}attn.") for name in state if name.startswith(f"{block}attn.")]
    linear = ["proj.weight", "proj.bias"]
    if config.version == 1:
        assert attention == [
            "relative_position_bias_table",
            "relative_position_index",
            "qkv.weight",
            "qkv.bias",
            *linear,
        ]
    else:
        mlp = ["cpb_mlp.0.weight", "cpb_mlp.0.bias", "cpb_mlp.2.weight"]
        tables = ["relative_coords_table", "relative_position_index"]
        assert attention == ["logit_scale", "q_bias", "v_bias", *tables, *mlp, "qkv.weight", *linear]


def test_a_state_dict_that_does_not_fit_is_named() -> None:
    model = SwinTransformer(swin_test())
    state = dict(model.state_dict())
    del state["norm.bias"]
    state["extra.weight"] = torch.zeros(1)
    with pytest.raises(KeyError, match=r"missing \['norm.bias'\], unknown \['extra.weight'\]"):
        official_state_dict(state, model)


def test_windows_and_mask_of_the_worked_example() -> None:
    tokens = torch.arange(16.0).view(1, 4, 4, 1)
    windows = window_partition(tokens.roll((-1, -1), dims=(1, 2)), 2)
    assert windows.squeeze(-1).tolist() == [[5, 6, 9, 10], [7, 4, 11, 8], [13, 14, 1, 2], [15, 12, 3, 0]]
    assert torch.equal(window_reverse(windows, 2, 4, 4).roll((1, 1), dims=(1, 2)), tokens)
    mask = shift_mask(4, 4, 2, (1, 1))
    assert mask[0].abs().max() == 0
    assert torch.equal(mask[3] == 0, torch.eye(4, dtype=torch.bool))
    regions = torch.tensor([0, 0, 1, 1])
    assert torch.equal(mask[2] == 0, regions[:, None] == regions[None, :])


@pytest.mark.parametrize("cls", [WindowAttention, WindowAttentionV2])
def test_attention_of_one_window_by_loops(cls: Any) -> None:
    """Every logit written out for one pair of tokens at a time."""
    w, h, d = 3, 2, 5
    attn = double(redraw(cls(h * d, w, h)))
    x = torch.randn(1, w * w, h * d, dtype=torch.float64)
    bias = attn.qkv.bias if cls is WindowAttention else attn.qkv_bias()
    qkv = torch.nn.functional.linear(x[0], attn.qkv.weight, bias).view(w * w, 3, h, d)
    table = attn.relative_position_bias_table if cls is WindowAttention else attn.bias_table()
    rows = []
    for n in range(w * w):
        heads = []
        for i in range(h):
            logits = []
            for m in range(w * w):
                dy, dx = n // w - m // w, n % w - m % w
                q, k = qkv[n, 0, i], qkv[m, 1, i]
                if cls is WindowAttention:
                    score = q @ k / d**0.5
                else:
                    score = attn.logit_scale[i, 0, 0].exp().clamp(max=100) * (q @ k) / (q.norm() * k.norm())
                logits.append(score + table[(dy + w - 1) * (2 * w - 1) + dx + w - 1, i])
            heads.append(torch.stack(logits).softmax(0) @ qkv[:, 2, i])
        rows.append(torch.cat(heads))
    assert rms_ratio(attn(x)[0], attn.proj(torch.stack(rows))) < 1e-12


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_every_parameter_matters(version: str) -> None:
    model = redraw(SwinTransformer(CONFIGS[version](image_size=(60, 44), drop_path=0.2))).eval()
    for name, value in gradients(model, torch.randn(2, 3, 60, 44)).items():
        assert value.abs().max() > 1e-6, name


def test_drop_path_keeps_or_drops_whole_samples() -> None:
    torch.manual_seed(0)
    model = redraw(SwinTransformer(swin_test(drop_path=0.5)))
    block = model.layers[1].blocks[1]
    x = torch.randn(64, 14, 14, 64)
    kept = (block(x) - x).flatten(1).abs().amax(1) > 0
    assert 0.5 < kept.float().mean() < 0.95  # 1 - 0.5 * 0.5 of the samples keep at least one branch
