"""Cases of tests/test_distributed.py, one family after the other; each runs on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from distributed_support import close, compare, even, grid, random, refuses, sent
from torch import Tensor

from vicinal import (
    KeyBias,
    Neighborhood,
    RelTable,
    Rope3D,
    Windows,
    distributed,
    linear_attention,
    neighborhood_attention,
    segments,
    voxel_attention,
    windowed_attention,
)


def windowed(
    windows: Windows, space: tuple[int, ...], axis: int, lengths: Sequence[int], **shared: Tensor
) -> None:
    compare(
        lambda **t: windowed_attention(**t, windows=windows),
        lambda **t: distributed.windowed_attention(**t, windows=windows, axis=axis, lengths=lengths),
        grid(*space),
        shared,
        1 + axis,
        lengths,
        exact=True,
    )


def case_windowed_shifted() -> None:
    bias = random(2, 16, 16, seed=9)
    windowed(Windows(4, shift=2), (32, 12), 0, even(32), bias=bias)
    windowed(Windows((4, 3), shift=(1, 2), mask_value=-float("inf")), (12, 24), 1, even(24))


def case_windowed_of_uneven_ranks() -> None:
    ranks = dist.get_world_size()
    lengths = [4, 8, 4, 12][:ranks]
    windowed(Windows(4, shift=(3, 0)), (sum(lengths), 9), 0, lengths)
    lengths[-1] += 3  # the last window hangs over
    windowed(
        Windows(4, shift=(0, 1)),
        (sum(lengths), 9),
        0,
        lengths,
        extra_k=random(2, 3, 2, 6),
        extra_v=random(2, 3, 2, 6),
    )


def case_windowed_stripes_and_cosine() -> None:
    windowed(Windows(None, head_groups=((1, (2, -1)), (1, (4, 3)))), (16, 9), 0, even(16))
    compare(
        lambda q, k, v, logit_scale: windowed_attention(
            q, k, v, Windows(4, shift=2), logit_scale=logit_scale, return_lse=True
        ),
        lambda q, k, v, logit_scale: distributed.windowed_attention(
            q, k, v, Windows(4, shift=2), logit_scale=logit_scale, return_lse=True
        ),
        grid(16, 8),
        {"logit_scale": random(2, seed=5)},
        1,
        even(16),
    )


def case_windowed_padding_mask() -> None:
    mask = random(2, 16, 8, seed=4) > 0.5
    rank, rows = dist.get_rank(), 16 // dist.get_world_size()
    mine = mask[:, rank * rows : (rank + 1) * rows]
    windows = Windows(4, shift=1, mask_value=-float("inf"))
    compare(
        lambda **t: windowed_attention(**t, windows=windows, key_padding_mask=mask),
        lambda **t: distributed.windowed_attention(**t, windows=windows, key_padding_mask=mine),
        grid(16, 8),
        {},
        1,
        even(16),
    )


def case_windowed_bad_splits() -> None:
    q = torch.randn(1, 8, 8, 1, 4)
    for windows, text in (
        (Windows(3), "must divide the rows"),
        (Windows((-1, 4)), "-1 on the split axis"),
        (Windows(4, partition="grid"), "partition 'grid'"),
        (Windows(4, kv_size=6), "kv_size 6"),
    ):
        refuses(ValueError, text, distributed.windowed_attention, q, q, q, windows)
    refuses(ValueError, "axis is 2", distributed.windowed_attention, q, q, q, 4, axis=2)
    refuses(ValueError, "lengths is", distributed.windowed_attention, q, q, q, 4, lengths=[8])
    refuses(
        ValueError,
        "this rank holds 8 rows",
        distributed.windowed_attention,
        q,
        q,
        q,
        4,
        lengths=[4] * dist.get_world_size(),
    )


def neighborhood(
    where: Neighborhood, space: tuple[int, ...], axis: int, lengths: Sequence[int], **shared: Tensor
) -> None:
    compare(
        lambda **t: neighborhood_attention(**t, kernel_size=where, return_lse=True),
        lambda **t: distributed.neighborhood_attention(
            **t, kernel_size=where, return_lse=True, axis=axis, lengths=lengths
        ),
        grid(*space),
        shared,
        1 + axis,
        lengths,
    )


def case_neighborhood() -> None:
    neighborhood(Neighborhood(5), (16, 9), 0, even(16), bias=random(2, 9, 9, seed=9))
    neighborhood(Neighborhood((3, 5), dilation=(1, 2)), (7, 20), 1, even(20))
    neighborhood(Neighborhood(4), (24,), 0, even(24), extra_k=random(2, 3, 2, 6), extra_v=random(2, 3, 2, 6))


def case_neighborhood_of_uneven_ranks() -> None:
    lengths = [5, 9, 3, 7][: dist.get_world_size()]
    for where in (
        Neighborhood(3, dilation=3),
        Neighborhood(7),
        Neighborhood(4, stride=2),
        Neighborhood(3, stride=3, dilation=2, is_causal=True),
        Neighborhood((4, 0), border="truncate"),
        Neighborhood((-1, 0), border="truncate"),
        Neighborhood((2, 5), border="truncate", stride=2),
    ):
        if where.border == "truncate" or sum(lengths) >= 9:
            neighborhood(where, (sum(lengths),), 0, lengths)


def case_neighborhood_of_one_row_each() -> None:
    ranks = dist.get_world_size()
    lengths = [1] * (ranks - 1) + [9]
    neighborhood(Neighborhood(3, dilation=2), (sum(lengths), 7), 0, lengths)


def case_bytes_sent() -> None:
    """The cost model of the documentation, in bytes that leave this rank."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    rows, width, row_bytes = 8, 5, 2 * 6 * 8  # heads x head dim x float64
    q = random(1, rows, width, 2, 6).requires_grad_()
    sides = (rank > 0) + (rank < ranks - 1)
    halo = 2 * 3 * width * row_bytes * sides  # k and v, 7 // 2 rows a side
    call: Any = distributed.neighborhood_attention
    assert sent(lambda: call(q, q, q, (7, 3)).sum().backward()) == [halo, halo]
    window = Windows((4, 5), shift=(1, 0))
    ring = 4 * width * row_bytes  # a row of q, k and v one way, a row of the output the other
    shifted: Any = distributed.windowed_attention
    assert sum(sent(lambda: shifted(q, q, q, window).sum().backward())) == 2 * ring
    state = random(1, rows, 2, 6).requires_grad_()
    causal = distributed.linear_attention
    assert not sum(sent(lambda: causal(state, state, state, is_causal=True).sum().backward()))


def case_neighborhood_padding_mask() -> None:
    mask = random(2, 16, seed=4) > 0.5
    rank, rows = dist.get_rank(), 16 // dist.get_world_size()
    mine = mask[:, rank * rows : (rank + 1) * rows]
    compare(
        lambda **t: neighborhood_attention(**t, kernel_size=5, key_padding_mask=mask),
        lambda **t: distributed.neighborhood_attention(**t, kernel_size=5, key_padding_mask=mine),
        grid(16),
        {},
        1,
        even(16),
    )


def case_neighborhood_bad_splits() -> None:
    q = torch.randn(1, 8, 1, 4)
    refuses(ValueError, "spans more than", distributed.neighborhood_attention, q, q, q, 9, dilation=8)
    refuses(ValueError, "an entry per axis", distributed.neighborhood_attention, q, q, q, (3, 3))


def linear(
    lengths: Sequence[int], shared: dict[str, Tensor] | None = None, heads: int = 2, **options: Any
) -> None:
    tokens = sum(lengths)
    split = {n: random(2, tokens, heads, 6, seed=i) for i, n in enumerate("qkv")}
    if options.pop("stepwise", False):
        split["decay"] = -random(2, tokens, heads, seed=7).abs()
    compare(
        lambda **t: linear_attention(**t, **options),
        lambda **t: distributed.linear_attention(**t, **options),
        split,
        shared or {},
        1,
        lengths,
    )


def case_linear() -> None:
    lengths = [13, 40, 5, 22][: dist.get_world_size()]
    linear(lengths)
    linear(lengths, normalize=False, feature_map="relu2", const=0.5)
    linear(lengths, is_causal=True)
    linear(lengths, is_causal=True, const=1.0, feature_map="exp", scale=0.3)


def case_linear_with_decay() -> None:
    lengths = [13, 40, 5, 22][: dist.get_world_size()]
    linear(lengths, is_causal=True, stepwise=True)
    linear(lengths, is_causal=True, stepwise=True, normalize=False, feature_map="identity")
    linear(lengths, {"decay": -random(2, seed=3).abs()}, is_causal=True, const=0.25)


def case_linear_blocks() -> None:
    for mode in ("previous", "inclusive"):
        linear([16, 8, 24, 13][: dist.get_world_size()], is_causal=True, block_size=8, block_mode=mode)


def case_linear_masks_and_denominators() -> None:
    lengths = even(24)
    mask = random(2, 24, seed=4) > 0.5
    rank, rows = dist.get_rank(), lengths[0]
    mine = mask[:, rank * rows : (rank + 1) * rows]
    split = {n: random(2, 24, 2, 6, seed=i) for i, n in enumerate("qkv")}
    split |= {n: random(2, 24, 2, 4, seed=7 + i).abs() for i, n in enumerate(("q_den", "k_den"))}
    for causal in (False, True):
        compare(
            lambda c=causal, **t: linear_attention(**t, key_padding_mask=mask, is_causal=c),
            lambda c=causal, **t: distributed.linear_attention(**t, key_padding_mask=mine, is_causal=c),
            split,
            {},
            1,
            lengths,
        )


def case_linear_bad_maps() -> None:
    q = torch.randn(1, 8, 1, 4)
    refuses(
        ValueError, "'softmax'", distributed.linear_attention, q, q, q, feature_map="softmax", normalize=False
    )
    decay = -torch.rand(1, 8, 1, 4)
    call = distributed.linear_attention
    refuses(ValueError, "per channel", call, q, q, q, is_causal=True, decay=decay)


def case_voxel() -> None:
    ranks = dist.get_world_size()
    lengths = [11, 30, 2, 17][:ranks]
    rows = sum(lengths)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(3))
    batch = torch.randint(0, 6, (rows,), generator=torch.Generator().manual_seed(4)).sort()[0]
    cut = torch.cat([torch.zeros(1, dtype=torch.long), torch.bincount(batch, minlength=6).cumsum(0)])
    cut[-1] = rows - 2  # two rows in no segment
    segs = segments.from_arrays(order[: rows - 2], cut, n_q=rows)
    part = distributed.partition_segments(segs, lengths[dist.get_rank()], lengths=lengths)
    split = {n: random(rows, 2, 6, seed=i) for i, n in enumerate("qkv")}
    compare(
        lambda **t: voxel_attention(**t, segments=segs, return_lse=True),
        lambda **t: distributed.voxel_attention(**t, partition=part, return_lse=True),
        split,
        {},
        0,
        lengths,
    )
    coords = torch.randint(0, 5, (rows, 3), generator=torch.Generator().manual_seed(5))
    first = [0, *accumulate(lengths)][dist.get_rank()]
    mine = coords[first : first + lengths[dist.get_rank()]]
    compare(
        lambda q, k, v, b, table, angles: voxel_attention(
            q, k, v, segs, bias=(KeyBias(b), RelTable(coords, table), Rope3D(coords, angles))
        ),
        lambda q, k, v, b, table, angles: distributed.voxel_attention(
            q, k, v, part, bias=(KeyBias(b), RelTable(mine, table), Rope3D(mine, angles))
        ),
        split | {"b": random(rows, 2, seed=8)},
        {"table": random(3, 5, 2, seed=9), "angles": random(1, seed=10)},
        0,
        lengths,
    )


def case_voxel_with_keys_of_their_own() -> None:
    ranks = dist.get_world_size()
    lengths, lengths_k = [5, 6, 7, 2][:ranks], [9, 1, 4, 12][:ranks]
    n_q, n_k = sum(lengths), sum(lengths_k)
    k_index = torch.randint(0, n_k, (40,), generator=torch.Generator().manual_seed(3))
    segs = segments.from_arrays(
        torch.arange(n_q),
        torch.tensor([0, 2, 2, 7, n_q]),
        k_index,
        torch.tensor([0, 3, 20, 10]),
        torch.tensor([10, 9, 20, 40]),
        n_q=n_q,
        n_k=n_k,
    )
    rank = dist.get_rank()
    part = distributed.partition_segments(
        segs, lengths[rank], own_k=lengths_k[rank], lengths=lengths, lengths_k=lengths_k
    )
    q, k, v = random(n_q, 2, 6), random(n_k, 2, 6, seed=1), random(n_k, 2, 5, seed=2)
    upstream = random(n_q, 2, 5, seed=3)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    call: Any = voxel_attention
    whole = call(*leaves, segs)
    expected = (whole, *torch.autograd.grad(whole, leaves, upstream))
    at, at_k = sum(lengths[:rank]), sum(lengths_k[:rank])
    cuts = (slice(at, at + lengths[rank]), slice(at_k, at_k + lengths_k[rank]))
    own = [x[c].clone().requires_grad_() for x, c in zip((q, k, v), (cuts[0], cuts[1], cuts[1]))]
    call = distributed.voxel_attention
    out = call(*own, part)
    got = (out, *torch.autograd.grad(out, own, upstream[cuts[0]]))
    for x, truth, c in zip(got, expected, (cuts[0], *cuts, cuts[1])):
        close("a result", x, truth[c])
