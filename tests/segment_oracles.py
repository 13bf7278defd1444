"""The published index code of voxel models, as plain loops: what the builders of segments are compared with.

Every oracle returns, per set, the list of its rows, or pairs (query rows, key rows).
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np

from vicinal.segments import Segments

Pairs = list[tuple[list[int], list[int]]]


def pairs(segments: Segments) -> Pairs:
    """(query rows, key rows) of every segment with queries or keys."""
    q, k, ptr, begin, end = (
        getattr(segments, name).tolist() for name in ("q_index", "k_index", "q_ptr", "k_begin", "k_end")
    )
    found = [(q[ptr[s] : ptr[s + 1]], k[begin[s] : end[s]]) for s in range(len(begin))]
    return [(a, b) for a, b in found if a or b]


def windows(coords: Any, window: Any, shift: Any, within: tuple[int, ...] = (0, 1, 2)) -> list[list[int]]:
    """Rows per window, windows and members in ascending order of (b, window) and of the place in it."""
    members: dict[tuple[int, ...], list[Any]] = defaultdict(list)
    for row, (b, *c) in enumerate(coords.tolist()):
        u = [x + s for x, s in zip(c, shift)]
        place = tuple(u[a] % window[a] for a in within)
        members[(b, *(x // w for x, w in zip(u, window)))].append((place, row))
    return [[row for _, row in sorted(members[key])] for key in sorted(members)]


def dsvt_slots(n: int, size: int) -> list[list[int]]:
    """Slots of the published padded sets of a window of n voxels: ranks, repeated where there are too few."""
    sets = -(-n // size)
    return [[((j * size + k) * n) // (sets * size) for k in range(size)] for j in range(sets)]


def dsvt_sets(coords: Any, window: Any, shift: Any, size: int, within: tuple[int, ...]) -> list[list[int]]:
    """The padded sets with the repeats of a rank masked."""
    found = []
    for rows in windows(coords, window, shift, within):
        for slots in dsvt_slots(len(rows), size):
            found.append([rows[r] for i, r in enumerate(slots) if i == 0 or slots[i - 1] != r])
    return found


def flatformer_order(coords: Any, window: Any, shifted: bool, axis: str) -> list[int]:
    """Rows by (batch, window of the axis across, then a serpentine)."""
    shift = [w // 2 if shifted else 0 for w in window]

    def key(row: int) -> tuple[int, ...]:
        b, x, y = (int(v) for v in coords[row][:3])
        (x1, x2), (y1, y2) = divmod(x + shift[0], window[0]), divmod(y + shift[1], window[1])
        if axis == "y":
            x1, x2, y1, y2 = y1, y2, x1, x2
        s, t = (-1) ** y1, (-1) ** x2
        return b, y1, s * x1, s * x2, s * t * y2

    return sorted(range(len(coords)), key=key)


def groups(order: list[int], sample_of: Any, size: int) -> Pairs:
    """Groups of `size` per sample; the last incomplete one attends to the last `size` rows."""
    by_sample: dict[int, list[int]] = defaultdict(list)
    for row in order:
        by_sample[int(sample_of[row])].append(row)
    found: Pairs = []
    for b in sorted(by_sample):
        rows = by_sample[b]
        for first in range(0, len(rows), size):
            own = rows[first : first + size]
            found.append((own, own if len(own) == size else rows[max(0, len(rows) - size) :]))
    return found


def z_code(x: int, y: int, z: int, depth: int) -> int:
    return sum(((c >> i) & 1) << (3 * i + 2 - a) for i in range(depth) for a, c in enumerate((x, y, z)))


def hilbert_code(x: int, y: int, z: int, depth: int) -> int:
    """Gray-decoded transposed coordinates, bit by bit on boolean lists."""
    bits = [[bool((c >> (depth - 1 - i)) & 1) for i in range(depth)] for c in (x, y, z)]
    for i in range(depth):
        for a in range(3):
            if bits[a][i]:
                for j in range(i + 1, depth):
                    bits[0][j] = not bits[0][j]
            else:
                for j in range(i + 1, depth):
                    if bits[0][j] != bits[a][j]:
                        bits[0][j], bits[a][j] = bits[a][j], bits[0][j]
    flat = [bits[a][i] for i in range(depth) for a in range(3)]
    code, parity = 0, False
    for bit in flat:  # Gray to binary: running parity from the top
        parity ^= bit
        code = code << 1 | int(parity)
    return code


def trellis(order: list[int], sample_of: Any, window: int, shift: int) -> Pairs:
    """Float form of the published query and key windows, positions modulo the sample's length."""
    by_sample: dict[int, list[int]] = defaultdict(list)
    for row in order:
        by_sample[int(sample_of[row])].append(row)
    found: Pairs = []
    for b in sorted(by_sample):
        rows = by_sample[b]
        n = len(rows)
        w = -(-n // window)
        if w == 1:
            found.append((rows, rows))
            continue
        starts = [int(i * n / w) for i in range(w + 1)]
        for i in range(w):
            centre = int(np.floor((2 * i + 1) * n / (2 * w) - window / 2 + 1e-9))
            q = [rows[(p + shift) % n] for p in range(starts[i], starts[i + 1])]
            found.append((q, [rows[(p + shift) % n] for p in range(centre, centre + window)]))
    return found


def octree(order: list[int], sample_of: Any, size: int, dilation: int) -> list[list[int]]:
    found: dict[tuple[int, int], list[int]] = defaultdict(list)
    for i, row in enumerate(order):
        group = i // (size * dilation) * dilation + i % (size * dilation) % dilation
        found[(group, int(sample_of[row]))].append(row)
    return [found[key] for key in sorted(found)]


def sst(coords: Any, window: Any, shift: Any, levels: Any, alive: list[bool]) -> list[bool]:
    """Which rows a bucketed window keeps: its first `most`, in the order of rows."""
    members: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for row, (b, *c) in enumerate(coords.tolist()):
        if alive[row]:
            members[(b, *((x + s) // w for x, s, w in zip(c, shift, window)))].append(row)
    kept = [False] * len(alive)
    for rows in members.values():
        most = next((m for low, high, m in levels if low <= len(rows) < high), len(rows))
        for row in rows[:most]:
            kept[row] = True
    return kept
