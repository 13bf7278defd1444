"""In a process of its own: stand in for a natten version, run and train models that import it, print results.

python tests/run_as_natten.py 0.17.5
python tests/run_as_natten.py 0.15.1 --dinat
"""

from __future__ import annotations

import importlib.util
import json
import sys
from typing import Any

import torch
import torch.nn.functional as F
from hidden_natten import hide_natten
from models_support import gradients, loss_curve, redraw, worst
from torch import Tensor, nn

import vicinal
from benchmarks import torchvision_operators
from vicinal.compat import install_as_natten
from vicinal.models import DiNAT, dinat_test, official_dinat_state_dict

IMAGES = (2, 3, 64, 44)  # levels of 16 x 11, 8 x 6 and 4 x 3 tokens: smaller than 3 * 4 on an axis


def compare(model: nn.Module, reference: nn.Module) -> dict[str, Any]:
    """The largest RMS ratio of outputs and gradients in double precision, and 12 losses of training."""
    x = torch.randn(IMAGES, dtype=torch.float64)
    error, where = worst(gradients(model.double(), x), gradients(reference.double(), x))
    losses = loss_curve(model.float(), x.float(), torch.arange(2), 12, F.cross_entropy)
    return {"error": error, "where": where, "first": float(losses[0]), "last": float(losses[-1])}


def reference_model(**changes: Any) -> DiNAT:
    model = redraw(DiNAT(dinat_test(**changes)))
    assert isinstance(model, DiNAT)
    return model


def published(version: str) -> dict[str, Any]:
    from published_nat import NAT, UnfusedAttention, make_attention

    modern = version >= "0.17"  # no padding of small maps
    narrow = {"dilations": ((1, 3), (1, 2), (1,))} if modern else {}
    reference = reference_model(**narrow)
    results = {}
    if version < "0.20":
        model = NAT(make_attention, reference.config)
        model.load_state_dict(reference.state_dict(), strict=True)
        results["modules"] = compare(model, reference)
        # the files that call the functions have no padding of their own
        reference = reference_model(dilations=((1, 3), (1, 2), (1,)))
        model = NAT(UnfusedAttention, reference.config)
        model.load_state_dict(reference.state_dict(), strict=True)
        results["functions"] = compare(model, reference)
        return results
    state = reference.state_dict()
    for name in [name for name in state if name.endswith("rpb")]:
        state.pop(name).zero_()
    model = NAT(make_attention, reference.config)
    model.load_state_dict(state, strict=True)
    for attention in (m for m in reference.modules() if hasattr(m, "rpb")):
        del attention.rpb
        attention.rpb = torch.zeros(1, 5, 5, dtype=torch.float64)
    results["modules"] = compare(model, reference)
    return results


class Logits(nn.Module):
    """A model of transformers that returns its logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).logits


def dinat_of_transformers() -> dict[str, Any]:
    """Accelerated; and through natten's functions, with the heads-first view of transformers 4."""
    torchvision_operators.declare()
    from transformers.models.dinat import modeling_dinat

    config = modeling_dinat.DinatConfig(
        embed_dim=32,
        depths=[2, 2, 1],
        num_heads=[2, 4, 8],
        kernel_size=3,
        dilations=[[1, 4], [1, 2], [1]],
        mlp_ratio=3.0,
        num_labels=10,
        drop_path_rate=0.0,
        layer_scale_init_value=0.5,
    )
    results = {}
    for name in ("accelerated", "functions"):
        if name == "functions":
            modeling_dinat.NeighborhoodAttention.forward = _forward_of_transformers_4(modeling_dinat)
        model = redraw(modeling_dinat.DinatForImageClassification(config))
        reference = DiNAT(dinat_test(layer_scale=0.5))
        reference.load_state_dict(official_dinat_state_dict(model.state_dict(), reference), strict=True)
        if name == "accelerated":
            report = vicinal.accelerate(model)
            assert (len(report.replaced), len(report.left_alone)) == (5, 0), str(report)
        x = torch.randn(IMAGES, dtype=torch.float64)
        with torch.no_grad():
            expected = reference.double()(x)
            error = float((model.double()(x).logits - expected).abs().max() / expected.abs().max())
        losses = loss_curve(Logits(model.float()), x.float(), torch.arange(2), 12, F.cross_entropy)
        trained = all(parameter.grad is not None for parameter in model.parameters())
        assert trained
        results[name] = {"error": error, "first": float(losses[0]), "last": float(losses[-1])}
    return results


def _forward_of_transformers_4(modeling: Any) -> Any:
    """What transformers computed before its heads moved to the wrong axis: queries [B, heads, H, W, d]."""

    def forward(self: Any, hidden_states: Tensor, output_attentions: bool = False) -> tuple[Tensor, ...]:
        heads = (self.num_attention_heads, self.attention_head_size)
        q, k, v = (
            project(hidden_states).unflatten(-1, heads).permute(0, 3, 1, 2, 4)
            for project in (self.query, self.key, self.value)
        )
        q = q / self.attention_head_size**0.5
        scores = modeling.natten2dqkrpb(q, k, self.rpb, self.kernel_size, self.dilation)
        weights = self.dropout(scores.softmax(-1))
        out = modeling.natten2dav(weights, v, self.kernel_size, self.dilation)
        return (out.permute(0, 2, 3, 1, 4).flatten(-2), *((weights,) if output_attentions else ()))

    return forward


def main() -> None:
    version = sys.argv[1]
    torch.manual_seed(0)
    hide_natten()
    assert importlib.util.find_spec("natten") is None
    module = install_as_natten(version)
    spec = importlib.util.find_spec("natten")
    assert spec is not None
    assert spec.name == "natten"
    assert importlib.util.find_spec("natten.functional") is not None
    assert install_as_natten(version) is module
    results: dict[str, Any] = {"version": module.__version__}
    try:
        install_as_natten("0.17" if version < "0.17" else "0.14.4")
    except RuntimeError as error:
        results["second"] = str(error)
    if "--dinat" in sys.argv:
        results |= dinat_of_transformers()
    else:
        results |= published(version)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
