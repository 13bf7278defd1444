"""Segment attention: exact attention inside groups of rows of any sizes, in the caller's order of rows.

Gather and scatter are fused; nothing is padded, masked or sorted. `vicinal.segments` makes the groups.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor

from . import _backends
from . import _check as checks
from ._choice import problem_of
from ._segments_type import SegmentGroups, Segments
from ._voxel_run import prepare, problem_key, run
from ._voxel_types import Bias, ContextTable, KeyBias, RelTable, Rope3D

__all__ = ["ContextTable", "KeyBias", "RelTable", "Rope3D", "voxel_attention"]


def voxel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments | SegmentGroups,
    *,
    bias: Bias | tuple[Bias, ...] | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of every row to the keys of its segment.

    For query row i and the keys j of its segment::

        s[i, j] = scale * q[i].k[j] + bias
        p = softmax(s)
        out[i] = sum_j p[i, j] v[j]        lse[i] = log sum_j exp s[i, j]

    Args:
        q: [Nq, h, D], float32, float64, bfloat16 or float16. Any strides; views with a contiguous last
            dimension (`unbind` of a packed qkv) are not copied.
        k: [Nk, h, D].
        v: [Nk, h, Dv].
        segments: `Segments` of Nq and Nk rows, or `SegmentGroups`, which gives groups of heads segments of
            their own.
        bias: `RelTable`, `ContextTable`, `KeyBias`, `Rope3D`, or a tuple of them. All tables are trainable.
        scale: factor of q.k. Default D ** -0.5.
        return_lse: also return lse. Differentiable.
        backend: "cpu", "cuda", "triton" or "reference". Default None: the fastest that can.

    Returns:
        out [Nq, h, Dv] in q's dtype and in the order of q's rows; with return_lse also lse [Nq, h], float32
        (float64 for float64). A row in no segment, or without a key, has out 0, lse -inf and zero gradients.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or value; the message names it.
        NotImplementedError: no backend (or not the forced one) takes the problem; lists every reason.

    Example:
        >>> from vicinal import segments
        >>> q = k = v = torch.randn(5, 8, 24)
        >>> voxel_attention(q, k, v, segments.from_lengths(torch.tensor([3, 2]))).shape
        torch.Size([5, 8, 24])
    """
    checks.flag("return_lse", return_lse)
    out, lse = run(q, k, v, segments, bias, scale, backend)
    return (out, lse) if return_lse else out


def _explained(*args: Any, **kwargs: Any) -> Any:
    """The problem and the forced backend of voxel_attention(*args, **kwargs)."""
    bound = inspect.signature(voxel_attention).bind(*args, **kwargs)
    bound.apply_defaults()
    values = bound.arguments
    del values["return_lse"]
    backend = values.pop("backend")
    return problem_of(problem_key(prepare(**values))), backend


_backends.explains(voxel_attention, _explained)
