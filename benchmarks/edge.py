"""Edge attention against gathers and scatters: neighbours of voxels, and a Graph Transformer layer.

"27 neighbours" is attention alone over the occupied cells of a 3 x 3 x 3 box around each voxel. The layers
have edge features: "graph-transformer" that of Dwivedi and Bresson (mode "exp"), and "transformer-conv" that
of Shi et al., for which PyTorch Geometric has a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vicinal import Graph, edge_attention, segments

from .measure import Contender, interleave
from .results import Report
from .windowed import DTYPES, OURS, reason

NODES, DEGREE, CHANNELS, HEADS = 10_000, 10, 80, 8

Prepared = tuple[list[Tensor], dict[str, Callable[..., Tensor]], str]  # tensors, contenders, what it is


def softmax_by_index(x: Tensor, dst: Tensor, nodes: int) -> Tensor:
    """Softmax of x [E, H] over the edges of each destination."""
    index = dst[:, None].expand_as(x)
    top = x.new_full((nodes, x.shape[1]), -torch.inf).scatter_reduce(0, index, x.detach(), "amax")
    weight = (x - top[dst]).exp()
    total = x.new_zeros(nodes, x.shape[1]).index_add(0, dst, weight)
    return weight / total[dst]


def gather_scatter(q: Tensor, k: Tensor, v: Tensor, src: Tensor, dst: Tensor, edge: Tensor | None) -> Tensor:
    keys, values = (k[src], v[src]) if edge is None else (k[src] + edge, v[src] + edge)
    p = softmax_by_index((q[dst] * keys).sum(-1) * q.shape[-1] ** -0.5, dst, len(q))
    return torch.zeros_like(q).index_add(0, dst, p[..., None] * values)


def padded_gather(q: Tensor, k: Tensor, v: Tensor, idx: Tensor, there: Tensor) -> Tensor:
    """idx, there [N, K]."""
    s = torch.einsum("nhd,nkhd->nhk", q, k[idx]) * q.shape[-1] ** -0.5
    p = s.masked_fill(~there[:, None], -torch.inf).softmax(-1)
    return torch.einsum("nhk,nkhd->nhd", p, v[idx])


def surface(size: int = 64, layers: int = 5) -> Tensor:
    """Voxels [20,480, 4] of a folded sheet a few layers thick, in the order of their cells: as many
    neighbours (21 of 27) as inside rooms."""
    x, y = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    height = 24 + (6 * torch.sin(x / 9.0) + 5 * torch.cos(y / 7.0)).round().long()
    z = height[..., None] + torch.arange(layers)
    cells = torch.stack([t[..., None].expand_as(z) for t in (torch.zeros_like(x), x, y)] + [z], -1)
    return cells.flatten(0, 2)


def voxel_cases() -> Prepared:
    coords = surface()
    table = segments.neighbour_table(coords, (64, 64, 48), 1).long()
    there = table >= 0
    dst, slot = torch.nonzero(there).unbind(1)
    src = table[dst, slot]
    graph = Graph.from_knn(table.clamp_min(0), there)
    idx = table.clamp_min(0)
    tensors = list(torch.randn(3, len(coords), 6, 16).unbind(0))
    calls: dict[str, Callable[..., Tensor]] = {
        OURS: lambda q, k, v: edge_attention(q, k, v, graph),  # type: ignore[dict-item,return-value]
        "gather-scatter": lambda q, k, v: gather_scatter(q, k, v, src, dst, None),
        "padded-gather": lambda q, k, v: padded_gather(q, k, v, idx, there),
    }
    return tensors, calls, f"{len(coords)} voxels, {len(src)} edges"


def random_graph(shuffled: bool = False) -> tuple[Tensor, Tensor, Graph]:
    """DEGREE random sources for each node; listed by destination, as graphs of neighbours are, or in any
    order."""
    generator = torch.Generator().manual_seed(0)
    src = torch.randint(0, NODES, (NODES * DEGREE,), generator=generator)
    dst = torch.arange(NODES).repeat_interleave(DEGREE)
    if shuffled:
        dst = dst[torch.randperm(len(dst), generator=generator)]
    return src, dst, Graph.from_coo(src, dst, NODES)


def heads_of(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1))


def transformer_conv_core(
    shuffled: bool = False,
) -> Prepared:
    """Softmax with edge features added to keys and values, projections left out."""
    src, dst, graph = random_graph(shuffled)
    tensors = [*torch.randn(3, NODES, HEADS, CHANNELS // HEADS).unbind(0)]
    tensors.append(torch.randn(len(src), HEADS, CHANNELS // HEADS))
    calls: dict[str, Callable[..., Tensor]] = {
        OURS: lambda q, k, v, e: edge_attention(q, k, v, graph, edge_k=e, edge_v=e),  # type: ignore[dict-item,return-value]
        "gather-scatter": lambda q, k, v, e: gather_scatter(q, k, v, src, dst, e),
    }
    return tensors, calls, f"{NODES} nodes, {len(src)} edges"


def transformer_conv() -> Prepared:
    """The layer, with its projections."""
    src, dst, graph = random_graph()
    index = torch.stack([src, dst])
    nn: Any = __import__("torch_geometric.nn", fromlist=["nn"])
    conv = nn.TransformerConv(CHANNELS, CHANNELS // HEADS, HEADS, edge_dim=CHANNELS, root_weight=False)
    named = {n: p.detach() for n, p in conv.named_parameters() if "skip" not in n}
    names, weights = list(named), list(named.values())

    def project(x: Tensor, e: Tensor, given: tuple[Tensor, ...]) -> list[Tensor]:
        w = dict(zip(names, given))
        rows = [F.linear(x, w[f"lin_{n}.weight"], w[f"lin_{n}.bias"]) for n in ("query", "key", "value")]
        return [heads_of(t) for t in (*rows, F.linear(e, w["lin_edge.weight"]))]

    def ours(x: Tensor, e: Tensor, *given: Tensor) -> Tensor:
        q, k, v, edge = project(x, e, given)
        out = edge_attention(q, k, v, graph, edge_k=edge, edge_v=edge)
        assert isinstance(out, Tensor)
        return out.flatten(1)

    def geometric(x: Tensor, e: Tensor, *given: Tensor) -> Tensor:
        out = torch.func.functional_call(conv, dict(zip(names, given)), (x, index, e))
        assert isinstance(out, Tensor)
        return out

    def plain(x: Tensor, e: Tensor, *given: Tensor) -> Tensor:
        q, k, v, edge = project(x, e, given)
        return gather_scatter(q, k, v, src, dst, edge).flatten(1)

    tensors = [torch.randn(NODES, CHANNELS), torch.randn(len(src), CHANNELS), *weights]
    calls = {OURS: ours, "torch-geometric": geometric, "gather-scatter": plain}
    return tensors, calls, f"{NODES} nodes, {len(src)} edges"


def published_graph_transformer(q: Tensor, k: Tensor, v: Tensor, e: Tensor, src: Tensor, dst: Tensor) -> Any:
    t = q[dst] * k[src] * q.shape[-1] ** -0.5 * e
    weight = t.sum(-1, keepdim=True).clamp(-5, 5).exp()
    top = torch.zeros_like(v).index_add(0, dst, weight * v[src])
    total = weight.new_zeros(len(q), HEADS, 1).index_add(0, dst, weight)
    return top / (total + 1e-6), t


def graph_transformer_core() -> Prepared:
    """The edge-featured attention of Dwivedi and Bresson, its edge output included, projections left out."""
    src, dst, graph = random_graph()
    options: Any = {"mode": "exp", "clamp": 5.0, "eps": 1e-6, "return_edge": True}
    tensors = [*torch.randn(3, NODES, HEADS, CHANNELS // HEADS).unbind(0)]
    tensors.append(torch.randn(len(src), HEADS, CHANNELS // HEADS))

    def joined(pair: Any) -> Tensor:
        return torch.cat([x.flatten(0, 1) for x in pair])

    calls: dict[str, Callable[..., Tensor]] = {
        OURS: lambda q, k, v, e: joined(edge_attention(q, k, v, graph, edge_mul=e, **options)),
        "gather-scatter": lambda q, k, v, e: joined(published_graph_transformer(q, k, v, e, src, dst)),
    }
    return tensors, calls, f"{NODES} nodes, {len(src)} edges"


CASES: dict[str, Callable[[], Any]] = {
    "27-neighbours": voxel_cases,
    "transformer-conv": transformer_conv,
    "transformer-conv-core": transformer_conv_core,
    "transformer-conv-core-shuffled": lambda: transformer_conv_core(True),
    "graph-transformer-core": graph_transformer_core,
}
QUICK = ("27-neighbours", "transformer-conv")


def prepare(name: str, dtype: torch.dtype, backward: bool, report: Report) -> list[Contender]:
    from .voxel import stepper

    torch.manual_seed(0)
    tensors, calls, what = CASES[name]()
    leaves = [x.to(dtype).requires_grad_(backward) for x in tensors]
    want, ready = None, []
    dout = None
    for impl, function in calls.items():
        try:
            out = function(*leaves)
            want = out.detach() if want is None else want
            dout = torch.randn_like(out) if dout is None else dout
            error = float((out.detach() - want).abs().max() / want.abs().max())
            if error > 128 * torch.finfo(dtype).eps:
                raise ArithmeticError(f"differs by {error:.1e} ({what})")
            step = stepper(lambda f=function: f(*leaves), leaves, dout, backward)
            step()
        except Exception as error:
            report.unavailable.append({"group": f"voxel/{name}", "impl": impl, "reason": reason(error)})
            continue
        ready.append(Contender(impl, step))
    return ready


def run(
    report: Report,
    threads: int,
    limits: Any,
    dtypes: tuple[str, ...],
    quick: bool,
    only: tuple[str, ...] = (),
) -> Iterator[str]:
    """Measure all cases at the current number of threads; yields a line for each group."""
    from .voxel import record

    for name in only or (QUICK if quick else tuple(CASES)):
        for dtype in dtypes:
            for backward in (False, True):
                direction = "fwd+bwd" if backward else "fwd"
                ready = prepare(name, DTYPES[dtype], backward, report)
                if ready:
                    params = {"problem": name, "dtype": dtype, "direction": direction, "threads": threads}
                    timed = interleave(ready, **limits).contenders
                    yield from record(report, f"voxel/{name}/{dtype}/{direction}/{threads}t", timed, params)
