"""Edge attention: every node of a graph attends to the nodes that its edges come from.

Gather, softmax and scatter are one kernel; nothing of the size of edges times channels is made besides the
edge features and gradients that a call asks for.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor

from . import _backends
from . import _check as checks
from ._choice import problem_of
from ._edge_graph import Graph
from ._edge_run import prepare, problem_key, run
from .reference_edge import Edges

__all__ = ["Graph", "edge_attention"]


def edge_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    graph: Graph,
    *,
    edge_k: Tensor | None = None,
    edge_v: Tensor | None = None,
    edge_bias: Tensor | None = None,
    edge_mul: Tensor | None = None,
    edge_gate: Tensor | None = None,
    mode: str = "softmax",
    clamp: float | None = None,
    eps: float = 0.0,
    scale: float | None = None,
    return_edge: bool = False,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Attention of every destination to the sources of its edges, with features of the edges.

    For the edges e of destination i, each from a source j, with * per channel::

        t[e] = scale * q[i] * (k[j] + edge_k[e]) * edge_mul[e]
        value[e] = (v[j] + edge_v[e]) * edge_gate[e]
        x[e] = clip(sum over channels of t[e] + edge_bias[e], -clamp, clamp)
        "softmax"  out[i] = sum_e p[e] value[e]     p[e] = exp x[e] / sum_e exp x[e]
        "exp"      out[i] = sum_e p[e] value[e]     p[e] = exp x[e] / (sum_e exp x[e] + eps)
        "gate"     out[i] = sum_e exp(clip(t[e] + edge_bias[e], -clamp, clamp)) * value[e]

    A tensor that is not given is left out of the formula.

    Args:
        q: [Nd, h, D], float32, float64, bfloat16 or float16. Any strides; D contiguous is not copied.
        k: [Ns, h, D].
        v: [Ns, h, Dv]; with "gate" Dv = D.
        graph: a `Graph` of Nd destinations, Ns sources and E edges.
        edge_k: [E, h, D], in the order in which the graph was given its edges, as all edge tensors.
        edge_v: [E, h, Dv]. It may be the tensor edge_k: then one gradient is made of both.
        edge_bias: [E, h], any float dtype; -inf excludes the edge.
        edge_mul: [E, h, D].
        edge_gate: [E, h, Dv].
        mode: "softmax", "exp" (no maximum is taken off: give a clamp) or "gate" (weights per channel, no
            divisor).
        clamp: bound of the scores. Default: none. Gradients of what lies beyond are 0.
        eps: added to the divisor, with "exp".
        scale: factor of q * k. Default D ** -0.5.
        return_lse: also return the logarithm of the divisor. Not with "gate".
        return_edge: also return t.
        backend: "cpu", "cuda", "triton" or "reference". Default None: the fastest that can.

    Returns:
        out [Nd, h, Dv] in q's dtype; with return_lse also lse [Nd, h], float32 (float64 for float64); with
        return_edge also t [E, h, D] in q's dtype. All are differentiable. A node without edges has out 0 and
        lse log eps, which is -inf but with "exp" and an eps.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or value; the message names it.
        NotImplementedError: no backend (or not the forced one) takes the problem; lists every reason.

    Example:
        >>> graph = Graph.from_coo(torch.tensor([0, 1, 1]), torch.tensor([2, 0, 2]), 3)
        >>> q = k = v = torch.randn(3, 8, 10)
        >>> edge_attention(q, k, v, graph, edge_k=torch.randn(3, 8, 10)).shape
        torch.Size([3, 8, 10])

    Source: Shi et al., Masked Label Prediction (arXiv 2009.03509) for "softmax"; Dwivedi and Bresson, A
    Generalization of Transformer Networks to Graphs (arXiv 2012.09699) for "exp".
    """
    checks.flag("return_lse", return_lse)
    checks.flag("return_edge", return_edge)
    edges = Edges(edge_k, edge_v, edge_mul, edge_gate, edge_bias)
    call = prepare(q, k, v, graph, edges, mode, clamp, eps, scale)
    if return_lse and mode == "gate":
        raise ValueError("return_lse is True; mode 'gate' has no divisor")
    out, lse, edge = run(call, return_edge, backend)
    found = (out, *([lse] if return_lse else []), *([edge] if return_edge else []))
    return found if len(found) > 1 else out


def _explained(*args: Any, **kwargs: Any) -> Any:
    """The problem and the forced backend of edge_attention(*args, **kwargs)."""
    bound = inspect.signature(edge_attention).bind(*args, **kwargs)
    bound.apply_defaults()
    a = bound.arguments
    edges = Edges(a["edge_k"], a["edge_v"], a["edge_mul"], a["edge_gate"], a["edge_bias"])
    options = (a["mode"], a["clamp"], a["eps"], a["scale"])
    return problem_of(problem_key(prepare(a["q"], a["k"], a["v"], a["graph"], edges, *options))), a["backend"]


_backends.explains(edge_attention, _explained)
