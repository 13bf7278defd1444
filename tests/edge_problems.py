"""Named problems of edge attention: graphs, modes, edge tensors, head dimensions; the calls; and
dense PyTorch over a padded table of each node's edges, built from the list of edges alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from rule import TRAINED, Results, accumulator, widened
from rule import dense_errors as errors_of
from torch import Tensor

from vicinal import Graph, edge_attention

ALL = ("edge_k", "edge_v", "edge_mul", "edge_gate", "edge_bias")


class Listed(NamedTuple):
    """Edges src[e] -> dst[e] that stand at row[e] of `rows` rows of the edge tensors; and the graph."""

    src: Tensor
    dst: Tensor
    row: Tensor
    rows: int
    graph: Graph


def coo(src: Tensor, dst: Tensor, n_src: int, n_dst: int) -> Listed:
    graph = Graph.from_coo(src, dst, n_src, n_dst)
    return Listed(src, dst, torch.arange(len(src)), len(src), graph)


def draw(edges: int, n_src: int = 17, n_dst: int = 23, seed: int = 0, last: int = 0) -> Listed:
    """Random edges: some twice, some loops; the last `last` nodes of both sides have none."""
    generator = torch.Generator().manual_seed(seed)
    src = torch.randint(0, n_src - last, (edges,), generator=generator)
    dst = torch.randint(0, n_dst - last, (edges,), generator=generator)
    return coo(src, dst, n_src, n_dst)


def hubs() -> Listed:
    """A destination and a source with more edges than a piece of the kernels has."""
    listed = draw(9000, 12, 11, 4, 1)
    listed.dst[:5000], listed.src[4000:8500] = 3, 2
    return coo(listed.src, listed.dst, 12, 11)


def neighbours() -> Listed:
    generator = torch.Generator().manual_seed(3)
    idx = torch.randint(0, 17, (25, 6), generator=generator)
    there = torch.rand(25, 6, generator=generator) < 0.7
    there[4] = False
    i, j = torch.nonzero(there).unbind(1)
    return Listed(idx[i, j], i, 6 * i + j, 150, Graph.from_knn(idx.where(there, 99), there, 17))


def every_neighbour() -> Listed:
    idx = torch.randint(0, 9, (9, 4), generator=torch.Generator().manual_seed(5))
    dst = torch.arange(9).repeat_interleave(4)
    return Listed(idx.flatten(), dst, torch.arange(36), 36, Graph.from_knn(idx))


def rows_in_order() -> Listed:
    """from_csr, with edge tensors in another order."""
    ptr, col = torch.tensor([0, 3, 3, 4, 8]), torch.tensor([5, 0, 0, 2, 1, 4, 4, 3])
    ids = torch.tensor([7, 1, 0, 2, 5, 6, 3, 4])
    dst = torch.tensor([0, 0, 0, 2, 3, 3, 3, 3])
    return Listed(col, dst, ids, 8, Graph.from_csr(ptr, col, 6, ids))


@dataclass(frozen=True)
class Problem:
    """terms: names of ALL; tied: edge_v is edge_k. keep: return_edge. layout: "contiguous", "packed" (q, k, v
    are views of one tensor), "crop" (views into NaN). factor: of q and k, for large scores."""

    name: str
    make: Callable[[], Listed]
    heads: int = 2
    dim: int = 8
    dim_v: int = 0
    mode: str = "softmax"
    terms: tuple[str, ...] = ()
    tied: bool = False
    keep: bool = False
    clamp: float | None = None
    eps: float = 0.0
    scale: float | None = None
    layout: str = "contiguous"
    factor: float = 1.0

    @property
    def value_dim(self) -> int:
        return self.dim_v or self.dim

    @property
    def listed(self) -> Listed:
        return built(self.name)

    def __str__(self) -> str:
        return self.name


@lru_cache
def built(name: str) -> Listed:
    return BY_NAME[name].make()


def square() -> Listed:
    return draw(200, 23, 23)


GRAPHS = (
    Problem("draw", lambda: draw(150, last=3)),
    Problem("hubs", hubs, heads=1),
    Problem("hubs-terms", hubs, heads=1, dim=4, terms=ALL, keep=True, clamp=1.5),
    Problem("hubs-exp", hubs, heads=1, dim=4, mode="exp", terms=("edge_mul",), clamp=5.0, eps=1e-6),
    Problem("hubs-gate", hubs, heads=1, dim=4, mode="gate", terms=("edge_mul", "edge_gate"), clamp=2.0),
    Problem("neighbours", neighbours, terms=("edge_k", "edge_bias"), keep=True),
    Problem("neighbours-gate", neighbours, mode="gate", terms=ALL, keep=True),
    Problem("every-neighbour", every_neighbour),
    Problem("csr", rows_in_order, terms=ALL),
    Problem("loops", lambda: coo(torch.arange(7), torch.arange(7), 7, 7), terms=("edge_v",)),
    Problem("no-edges", lambda: draw(0), terms=("edge_k", "edge_mul"), keep=True),
    Problem("no-nodes", lambda: coo(torch.zeros(0).long(), torch.zeros(0).long(), 0, 0)),
    Problem("one-edge", lambda: coo(torch.tensor([2]), torch.tensor([1]), 3, 2), terms=ALL),
)
MODES = (
    Problem("softmax-all", square, terms=ALL, keep=True),
    Problem("softmax-clamp", square, terms=ALL, clamp=1.0),
    Problem("transformer-conv", square, heads=3, dim=16, terms=("edge_k",), tied=True),
    Problem("tied-all", square, terms=("edge_k", "edge_mul", "edge_gate"), tied=True, keep=True),
    Problem("bias", square, terms=("edge_bias",)),
    Problem("large-scores", square, factor=8.0),
    Problem("exp", square, mode="exp", terms=("edge_mul",), keep=True, clamp=5.0, eps=1e-6),
    Problem("exp-all", square, mode="exp", terms=ALL, keep=True, clamp=1.0),
    Problem("exp-plain", square, mode="exp"),
    Problem(
        "graph-transformer", square, heads=8, dim=10, mode="exp", terms=("edge_mul",), keep=True, clamp=5.0
    ),
    Problem("gate", square, mode="gate", terms=("edge_mul", "edge_gate"), clamp=2.0),
    Problem("gate-all", square, dim=24, mode="gate", terms=ALL, keep=True, clamp=0.7),
    Problem("gate-tied", square, dim=5, mode="gate", terms=("edge_k",), tied=True),
    Problem("scale-0", square, scale=0.0),
    Problem("packed", square, layout="packed", heads=3, dim=12),
    Problem("crop", square, layout="crop", dim=11, dim_v=5, terms=("edge_v", "edge_mul")),
)
HEAD_DIMS = tuple(
    Problem(f"dim-{d}-{e}{name}", lambda: draw(120), heads=1, dim=d, dim_v=e, terms=terms)
    for d, e in (
        *((1, 1), (4, 4), (8, 3), (10, 10), (12, 12), (13, 13), (16, 16), (18, 18), (24, 24), (32, 32)),
        *((42, 42), (48, 48), (64, 64), (96, 96), (128, 128), (16, 128), (128, 7)),
    )
    for name, terms in (("", ()), ("-terms", ("edge_k", "edge_v", "edge_mul", "edge_gate")))
)
PROBLEMS = (*GRAPHS, *MODES, *HEAD_DIMS)
BY_NAME = {p.name: p for p in PROBLEMS}
assert len(BY_NAME) == len(PROBLEMS), "two problems share a name"


def make(problem: Problem, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, Tensor]:
    """The tensors by name, as leaves."""
    generator = torch.Generator().manual_seed(0)
    p, graph, h = problem, problem.listed.graph, problem.heads

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    low = [normal(graph.n_dst, h, p.dim) * p.factor, normal(graph.n_src, h, p.dim) * p.factor]
    low = [x.to(device, dtype) for x in (*low, normal(graph.n_src, h, p.value_dim))]
    if p.layout == "packed":
        low = [x.detach() for x in torch.stack(low, 1).unbind(1)]
    if p.layout == "crop":
        low = [cropped(x) for x in low]
    tensors = dict(zip("qkv", low))
    for name in ALL:
        if name in p.terms:
            width = p.value_dim if name in ("edge_v", "edge_gate") else p.dim
            shape = (graph.n_edges, h) if name == "edge_bias" else (graph.n_edges, h, width)
            tensors[name] = normal(*shape).to(device, accumulator(dtype) if name == "edge_bias" else dtype)
    return {name: t.requires_grad_(name in TRAINED) for name, t in tensors.items()}


def cropped(x: Tensor) -> Tensor:
    buffer = x.new_full((x.shape[0] + 1, x.shape[1] + 1, x.shape[2] + 3), float("nan"))
    return buffer[1:, :-1, 2 : 2 + x.shape[2]].copy_(x).detach()


def run(problem: Problem, tensors: dict[str, Tensor], backend: str | None = None) -> dict[str, Tensor]:
    """The outputs by name."""
    p, device = problem, tensors["q"].device
    edges = {n: x for n, x in tensors.items() if n in ALL}
    if p.tied:
        edges["edge_v"] = edges["edge_k"]
    attend: Any = edge_attention
    found = attend(
        *(tensors[n] for n in "qkv"),
        p.listed.graph.to(device),
        **edges,
        mode=p.mode,
        clamp=p.clamp,
        eps=p.eps,
        scale=p.scale,
        return_lse=p.mode != "gate",
        return_edge=p.keep,
        backend=backend,
    )
    outputs = found if isinstance(found, tuple) else (found,)
    names = ("out", *(["lse"] if p.mode != "gate" else []), *(["edge"] if p.keep else []))
    return dict(zip(names, outputs, strict=True))


def differentiate(outputs: dict[str, Tensor], tensors: dict[str, Tensor], dtype: torch.dtype) -> Results:
    """The outputs, and the gradient of every tensor ("dq", ..)."""
    generator = torch.Generator().manual_seed(99)
    grads = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in outputs.values()]
    grads = [g.to(dtype).to(x.device, x.dtype) for g, x in zip(grads, outputs.values())]
    leaves = {n: t for n, t in tensors.items() if t.requires_grad}
    found = torch.autograd.grad(list(outputs.values()), list(leaves.values()), grads, allow_unused=True)
    results = {f"d{n}": torch.zeros_like(t) if g is None else g for (n, t), g in zip(leaves.items(), found)}
    return {**{n: x.detach() for n, x in outputs.items()}, **results}


def solve(problem: Problem, tensors: dict[str, Tensor], backend: str | None = None) -> Results:
    return differentiate(run(problem, tensors, backend), tensors, tensors["q"].dtype)


def table(listed: Listed) -> tuple[Tensor, Tensor, Tensor]:
    """src, row [Nd, most] and which of them there are."""
    lists: list[list[tuple[int, int]]] = [[] for _ in range(listed.graph.n_dst)]
    for s, d, r in zip(listed.src.tolist(), listed.dst.tolist(), listed.row.tolist()):
        lists[d].append((s, r))
    most = max([1, *map(len, lists)])
    shape = (len(lists), most)
    src, row, there = torch.zeros(shape).long(), torch.zeros(shape).long(), torch.zeros(shape).bool()
    for d, entries in enumerate(lists):
        for j, (s, r) in enumerate(entries):
            src[d, j], row[d, j], there[d, j] = s, r, True
    return src, row, there


def dense(
    problem: Problem, tensors: dict[str, Tensor], c: float, backwards: bool, given: torch.dtype
) -> Results:
    """Padded gather, mask and softmax, every step in the dtype of q. given: the problem's own dtype."""
    p, listed = problem, problem.listed
    src, row, there = table(listed)
    q, k, v = tensors["q"] * c, tensors["k"], tensors["v"] * c
    keys, values = (picked(x, src) for x in (k, v))
    edges = {n: picked(x.to(q.dtype), row) for n, x in tensors.items() if n in ALL}
    if p.tied:
        edges["edge_v"] = edges["edge_k"]
    keys = keys + edges["edge_k"] if "edge_k" in edges else keys
    values = values + edges["edge_v"] * c if "edge_v" in edges else values
    values = values * edges["edge_gate"] if "edge_gate" in edges else values
    t = q[:, None] * ((p.dim**-0.5 if p.scale is None else p.scale) / c) * keys
    t = t * edges["edge_mul"] if "edge_mul" in edges else t
    x = t if p.mode == "gate" else (t.flip(-1) if backwards else t).sum(-1)
    if "edge_bias" in edges:
        x = x + (edges["edge_bias"][..., None] if p.mode == "gate" else edges["edge_bias"])
    x = x if p.clamp is None else x.clamp(-p.clamp, p.clamp)
    mask = there[..., None, None] if p.mode == "gate" else there[..., None]
    outputs = {}
    if p.mode == "gate":
        order = (x.exp() * values).where(mask, 0)
        outputs["out"] = (order.flip(1) if backwards else order).sum(1) / c
    else:
        x = x.masked_fill(~mask, -torch.inf)
        top = x.detach().amax(1, keepdim=True)
        top = torch.where(top > -torch.inf, top, 0) if p.mode == "softmax" else torch.zeros_like(top)
        e = torch.exp(x - top)
        total = e.sum(1, keepdim=True) + p.eps
        some = total > 0
        outputs["out"] = ((e / total.where(some, 1))[..., None] * values).sum(1) / c
        outputs["lse"] = (top + total.where(some, 1).log()).where(some, -torch.inf).squeeze(1)
    if p.keep:
        flat = torch.zeros(listed.rows, p.heads, p.dim, dtype=t.dtype)
        outputs["edge"] = flat.index_put((row[there],), t[there]) if len(row) else flat
    return differentiate(outputs, tensors, given)


def picked(x: Tensor, index: Tensor) -> Tensor:
    return x[index] if len(x) else x.new_zeros(*index.shape, *x.shape[1:])


def exact(problem: Problem, tensors: dict[str, Tensor]) -> Results:
    given = tensors["q"].dtype
    return dense(problem, widened({n: t.cpu() for n, t in tensors.items()}), 1.0, False, given)


def dense_errors(problem: Problem, tensors: dict[str, Tensor], truth: Results) -> dict[str, float]:
    return errors_of(
        tensors,
        truth,
        lambda t: exact(problem, t),
        lambda t, c, backwards: dense(problem, t, c, backwards, t["q"].dtype),
    )
