"""The value objects of segment attention: which query rows attend to which key rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False, repr=False)
class Segments:
    """Ranges of two lists of rows: the queries of segment s attend to the keys of segment s.

    Query slot i stands for row q_index[i] of q, key slot j for row k_index[j] of k and v. Segment s owns the
    query slots q_ptr[s] .. q_ptr[s + 1] - 1 and reads the key slots k_begin[s] .. k_end[s] - 1, which other
    segments may read too. Immutable, on the device of its tensors; made by the builders of
    `vicinal.segments`, and worth keeping: what the kernels need besides is built once, at the first use.

    Args:
        q_index: int32 [Mq], each row at most once. Rows in no segment get output 0 and lse -inf.
        k_index: int32 [Mk]; a row may stand at several slots.
        q_ptr: int32 [S + 1], ascending, from 0 to Mq. Empty segments are legal.
        k_begin: int32 [S].
        k_end: int32 [S].
        n_q: rows of q.
        n_k: rows of k and v.
        max_q: bound of the queries of a segment.
        max_k: bound of the keys of a segment.
        covers_q: whether every row of q is in a segment with keys.
        covers_k: whether every row of k stands at a slot that a segment with queries reads.
        repeats: whether a row of k may stand at several slots.
        apart: whether no slot is read by two segments.
        monotone: whether k_begin and k_end never decrease over the segments with queries and keys.
        kept: what was built from the others, such as the plan of the kernels.

    Example:
        >>> from vicinal import segments
        >>> segments.from_lengths(torch.tensor([3, 2]))
        Segments(2 segments, 5 queries, 5 keys, at most 3 x 3)
    """

    q_index: Tensor
    k_index: Tensor
    q_ptr: Tensor
    k_begin: Tensor
    k_end: Tensor
    n_q: int
    n_k: int
    max_q: int
    max_k: int
    covers_q: bool
    covers_k: bool
    repeats: bool
    apart: bool
    monotone: bool
    kept: dict[str, Any] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """S, with empty segments."""
        return self.k_begin.shape[0]

    @property
    def device(self) -> torch.device:
        return self.q_index.device

    def __repr__(self) -> str:
        sizes = f"{self.q_index.shape[0]} queries, {self.k_index.shape[0]} keys"
        return f"Segments({self.count} segments, {sizes}, at most {self.max_q} x {self.max_k})"

    def to(self, device: torch.device | str) -> Segments:
        """The same segments on another device."""
        names = ("q_index", "k_index", "q_ptr", "k_begin", "k_end")
        moved = {name: getattr(self, name).to(device) for name in names}
        if moved["q_index"].device == self.device:
            return self
        return replace(self, **moved, kept={})


def own_keys(index: Tensor, ptr: Tensor, rows: int, longest: int) -> Segments:
    """Segments whose keys are their queries. `index` holds each of `rows` rows at most once; `longest`: bound
    of a segment."""
    whole = index.shape[0] == rows
    longest = min(longest, index.shape[0])
    sizes = (rows, rows, longest, longest)
    return Segments(index, index, ptr, ptr[:-1], ptr[1:], *sizes, whole, whole, False, True, True)


class SegmentGroups:
    """Consecutive heads with segments of their own.

    Args:
        groups: (segments, heads) in the order of the heads.

    Example:
        >>> from vicinal import segments
        >>> a, b = segments.from_lengths(torch.tensor([2, 2])), segments.from_lengths(torch.tensor([4]))
        >>> segments.SegmentGroups([(a, 2), (b, 1)]).heads
        3
    """

    def __init__(self, groups: Sequence[tuple[Segments, int]]) -> None:
        made = tuple((s, n) for s, n in groups)
        if not made:
            raise ValueError("groups is empty; it must have at least one pair (segments, heads)")
        for s, n in made:
            if not isinstance(s, Segments):
                raise TypeError(f"groups has a {type(s).__name__}; an entry is (Segments, heads)")
            if not isinstance(n, int) or isinstance(n, bool) or n < 1:
                raise ValueError(f"groups has {n!r} heads; they must be an int >= 1")
            if (s.n_q, s.n_k, s.device) != (made[0][0].n_q, made[0][0].n_k, made[0][0].device):
                raise ValueError(
                    f"groups has segments of {s.n_q} and {s.n_k} rows on {s.device}; the first has "
                    f"{made[0][0].n_q} and {made[0][0].n_k} on {made[0][0].device}"
                )
        self.groups = made
        self.kept: dict[str, Any] = {}

    @property
    def heads(self) -> int:
        return sum(n for _, n in self.groups)

    def to(self, device: torch.device | str) -> SegmentGroups:
        """The same groups on another device."""
        return SegmentGroups([(s.to(device), n) for s, n in self.groups])

    def __repr__(self) -> str:
        return f"SegmentGroups({list(self.groups)!r})"


def _index(name: str, value: Any, rows: int, device: torch.device | None) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; it must be an integer tensor")
    if value.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} is {value.dtype}; it must be torch.int32 or torch.int64")
    if value.dim() != 1:
        raise ValueError(f"{name} has shape {list(value.shape)}; it must have one dimension")
    if device is not None and value.device != device:
        raise ValueError(f"{name} is on {value.device}; it must be on {device}")
    if rows >= 0 and value.numel() and (int(value.min()) < 0 or int(value.max()) >= rows):
        raise ValueError(
            f"{name} has values from {int(value.min())} to {int(value.max())}; "
            f"they must be 0 <= value < {rows}"
        )
    return value.to(torch.int32).contiguous()


def from_arrays(
    q_index: Tensor,
    q_ptr: Tensor,
    k_index: Tensor | None = None,
    k_begin: Tensor | None = None,
    k_end: Tensor | None = None,
    *,
    n_q: int,
    n_k: int | None = None,
) -> Segments:
    """Segments from their arrays, all of which are checked (one synchronisation).

    Args:
        q_index: int [Mq], rows of q, each at most once.
        q_ptr: int [S + 1], ascending from 0 to Mq.
        k_index: int [Mk], rows of k, possibly repeated. Default: q_index.
        k_begin: int [S], with k_end: the key slots of each segment. Default: its query slots.
        k_end: int [S].
        n_q: rows of q.
        n_k: rows of k. Default: n_q.

    Returns:
        The segments.

    Raises:
        TypeError, ValueError: names the array, what is in it and what may be.
    """
    n_k = n_q if n_k is None else n_k
    q = _index("q_index", q_index, n_q, None)
    ptr = _index("q_ptr", q_ptr, len(q) + 1, q.device)
    k = q if k_index is None else _index("k_index", k_index, n_k, q.device)
    if len(torch.unique(q)) != len(q):
        raise ValueError("q_index has a row twice; each row may be there once")
    if not len(ptr) or int(ptr[0]) != 0 or int(ptr[-1]) != len(q) or bool((ptr[1:] < ptr[:-1]).any()):
        raise ValueError(f"q_ptr must ascend from 0 to the {len(q)} entries of q_index")
    if (k_begin is None) != (k_end is None):
        raise ValueError("k_begin and k_end must be given together")
    begin = ptr[:-1] if k_begin is None else _index("k_begin", k_begin, len(k) + 1, q.device)
    end = ptr[1:] if k_end is None else _index("k_end", k_end, len(k) + 1, q.device)
    for name, x in (("k_begin", begin), ("k_end", end)):
        if len(x) != len(ptr) - 1:
            raise ValueError(f"{name} has {len(x)} entries; there are {len(ptr) - 1} segments")
    if bool((end < begin).any()):
        raise ValueError("k_end is below k_begin in some segment")
    return derived(q, k, ptr, begin, end, n_q, n_k)


def derived(
    q_index: Tensor, k_index: Tensor, ptr: Tensor, begin: Tensor, end: Tensor, n_q: int, n_k: int
) -> Segments:
    """Segments whose properties are read from the arrays (a synchronisation on devices)."""
    used = (ptr[1:] > ptr[:-1]) & (end > begin)
    b, e = begin[used].long(), end[used].long()
    monotone = bool((b[1:] >= b[:-1]).all() & (e[1:] >= e[:-1]).all())
    repeats = len(torch.unique(k_index)) != len(k_index)
    first, last = torch.sort(b)[0], torch.sort(e)[0]
    apart = bool((first[1:] >= last[:-1]).all())
    read = torch.zeros(len(k_index) + 1, dtype=torch.int32, device=b.device)
    ones = torch.ones_like(b, dtype=torch.int32)
    read = torch.cumsum(read.index_add_(0, b, ones).index_add_(0, e, -ones), 0)[:-1] > 0
    covers_k = len(torch.unique(k_index[read])) == n_k
    most_q, most_k = (int(x.max()) if len(x) else 0 for x in (ptr[1:] - ptr[:-1], end - begin))
    covers_q = int((ptr[1:] - ptr[:-1])[used].sum()) == n_q
    traits = (covers_q, covers_k, repeats, apart, monotone)
    return Segments(q_index, k_index, ptr, begin, end, n_q, n_k, most_q, most_k, *traits)
