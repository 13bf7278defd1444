"""Draws docs/pictures/voxel_sets.png: sets of four builders on a synthetic street scene, seen from above.

python docs/pictures/voxel_sets.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.scenes import batch, scene  # noqa: E402
from vicinal import Segments, segments  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

LOW, HIGH = 168, 300  # the middle of the scene


def sets_of(made: Segments) -> np.ndarray:
    """[N]: the segment of every row."""
    lengths = (made.q_ptr[1:] - made.q_ptr[:-1]).long()
    owner = torch.repeat_interleave(torch.arange(made.count), lengths)
    found = torch.empty(made.n_q, dtype=torch.long)
    found[made.q_index.long()] = owner
    return found.numpy()


def main() -> None:
    raw, grid = scene("waymo_pillar")
    coords = torch.from_numpy(batch([raw], shuffle=0))
    place = (tuple(grid), 1)
    y, x = segments.dsvt_sets(coords, *place, (24, 24, 1), (6, 6, 0), 36)
    pictures = {
        "windows of 12 x 12 (SST)": segments.windows(coords, *place, (12, 12, 1)),
        "sets of 36 in windows of 24 x 24, along y (DSVT)": y,
        "the same along x": x,
        "groups of 69 in a serpentine of 9 x 9 windows (FlatFormer)": segments.flatformer_groups(
            coords, *place, (9, 9), 69
        ),
        "patches of 256 on the Hilbert curve (PTv3)": segments.serialize(coords, *place, "hilbert").patches(
            256
        ),
        "sequence windows of 256 on the z curve (TRELLIS)": segments.trellis_serialized(
            segments.serialize(coords, *place), 256
        ),
    }
    inside = ((coords[:, 1:3] >= LOW) & (coords[:, 1:3] < HIGH)).all(1).numpy()
    colours = plt.get_cmap("tab20")(np.random.default_rng(0).permutation(20))
    figure, axes = plt.subplots(2, 3, figsize=(13.5, 9), constrained_layout=True)
    for axis, (title, made) in zip(axes.flat, pictures.items()):
        set_of = sets_of(made)[inside]
        picture = np.ones((HIGH - LOW, HIGH - LOW, 4))
        picture[coords[inside, 2] - LOW, coords[inside, 1] - LOW] = colours[(set_of * 7) % 20]
        axis.imshow(picture, origin="lower", interpolation="nearest", extent=(LOW, HIGH, LOW, HIGH))
        axis.set_title(title, fontsize=9)
        axis.set_xticks([])
        axis.set_yticks([])
    figure.savefig(ROOT / "docs" / "pictures" / "voxel_sets.png", dpi=90)


if __name__ == "__main__":
    main()
