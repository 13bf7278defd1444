"""Points of a spinning laser scanner in a random street, from numpy alone."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def _hit_boxes(
    origin: Any, directions: Any, azimuth: Any, centers: Any, half_sizes: Any, yaws: Any, t_max: Any
) -> Array:
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


def make_street(
    rng: Any,
    n_cars: int = 60,
    n_poles: int = 120,
    n_build: int = 26,
    n_tree: int = 70,
    setback: float = 20.0,
    extent: float = 75.0,
) -> tuple[Array, ...]:
    """Random street along x: facades, cars in six lanes, poles, porous trees.

    Returns (centers, half sizes, yaws, porosity); porosity is the probability that a
    ray passes the box (0 for solid boxes).  The ego position is kept free.
    """
    centers, halves, yaws, porosity = [], [], [], []

    def add(center: Any, half: Any, yaw: Any, porous: float = 0.0) -> None:
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
    rng: Any,
    *,
    beams: int = 64,
    fov: Any = (-17.6, 2.4),
    columns: int = 2650,
    height: float = 2.1,
    max_range: float = 75.0,
    origin: Any = (0.0, 0.0),
    street: Any = None,
    drop: float = 0.05,
    noise: float = 0.02,
    bend: float = 1.35,
) -> tuple[Array, Any]:
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


def waymo_like(seed: int) -> Array:
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


def nuscenes_like(seed: int, sweeps: int = 10) -> Array:
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
