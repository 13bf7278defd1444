"""The named problems of windowed attention: every option, every shape that once broke an implementation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vicinal import Windows

INF = float("inf")


@dataclass(frozen=True)
class Problem:
    """One windowed problem.

    space: the grid of the keys. q_space: that of the queries, None: the same. bias: "" none, "q-k", "k-q",
    "abs", "index" (an index tensor with negative rows), "dense" [h, Nq, Nk], "dense4" [1, h, Nq, Nk].
    bias_window: the window that the table was made for. low_bias: the bias is in q's dtype instead of
    float32. rel_pos: "" none, "shared" tables, or "heads", a table per head. cosine: with logit_scale.
    edge_k, edge_v: pads have a key, a value. extra: extra keys. padding: "" none, "bool", "float", "window"
    (whole windows ignored), "sample" (one sample has no key). mask: "" none, "windows" [W, Nq, Nk], "samples"
    [B * W, 1, Nq, Nk], "heads" [B * W, h, Nq, Nk] with -inf. layout: "contiguous", "packed" (views of one qkv
    tensor), "transposed" (heads before the grid), "crop" (views into a buffer of NaN), "qkvpacked" (the
    packed function).
    """

    name: str
    space: tuple[int, ...]
    windows: Windows
    batch: int = 2
    heads: int = 2
    dim: int = 8
    dim_v: int = 0
    q_space: tuple[int, ...] | None = None
    scale: float | None = None
    bias: str = ""
    bias_window: tuple[int, ...] | None = None
    low_bias: bool = False
    rel_pos: str = ""
    cosine: bool = False
    edge_k: bool = False
    edge_v: bool = False
    extra: int = 0
    extra_bias: bool = False
    padding: str = ""
    mask: str = ""
    activation: str = "softmax"
    dropout_p: float = 0.0
    layout: str = "contiguous"

    @property
    def value_dim(self) -> int:
        return self.dim_v or self.dim

    @property
    def query_space(self) -> tuple[int, ...]:
        return self.q_space or self.space

    def __str__(self) -> str:
        return self.name


def _windows_of(*groups: Any, **options: Any) -> Windows:
    return Windows(None, head_groups=groups, **options)


SHAPES = (
    Problem("1d", (12,), Windows(4), bias="q-k"),
    Problem("1d-shift", (12,), Windows(4, shift=2), bias="q-k"),
    Problem("1d-shift-overhang", (13,), Windows(4, shift=1), bias="q-k"),
    Problem("1d-one-short", (11,), Windows(4, shift=3), bias="k-q"),
    Problem("2d", (6, 8), Windows((3, 4)), bias="q-k"),
    Problem("2d-shift", (8, 12), Windows(4, shift=2), bias="q-k"),
    Problem("2d-shift-rows-only", (6, 9), Windows(3, shift=(1, 0)), bias="q-k"),
    Problem("2d-shift-columns-only", (6, 9), Windows(3, shift=(0, 2)), bias="q-k"),
    Problem("2d-overhang", (7, 10), Windows((4, 3)), bias="q-k"),
    Problem("2d-shift-overhang", (7, 10), Windows(4, shift=2), bias="q-k"),
    Problem("2d-swin", (14, 14), Windows(7, shift=3), heads=3, dim=32, bias="q-k", batch=1),
    Problem("3d-shift", (4, 6, 4), Windows((2, 3, 2), shift=(1, 1, 0)), bias="q-k"),
    Problem("3d-overhang", (3, 5, 4), Windows((2, 3, 3), shift=(1, 2, 1)), bias="q-k"),
    Problem("window-above-map", (3, 5), Windows(7), bias="q-k"),
    Problem("window-above-map-shift", (3, 5), Windows(7, shift=3), bias="q-k"),
    Problem("one-window", (5, 4), Windows((5, 4)), bias="q-k"),
    Problem("one-window-shift", (5, 4), Windows((5, 4), shift=(2, 1)), bias="q-k"),
    Problem("whole-axis", (5, 6), Windows((-1, 2))),
    Problem("whole-map", (4, 5), Windows(-1), bias="q-k"),
    Problem("large-window", (16, 10), Windows((12, 10)), heads=1, dim=16, bias="q-k", batch=1),
    Problem("long-keys", (150,), Windows(150), heads=1, bias="q-k"),
    Problem("one-token-window", (4, 3), Windows(1), extra=2, extra_bias=True),
    Problem("one-token", (1, 1), Windows(3), extra=1),
    Problem("pre-split-tiny", (4,), Windows(4), batch=9, dim=6, bias="q-k"),
    Problem("pre-split-10", (16,), Windows(16), batch=5, heads=4, dim=10, bias="dense"),
    Problem("grid-1d", (12,), Windows(4, partition="grid"), bias="q-k"),
    Problem("grid-2d", (6, 8), Windows((3, 2), partition="grid"), bias="k-q"),
    Problem("grid-overhang", (7, 5), Windows(3, partition="grid"), bias="q-k"),
    Problem(
        "grid-overhang-center",
        (7, 5),
        Windows(3, partition="grid", pad_side="center", edge="zero"),
        bias="q-k",
    ),
    Problem("stripes", (6, 8), _windows_of((2, (-1, 2)), (2, (2, -1))), heads=4),
    Problem(
        "stripes-overhang",
        (7, 5),
        _windows_of((1, (-1, 2)), (3, (2, -1)), edge="zero", pad_side="center"),
        heads=4,
    ),
    Problem("groups-shift", (8, 8), _windows_of((1, 4, 2), (2, (2, 4), (1, 0))), heads=3),
    Problem("groups-one-window", (6, 6), _windows_of((1, 3, 1), (2, 3)), heads=3, bias="q-k"),
    Problem("overlap", (8, 8), Windows(4, kv_size=6, edge="zero"), bias="k-q"),
    Problem("overlap-mask", (8, 9), Windows((4, 3), kv_size=(6, 4)), bias="q-k"),
    Problem("overlap-overhang", (7, 9), Windows(4, kv_size=7, edge="zero"), bias="k-q"),
    Problem(
        "overlap-const", (9,), Windows(4, kv_size=6, edge="const"), edge_k=True, edge_v=True, padding="bool"
    ),
    Problem("overlap-equal", (9,), Windows(4, kv_size=4), bias="q-k"),
    Problem("pooled", (16,), Windows(8, q_size=2), q_space=(4,), dim=16),
    Problem("pooled-grid", (32,), Windows(8, q_size=2, partition="grid"), q_space=(8,), bias="index"),
    Problem("pooled-2d", (8, 6), Windows((4, 3), q_size=(2, 1)), q_space=(4, 2), bias="q-k"),
    Problem("pooled-overhang", (7, 6), Windows((4, 3), q_size=(2, 1)), q_space=(4, 2), bias="dense"),
    Problem("center", (7, 5), Windows(4, pad_side="center"), bias="q-k"),
    Problem("center-shift", (7, 5), Windows(4, shift=1, pad_side="center", edge="zero"), bias="q-k"),
    Problem(
        "roll-pad", (7, 10), Windows(4, shift=2, pad_order="roll_pad", edge="const"), edge_k=True, edge_v=True
    ),
    Problem("roll-pad-mask", (7, 5), Windows((4, 3), shift=(2, 1), pad_order="roll_pad"), bias="q-k"),
    Problem("batch-0", (4, 4), Windows(2), batch=0, bias="q-k"),
    Problem("batch-1", (4, 4), Windows(2, shift=1), batch=1, bias="q-k"),
)

OPTIONS = (
    Problem("edge-mask", (5, 7), Windows(4, shift=1, edge="mask")),
    Problem("edge-zero", (5, 7), Windows(4, shift=1, edge="zero"), bias="q-k"),
    Problem("edge-const", (5, 7), Windows(4, shift=1, edge="const"), edge_k=True, edge_v=True, bias="q-k"),
    Problem("edge-const-value-only", (5, 7), Windows(4, edge="const"), edge_v=True),
    Problem("edge-const-key-only", (5, 7), Windows(4, edge="const"), edge_k=True),
    Problem(
        "edge-const-extra",
        (5, 7),
        Windows(4, edge="const"),
        edge_k=True,
        edge_v=True,
        extra=3,
        extra_bias=True,
    ),
    Problem(
        "edge-const-3d", (3, 3, 3), Windows(2, shift=1, edge="const"), edge_k=True, edge_v=True, bias="q-k"
    ),
    Problem("bias-k-q", (6, 6), Windows(3, shift=1), bias="k-q"),
    Problem("bias-abs", (6, 6), Windows(3), bias="abs"),
    Problem("bias-abs-shift", (6, 8), Windows((3, 4), shift=(1, 2)), bias="abs"),
    Problem("bias-dense", (6, 6), Windows(3, shift=1), bias="dense"),
    Problem("bias-dense4", (6, 6), Windows(3), bias="dense4"),
    Problem("bias-index", (6, 6), Windows(3, shift=1), bias="index"),
    Problem("bias-window", (2, 4, 4), Windows((2, 3, 3)), bias="q-k", bias_window=(4, 3, 3)),
    Problem("bias-window-inner", (4, 4), Windows((4, 2)), bias="q-k", bias_window=(4, 3)),
    Problem("bias-low", (6, 6), Windows(3, shift=1), bias="q-k", low_bias=True),
    Problem("mask-value-200", (8, 8), Windows(4, shift=2, mask_value=-200.0), cosine=True, bias="q-k"),
    Problem("mask-value-inf", (8, 8), Windows(4, shift=2, mask_value=-INF), bias="q-k"),
    Problem("mask-value-small", (8, 8), Windows(4, shift=2, mask_value=-0.5), bias="q-k"),
    Problem("padding-bool", (7, 6), Windows(4, shift=2, mask_value=-INF), padding="bool", bias="q-k"),
    Problem("padding-float", (7, 6), Windows(4, shift=2), padding="float", bias="q-k"),
    Problem("padding-window", (8, 6), Windows((4, 3)), padding="window", bias="q-k"),
    Problem("padding-sample", (7, 6), Windows(4), padding="sample", bias="q-k"),
    Problem("padding-sample-extra", (7, 6), Windows(4, edge="const"), padding="sample", extra=1, edge_v=True),
    Problem("mask-windows", (6, 6), Windows(3, shift=1), mask="windows"),
    Problem("mask-samples", (6, 6), Windows(3), mask="samples", bias="q-k"),
    Problem("mask-heads", (6, 5), Windows(3, shift=1), mask="heads", bias="dense"),
    Problem("mask-extra", (6, 5), Windows(3), mask="heads", extra=2, padding="bool"),
    Problem("mask-pre-split", (5,), Windows(5), batch=6, mask="heads"),
    Problem("extra", (6, 6), Windows(3, shift=1), extra=3),
    Problem("extra-bias", (6, 6), Windows(3, shift=1), extra=3, extra_bias=True),
    Problem("extra-and-bias", (6, 6), Windows(3, shift=1), extra=3, extra_bias=True, bias="q-k"),
    Problem("extra-beside-bias", (6, 6), Windows(3), extra=2, bias="dense"),
    Problem("cosine", (8, 6), Windows(4, shift=2), cosine=True, bias="q-k"),
    Problem("cosine-const", (7, 6), Windows(4, shift=2, edge="const"), cosine=True, edge_k=True, edge_v=True),
    Problem("cosine-value-edge", (7, 6), Windows(4, edge="const"), cosine=True, edge_v=True, bias="q-k"),
    Problem("cosine-extra", (6, 6), Windows(3), cosine=True, extra=2, extra_bias=True),
    Problem("cosine-overlap", (8, 8), Windows(4, kv_size=6, edge="zero"), cosine=True, bias="k-q"),
    Problem("cosine-stripes", (6, 8), _windows_of((2, (-1, 2)), (2, (2, -1))), heads=4, cosine=True),
    Problem("relu2", (8, 6), Windows(4, shift=2), activation="relu2", bias="q-k"),
    Problem("relu", (7, 6), Windows(4, shift=2), activation="relu", bias="q-k"),
    Problem("none", (7, 6), Windows(4, shift=2), activation="none", bias="q-k"),
    Problem(
        "relu2-mossformer", (24,), Windows(8), heads=1, dim=16, dim_v=48, scale=1 / 256, activation="relu2"
    ),
    Problem(
        "relu2-padding-extra", (7, 6), Windows(4, edge="zero"), activation="relu2", padding="bool", extra=2
    ),
    Problem("dropout", (8, 6), Windows(4, shift=2), dropout_p=0.3, bias="q-k"),
    Problem(
        "dropout-extra", (7, 6), Windows(4, edge="const"), dropout_p=0.5, extra=3, edge_k=True, edge_v=True
    ),
    Problem("dropout-overlap", (7, 9), Windows(4, kv_size=6, edge="zero"), dropout_p=0.2, bias="k-q"),
    Problem("dropout-stripes", (6, 8), _windows_of((1, (-1, 2)), (2, (2, -1))), heads=3, dropout_p=0.2),
    Problem("dropout-relu2", (8, 6), Windows(4), dropout_p=0.25, activation="relu2"),
    Problem("scale-1", (6, 6), Windows(3), scale=1.0),
    Problem("scale-1/256", (6, 6), Windows(3), scale=1 / 256, bias="q-k"),
    Problem("scale-0", (6, 6), Windows(3), scale=0.0, bias="q-k"),
    Problem("packed", (8, 6), Windows(4, shift=2), bias="q-k", layout="packed"),
    Problem("qkvpacked", (8, 6), Windows(4, shift=2), bias="q-k", layout="qkvpacked"),
    Problem("qkvpacked-cosine", (7, 6), Windows(4, shift=2), cosine=True, layout="qkvpacked"),
    Problem("qkvpacked-overlap", (8, 8), Windows(4, kv_size=6, edge="zero"), bias="k-q", layout="qkvpacked"),
    Problem(
        "qkvpacked-stripes", (6, 8), _windows_of((2, (-1, 2)), (2, (2, -1))), heads=4, layout="qkvpacked"
    ),
    Problem("transposed", (8, 6), Windows(4, shift=2), bias="q-k", layout="transposed"),
    Problem("crop", (7, 6), Windows(4, shift=2), bias="q-k", layout="crop"),
    Problem("crop-overlap", (7, 6), Windows(4, kv_size=6, edge="zero"), layout="crop"),
    Problem("crop-3d", (3, 4, 3), Windows(2, shift=1), layout="crop", dim=5, dim_v=3),
)

CONTEXT = (
    Problem("rel-pos-1d", (12,), Windows(4, shift=2), rel_pos="shared"),
    Problem("rel-pos-2d", (6, 8), Windows((3, 4), shift=(1, 2)), rel_pos="heads", bias="q-k"),
    Problem("rel-pos-3d", (4, 6, 4), Windows((2, 3, 2)), rel_pos="shared", dim=5, dim_v=3),
    Problem("rel-pos-mask", (7, 10), Windows(4, shift=2), rel_pos="shared", padding="bool"),
    Problem(
        "rel-pos-const", (7, 10), Windows(4, edge="const"), rel_pos="shared", edge_k=True, edge_v=True, dim=16
    ),
    Problem("rel-pos-const-whole", (8, 4), Windows(4, edge="const"), rel_pos="shared", edge_k=True),
    Problem(
        "rel-pos-const-shift",
        (7, 5),
        Windows((4, 3), shift=(2, 1), edge="const"),
        rel_pos="heads",
        edge_v=True,
        padding="float",
        dropout_p=0.3,
        extra=2,
        extra_bias=True,
    ),
    Problem("rel-pos-zero-center", (7, 5), Windows(4, edge="zero", pad_side="center"), rel_pos="shared"),
    Problem("rel-pos-zero-grid", (7, 5), Windows(3, edge="zero", partition="grid"), rel_pos="heads"),
    Problem(
        "rel-pos-roll-pad",
        (7, 10),
        Windows(4, shift=2, pad_order="roll_pad", edge="const"),
        rel_pos="shared",
        edge_k=True,
        mask="windows",
    ),
    Problem("rel-pos-overlap", (8, 9), Windows((4, 3), kv_size=(6, 4)), rel_pos="heads"),
    Problem(
        "rel-pos-overlap-zero",
        (7, 9),
        Windows(4, kv_size=7, edge="zero"),
        rel_pos="shared",
        bias="q-k",
        padding="bool",
        dropout_p=0.2,
        mask="heads",
    ),
    Problem("rel-pos-pooled", (8, 6), Windows((4, 3), q_size=(2, 1)), q_space=(4, 2), rel_pos="shared"),
    Problem(
        "rel-pos-groups",
        (7, 8),
        _windows_of((1, 4, 2), (2, (4, 4), (1, 0)), edge="zero", pad_order="roll_pad"),
        heads=3,
        rel_pos="heads",
    ),
    Problem("rel-pos-cosine", (7, 6), Windows(4, edge="const"), cosine=True, rel_pos="heads", extra=1),
    Problem("rel-pos-scale-0", (6, 6), Windows(3), scale=0.0, rel_pos="shared"),
    Problem("rel-pos-relu2", (6, 6), Windows(3), activation="relu2", rel_pos="shared", scale=-0.3),
    Problem("rel-pos-packed", (8, 6), Windows(4, shift=2), rel_pos="shared", layout="qkvpacked"),
    Problem("rel-pos-batch-0", (4, 4), Windows(2), batch=0, rel_pos="shared"),
)

HEAD_DIMS = tuple(
    Problem(f"dim-{d}-{e}", (6, 5), Windows((3, 4), shift=(1, 2)), dim=d, dim_v=e, bias="q-k", batch=1)
    for d, e in (
        *((1, 1), (1, 5), (10, 10), (18, 18), (24, 24), (30, 30), (46, 46), (53, 53), (77, 77), (96, 96)),
        *((122, 122), (16, 96), (32, 128), (128, 64), (64, 7), (256, 256)),
    )
)

PROBLEMS = (*SHAPES, *OPTIONS, *CONTEXT, *HEAD_DIMS)
BY_NAME = {p.name: p for p in PROBLEMS}
assert len(BY_NAME) == len(PROBLEMS), "two problems share a name"
