"""The named problems of neighborhood attention: every option, and shapes that broke an implementation."""

from __future__ import annotations

from dataclasses import dataclass

from vicinal import Neighborhood


@dataclass(frozen=True)
class Problem:
    """One neighborhood problem.

    space: the grid of the keys. q_length: queries on its one axis, 0: as many as keys. kv_heads: 0: as many
    as heads. low_bias: the bias is in q's dtype instead of float32. extra: extra keys. padding: "" none,
    "bool" (30 % of the keys), "window" (the first half of the first axis), "sample" (one sample has no key).
    rel_pos: "" none, "shared" tables, or "heads", a table per head.
    layout: "contiguous", "packed" (views of one qkv tensor), "transposed" (heads before the grid), "crop"
    (views into a buffer of NaN), "expanded" (one sample of k and v for all), "qkvpacked" (the packed
    function).
    """

    name: str
    space: tuple[int, ...]
    where: Neighborhood
    batch: int = 2
    heads: int = 2
    kv_heads: int = 0
    dim: int = 8
    dim_v: int = 0
    q_length: int = 0
    scale: float | None = None
    bias: bool = False
    low_bias: bool = False
    rel_pos: str = ""
    extra: int = 0
    padding: str = ""
    dropout_p: float = 0.0
    layout: str = "contiguous"

    @property
    def value_dim(self) -> int:
        return self.dim_v or self.dim

    @property
    def key_heads(self) -> int:
        return self.kv_heads or self.heads

    @property
    def query_space(self) -> tuple[int, ...]:
        return (self.q_length,) if self.q_length else self.space

    def __str__(self) -> str:
        return self.name


N = Neighborhood

SHAPES = (
    Problem("1d", (13,), N(3), bias=True),
    Problem("1d-even", (13,), N(4), bias=True),
    Problem("1d-k1", (9,), N(1), extra=1),
    Problem("1d-k1-dilated", (9,), N(1, dilation=3), extra=2),
    Problem("1d-whole", (9,), N(9), bias=True),
    Problem("1d-one-short", (9,), N(8), bias=True),
    Problem("1d-dilated", (14,), N(3, dilation=4), bias=True),
    Problem("1d-dense-groups", (12,), N(4, dilation=3), bias=True),
    Problem("1d-stride", (13,), N(5, stride=2), bias=True),
    Problem("1d-stride-dilated", (23,), N(5, stride=3, dilation=2), bias=True),
    Problem("1d-blocks", (12,), N(4, stride=4), bias=True),
    Problem("1d-blocks-short", (14,), N(4, stride=4), bias=True),
    Problem("1d-causal", (13,), N(4, is_causal=True), bias=True),
    Problem("1d-causal-stride", (14,), N(5, stride=3, is_causal=True), bias=True),
    Problem("1d-causal-dilated", (14,), N(3, dilation=3, is_causal=True), bias=True),
    Problem("1d-long", (200,), N(31), heads=1, bias=True, batch=1),
    Problem("1d-long-keys", (300,), N(151), heads=1, batch=1),
    Problem("1d-long-causal", (300,), N(128, is_causal=True), heads=2, dim=16, batch=1),
    Problem("2d", (7, 9), N(3), bias=True),
    Problem("2d-even", (8, 9), N((4, 2)), bias=True),
    Problem("2d-rectangle", (6, 11), N((3, 7)), bias=True),
    Problem("2d-dilated", (11, 9), N(3, dilation=(3, 2)), bias=True),
    Problem("2d-dense-groups", (6, 8), N((3, 4), dilation=(2, 2)), bias=True),
    Problem("2d-half-dense", (6, 9), N((3, 4), dilation=2), bias=True),
    Problem("2d-whole", (5, 6), N((5, 6)), bias=True),
    Problem("2d-stride", (9, 10), N(5, stride=(2, 3)), bias=True),
    Problem("2d-blocks", (6, 8), N((3, 4), stride=(3, 4)), bias=True),
    Problem("2d-causal", (7, 8), N((3, 4), is_causal=True), bias=True),
    Problem("2d-causal-rows", (7, 8), N((3, 5), is_causal=(True, False)), bias=True),
    Problem("2d-causal-columns-stride", (7, 9), N(4, stride=(1, 3), is_causal=(False, True)), bias=True),
    Problem("2d-strips", (24, 20), N(7), heads=1, bias=True, batch=1),
    Problem("2d-dinat", (14, 14), N(7, dilation=2), heads=2, dim=32, bias=True, batch=1),
    Problem("3d", (4, 5, 6), N((3, 2, 3)), bias=True),
    Problem("3d-dilated", (4, 7, 6), N((2, 3, 2), dilation=(2, 1, 3)), bias=True),
    Problem("3d-causal-time", (5, 4, 6), N(3, is_causal=(True, False, False)), bias=True),
    Problem("3d-stride", (6, 5, 6), N((4, 3, 3), stride=(2, 1, 3)), bias=True),
    Problem("3d-blocks", (4, 4, 6), N((2, 2, 3), stride=(2, 2, 3)), bias=True),
    Problem("one-token", (1, 1), N(1), extra=2),
    Problem("batch-0", (7, 6), N(3), batch=0, bias=True),
    Problem("batch-1", (7, 6), N(3), batch=1, bias=True),
    Problem("many-samples", (5,), N(3), batch=70, heads=1, dim=4, bias=True),
)

TRUNCATED = (
    Problem("truncate-1d", (13,), N(3, border="truncate"), bias=True),
    Problem("truncate-even", (13,), N(4, border="truncate"), bias=True),
    Problem("truncate-above-axis", (5,), N(13, border="truncate"), bias=True),
    Problem("truncate-dilation-above-axis", (5,), N(3, dilation=7, border="truncate"), extra=1),
    Problem("truncate-dilated", (14,), N(5, dilation=3, border="truncate"), bias=True),
    Problem("truncate-stride", (14,), N(5, stride=3, border="truncate"), bias=True),
    Problem("truncate-blocks", (14,), N(4, stride=4, border="truncate"), bias=True),
    Problem("truncate-blocks-2d", (7, 6), N((3, 2), stride=(3, 2), border="truncate"), bias=True),
    Problem("truncate-causal", (13,), N(4, is_causal=True, border="truncate"), bias=True),
    Problem("truncate-own-and-last-block", (14,), N(8, stride=4, is_causal=True, border="truncate")),
    Problem("truncate-pair", (13,), N((4, 1), border="truncate"), bias=True),
    Problem("truncate-pair-2d", (7, 8), N(((2, 0), (1, 3)), border="truncate"), bias=True),
    Problem("truncate-pair-and-size", (7, 8), N((3, (0, 2)), border="truncate"), bias=True),
    Problem("truncate-self", (6,), N((0, 0), border="truncate"), extra=1),
    Problem("sliding", (70,), N((15, 0), border="truncate"), heads=1, batch=1),
    Problem("sliding-causal", (70,), N((15, 0), is_causal=True, border="truncate"), bias=True, batch=1),
    Problem("unlimited", (11,), N((-1, -1), border="truncate")),
    Problem("unlimited-left", (13,), N((-1, 2), border="truncate")),
    Problem("unlimited-right", (13,), N((2, -1), border="truncate")),
    Problem("unlimited-causal", (13,), N((-1, 0), is_causal=True, border="truncate")),
    Problem("unlimited-dilated", (13,), N((-1, -1), dilation=4, border="truncate")),
    Problem("unlimited-stride", (13,), N((-1, 1), stride=3, border="truncate")),
    Problem("unlimited-2d", (5, 8), N(((-1, -1), (1, 1)), border="truncate")),
    Problem("unlimited-3d", (4, 4, 6), N(((-1, -1),) * 3, dilation=(2, 1, 2), border="truncate")),
    Problem("more-keys", (17,), N((4, 1), border="truncate"), q_length=6, bias=True),
    Problem("more-keys-causal", (17,), N((4, 0), is_causal=True, border="truncate"), q_length=6, bias=True),
    Problem("more-keys-dilated", (17,), N(3, dilation=4, border="truncate"), q_length=6, bias=True),
    Problem("more-keys-stride", (17,), N(5, stride=3, border="truncate"), q_length=7, bias=True),
    Problem("more-keys-one-query", (70,), N((40, 0), border="truncate"), q_length=1, heads=4, kv_heads=1),
    Problem("more-keys-unread", (60,), N((3, 0), border="truncate"), q_length=3),
)

OPTIONS = (
    Problem("bias-low", (7, 6), N(3), bias=True, low_bias=True),
    Problem("grouped", (7, 6), N(3), heads=4, kv_heads=2, bias=True),
    Problem("grouped-one", (7, 6), N(3, dilation=2), heads=3, kv_heads=1, bias=True, dim_v=5),
    Problem("grouped-dense-groups", (6, 8), N((3, 4), dilation=2), heads=4, kv_heads=2, bias=True),
    Problem("grouped-blocks", (6, 8), N((3, 4), stride=(3, 4)), heads=4, kv_heads=2),
    Problem("grouped-causal", (70,), N((15, 0), is_causal=True, border="truncate"), heads=4, kv_heads=2),
    Problem("extra", (7, 6), N(3), extra=3),
    Problem("extra-bias", (7, 6), N(3), extra=3, bias=True),
    Problem("extra-causal", (13,), N(4, is_causal=True), extra=2, bias=True),
    Problem("extra-grouped", (7, 6), N(3), extra=3, bias=True, heads=4, kv_heads=2, dim_v=5),
    Problem("extra-dense-groups", (6, 8), N((3, 4), dilation=2), extra=2, bias=True),
    Problem("extra-many", (40,), N(5), extra=70, heads=1),
    Problem("padding", (7, 6), N(3), padding="bool", bias=True),
    Problem("padding-dense-groups", (6, 8), N((3, 4), dilation=2), padding="bool", bias=True),
    Problem("padding-window", (12, 5), N(3), padding="window", bias=True),
    Problem("padding-sample", (7, 6), N(3, dilation=2), padding="sample", bias=True),
    Problem("padding-sample-extra", (7, 6), N(3), padding="sample", extra=2, bias=True),
    Problem("padding-causal", (15,), N(4, is_causal=True), padding="bool"),
    Problem("padding-truncate", (15,), N(5, border="truncate"), padding="bool", heads=4, kv_heads=2),
    Problem("dropout", (7, 6), N(3), dropout_p=0.3, bias=True),
    Problem("dropout-dense-groups", (6, 8), N((3, 4), dilation=2), dropout_p=0.3, bias=True),
    Problem("dropout-grouped", (7, 6), N(3), dropout_p=0.5, heads=4, kv_heads=2, extra=3),
    Problem("dropout-truncate", (14,), N((4, 1), border="truncate"), dropout_p=0.4, padding="bool"),
    Problem("dropout-more-keys", (17,), N((4, 1), border="truncate"), dropout_p=0.4, q_length=6, extra=2),
    Problem("dropout-all", (7, 6), N(3), dropout_p=1.0, bias=True),
    Problem("scale-1", (7, 6), N(3), scale=1.0),
    Problem("scale-0", (7, 6), N(3), scale=0.0, bias=True),
    Problem("packed", (8, 6), N(3), bias=True, layout="packed"),
    Problem("qkvpacked", (8, 6), N(3), bias=True, layout="qkvpacked"),
    Problem("qkvpacked-dense-groups", (6, 8), N((3, 4), dilation=2), bias=True, layout="qkvpacked"),
    Problem("transposed", (8, 6), N(3, dilation=2), bias=True, layout="transposed"),
    Problem("crop", (7, 6), N(3), bias=True, layout="crop", extra=2, heads=4, kv_heads=2),
    Problem("crop-dense-groups", (6, 8), N((3, 4), dilation=2), bias=True, layout="crop"),
    Problem("crop-3d", (3, 4, 5), N((3, 2, 3)), layout="crop", dim=5, dim_v=3),
    Problem("crop-more-keys", (17,), N((4, 1), border="truncate"), q_length=6, bias=True, layout="crop"),
    Problem("expanded", (7, 6), N(3), bias=True, layout="expanded"),
    Problem(
        "everything",
        (7, 9),
        N((3, 4), dilation=(2, 1), is_causal=(False, True)),
        heads=4,
        kv_heads=2,
        dim=13,
        dim_v=6,
        bias=True,
        extra=3,
        padding="bool",
        dropout_p=0.2,
        layout="crop",
    ),
)

CONTEXT = (
    Problem("rel-pos-1d", (13,), N(3), rel_pos="shared"),
    Problem("rel-pos-2d", (7, 9), N((3, 4), dilation=(2, 1)), rel_pos="heads", bias=True),
    Problem("rel-pos-3d", (4, 5, 6), N((3, 2, 3)), rel_pos="shared", dim=5, dim_v=3),
    Problem("rel-pos-stride", (14,), N(5, stride=3), rel_pos="shared", extra=2),
    Problem("rel-pos-causal", (14,), N(5, stride=3, is_causal=True), rel_pos="heads", padding="bool"),
    Problem("rel-pos-dense-groups", (6, 8), N((3, 4), dilation=2), rel_pos="shared", dropout_p=0.3),
    Problem("rel-pos-truncate", (14,), N((4, 1), dilation=2, border="truncate"), rel_pos="heads"),
    Problem("rel-pos-truncate-above-axis", (5,), N(13, border="truncate"), rel_pos="shared"),
    Problem("rel-pos-more-keys", (17,), N((4, 1), border="truncate"), q_length=6, rel_pos="shared"),
    Problem("rel-pos-grouped", (7, 6), N(3), heads=4, kv_heads=2, rel_pos="heads", scale=0.0),
    Problem("rel-pos-packed", (8, 6), N(3), rel_pos="shared", layout="qkvpacked", dropout_p=1.0),
)

HEAD_DIMS = tuple(
    Problem(f"dim-{d}-{e}", (6, 5), N(3, dilation=(2, 1)), dim=d, dim_v=e, bias=True, batch=1)
    for d, e in (
        *((1, 1), (1, 6), (6, 6), (13, 13), (30, 30), (53, 53), (77, 77), (122, 122), (16, 96), (96, 40)),
        *((32, 128), (128, 64), (64, 7), (256, 256)),
    )
)

PROBLEMS = (*SHAPES, *TRUNCATED, *OPTIONS, *CONTEXT, *HEAD_DIMS)
BY_NAME = {p.name: p for p in PROBLEMS}
assert len(BY_NAME) == len(PROBLEMS), "two problems share a name"

# The awkward sizes of published tests: axes that nothing divides.
AWKWARD = (
    Problem("84x19", (84, 19), N((7, 3), dilation=(5, 1)), heads=1, batch=1),
    Problem("67x80", (67, 80), N((12, 7), stride=(8, 4), dilation=(5, 11)), heads=1, batch=1),
    Problem(
        "18x37x12",
        (18, 37, 12),
        N((14, 16, 12), stride=(12, 8, 1), dilation=(1, 2, 1)),
        heads=1,
        batch=1,
        dim=4,
    ),
)
