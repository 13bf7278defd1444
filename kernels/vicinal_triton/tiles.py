"""The static tile table: per kernel, dtype class and padded head dim, how much of a window a program takes.

No run-time autotuning. The entries are the largest tiles that the compiler keeps in registers, or nearly
so, on sm_80, sm_90 and sm_100; none has been timed on a GPU. tests/triton_budgets.json holds registers,
stack and shared memory of each. One table serves all architectures; an entry by architecture needs a
measurement that favours it.
"""

from typing import NamedTuple


class Tile(NamedTuple):
    """Most query and key slots of a program, its warps and its pipeline stages (of loops over more than one
    tile)."""

    block_q: int
    block_k: int
    warps: int
    stages: int


KERNELS = ("fwd", "tile", "q", "kv", "bias")
CLASSES = ("half", "tf32", "fp32", "fp64")
HEAD_DIMS = (32, 64, 128, 256)  # smaller ones use the entries of 32

Entries = dict[int, tuple[int, int, int, int]]

_HALF: dict[str, Entries] = {
    "fwd": {32: (64, 64, 4, 2), 64: (64, 64, 4, 2), 128: (64, 64, 8, 1), 256: (32, 32, 4, 1)},
    "tile": {32: (64, 64, 4, 1), 64: (64, 64, 4, 1), 128: (64, 64, 8, 1), 256: (32, 32, 8, 1)},
    "q": {32: (64, 64, 4, 2), 64: (32, 64, 4, 2), 128: (64, 64, 8, 1), 256: (32, 32, 4, 1)},
    "kv": {32: (64, 64, 4, 1), 64: (64, 32, 4, 1), 128: (64, 64, 8, 1), 256: (32, 32, 4, 1)},
    "bias": {32: (64, 64, 4, 2), 64: (64, 64, 8, 1), 128: (64, 64, 8, 1), 256: (32, 32, 4, 1)},
}
_TF32_PASS: Entries = {32: (64, 32, 4, 1), 64: (64, 32, 4, 1), 128: (32, 32, 4, 1), 256: (16, 16, 4, 1)}
_TF32: dict[str, Entries] = {
    "fwd": {32: (64, 64, 4, 1), 64: (64, 32, 4, 1), 128: (64, 32, 4, 1), 256: (32, 32, 4, 1)},
    "tile": {32: (64, 64, 8, 1), 64: (64, 64, 8, 1), 128: (32, 32, 4, 1), 256: (16, 16, 4, 1)},
    "q": _TF32_PASS,
    "kv": _TF32_PASS,
    "bias": _TF32_PASS,
}
_FP32_PASS: Entries = {32: (32, 32, 4, 1), 64: (32, 32, 4, 1), 128: (32, 32, 8, 1), 256: (16, 16, 4, 1)}
_FP32: dict[str, Entries] = {
    "fwd": {32: (64, 64, 8, 1), 64: (64, 64, 8, 1), 128: (32, 32, 8, 1), 256: (16, 16, 4, 1)},
    "tile": {32: (64, 64, 8, 1), 64: (32, 32, 4, 1), 128: (32, 32, 8, 1), 256: (16, 16, 4, 1)},
    "q": _FP32_PASS,
    "kv": _FP32_PASS,
    "bias": _FP32_PASS,
}
_FP64_PASS: Entries = {32: (16, 16, 4, 1), 64: (16, 16, 4, 1), 128: (16, 16, 4, 1), 256: (16, 16, 8, 1)}
_FP64: dict[str, Entries] = {
    "fwd": {32: (32, 32, 4, 1), 64: (32, 32, 4, 1), 128: (32, 32, 4, 1), 256: (16, 16, 8, 1)},
    "tile": {32: (32, 32, 4, 1), 64: (16, 16, 4, 1), 128: (16, 16, 4, 1), 256: (16, 16, 8, 1)},
    "q": _FP64_PASS,
    "kv": _FP64_PASS,
    "bias": _FP64_PASS,
}
TABLE: dict[str, dict[str, Entries]] = {"half": _HALF, "tf32": _TF32, "fp32": _FP32, "fp64": _FP64}


def power_of_two(n: int) -> int:
    """The least power of two >= n, at least 16 (the smallest side of a tensor-core product)."""
    return max(16, 1 << (n - 1).bit_length())


def choose(kernel: str, dtype_class: str, block_d: int, q_slots: int, k_slots: int) -> Tile:
    """The tile of a kernel for windows of q_slots x k_slots; small windows get small tiles and fewer warps.

    At least two warps, which every combination of options is compiled with."""
    most = Tile(*TABLE[dtype_class][kernel][max(HEAD_DIMS[0], block_d)])
    block_q, block_k = min(most.block_q, power_of_two(q_slots)), min(most.block_k, power_of_two(k_slots))
    warps = max(2, most.warps * block_q * block_k // (most.block_q * most.block_k))
    loops = k_slots > block_k or q_slots > block_q or kernel == "bias"
    return Tile(block_q, block_k, warps, most.stages if loops else 1)


class LinearTile(NamedTuple):
    """Of linear attention: tokens, features and values of a program, values that a sum over values takes at a
    time, warps, stages, and least tokens of a part."""

    tokens: int
    features: int
    values: int
    summed: int
    warps: int
    stages: int
    part: int


LINEAR: dict[str, LinearTile] = {
    "half": LinearTile(64, 64, 64, 32, 4, 1, 256),
    "tf32": LinearTile(32, 32, 32, 32, 2, 1, 256),
    "fp32": LinearTile(32, 32, 32, 16, 8, 1, 128),
    "fp64": LinearTile(16, 16, 16, 16, 4, 1, 64),
}


def choose_linear(dtype_class: str, tokens: int, features: int, values: int) -> LinearTile:
    """Small problems get small tiles."""
    most = LINEAR[dtype_class]
    return most._replace(
        tokens=min(most.tokens, power_of_two(tokens)),
        features=min(most.features, power_of_two(features)),
        values=min(most.values, power_of_two(values)),
        summed=min(most.summed, power_of_two(values)),
    )
