"""The feature maps that act on each element (csrc/linear.h): value, and derivative from x and the value.

Kernels take the two functions of a map as constants, so a map is written here and nowhere else."""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Map(NamedTuple):
    """phi(x, param) and slope(x, phi, param)."""

    phi: Any
    slope: Any


@triton.jit
def identity(x, param):
    return x


@triton.jit
def identity_slope(x, phi, param):
    return x * 0.0 + 1.0


@triton.jit
def elu1(x, param):
    return tl.where(x >= 0, x + 1.0, tl.exp(tl.minimum(x, 0.0)))


@triton.jit
def elu1_slope(x, phi, param):
    return tl.where(x >= 0, 1.0, phi)


@triton.jit
def relu(x, param):
    return tl.maximum(x, 0.0) + param


@triton.jit
def relu_slope(x, phi, param):
    return tl.where(x > 0, 1.0, 0.0)


@triton.jit
def relu2(x, param):
    positive = tl.maximum(x, 0.0)
    return positive * positive


@triton.jit
def relu2_slope(x, phi, param):
    return 2.0 * tl.maximum(x, 0.0)


@triton.jit
def exponential(x, param):
    return tl.exp(tl.minimum(x - param, 32.0))


@triton.jit
def exponential_slope(x, phi, param):
    return tl.where(x - param <= 32.0, phi, 0.0)


MAPS = {
    "identity": Map(identity, identity_slope),
    "elu1": Map(elu1, elu1_slope),
    "relu": Map(relu, relu_slope),
    "relu2": Map(relu2, relu2_slope),
    "exp": Map(exponential, exponential_slope),
}
