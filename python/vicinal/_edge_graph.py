"""The value object of edge attention, which source each edge of a destination comes from; its builders."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from ._segments_keys import bits_of, confirm, expand, key_dtype, positive, sort
from ._segments_type import Segments

MOST_NODES = 2**31 - 2
WIDE = 2**31  # from so many edges on, numbers of slots are int64


class Reverse(NamedTuple):
    """The slots in the order of their sources: those of source j are rev[colptr[j] : colptr[j + 1]], and dst
    int32 are their destinations."""

    colptr: Tensor
    rev: Tensor
    dst: Tensor


@dataclass(frozen=True, eq=False, repr=False)
class Graph:
    """Edges sorted by destination. Slot e of destination i, rowptr[i] <= e < rowptr[i + 1], is the edge from
    source col[e] whose features lie in row edge_id[e] of the caller's edge tensors.

    Immutable, on the device of its tensors, and worth keeping: the order by source, which gradients need, is
    built at the first use. Made by `from_coo`, `from_csr`, `from_knn` and `from_segments`. Several edges
    between two nodes, loops, and nodes without edges are legal.

    Args:
        rowptr: int32 [Nd + 1], int64 from 2**31 edges on.
        col: int32 [slots].
        edge_id: [slots], as rowptr.
        n_src: Ns, the number of sources.
        n_edges: rows of the edge tensors.
        whole: whether every row of the edge tensors has a slot.
        kept: what was built from the others.

    Example:
        >>> import torch
        >>> from vicinal import Graph
        >>> Graph.from_coo(torch.tensor([0, 1, 1]), torch.tensor([2, 0, 2]), 3)
        Graph(3 edges, 3 sources, 3 destinations)
    """

    rowptr: Tensor
    col: Tensor
    edge_id: Tensor
    n_src: int
    n_edges: int
    whole: bool
    kept: dict[str, Any] = field(default_factory=dict)

    @property
    def n_dst(self) -> int:
        """Nd, the number of destinations."""
        return self.rowptr.shape[0] - 1

    @property
    def device(self) -> torch.device:
        return self.rowptr.device

    def __repr__(self) -> str:
        return f"Graph({self.n_edges} edges, {self.n_src} sources, {self.n_dst} destinations)"

    def to(self, device: torch.device | str) -> Graph:
        """The same graph on another device."""
        moved = {name: getattr(self, name).to(device) for name in ("rowptr", "col", "edge_id")}
        return self if moved["rowptr"].device == self.device else replace(self, **moved, kept={})

    def dst(self) -> Tensor:
        """int32 [slots], the destination of each slot."""
        if "dst" not in self.kept:
            slot = torch.arange(len(self.col), device=self.device, dtype=self.rowptr.dtype)
            self.kept["dst"] = torch.searchsorted(self.rowptr, slot, right=True, out_int32=True) - 1
        found: Tensor = self.kept["dst"]
        return found

    def reverse(self) -> Reverse:
        """The slots by source."""
        if "reverse" not in self.kept:
            if torch._C._are_functorch_transforms_active():  # what is kept must not belong to a transform
                with temporarily_clear_interpreter_stack():
                    return self.reverse()
            order, sources = _sorted(self.col, bits_of(self.n_src + 1))
            colptr = _pointers(sources, self.n_src, self.rowptr.dtype)
            dst = self.dst().index_select(0, order)
            self.kept["reverse"] = Reverse(colptr, order.to(self.rowptr.dtype), dst)
        found: Reverse = self.kept["reverse"]
        return found

    @staticmethod
    def from_coo(
        src: Tensor, dst: Tensor, n_src: int, n_dst: int | None = None, *, validate: bool | None = None
    ) -> Graph:
        """The graph of edges src[e] -> dst[e], sorted stably by (destination, source).

        Args:
            src: int [E], the source of each edge (row 0 of PyTorch Geometric's edge_index).
            dst: int [E], its destination.
            n_src: number of sources.
            n_dst: number of destinations. Default: n_src.
            validate: whether an index out of range raises now (a synchronisation on devices). Default: now on
                CPUs, at the next synchronisation elsewhere. Such an index is never used as one.

        Returns:
            The graph; edge tensors are in the order of src and dst.

        Raises:
            TypeError, ValueError: names the argument, what is in it and what may be.
        """
        n_dst = n_src if n_dst is None else n_dst
        _sizes(n_src, n_dst)
        src, dst = _index("src", src, n_src, validate), _index("dst", dst, n_dst, validate)
        if len(src) != len(dst):
            raise ValueError(f"src has {len(src)} edges, dst has {len(dst)}; they must have as many")
        _same_device("dst", dst, src)
        low, bits = bits_of(n_src), bits_of(n_src) + bits_of(n_dst)
        dtype = key_dtype(bits, "a pair (dst, src)")
        keys = (dst.to(dtype) << low) | src.to(dtype)
        order, keys = _sorted(keys, bits)
        number = torch.int64 if len(src) >= WIDE else torch.int32
        col = (keys & ((1 << low) - 1)).to(torch.int32)
        return Graph(_pointers(keys >> low, n_dst, number), col, order.to(number), n_src, len(src), True)

    @staticmethod
    def from_csr(
        rowptr: Tensor,
        col: Tensor,
        n_src: int,
        edge_id: Tensor | None = None,
        *,
        validate: bool | None = None,
    ) -> Graph:
        """The graph of edges that are sorted by destination already.

        Args:
            rowptr: int [Nd + 1], ascending from 0 to E.
            col: int [E], sources.
            n_src: number of sources.
            edge_id: int [E], a permutation: row of each edge in the edge tensors. Default: 0, 1, ..
            validate: as in `from_coo`.

        Returns:
            The graph.

        Raises:
            TypeError, ValueError: names the argument, what is in it and what may be.
        """
        _sizes(n_src, 0)
        col = _index("col", col, n_src, validate)
        rowptr = _index("rowptr", rowptr, len(col) + 1, validate)
        _same_device("rowptr", rowptr, col)
        if not len(rowptr):
            raise ValueError("rowptr is empty; it must have an entry more than there are destinations")
        falls = (rowptr[1:] < rowptr[:-1]).any() | (rowptr[0] != 0) | (rowptr[-1] != len(col))
        if confirm(falls, validate, "rowptr does not ascend from 0 to the number of edges"):
            raise ValueError(f"rowptr must ascend from 0 to the {len(col)} entries of col")
        number = torch.int64 if len(col) >= WIDE else torch.int32
        if edge_id is None:
            edge_id = torch.arange(len(col), device=col.device)
        else:
            edge_id = _index("edge_id", edge_id, len(col), validate)
            _same_device("edge_id", edge_id, col)
            seen = torch.zeros(len(col), dtype=torch.bool, device=col.device)
            twice = ~seen.index_fill_(0, edge_id.long(), True).all()
            if len(edge_id) != len(col) or confirm(twice, validate, "edge_id is no permutation"):
                raise ValueError(f"edge_id must be a permutation of 0 .. {len(col) - 1}")
        return Graph(rowptr.to(number), col.to(torch.int32), edge_id.to(number), n_src, len(col), True)

    @staticmethod
    def from_knn(
        idx: Tensor, mask: Tensor | None = None, n_src: int | None = None, *, validate: bool | None = None
    ) -> Graph:
        """The graph of K sources for each destination; edge (i, j) is row i * K + j of the edge tensors.

        Args:
            idx: int [Nd, K].
            mask: bool [Nd, K], which of them there are. Default: all. The entries of others are ignored, and
                gradients of their rows of edge tensors are 0.
            n_src: number of sources. Default: Nd.
            validate: as in `from_coo`.

        Returns:
            The graph, its edges in the order of idx.

        Raises:
            TypeError, ValueError: names the argument, what is in it and what may be.
        """
        if not isinstance(idx, Tensor):
            raise TypeError(f"idx is a {type(idx).__name__}; it must be an integer tensor [Nd, K]")
        if idx.dim() != 2:
            raise ValueError(f"idx has shape {list(idx.shape)}; it must be [Nd, K]")
        nodes, most = idx.shape
        n_src = nodes if n_src is None else n_src
        _sizes(n_src, nodes)
        there = _mask(idx, mask)
        flat = idx if there is None else torch.where(there, idx, 0)
        if there is not None and n_src == 0 and not bool(there.any()):
            flat = flat[:, :0]
        col = _index("idx", flat.reshape(-1), n_src, validate)
        number = torch.int64 if len(col) >= WIDE else torch.int32
        if there is None:
            rowptr = torch.arange(nodes + 1, device=idx.device, dtype=number) * most
            edge_id = torch.arange(len(col), device=idx.device, dtype=number)
            return Graph(rowptr, col.to(torch.int32), edge_id, n_src, nodes * most, True)
        counts = torch.cumsum(there.sum(1), 0)
        rowptr = torch.cat([counts.new_zeros(1), counts]).to(number)
        return Graph(rowptr, *_chosen(col, there.reshape(-1), n_src, number), n_src, nodes * most, False)

    @staticmethod
    def from_segments(segments: Segments) -> Graph:
        """The graph of all pairs of a query and a key of a segment, an edge for each, in the order of query
        slots, then key slots: `edge_attention` on it is `voxel_attention` on the segments."""
        if not isinstance(segments, Segments):
            raise TypeError(f"segments is a {type(segments).__name__}; it must be Segments")
        s = segments
        slot = torch.arange(s.q_index.shape[0], device=s.device)
        owner = torch.searchsorted(s.q_ptr[1:].contiguous(), slot.to(torch.int32), right=True)
        counts = (s.k_end - s.k_begin)[owner].long() if s.count else slot
        query, place = expand(counts, int(counts.sum()))
        src = s.k_index[s.k_begin[owner[query]].long() + place]
        return Graph.from_coo(src, s.q_index[query], s.n_k, s.n_q)


def _sizes(n_src: Any, n_dst: Any) -> None:
    for name, value in (("n_src", n_src), ("n_dst", n_dst)):
        positive(name, value, 0, lowest=0)
        if value > MOST_NODES:
            raise ValueError(f"{name} is {value}; it may be {MOST_NODES}")


def _same_device(name: str, x: Tensor, first: Tensor) -> None:
    if x.device != first.device:
        raise ValueError(f"{name} is on {x.device}; it must be on {first.device}")


def _mask(idx: Tensor, mask: Any) -> Tensor | None:
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask is {getattr(mask, 'dtype', type(mask).__name__)}; it must be a bool tensor")
    if mask.shape != idx.shape:
        raise ValueError(f"mask has shape {list(mask.shape)}; it must be {list(idx.shape)} as idx")
    _same_device("mask", mask, idx)
    return mask


def _index(name: str, x: Any, rows: int, validate: bool | None) -> Tensor:
    """x, checked; where that is left to later, brought into range."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}; it must be an integer tensor")
    if x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} is {x.dtype}; it must be torch.int32 or torch.int64")
    if x.dim() != 1:
        raise ValueError(f"{name} has shape {list(x.shape)}; it must have one dimension")
    if not x.numel():
        return x
    if rows == 0:
        raise ValueError(f"{name} has {x.numel()} entries; there is nothing that they could stand for")
    outside = ((x < 0) | (x >= rows)).any()
    if confirm(outside, validate, f"{name} has an index out of range"):
        raise ValueError(
            f"{name} has values from {int(x.min())} to {int(x.max())}; they must be 0 .. {rows - 1}"
        )
    certain = x.device.type == "cpu" and validate is not False
    return x if certain else x.clamp(0, rows - 1)


def _sorted(keys: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The stable order of keys, and the keys in it."""
    if len(keys) < WIDE:
        return tuple(sort(keys.contiguous(), bits))  # type: ignore[return-value]
    ascending, order = torch.sort(keys, stable=True)
    return order, ascending


def _pointers(ascending: Tensor, nodes: int, dtype: torch.dtype) -> Tensor:
    """[nodes + 1]: where the entries of each node begin."""
    node = torch.arange(nodes + 1, device=ascending.device, dtype=ascending.dtype)
    return torch.searchsorted(ascending, node).to(dtype)


def _chosen(col: Tensor, there: Tensor, n_src: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """col and edge_id of the slots that there are. Devices do not read their number: unused slots follow,
    whose source is none."""
    if not len(col):
        return col.to(torch.int32), col.to(dtype)
    if there.device.type == "cpu":
        edge_id = torch.nonzero(there).flatten()
        return col[edge_id].to(torch.int32), edge_id.to(dtype)
    n = len(there)
    place = torch.where(there, torch.cumsum(there, 0) - 1, n)
    edge_id = torch.zeros(n + 1, dtype=torch.int64, device=col.device)
    edge_id = edge_id.scatter_(0, place, torch.arange(n, device=col.device))[:n]
    used = torch.arange(n, device=col.device) < there.sum()
    return torch.where(used, col[edge_id], n_src).to(torch.int32), edge_id.to(dtype)
