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

import numpy as np


def _hit_boxes(origin, directions, azimuth, centers, half_sizes, yaws, t_max):
    """Distance to the first box hit by each ray.

    origin [3]; directions [R, 3] unit vectors; azimuth [R] of the same rays; boxes are
    given by centre [M, 3], half size [M, 3] and rotation about z [M].  Boxes are culled
    by azimuth before the slab test.  Returns [R] float32, ``inf`` where nothing is hit.
    """
    t_hit = np.full(len(directions), np.inf, np.float32)
    for center, half, yaw in zip(centers, half_sizes, yaws):
        rel = center - origin
        dist, radius = np.hypot(rel[0], rel[1]), np.hypot(half[0], half[1])
        if dist - radius > t_max:
            continue
        if dist > radius * 1.01:
            middle = np.arctan2(rel[1], rel[0])
            spread = np.arcsin(min(1.0, radius / dist)) + 1e-3
            near = np.abs((azimuth - middle + np.pi) % (2 * np.pi) - np.pi) < spread
            idx = np.nonzero(near)[0]
        else:
            idx = np.arange(len(directions))
        if idx.size == 0:
            continue
        cos, sin = np.cos(yaw), np.sin(yaw)
        d, o = directions[idx], -rel
        axes = (
            (o[0] * cos + o[1] * sin, d[:, 0] * cos + d[:, 1] * sin, half[0]),
            (-o[0] * sin + o[1] * cos, -d[:, 0] * sin + d[:, 1] * cos, half[1]),
            (o[2], d[:, 2], half[2]),
        )
        t_in = np.full(idx.size, -np.inf, np.float32)
        t_out = np.full(idx.size, np.inf, np.float32)
        for o_a, d_a, h_a in axes:
            inv = 1.0 / np.where(np.abs(d_a) < 1e-9, 1e-9, d_a)
            t0, t1 = (-h_a - o_a) * inv, (h_a - o_a) * inv
            t_in = np.maximum(t_in, np.minimum(t0, t1))
            t_out = np.minimum(t_out, np.maximum(t0, t1))
        ok = (t_in <= t_out) & (t_in > 0.3)
        rows = idx[ok]
        t_hit[rows] = np.minimum(t_hit[rows], t_in[ok])
    return t_hit


def make_street(rng, n_cars=60, n_poles=120, n_build=26, n_tree=70, setback=20.0, extent=75.0):
    """Random street along x: facades, cars in six lanes, poles, porous trees.

    Returns (centers, half sizes, yaws, porosity); porosity is the probability that a
    ray passes the box (0 for solid boxes).  The ego position is kept free.
    """
    centers, halves, yaws, porosity = [], [], [], []

    def add(center, half, yaw, porous=0.0):
        centers.append(center)
        halves.append(half)
        yaws.append(yaw)
        porosity.append(porous)

    for _ in range(n_build):
        side = rng.choice([-1, 1])
        width, depth, height = rng.uniform(8, 25), rng.uniform(6, 12), rng.uniform(4, 12)
        x = rng.uniform(-extent, extent)
        if abs(x - 18) < 14 + width / 2:  # opening of a cross street
            continue
        y = side * (setback + depth / 2 + rng.uniform(0, 35))
        add([x, y, height / 2], [width / 2, depth / 2, height / 2], rng.normal(0, 0.05))
    for _ in range(n_cars):
        lane = rng.choice([-8.5, -5.2, -1.8, 1.8, 5.2, 8.5])
        center = [rng.uniform(-extent, extent), lane + rng.normal(0, 0.2), 0.8]
        add(center, [2.3, 0.95, 0.8], rng.normal(0, 0.03))
    for _ in range(n_poles):
        x, side = rng.uniform(-extent, extent), rng.choice([-1, 1])
        y, z = side * rng.uniform(8, 30), rng.uniform(0.8, 3)
        add([x, y, z], [0.15, 0.15, rng.uniform(0.8, 3)], 0.0)
    for _ in range(n_tree):
        r = rng.uniform(1.0, 3.0)
        x, side = rng.uniform(-extent, extent), rng.choice([-1, 1])
        y, z = side * rng.uniform(8, 45), rng.uniform(2.0, 5.0)
        add([x, y, z], [r, r, r * 0.9], 0.0, 0.5)
    c, h, y, p = (np.asarray(a, np.float32) for a in (centers, halves, yaws, porosity))
    free = np.hypot(c[:, 0], c[:, 1]) > np.hypot(h[:, 0], h[:, 1]) + 1.5
    return c[free], h[free], y[free], p[free]


def lidar_sweep(
    rng,
    *,
    beams=64,
    fov=(-17.6, 2.4),
    columns=2650,
    height=2.1,
    max_range=75.0,
    origin=(0.0, 0.0),
    street=None,
    drop=0.05,
    noise=0.02,
    bend=1.35,
):
    """One revolution of a spinning scanner in a street.

    fov is (lowest, highest) elevation in degrees; ``bend`` > 1 packs beams towards the
    horizon as real units do.  Returns (points [P, 3] float32, street).
    """
    u = np.linspace(0, 1, beams)
    elevation = np.deg2rad(fov[1] - (fov[1] - fov[0]) * u**bend).astype(np.float32)
    azimuth = np.arange(columns, dtype=np.float32) / columns * 2 * np.pi - np.pi
    elev, azim = (a.ravel() for a in np.meshgrid(elevation, azimuth, indexing="ij"))
    d = np.stack([np.cos(elev) * np.cos(azim), np.cos(elev) * np.sin(azim), np.sin(elev)], 1)
    d = d.astype(np.float32)
    o = np.array([origin[0], origin[1], height], np.float32)
    if street is None:
        street = make_street(rng, extent=max_range)
    centers, halves, yaws, porosity = street

    # Ground: gently undulating with a kerb, two fixed-point steps.
    down = d[:, 2] < -1e-4
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(down, -o[2] / d[:, 2], np.inf).astype(np.float32)
        for _ in range(2):
            gx = o[0] + d[:, 0] * np.minimum(t, 200)
            gy = o[1] + d[:, 1] * np.minimum(t, 200)
            gz = 0.15 * np.sin(gx / 17) + 0.12 * np.sin(gy / 23) + 0.15 * (np.abs(gy) > 6)
            t = np.where(down, (gz - o[2]) / d[:, 2], np.inf).astype(np.float32)
    t[t <= 0.5] = np.inf

    solid = porosity == 0
    t = np.minimum(t, _hit_boxes(o, d, azim, centers[solid], halves[solid], yaws[solid], max_range))
    for c, h, y, p in zip(centers[~solid], halves[~solid], yaws[~solid], porosity[~solid]):
        entry = _hit_boxes(o, d, azim, c[None], h[None], np.array([y]), max_range)
        depth = rng.exponential(0.6 * float(h[0]), len(d)).astype(np.float32)
        stop = np.isfinite(entry) & (rng.random(len(d)) > p) & (depth < 2 * h[0])
        t[stop] = np.minimum(t[stop], entry[stop] + depth[stop])

    seen = np.isfinite(t) & (t < max_range) & (rng.random(len(d)) > drop)
    t = t + rng.normal(0, noise, len(t)).astype(np.float32)
    return o + d[seen] * t[seen, None], street


def waymo_like(seed):
    """Points of a 64-beam roof unit (75 m) plus four short-range side units (20 m)."""
    rng = np.random.default_rng(seed)
    points, street = lidar_sweep(rng)
    parts = [points]
    for origin in ((2.5, 0.0), (-2.5, 0.0), (0.0, 1.2), (0.0, -1.2)):
        side, _ = lidar_sweep(
            rng,
            beams=40,
            fov=(-60, 20),
            columns=400,
            height=1.0,
            max_range=20.0,
            street=street,
            origin=origin,
        )
        parts.append(side)
    return np.concatenate(parts)


def nuscenes_like(seed, sweeps=10):
    """Points of a 32-beam unit; sweeps overlap while the ego moves 0.4 m per sweep."""
    rng = np.random.default_rng(seed)
    street, parts = None, []
    for s in range(sweeps):
        points, street = lidar_sweep(
            rng,
            beams=32,
            fov=(-30.67, 10.67),
            columns=1085,
            height=1.84,
            max_range=80.0,
            street=street,
            origin=(-0.4 * s, 0.0),
        )
        parts.append(points)
    return np.concatenate(parts)


def room(seed, size=(5.0, 4.0, 2.5), n_furniture=14, density=2200.0, coverage=0.7, noise=0.004, ceiling=0.15):
    """RGB-D style room: Poisson area samples of floor, walls, part of the ceiling and
    rotated furniture boxes, a smooth mask keeping ``coverage`` of them.  Metres."""
    rng = np.random.default_rng(seed)
    samples = []

    def quad(corner, u, v, per_area):
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


def shell(seed, resolution=64, n=5):
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


def voxelize(points, voxel_size, low, high):
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


def scene(name, seed=0):
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


def batch(samples, shuffle=None):
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


def adversarial(name, seed=0):
    """Edge cases as (coords [N, 4] int32 (batch, x, y, z), batch size, grid).

    ``duplicates``, ``negative`` and ``out_of_grid`` are invalid input that must be
    rejected with a clear message; every other case must work.
    """
    rng = np.random.default_rng(seed)
    grid = (468, 468, 1)

    def plane(nx, ny, step=1):
        x, y = np.meshgrid(np.arange(nx) * step, np.arange(ny) * step, indexing="ij")
        return np.stack([x.ravel(), y.ravel(), np.zeros(nx * ny, np.int64)], 1)

    def some(n):
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
