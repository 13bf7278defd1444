"""The builders of segments against plain loops over the published rules, on scenes and adversarial inputs."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import segment_oracles as oracle
import torch
from torch import Tensor

from benchmarks.scenes import ADVERSARIAL, adversarial, batch, scene
from vicinal import _segments_curves as curves
from vicinal import _segments_keys as keys
from vicinal import segments
from vicinal.segments import Segments

INVALID = ("duplicates", "negative", "out_of_grid")
VALID = tuple(name for name in ADVERSARIAL if name not in (*INVALID, "many"))
CUBES = ("max_coord",)
FLAT = tuple(name for name in VALID if name not in CUBES)


@lru_cache
def case(name: str) -> tuple[Tensor, tuple[int, ...], int]:
    """coords [N, 4], grid, batch size of an adversarial case or of two samples of a scene."""
    if name in ADVERSARIAL:
        coords, size, grid = adversarial(name)
    else:
        samples = [scene(name, seed) for seed in (0, 1)]
        coords, size, grid = batch([c[:1500] for c, _ in samples], shuffle=0), 2, samples[0][1]
    return torch.from_numpy(coords), tuple(grid), size


def rows_of(s: Segments) -> list[list[int]]:
    found = oracle.pairs(s)
    assert all(q == k for q, k in found)
    return [q for q, _ in found]


def check(s: Segments) -> None:
    """What holds for every Segments."""
    ptr = s.q_ptr.long()
    assert ptr[0] == 0
    assert ptr[-1] == len(s.q_index)
    assert bool((ptr[1:] >= ptr[:-1]).all())
    assert len(torch.unique(s.q_index)) == len(s.q_index)
    lengths = torch.cat([ptr[1:] - ptr[:-1], ptr.new_zeros(1)])
    assert int(lengths.max()) <= s.max_q
    assert int(torch.cat([s.k_end - s.k_begin, s.k_end.new_zeros(1)]).max()) <= s.max_k
    exact = segments.from_arrays(s.q_index, s.q_ptr, s.k_index, s.k_begin, s.k_end, n_q=s.n_q, n_k=s.n_k)
    for name in ("covers_q", "covers_k", "apart", "monotone"):
        assert getattr(exact, name) or not getattr(s, name), name
    assert s.repeats or not exact.repeats
    for name in ("q_index", "k_index", "q_ptr", "k_begin", "k_end"):
        assert getattr(s, name).dtype == torch.int32


WINDOWS: tuple[tuple[Any, Any], ...] = (
    ((12, 12, 1), (0, 0, 0)),
    ((24, 24, 1), (6, 6, 0)),
    ((30, 7, 4), (15, 3, 2)),
)


@pytest.mark.parametrize("name", [*VALID, "waymo_pillar", "waymo_voxel", "shell_64"])
@pytest.mark.parametrize(("window", "shift"), WINDOWS)
def test_windows(name: str, window: Any, shift: Any) -> None:
    coords, grid, size = case(name)
    made = segments.windows(coords, grid, size, window, shift)
    check(made)
    assert rows_of(made) == oracle.windows(coords, window, shift)


@pytest.mark.parametrize("name", [*VALID, "waymo_pillar", "waymo_voxel"])
@pytest.mark.parametrize("set_size", [36, 48, 90])
def test_dsvt_sets(name: str, set_size: int) -> None:
    coords, grid, size = case(name)
    for window, shift in WINDOWS[:2]:
        made = segments.dsvt_sets(coords, grid, size, window, shift, set_size)
        for s, within in zip(made, ((1, 0, 2), (0, 1, 2))):
            check(s)
            assert rows_of(s) == oracle.dsvt_sets(coords, window, shift, set_size, within)
            assert len(made[0].q_ptr) == len(s.q_ptr)


def test_split_evenly_is_the_published_index() -> None:
    for size in (36, 90):
        for n in range(1, 6 * size):
            expected = [sorted(set(s)) for s in oracle.dsvt_slots(n, size)]
            ptr = segments_ptr(n, size)
            assert [list(range(a, b)) for a, b in pairwise(ptr)] == expected


def segments_ptr(n: int, size: int) -> list[int]:
    from vicinal._segments_windows import split_evenly

    return split_evenly(torch.tensor([0, n], dtype=torch.int32), size, n).tolist()


@pytest.mark.parametrize("name", [*FLAT, "waymo_pillar"])
@pytest.mark.parametrize("axis", ["x", "y"])
@pytest.mark.parametrize("shifted", [False, True])
def test_flatformer_groups(name: str, axis: str, shifted: bool) -> None:
    coords, grid, size = case(name)
    for window, group in (((9, 9), 69), ((13, 13), 144)):
        made = segments.flatformer_groups(coords, grid, size, window, group, axis=axis, shifted=shifted)
        check(made)
        order = oracle.flatformer_order(coords.tolist(), window, shifted, axis)
        assert oracle.pairs(made) == oracle.groups(order, coords[:, 0], group)


@pytest.mark.parametrize("name", [*VALID, "shell_64"])
@pytest.mark.parametrize("curve", curves.CURVES)
def test_serialization(name: str, curve: str) -> None:
    coords, grid, size = case(name)
    made = segments.serialize(coords, grid, size, curve)
    code = oracle.z_code if curve.startswith("z") else oracle.hilbert_code

    def key(row: int) -> tuple[int, int]:
        b, x, y, z = coords[row].tolist()
        return b, code(y, x, z, made.depth) if curve.endswith("trans") else code(x, y, z, made.depth)

    order = sorted(range(len(coords)), key=key)
    assert made.order.tolist() == order
    assert made.codes.tolist() == [(key(r)[0] << (3 * made.depth)) | key(r)[1] for r in order]
    assert made.ptr.tolist() == np.searchsorted(coords[:, 0][order].numpy(), np.arange(size + 1)).tolist()
    patches = made.patches(48)
    check(patches)
    assert oracle.pairs(patches) == oracle.groups(order, coords[:, 0], 48)


def test_hilbert_is_a_walk_over_all_cells() -> None:
    for depth in (1, 2, 3, 4):
        axis = torch.arange(1 << depth)
        x, y, z = (a.flatten() for a in torch.meshgrid(axis, axis, axis, indexing="ij"))
        codes = curves.hilbert_codes(x, y, z, depth)
        order = torch.argsort(codes)
        assert torch.equal(codes[order], torch.arange(len(codes)))
        path = torch.stack([x, y, z], 1)[order]
        assert bool(((path[1:] - path[:-1]).abs().sum(1) == 1).all())


@pytest.mark.parametrize("name", ["empty", "tiny_sample", "max_coord", "shell_64"])
def test_pooled_levels_are_sorted(name: str) -> None:
    coords, grid, size = case(name)
    levels = [segments.serialize(coords, grid, size, c) for c in curves.CURVES]
    depth = levels[0].depth
    for _ in range(2):
        cluster, levels = segments.pool(levels)
        coarse = torch.zeros(len(levels[0].order), 4, dtype=coords.dtype)
        halved = torch.cat([coords[:, :1], coords[:, 1:] // 2], 1)
        coarse[cluster] = halved
        assert torch.equal(coarse[cluster], halved)
        coords, depth = coarse, depth - 1
        grid = tuple(-(-g // 2) for g in grid)
        for level in levels:
            fresh = segments.serialize(coords, grid, size, level.curve, depth=depth)
            assert torch.equal(level.order, fresh.order)
            assert torch.equal(level.codes, fresh.codes.to(level.codes.dtype))
            assert torch.equal(level.ptr, fresh.ptr)


@pytest.mark.parametrize("name", [*FLAT, "shell_64"])
@pytest.mark.parametrize(("window", "shift"), [(24, 0), (24, 12), (100, 37), (7, 3)])
def test_trellis_serialized(name: str, window: int, shift: int) -> None:
    coords, grid, size = case(name)
    order = segments.serialize(coords, grid, size)
    made = segments.trellis_serialized(order, window, shift)
    check(made)
    assert oracle.pairs(made) == oracle.trellis(order.order.tolist(), coords[:, 0], window, shift)


@pytest.mark.parametrize("name", [*VALID, "shell_64"])
@pytest.mark.parametrize(("size", "dilation"), [(32, 1), (32, 4), (5, 3)])
def test_octree_groups(name: str, size: int, dilation: int) -> None:
    coords, grid, samples = case(name)
    order = segments.serialize(coords, grid, samples)
    made = segments.octree_groups(order, size, dilation)
    check(made)
    assert rows_of(made) == oracle.octree(order.order.tolist(), coords[:, 0], size, dilation)


@pytest.mark.parametrize("name", ["empty", "one_window", "tiny_sample", "dense", "waymo_pillar"])
def test_sst_buckets(name: str) -> None:
    coords, grid, size = case(name)
    levels = [(0, 3, 2), (3, 9, 5), (9, 100000, 20)]
    first = segments.sst_buckets(coords, grid, size, (12, 12, 1), (0, 0, 0), levels)
    second = segments.sst_buckets(coords, grid, size, (12, 12, 1), (6, 6, 0), levels, keep=first.keep)
    kept = oracle.sst(coords, (12, 12, 1), (0, 0, 0), levels, [True] * len(coords))
    assert first.keep.tolist() == kept
    kept = oracle.sst(coords, (12, 12, 1), (6, 6, 0), levels, kept)
    assert second.keep.tolist() == kept
    for made, shift in ((first, (0, 0, 0)), (second, (6, 6, 0))):
        check(made.segments)
        expected = oracle.windows(coords, (12, 12, 1), shift)
        alive = [[r for r in rows if made.keep[r]] for rows in expected]
        assert rows_of(made.segments) == [rows for rows in alive if rows]


def test_published_buckets_drop_nothing_in_evaluation() -> None:
    coords, grid, size = case("waymo_pillar")
    levels = [(0, 30, 30), (30, 60, 60), (60, 100, 100), (100, 100000, 144)]
    assert bool(segments.sst_buckets(coords, grid, size, (12, 12, 1), (0, 0, 0), levels).keep.all())


def test_cells() -> None:
    coords = torch.tensor([[0, 1, 0, 0], [1, 0, 0, 1], [0, 1, 0, 0], [0, 0, 1, 1]])
    made = segments.cells(coords, (2, 2, 2), 2)
    check(made)
    assert rows_of(made) == [[3], [0, 2], [1]]
    every = segments.cells(coords, (2, 2, 2), 2, empty=True)
    check(every)
    assert every.count == 16
    assert (every.q_ptr[1:] - every.q_ptr[:-1]).tolist() == [0, 0, 0, 1, 2, 0, 0, 0, 0, 1, *[0] * 6]


def test_lists() -> None:
    lengths = segments.from_lengths(torch.tensor([2, 0, 3]))
    check(lengths)
    assert rows_of(lengths) == [[0, 1], [2, 3, 4]]
    assert rows_of(segments.from_cu_seqlens(torch.tensor([0, 2, 2, 5]))) == rows_of(lengths)
    made = segments.from_batch(torch.tensor([2, 0, 2, 0, 3]), 5)
    check(made)
    assert rows_of(made) == [[1, 3], [0, 2], [4]]
    assert made.count == 5
    permutation = torch.tensor([4, 2, 0, 1, 3])
    slices = segments.chunks(5, 2, 1, permutation)
    check(slices)
    assert oracle.pairs(slices) == [([4, 2], [4, 2]), ([0, 1], [4, 2, 0, 1]), ([3], [0, 1, 3])]
    free = segments.ranges(torch.tensor([2, 3]), torch.tensor([0, 0]), torch.tensor([2, 5]))
    check(free)
    assert oracle.pairs(free) == [([0, 1], [0, 1]), ([2, 3, 4], [0, 1, 2, 3, 4])]
    assert free.monotone
    back = segments.ranges(torch.tensor([1, 1]), torch.tensor([3, 0]), torch.tensor([4, 2]), n_k=4)
    check(back)
    assert not back.monotone
    knn = segments.from_knn(
        torch.tensor([[1, 9], [0, 1], [7, 7]]), torch.tensor([[True, False], [True, True], [False, False]]), 2
    )
    check(knn)
    assert oracle.pairs(knn) == [([0], [1]), ([1], [0, 1]), ([2], [])]


@pytest.mark.parametrize("name", ["empty", "one_voxel", "tiny_sample", "corner_windows", "shell_64"])
def test_neighbour_table(name: str) -> None:
    coords, grid, size = case(name)
    table = segments.neighbour_table(coords, grid, size)
    rows = {tuple(c): i for i, c in enumerate(coords.tolist())}
    assert table.shape == (len(coords), 27)
    for i, (b, x, y, z) in enumerate(coords.tolist()[:500]):
        around = [(b, x + i, y + j, z + k) for i in (-1, 0, 1) for j in (-1, 0, 1) for k in (-1, 0, 1)]
        assert table[i].tolist() == [rows.get(c, -1) for c in around]


def test_condaformer_planes() -> None:
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(400, 3, generator=generator) * 30 - 4
    ids = torch.arange(400) % 2
    for shifted in (False, True):
        made, cells, extent = segments.condaformer_planes(points, ids, 2, 8.0, 0.25, shifted=shifted, heads=6)
        assert extent == 63
        for (s, heads), plane, cell in zip(made.groups, ((8, 8, 1), (8, 1, 8), (1, 8, 8)), cells):
            assert heads == 2
            check(s)
            size = np.array(plane, np.float32)
            shift = size / 2 if shifted else np.zeros(3, np.float32)
            p = points.numpy()
            low = p.min(0)
            place = np.floor((p + shift - low) / size).astype(int)
            expected: dict[tuple[int, ...], list[int]] = {}
            for row in range(400):
                expected.setdefault((int(ids[row]), *place[row]), []).append(row)
            assert rows_of(s) == [expected[key] for key in sorted(expected)]
            limit = np.floor((size + np.float32(1e-4)) / np.float32(0.25)) - 1
            wanted = np.minimum(np.floor(np.mod(p - low + shift, size) / np.float32(0.25)), limit)
            assert np.array_equal(cell.numpy(), wanted.astype(np.int32))
            assert int(cell.max()) * 2 <= extent - 1


@pytest.mark.parametrize(
    "builder", ["windows", "dsvt_sets", "flatformer_groups", "serialize", "neighbour_table"]
)
@pytest.mark.parametrize("name", INVALID)
def test_invalid_coordinates_raise(builder: str, name: str) -> None:
    coords, grid, size = case(name)
    given: dict[str, Any] = {
        "windows": ((12, 12, 1),),
        "dsvt_sets": ((12, 12, 1), (0, 0, 0), 36),
        "flatformer_groups": ((9, 9), 69),
    }
    arguments = given.get(builder, ())
    expected = (
        "same voxel in rows" if name == "duplicates" else r"coords has x -?\d+ in row \d+; it must be 0 <="
    )
    for validate in (None, True):
        with pytest.raises(ValueError, match=expected):
            getattr(segments, builder)(coords, grid, size, *arguments, validate=validate)


def test_invalid_arguments_raise() -> None:
    coords = torch.zeros(1, 4, dtype=torch.int32)
    good = (coords, (8, 8, 8), 1)
    with pytest.raises(ValueError, match="coords has batch 1 in row 0; it must be 0 <= batch < 1"):
        segments.windows(torch.tensor([[1, 0, 0, 0]]), (8, 8, 8), 1, (2, 2, 2))
    with pytest.raises(ValueError, match="window is"):
        segments.windows(*good, (2, 0, 2))
    with pytest.raises(ValueError, match="set_size is 0"):
        segments.dsvt_sets(*good, (2, 2, 2), (0, 0, 0), 0)
    with pytest.raises(ValueError, match="size is 0"):
        segments.serialize(*good).patches(0)
    with pytest.raises(TypeError, match=r"coords is torch.float32"):
        segments.windows(coords.float(), (8, 8, 8), 1, (2, 2, 2))
    with pytest.raises(ValueError, match="coords has shape"):
        segments.windows(coords[:, :3], (8, 8, 8), 1, (2, 2, 2))
    with pytest.raises(ValueError, match="needs 64 bits; it may have 63"):
        segments.serialize(coords, (2**20, 2**20, 2**20), 16)
    assert segments.serialize(coords, (2**20, 2**20, 2**20), 8).codes.tolist() == [0]
    with pytest.raises(ValueError, match="each row may be there once"):
        segments.from_arrays(torch.tensor([0, 0]), torch.tensor([0, 2]), n_q=2)
    with pytest.raises(ValueError, match="q_ptr must ascend"):
        segments.from_arrays(torch.tensor([0, 1]), torch.tensor([0, 1]), n_q=2)
    with pytest.raises(ValueError, match="k_index has values"):
        segments.from_arrays(torch.tensor([0]), torch.tensor([0, 1]), torch.tensor([5]), n_q=2)


def test_duplicates_are_kept_on_request_in_the_order_of_rows() -> None:
    coords = torch.tensor([[0, 3, 0, 0], [0, 1, 0, 0], [0, 3, 0, 0]])
    assert rows_of(segments.windows(coords, (8, 1, 1), 1, (4, 1, 1), duplicates="keep")) == [[1, 0, 2]]


def test_columns_may_be_bzyx() -> None:
    coords, grid, size = case("waymo_voxel")
    swapped = coords[:, [0, 3, 2, 1]]
    plain = segments.windows(coords, grid, size, (12, 12, 32))
    assert rows_of(segments.windows(swapped, grid, size, (12, 12, 32), order="bzyx")) == rows_of(plain)
    curve = segments.serialize(coords, grid, size, "hilbert-trans")
    assert torch.equal(
        curve.order, segments.serialize(swapped, grid, size, "hilbert-trans", order="bzyx").order
    )


@pytest.mark.parametrize("name", ["empty", "one_voxel", "tiny_sample", "many", "max_coord", "waymo_voxel"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_native_and_torch_agree(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    coords, grid, size = case(name)
    coords = coords.to(dtype)

    def build() -> list[Tensor]:
        s = segments.windows(coords, grid, size, (12, 12, 8), (6, 6, 0))
        curve = [segments.serialize(coords, grid, size, c) for c in ("z", "hilbert")]
        return [s.q_index, s.q_ptr, *(t for c in curve for t in (c.order, c.codes, c.ptr))]

    fast = build()
    monkeypatch.setattr(keys, "native", lambda *tensors: False)
    for x, y in zip(fast, build()):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)


@pytest.mark.parametrize("n", [0, 1, 5, 16383, 16384, 100003])
@pytest.mark.parametrize("bits", [0, 1, 11, 12, 22, 31, 40, 63])
def test_sort_is_stable_for_any_number_of_threads(n: int, bits: int) -> None:
    generator = torch.Generator().manual_seed(n + bits)
    drawn = torch.randint(0, 2**bits if bits < 63 else 2**63 - 1, (n,), generator=generator)
    packed = drawn.to(keys.key_dtype(bits))
    ascending, order = torch.sort(packed, stable=True)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            made = keys.sort(packed, bits)
            assert torch.equal(made.order.long(), order)
            assert torch.equal(made.keys, ascending)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["tiny_sample", "waymo_voxel"])
def test_rows_in_another_order_give_the_same_voxels(name: str) -> None:
    coords, grid, size = case(name)
    permutation = torch.randperm(len(coords), generator=torch.Generator().manual_seed(0))
    made, moved = (segments.windows(c, grid, size, (12, 12, 32)) for c in (coords, coords[permutation]))
    assert torch.equal(made.q_ptr, moved.q_ptr)
    assert torch.equal(made.q_index.long(), permutation[moved.q_index.long()])


@pytest.mark.parametrize("name", ["empty", "tiny_sample", "waymo_pillar"])
def test_bounds_of_devices_only_add_empty_segments(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere than on CPUs the number of segments is not read back, but bounded."""
    coords, grid, size = case(name)

    def build() -> list[Segments]:
        curve = segments.serialize(coords, grid, size)
        return [
            *segments.dsvt_sets(coords, grid, size, (24, 24, 1), (6, 6, 0), 36),
            segments.flatformer_groups(coords, grid, size, (9, 9), 69),
            segments.trellis_serialized(curve, 100, 7),
            segments.octree_groups(curve, 32, 4),
        ]

    exact = build()
    monkeypatch.setattr(keys, "native", lambda *tensors: False)
    monkeypatch.setattr(keys, "exact_or_bound", lambda count, bound: bound)
    monkeypatch.setattr(keys, "begun", bounded_runs)
    for s, t in zip(exact, build()):
        check(t)
        assert oracle.pairs(t) == oracle.pairs(s)


def bounded_runs(begins: Tensor, bound: int) -> keys.Runs:
    n = len(begins)
    bound = min(bound, n)
    ptr = torch.full((bound + 1,), n, dtype=torch.int32)
    starts = torch.nonzero(begins).flatten()
    ptr[: len(starts)] = starts.to(torch.int32)
    return keys.Runs(ptr)
