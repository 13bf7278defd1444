"""Edge attention inside PyTorch: op checks, compile, autocast, second derivatives; TransformerConv of PyTorch
Geometric as an independent oracle; graphs; errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backends_support import device_of, op_backends
from dispatch_modes import Recorded
from edge_problems import BY_NAME, make, solve
from torch import Tensor

from vicinal import Graph, edge_attention, segments


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "name", ["draw", "hubs-terms", "neighbours", "tied-all", "exp", "gate-all", "no-edges"]
)
@pytest.mark.parametrize("backend", op_backends("edge"))
def test_opcheck(name: str, backend: str) -> None:
    with Recorded() as mode:
        solve(BY_NAME[name], make(BY_NAME[name], torch.float32, device_of(backend)), backend)
    assert [f for f, _ in mode.calls] == [
        getattr(getattr(torch.ops.vicinal, f"edge_{d}"), backend) for d in ("fwd", "bwd")
    ]
    for func, args in mode.calls:
        torch.library.opcheck(func, args)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("backend", [*op_backends("edge"), "reference"])
def test_compile_without_graph_break(backend: str, compiler: str) -> None:
    device = device_of(backend)

    def function(x: Tensor, graph: Graph, e: Tensor) -> Tensor:
        out = edge_attention(x * 2, x, x, graph, edge_k=e, edge_v=e, backend=backend)
        assert isinstance(out, Tensor)
        return out.sin()

    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    for edges in (60, 33):
        generator = torch.Generator().manual_seed(edges)
        src, dst = torch.randint(0, 15, (2, edges), generator=generator)
        graph = Graph.from_coo(src, dst, 15).to(device)
        graph.reverse()  # built outside of the compiled function
        given = [torch.randn(n, 2, 8, device=device, requires_grad=True) for n in (15, edges)]
        results = []
        for f in (compiled, function):
            out = f(given[0], graph, given[1])
            results.append([out, *torch.autograd.grad(out.sum(), given)])
        for a, b in zip(*results):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", [*op_backends("edge"), "reference"])
def test_autocast_rounds_all_but_the_bias(backend: str) -> None:
    device = device_of(backend)
    problem = BY_NAME["softmax-all"]
    tensors = make(problem, torch.float32, device)
    graph = problem.listed.graph.to(device)
    low: Any = {n: t if n == "edge_bias" else t.bfloat16() for n, t in tensors.items()}
    with torch.autocast(device, torch.bfloat16):
        out = edge_attention(**tensors, graph=graph, backend=backend)  # type: ignore[arg-type]
    assert isinstance(out, Tensor)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, edge_attention(**low, graph=graph, backend=backend))  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", op_backends("edge"))
def test_second_derivatives_of_kernels_are_refused(backend: str) -> None:
    graph = BY_NAME["exp"].listed.graph.to(device_of(backend))
    x = torch.randn(23, 2, 8, device=device_of(backend), requires_grad=True)
    out = edge_attention(x, x, x, graph, backend=backend)
    assert isinstance(out, Tensor)
    (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"edge attention of backend .* is differentiable once"):
        torch.autograd.grad(first.sum(), x)


@pytest.mark.parametrize("backend", op_backends("edge"))
def test_only_wanted_gradients_are_made(backend: str) -> None:
    problem = BY_NAME["softmax-all"]
    tensors = {n: t.detach() for n, t in make(problem, torch.float32, device_of(backend)).items()}
    tensors["edge_mul"].requires_grad_()
    with Recorded() as mode:
        solve(problem, tensors, backend)
    func, args = mode.calls[1]
    sizes = [x.numel() for x in func(*args)[3:]]
    assert [n > 0 for n in sizes] == [False, False, True, False, False]


@pytest.mark.parametrize("backend", [*op_backends("edge"), "reference"])
def test_functional_gradients(backend: str) -> None:
    device = device_of(backend)
    graph = BY_NAME["exp"].listed.graph.to(device)
    x, e = torch.randn(23, 2, 8, device=device), torch.randn(200, 2, 8, device=device)

    def loss(x: Tensor, e: Tensor) -> Tensor:
        out = edge_attention(x, x, x, graph, edge_mul=e, backend=backend)
        assert isinstance(out, Tensor)
        return out.square().sum()

    leaves = [x.clone().requires_grad_(), e.clone().requires_grad_()]
    for a, b in zip(torch.func.grad(loss, (0, 1))(x, e), torch.autograd.grad(loss(*leaves), leaves)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("edge_dim", [None, 5])
@pytest.mark.parametrize("backend", [*op_backends("edge"), "reference"])
def test_transformer_conv_of_pytorch_geometric(backend: str, edge_dim: int | None) -> None:
    nn = pytest.importorskip("torch_geometric.nn")
    device = device_of(backend)
    torch.manual_seed(0)
    conv = nn.TransformerConv(12, 8, heads=3, edge_dim=edge_dim, root_weight=False)
    src, dst = torch.randint(0, 40, (2, 300))
    x, dout = torch.randn(40, 12, requires_grad=True), torch.randn(40, 24)
    e = None if edge_dim is None else torch.randn(300, edge_dim, requires_grad=True)
    graph = Graph.from_coo(src, dst, 40).to(device)
    q, k, v = (f(x).view(40, 3, 8).to(device) for f in (conv.lin_query, conv.lin_key, conv.lin_value))
    edge = None if e is None else conv.lin_edge(e).view(300, 3, 8).to(device)
    ours = edge_attention(q, k, v, graph, edge_k=edge, edge_v=edge, backend=backend)
    assert isinstance(ours, Tensor)
    used = [p for n, p in conv.named_parameters() if "skip" not in n]
    leaves = [x, *([] if e is None else [e]), *used]
    results = [
        [out, *torch.autograd.grad(out, leaves, dout)]
        for out in (ours.cpu().flatten(1), conv(x, torch.stack([src, dst]), e))
    ]
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_slots_are_sorted_by_destination_then_source_then_edge() -> None:
    src, dst = torch.tensor([4, 1, 4, 0, 1]), torch.tensor([1, 1, 1, 0, 1])
    graph = Graph.from_coo(src, dst, 5, 3)
    assert graph.rowptr.tolist() == [0, 1, 5, 5]
    assert graph.col.tolist() == [0, 1, 1, 4, 4]
    assert graph.edge_id.tolist() == [3, 1, 4, 0, 2]
    reverse = graph.reverse()
    assert reverse.colptr.tolist() == [0, 1, 3, 3, 3, 5]
    assert reverse.rev.tolist() == [0, 1, 2, 3, 4]
    assert reverse.dst.tolist() == [0, 1, 1, 1, 1]
    assert graph.reverse() is reverse


def test_graph_of_segments_has_all_pairs() -> None:
    made = segments.from_lengths(torch.tensor([2, 0, 3]))
    graph = Graph.from_segments(made)
    assert graph.rowptr.tolist() == [0, 2, 4, 7, 10, 13]
    assert graph.col.tolist() == [0, 1, 0, 1, *[2, 3, 4] * 3]
    assert repr(graph) == "Graph(13 edges, 5 sources, 5 destinations)"


def test_wrong_indices_are_never_used() -> None:
    """Unchecked on request, they are brought into range."""
    graph = Graph.from_coo(torch.tensor([7, -1]), torch.tensor([0, 1]), 3, 2, validate=False)
    assert sorted(graph.col.tolist()) == [0, 2]
    assert Graph.from_knn(torch.tensor([[5], [0]]), validate=False).col.tolist() == [1, 0]


LONG: Any = torch.zeros(2).long()
LISTED: Any = [0]
ERRORS: Any = [
    (
        lambda: Graph.from_coo(LONG + 3, LONG, 3),
        ValueError,
        r"src has values from 3 to 3; they must be 0 \.\. 2",
    ),
    (lambda: Graph.from_coo(LONG, LONG - 1, 3), ValueError, "dst has values from -1 to -1"),
    (lambda: Graph.from_coo(LONG, LONG[:1], 3), ValueError, "src has 2 edges, dst has 1"),
    (lambda: Graph.from_coo(LONG.float(), LONG, 3), TypeError, "src is torch.float32"),
    (lambda: Graph.from_coo(LONG[None], LONG, 3), ValueError, r"src has shape \[1, 2\]"),
    (lambda: Graph.from_coo(LISTED, LONG, 3), TypeError, "src is a list"),
    (lambda: Graph.from_coo(LONG, LONG, -1), ValueError, "n_src is -1"),
    (lambda: Graph.from_coo(LONG, LONG, 2**31), ValueError, "n_src is 2147483648; it may be"),
    (lambda: Graph.from_coo(LONG, LONG, 0), ValueError, "src has 2 entries; there is nothing"),
    (lambda: Graph.from_csr(torch.tensor([0, 1]), LONG, 3), ValueError, "rowptr must ascend from 0 to the 2"),
    (
        lambda: Graph.from_csr(torch.tensor([0, 2]), LONG, 3, LONG),
        ValueError,
        "edge_id must be a permutation",
    ),
    (lambda: Graph.from_csr(LONG[:0], LONG, 3), ValueError, "rowptr is empty"),
    (lambda: Graph.from_knn(LONG), ValueError, r"idx has shape \[2\]"),
    (lambda: Graph.from_knn(LONG[:, None], LONG[:, None]), TypeError, "mask is torch.int64"),
    (lambda: Graph.from_knn(LONG[:, None], LONG.bool()), ValueError, r"mask has shape \[2\]"),
    (lambda: Graph.from_segments(LONG), TypeError, "segments is a Tensor"),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS, ids=[str(i) for i in range(len(ERRORS))])
def test_errors_of_graphs(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


X = torch.zeros(3, 2, 4)
CHANGES: Any = [
    ({"q": X[0]}, ValueError, r"q has shape \[2, 4\]"),
    ({"q": X[:2]}, ValueError, "q has 2 rows; graph has 3 destinations"),
    ({"k": X[:2], "v": X[:2]}, ValueError, "k has 2 rows; graph has 3 sources"),
    ({"k": X.double()}, TypeError, "k is torch.float64; it must be torch.float32 as q"),
    ({"v": X[:, :1]}, ValueError, r"v has shape \[3, 1, 4\]"),
    ({"graph": LONG}, TypeError, "graph is a Tensor"),
    (
        {"edge_k": X},
        ValueError,
        r"edge_k has shape \[3, 2, 4\]; it must be \[E, heads, head_dim\] = \[2, 2, 4\]",
    ),
    ({"edge_mul": X[:2].double()}, TypeError, "edge_mul is torch.float64"),
    ({"edge_bias": X[:2]}, ValueError, r"edge_bias has shape"),
    ({"edge_bias": LONG}, TypeError, "edge_bias is torch.int64; it must be a float tensor"),
    ({"mode": "sigmoid"}, ValueError, "mode is 'sigmoid'; it must be one of 'softmax', 'exp', 'gate'"),
    ({"mode": "gate", "v": X[..., :3]}, ValueError, "q and v have head dims 4 and 3"),
    ({"mode": "gate", "return_lse": True}, ValueError, "mode 'gate' has no divisor"),
    ({"clamp": -1.0}, ValueError, r"clamp is -1\.0"),
    ({"eps": 1e-6}, ValueError, "eps is 1e-06; with mode 'softmax' it must be 0"),
    ({"mode": "exp", "eps": -1.0}, ValueError, r"eps is -1\.0; it must be at least 0"),
    ({"scale": float("nan")}, ValueError, "scale is nan"),
    ({"return_edge": 1}, TypeError, "return_edge is 1"),
    ({"backend": "tpu"}, ValueError, "backend is 'tpu'"),
]


@pytest.mark.parametrize(("change", "error", "message"), CHANGES, ids=[str(i) for i in range(len(CHANGES))])
def test_errors_of_calls(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given: Any = {"q": X, "k": X, "v": X, "graph": Graph.from_coo(LONG, LONG, 3)}
    with pytest.raises(error, match=message):
        edge_attention(**{**given, **change})
