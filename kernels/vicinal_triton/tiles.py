"""The static tile table: per kernel, dtype class and padded head dim, how much of a window a program takes.

No run-time autotuning: these are chosen so that no configuration spills on sm_80, sm_90 or sm_100 and all fit 99 KB of
shared memory, the least of any GPU from Ampere on; tests/triton_budgets.json holds what the compiler makes of each. One
table serves all architectures; an entry by architecture needs a measurement that favours it.
"""

from typing import NamedTuple


class Tile(NamedTuple):
    """Most query and key slots of a program, its warps and its pipeline stages (of loops over more than one tile)."""

    block_q: int
    block_k: int
    warps: int
    stages: int


KERNELS = ("fwd", "tile", "q", "kv", "bias")
CLASSES = ("half", "tf32", "fp32", "fp64")
HEAD_DIMS = (16, 32, 64, 128, 256)

_HALF = {
    "fwd": {16: (64, 64, 4, 2), 32: (64, 64, 4, 2), 64: (64, 64, 4, 2), 128: (64, 64, 4, 2), 256: (64, 32, 4, 2)},
    "tile": {16: (64, 64, 4, 1), 32: (64, 64, 4, 1), 64: (64, 64, 4, 1), 128: (64, 64, 8, 1), 256: (32, 32, 4, 1)},
    "q": {16: (64, 64, 4, 2), 32: (64, 64, 4, 2), 64: (64, 64, 4, 2), 128: (64, 64, 8, 1), 256: (32, 32, 4, 1)},
    "kv": {16: (64, 64, 4, 2), 32: (64, 64, 4, 2), 64: (64, 64, 4, 2), 128: (64, 64, 8, 1), 256: (32, 32, 4, 1)},
    "bias": {16: (64, 64, 4, 2), 32: (64, 64, 4, 2), 64: (64, 64, 4, 2), 128: (64, 64, 8, 1), 256: (32, 32, 4, 1)},
}
_TF32 = {
    kernel: {16: (64, 64, 4, 1), 32: (64, 64, 4, 1), 64: (64, 32, 4, 1), 128: (32, 32, 4, 1), 256: (16, 16, 4, 1)}
    for kernel in KERNELS
}
_FP32 = {
    kernel: {16: (64, 64, 8, 1), 32: (64, 64, 8, 1), 64: (32, 32, 4, 1), 128: (32, 32, 4, 1), 256: (16, 16, 4, 1)}
    for kernel in KERNELS
}
_FP64 = {
    kernel: {16: (32, 32, 4, 1), 32: (32, 32, 4, 1), 64: (32, 32, 4, 1), 128: (16, 16, 4, 1), 256: (16, 16, 4, 1)}
    for kernel in KERNELS
}
TABLE: dict[str, dict[str, dict[int, tuple[int, int, int, int]]]] = {
    "half": _HALF,
    "tf32": _TF32,
    "fp32": _FP32,
    "fp64": _FP64,
}


def power_of_two(n: int) -> int:
    """The least power of two >= n, at least 16 (the smallest side of a tensor-core product)."""
    return max(16, 1 << (n - 1).bit_length())


def choose(kernel: str, dtype_class: str, block_d: int, q_slots: int, k_slots: int) -> Tile:
    """The tile of a kernel for windows of q_slots x k_slots; small windows get small tiles and fewer warps."""
    most = Tile(*TABLE[dtype_class][kernel][block_d])
    block_q, block_k = min(most.block_q, power_of_two(q_slots)), min(most.block_k, power_of_two(k_slots))
    warps = max(1, most.warps * block_q * block_k // (most.block_q * most.block_k))
    loops = k_slots > block_k or q_slots > block_q or kernel == "bias"
    return Tile(block_q, block_k, warps, most.stages if loops else 1)
