"""From scores to weights, once forward (online over key blocks) and once backward. Three functions per
activation.

Forward:  `weights, m, l, rescale = <activation>_step(s, m, l)` on a tile s [Q, K]; m, l [Q]; acc is
multiplied by rescale. Backward: `weights = <activation>_weights(s, lse)`, `ds = <activation>_slope(s,
weights, dp, lse, delta, ..)`, in either orientation. delta is rowsum(dout * out) - dlse for softmax and
-dlse for the others, whose lse is that of their scores; HAS_DELTA: there is a dlse.

A score of -inf is excluded; the launcher makes the mask value -inf where an activation gives cross-region
pairs 0.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def softmax_step(s, m, l):
    m_new = tl.maximum(m, tl.max(s, 1))
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    weights = tl.exp2((s - m_safe[:, None]) * LOG2E)
    rescale = tl.exp2((m - m_safe) * LOG2E)
    return weights, m_new, l * rescale + tl.sum(weights, 1), rescale


@triton.jit
def softmax_finish(m, l):
    """1/l, or 0 for a row that saw no key, and lse."""
    seen = l > 0.0
    l_safe = tl.where(seen, l, 1.0)
    return tl.where(seen, 1.0 / l_safe, 0.0), tl.where(seen, m + tl.log2(l_safe) * LN2, float("-inf"))


@triton.jit
def pointwise_finish(m, l):
    """1 and lse: the weights of the other activations are not normalised."""
    return l * 0.0 + 1.0, softmax_finish(m, l)[1]


@triton.jit
def softmax_weights(s, lse):
    return tl.exp2((s - tl.where(lse == float("-inf"), 0.0, lse)) * LOG2E)


@triton.jit
def softmax_slope(s, weights, dp, lse, delta, HAS_DELTA: tl.constexpr):
    return weights * (dp - delta)


@triton.jit
def relu2_weights(s, lse):
    r = tl.maximum(s, 0.0)
    return r * r


@triton.jit
def relu2_step(s, m, l):
    m, l = softmax_step(s, m, l)[1:3]
    return relu2_weights(s, m), m, l, l * 0.0 + 1.0


@triton.jit
def relu2_slope(s, weights, dp, lse, delta, HAS_DELTA: tl.constexpr):
    ds = 2.0 * tl.maximum(s, 0.0) * dp
    return ds - softmax_weights(s, lse) * delta if HAS_DELTA else ds


@triton.jit
def relu_weights(s, lse):
    return tl.maximum(s, 0.0)


@triton.jit
def relu_step(s, m, l):
    m, l = softmax_step(s, m, l)[1:3]
    return relu_weights(s, m), m, l, l * 0.0 + 1.0


@triton.jit
def relu_slope(s, weights, dp, lse, delta, HAS_DELTA: tl.constexpr):
    ds = tl.where(s > 0.0, dp, 0.0)
    return ds - softmax_weights(s, lse) * delta if HAS_DELTA else ds


@triton.jit
def identity_weights(s, lse):
    return tl.where(s == float("-inf"), 0.0, s)


@triton.jit
def identity_step(s, m, l):
    m, l = softmax_step(s, m, l)[1:3]
    return identity_weights(s, m), m, l, l * 0.0 + 1.0


@triton.jit
def identity_slope(s, weights, dp, lse, delta, HAS_DELTA: tl.constexpr):
    ds = tl.where(s == float("-inf"), 0.0, dp)
    return ds - softmax_weights(s, lse) * delta if HAS_DELTA else ds
