"""Synthetic sparse-voxel inputs for tests, benchmarks and pictures, from a seed and numpy alone.

The scenes imitate the occupancy statistics of public data sets (how many voxels, how they spread over
windows), not their appearance:

=================  =====================================  ======================
name               imitates                               grid (x, y, z)
=================  =====================================  ======================
waymo_pillar       64-beam street scan, .32 m pillars     468 x 468 x 1
waymo_voxel        same scan, .1875 m layers              468 x 468 x 32
nuscenes_pillar    32 beams, 10 sweeps, .3 m pillars      360 x 360 x 1
nuscenes_seg       32 beams, 1 sweep, .05 m voxels        2160 x 2160 x 160
room_02 / room_04  RGB-D room, 2 cm voxels / stride 2     405^3 / 203^3
shell_64           object surface in a 64^3 grid          64 x 64 x 64
=================  =====================================  ======================

`scene(name, seed)` returns (coords [N, 3], grid), `adversarial(name)` small batched edge cases; coordinates
are integer voxel indices in (x, y, z) order, batched ones (batch, x, y, z).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .lidar import nuscenes_like, waymo_like

Array = np.ndarray[Any, Any]


def room(
    seed: int,
    size: Any = (5.0, 4.0, 2.5),
    n_furniture: int = 14,
    density: float = 2200.0,
    coverage: float = 0.7,
    noise: float = 0.004,
    ceiling: float = 0.15,
) -> Array:
    """RGB-D style room: Poisson area samples of floor, walls, part of the ceiling and
    rotated furniture boxes, a smooth mask keeping ``coverage`` of them.  Metres."""
    rng = np.random.default_rng(seed)
    samples = []

    def quad(corner: Any, u: Any, v: Any, per_area: Any) -> None:
        n = rng.poisson(np.linalg.norm(np.cross(u, v)) * per_area)
        a, b = rng.random((2, n))
        samples.append(np.asarray(corner) + a[:, None] * u + b[:, None] * v)

    sx, sy, sz = size
    ex, ey, ez = np.eye(3)
    quad([0, 0, 0], sx * ex, sy * ey, density)
    quad([0, 0, sz], sx * ex, sy * ey, density * ceiling)
    for corner, u in (
        ([0, 0, 0], sx * ex),
        ([0, sy, 0], sx * ex),
        ([0, 0, 0], sy * ey),
        ([sx, 0, 0], sy * ey),
    ):
        quad(corner, u, sz * ez, density)
    for _ in range(n_furniture):
        half = rng.uniform([0.2, 0.2, 0.2], [1.1, 0.6, 1.0])
        center = rng.uniform([0.5, 0.5, 0], [sx - 0.5, sy - 0.5, 0])
        angle = rng.uniform(0, np.pi)
        cos, sin = np.cos(angle), np.sin(angle)
        u = np.array([cos, sin, 0.0]) * half[0] * 2
        v = np.array([-sin, cos, 0.0]) * half[1] * 2
        w = ez * half[2]
        corner = center - u / 2 - v / 2
        faces = ((corner + w, u, v), (corner, u, w), (corner + v, u, w), (corner, v, w), (corner + u, v, w))
        for face in faces:
            quad(*face, density * 1.5)
    points = np.concatenate(samples)
    waves, phase = rng.normal(0, 1.2, (8, 3)), rng.uniform(0, 2 * np.pi, 8)
    field = np.cos(points @ waves.T + phase).sum(1)
    points = points[field > np.quantile(field, 1 - coverage)]
    return (points + rng.normal(0, noise, points.shape)).astype(np.float32)


def shell(seed: int, resolution: int = 64, n: int = 5) -> Array:
    """Surface voxels of a union of random ellipsoids, boxes and tori (object latents)."""
    rng = np.random.default_rng(seed)
    axes = np.meshgrid(*[np.arange(resolution)] * 3, indexing="ij")
    grid = (np.stack(axes, -1) + 0.5) / resolution * 2 - 1
    sdf = np.full((resolution,) * 3, 9.0, np.float32)
    for i in range(n):
        c, r = rng.uniform(-0.45, 0.45, 3), rng.uniform(0.15, 0.5, 3)
        q = grid - c
        if i % 3 == 0:
            s = (np.linalg.norm(q / r, axis=-1) - 1) * r.min()
        elif i % 3 == 1:
            a = np.abs(q) - r
            s = np.linalg.norm(np.maximum(a, 0), axis=-1) + np.minimum(a.max(-1), 0)
        else:
            s = np.hypot(np.hypot(q[..., 0], q[..., 1]) - r[0], q[..., 2]) - 0.3 * r[0]
        sdf = np.minimum(sdf, s)
    return np.argwhere(np.abs(sdf) < 1.0 / resolution)


def voxelize(points: Any, voxel_size: Any, low: Any, high: Any) -> tuple[Array, tuple[int, ...], int]:
    """Unique occupied voxels of the points inside [low, high).

    Returns (coords [N, 3] int64 in (x, y, z), sorted by (z, y, x); grid; points kept).
    """
    low, high, size = (np.asarray(a, np.float64) for a in (low, high, voxel_size))
    inside = ((points >= low) & (points < high)).all(1)
    grid = np.round((high - low) / size).astype(np.int64)
    c = np.floor((points[inside] - low) / size).astype(np.int64)
    c = np.minimum(c, grid - 1)
    key = np.unique((c[:, 2] * grid[1] + c[:, 1]) * grid[0] + c[:, 0])
    coords = np.stack([key % grid[0], key // grid[0] % grid[1], key // (grid[0] * grid[1])], 1)
    return coords, tuple(int(g) for g in grid), int(inside.sum())


_WAYMO = ((-74.88, -74.88, -2.0), (74.88, 74.88, 4.0))
_NUSC = ((-54.0, -54.0, -5.0), (54.0, 54.0, 3.0))
_ROOM = ((-0.1, -0.1, -0.1), (8.0, 8.0, 8.0))
SCENES = ("waymo_pillar", "waymo_voxel", "nuscenes_pillar", "nuscenes_seg", "room_02", "room_04", "shell_64")


def scene(name: str, seed: int = 0) -> tuple[Array, tuple[int, ...]]:
    """Standard scene: (coords [N, 3] int64 (x, y, z), unique; grid (X, Y, Z))."""
    if name == "waymo_pillar":
        return voxelize(waymo_like(seed), (0.32, 0.32, 6), *_WAYMO)[:2]
    if name == "waymo_voxel":
        return voxelize(waymo_like(seed), (0.32, 0.32, 0.1875), *_WAYMO)[:2]
    if name == "nuscenes_pillar":
        return voxelize(nuscenes_like(seed), (0.3, 0.3, 8), *_NUSC)[:2]
    if name == "nuscenes_seg":
        return voxelize(nuscenes_like(seed, sweeps=1), (0.05,) * 3, *_NUSC)[:2]
    if name in ("room_02", "room_04"):
        coords, grid, _ = voxelize(room(seed), (0.02,) * 3, *_ROOM)
        if name == "room_02":
            return coords, grid
        return np.unique(coords // 2, axis=0), tuple(-(-g // 2) for g in grid)
    if name == "shell_64":
        return shell(seed), (64, 64, 64)
    raise ValueError(f"unknown scene {name!r}; choose from {SCENES}")


def batch(samples: Any, shuffle: int | None = None) -> Array:
    """Stack per-sample coords into [N, 4] int32 (batch, x, y, z).

    With ``shuffle`` (a seed) rows are permuted inside each sample, samples staying
    contiguous: real voxelisers do not return sorted rows.
    """
    rng = None if shuffle is None else np.random.default_rng(shuffle)
    parts = []
    for b, c in enumerate(samples):
        c = np.asarray(c, np.int64).reshape(-1, 3)
        if rng is not None:
            c = c[rng.permutation(len(c))]
        parts.append(np.concatenate([np.full((len(c), 1), b), c], 1))
    return np.concatenate(parts).astype(np.int32)


ADVERSARIAL = (
    "empty",
    "one_voxel",
    "one_window",
    "one_per_window",
    "dense",
    "empty_sample",
    "tiny_sample",
    "around_multiples",
    "corner_windows",
    "few",
    "many",
    "max_coord",
    "duplicates",
    "negative",
    "out_of_grid",
)


def adversarial(name: str, seed: int = 0) -> tuple[Array, int, tuple[int, ...]]:
    """Edge cases as (coords [N, 4] int32 (batch, x, y, z), batch size, grid).

    ``duplicates``, ``negative`` and ``out_of_grid`` are invalid input that must be
    rejected with a clear message; every other case must work.
    """
    rng = np.random.default_rng(seed)
    grid = (468, 468, 1)

    def plane(nx: int, ny: int, step: int = 1) -> Array:
        x, y = np.meshgrid(np.arange(nx) * step, np.arange(ny) * step, indexing="ij")
        return np.stack([x.ravel(), y.ravel(), np.zeros(nx * ny, np.int64)], 1)

    def some(n: int) -> Array:
        flat = rng.choice(468 * 468, n, replace=False)
        return np.stack([flat % 468, flat // 468, np.zeros(n, np.int64)], 1)

    if name == "empty":
        samples = [some(0)]
    elif name == "one_voxel":
        samples = [some(1)]
    elif name == "one_window":  # all voxels share one 12 x 12 window
        samples = [plane(12, 12)]
    elif name == "one_per_window":
        samples = [plane(39, 39, 12)]
    elif name == "dense":  # every window full
        samples = [plane(120, 120)]
    elif name == "empty_sample":
        samples = [some(500), some(0), some(700), some(0)]
    elif name == "tiny_sample":
        samples = [some(300), some(1), some(2), some(300)]
    elif name == "around_multiples":  # group sizes 36, 48, 69, 90, 144, 1024: k*G - 1, k*G, k*G + 1
        sizes = [k * g + e for g in (36, 48, 69, 90, 144, 1024) for k in (1, 2) for e in (-1, 0, 1)]
        samples = [some(s) for s in sizes]
    elif name == "corner_windows":  # only the clipped windows at the grid corners
        c = plane(4, 4)[:, :2]
        corners = [c + np.array(corner) for corner in ((0, 0), (464, 0), (0, 464), (464, 464))]
        samples = [np.concatenate([np.c_[a, np.zeros(len(a), np.int64)] for a in corners])]
    elif name == "few":
        samples = [some(3000)]
    elif name == "many":
        samples = [some(35000), some(35000)]
    elif name == "max_coord":  # 16-bit limit per axis
        grid = (65536, 65536, 65536)
        samples = [65535 - rng.integers(0, 40, (400, 3)), rng.integers(0, 65536, (400, 3))]
        samples = [np.unique(s, axis=0) for s in samples]
    elif name == "duplicates":
        samples = [np.concatenate([some(100), plane(3, 3), plane(3, 3)])]
    elif name == "negative":
        samples = [some(100) - np.array([300, 0, 0])]
    elif name == "out_of_grid":
        samples = [some(100) + np.array([300, 0, 0])]
    else:
        raise ValueError(f"unknown case {name!r}; choose from {ADVERSARIAL}")
    return batch(samples, shuffle=seed), len(samples), grid
