"""From sums of ds per pair of slots to the gradient of the bias table, in a fixed order.

Plan rows whose pairs of slots have the same bias indices are one *class*: their ds may be summed pair by pair
before any index is looked at. A windowed grid is one class; a neighborhood has one for the inside and a few
for each border. A program sums over a chunk of the rows of one class; then the chunks of each class are added
up, and last, one program adds the pairs of a few table entries, sorted by entry once (cached with the plan):
each entry has one owner.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from . import launch

BLOCK_T, BLOCK_M, BLOCK_P = 32, 32, 1024
MOST_SUMS = 2**26  # elements of the sums of the classes of one launch


@dataclass(frozen=True)
class Classes:
    """Some classes of a plan. `rows` int32: their plan rows, class by class, `counts` of each; `pairs` int32
    [P]: (class * q side + q slot) * k side + key slot, by table entry; `first` int32 [T + 1]: where an
    entry's pairs begin; `most`: most pairs of an entry."""

    rows: Tensor
    counts: list[int]
    pairs: Tensor
    first: Tensor
    most: int
    known: dict[tuple[int, int], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def chunks(self, samples: int, wanted: int) -> tuple[Tensor, Tensor]:
        """Chunks int32 [C, 4] (first, listed, begin, end: see BiasGrad), about as many as wanted, and where
        those of each class begin, int32 [classes + 1]."""
        if (samples, wanted) not in self.known:
            self.known[samples, wanted] = _chunks(self.counts, samples, wanted, self.rows.device)
        return self.known[samples, wanted]


_known: WeakIdKeyDictionary = WeakIdKeyDictionary()


def row_classes(
    axes: Tensor, rows: Tensor, appended: int, table: int, heads: int, q_side: int, k_side: int
) -> list[Classes]:
    """All classes of a plan, in launches whose sums [heads, classes, q_side, k_side] are not too large, for a
    table of `table` entries, the last `appended` of which belong to appended rows. Computed once per plan
    (its tables go to the host once)."""
    known = _known.setdefault(rows, {})
    key = (appended, table, heads, q_side, k_side)
    if key not in known:
        most = max(1, MOST_SUMS // (heads * q_side * k_side))
        known[key] = list(_build(axes.cpu().long(), rows.cpu().long(), appended, table, q_side, k_side, most,
                                 rows.device))  # fmt: skip
    return known[key]


def _build(
    axes: Tensor, rows: Tensor, appended: int, table: int, q_side: int, k_side: int, most: int,
    device: torch.device,
) -> Iterator[Classes]:  # fmt: skip
    codes = axes[:, 2]
    of_row, members = torch.unique(_row_names(codes, rows), dim=0, return_inverse=True)
    order = torch.argsort(members, stable=True)
    counts = torch.bincount(members, minlength=len(of_row)).tolist()
    begins = [0, *accumulate(counts)]
    for c in range(0, len(counts), most):
        group = range(c, min(c + most, len(counts)))
        listed = order[begins[group.start] : begins[group.stop]]
        pairs, entries = [], []
        for at, i in enumerate(group):
            pair, entry = _pairs(codes, rows[order[begins[i]]], appended, table, k_side)
            pairs.append(pair + at * q_side * k_side)
            entries.append(entry)
        entry = torch.cat(entries)
        by_entry = torch.argsort(entry, stable=True)
        sizes = torch.bincount(entry, minlength=table)
        first = torch.cat([torch.zeros(1, dtype=torch.long), sizes.cumsum(0)]).int()
        yield Classes(
            listed.int().to(device), counts[group.start : group.stop],
            torch.cat(pairs)[by_entry].int().to(device), first.to(device), int(sizes.max()),
        )  # fmt: skip


def _row_names(codes: Tensor, rows: Tensor) -> Tensor:
    """int64 [R, 3]: equal for rows whose pairs have the same bias indices, axis by axis."""
    names = []
    for a in range(3):
        boxes, at = torch.unique(rows[:, [a, a + 3, a + 6, a + 9]], dim=0, return_inverse=True)
        numbers: dict[tuple[int, ...], int] = {}
        of_box = []
        for q_begin, q_extent, k_begin, k_extent in boxes.tolist():
            q, k = codes[q_begin : q_begin + q_extent], codes[k_begin : k_begin + k_extent]
            name = (q_extent, int(q[0] + k[0]), *(q - q[0]).tolist(), *(k - k[0]).tolist())
            of_box.append(numbers.setdefault(name, len(numbers)))
        names.append(torch.tensor(of_box)[at])
    return torch.stack(names, 1)


def _pairs(codes: Tensor, row: Tensor, appended: int, table: int, k_side: int) -> tuple[Tensor, Tensor]:
    """q slot * k_side + key slot of the pairs of a row that have a table entry, and the entry."""
    q_code, k_code = (_slot_codes(codes, row[side : side + 6].tolist()) for side in (0, 6))
    index = q_code[:, None] + k_code[None, :]
    if appended:
        index = torch.cat([index, torch.arange(table - appended, table).expand(len(q_code), appended)], 1)
    pair = torch.arange(len(q_code))[:, None] * k_side + torch.arange(index.shape[1])
    inside = (index >= 0) & (index < table)  # other pairs are never visible
    return pair[inside], index[inside]


def _slot_codes(codes: Tensor, box: list[int]) -> Tensor:
    c0, c1, c2 = (codes[box[a] : box[a] + box[a + 3]] for a in range(3))
    return (c0[:, None, None] + c1[:, None] + c2).flatten()


def _chunks(counts: list[int], samples: int, wanted: int, device: torch.device) -> tuple[Tensor, Tensor]:
    size = -(-samples * sum(counts) // max(1, wanted))
    chunks, begins, first = [], [0], 0
    for listed in counts:
        items = samples * listed
        each = -(-items // -(-items // size))
        chunks += [(first, listed, i, min(i + each, items)) for i in range(0, items, each)]
        begins.append(len(chunks))
        first += listed
    return (torch.tensor(chunks, dtype=torch.int32).to(device),
            torch.tensor(begins, dtype=torch.int32).to(device))  # fmt: skip


@triton.jit(do_not_specialize=["pairs", "heads"])
def class_sums_kernel(
    Chunks, First, Sums, pairs, heads, stride_c, stride_h, BLOCK_P: tl.constexpr
):  # fmt: skip
    """Sums[h, class, pair] = sum of Chunks[chunk, h, pair] over the chunks of a class, in their order."""
    tiles = tl.cdiv(pairs, BLOCK_P)
    at = tl.program_id(0).to(tl.int64)
    pair = at % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    h = at // tiles % heads
    row_class = at // tiles // heads
    total = tl.zeros((BLOCK_P,), Sums.dtype.element_ty)
    for chunk in range(tl.load(First + row_class), tl.load(First + row_class + 1)):
        from_chunk = Chunks + (h * 0 + chunk) * stride_c + h * pairs  # in 64 bits
        total += tl.load(from_chunk + pair, mask=pair < pairs, other=0.0)
    tl.store(Sums + h * stride_h + row_class * pairs + pair, total, mask=pair < pairs)


@triton.jit(do_not_specialize=["table", "most"])
def bias_grad_kernel(
    Sums, Pairs, First, DBias, stride_h, out_stride_h, table, most, ADD: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """DBias[h, t] (+)= sum of Sums[h, pair] over the pairs of entry t. Programs: (t tile, head)."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    h = tl.program_id(1).to(tl.int64)
    begin = tl.load(First + t, mask=t < table, other=0)
    end = tl.load(First + t + 1, mask=t < table, other=0)
    total = tl.zeros((BLOCK_T,), DBias.dtype.element_ty)
    for m in range(0, most, BLOCK_M):
        at = begin[:, None] + m + tl.arange(0, BLOCK_M)[None, :]
        pair = tl.load(Pairs + at, mask=at < end[:, None], other=0)
        total += tl.sum(tl.load(Sums + h * stride_h + pair, mask=at < end[:, None], other=0.0), 1)
    to = DBias + h * out_stride_h + t
    if ADD:
        total += tl.load(to, mask=t < table, other=0.0)
    tl.store(to, total, mask=t < table)


def add_bias_grad(chunks: Tensor, first: Tensor, classes: Classes, dbias: Tensor, add: bool) -> None:
    """Sums of ds over chunks, [chunks, H, q side, k side], those of each class from `first` on, into dbias
    [H, T]."""
    heads, table = dbias.shape
    pairs = chunks.shape[2] * chunks.shape[3]
    sums = chunks.new_empty(heads, len(classes.counts), pairs)
    args = {
        "Chunks": chunks, "First": first, "Sums": sums, "pairs": pairs, "heads": heads,
        "stride_c": chunks.stride(0), "stride_h": sums.stride(0), "BLOCK_P": BLOCK_P,
    }  # fmt: skip
    launch.run(class_sums_kernel, (triton.cdiv(pairs, BLOCK_P) * heads * len(classes.counts),), args, warps=4)
    args = {
        "Sums": sums, "Pairs": classes.pairs, "First": classes.first, "DBias": dbias,
        "stride_h": sums.stride(0), "out_stride_h": dbias.stride(0), "table": table, "most": classes.most,
        "ADD": add, "BLOCK_T": BLOCK_T, "BLOCK_M": BLOCK_M,
    }  # fmt: skip
    launch.run(bias_grad_kernel, (triton.cdiv(table, BLOCK_T), heads), args, warps=4)
