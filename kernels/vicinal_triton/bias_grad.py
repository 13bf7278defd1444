"""From sums of ds per pair of slots to the gradient of the bias table, in a fixed order.

Plan rows whose slots have the same codes share their bias indices: such rows are one *class* and their ds
may be summed pair by pair before any index is looked at. A windowed grid is one class. Per class, the pairs
are sorted by table entry once (cached with the plan), and one program sums the pairs of a few entries: each
entry has one owner.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from . import launch

BLOCK_T, BLOCK_M = 32, 32


@dataclass(frozen=True)
class RowClass:
    """`rows` int32 [n]: plan rows; `pairs` int32 [P]: q slot * k_stride + key slot, by table entry; `first`
    int32 [T + 1]: where an entry's pairs begin; `most`: most pairs of an entry."""

    rows: Tensor
    pairs: Tensor
    first: Tensor
    most: int


_classes: WeakIdKeyDictionary = WeakIdKeyDictionary()


def row_classes(axes: Tensor, rows: Tensor, appended: int, table: int, k_stride: int) -> list[RowClass]:
    """The classes of a plan for a table of `table` entries, the last `appended` of which belong to appended
    rows. Computed once per plan (the tables go to the host once)."""
    known = _classes.setdefault(rows, {})
    key = (appended, table, k_stride)
    if key not in known:
        known[key] = _build_classes(
            axes.cpu().long(), rows.cpu().long(), appended, table, k_stride, rows.device
        )
    return known[key]


def _build_classes(
    axes: Tensor, rows: Tensor, appended: int, table: int, k_stride: int, device: torch.device
) -> list[RowClass]:
    codes = axes[:, 2].tolist()
    lists: dict[tuple[int, int], tuple[int, ...]] = {}  # codes of the axis list (begin, extent)

    def axis_codes(begin: int, extent: int) -> tuple[int, ...]:
        if (begin, extent) not in lists:
            lists[begin, extent] = tuple(codes[begin : begin + extent])
        return lists[begin, extent]

    members: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    for i, row in enumerate(rows[:, :12].tolist()):
        name = tuple(axis_codes(row[side + a], row[side + a + 3]) for side in (0, 6) for a in range(3))
        members.setdefault(name, []).append(i)
    return [_row_class(name, rows, appended, table, k_stride, device) for name, rows in members.items()]


def _row_class(
    name: tuple[tuple[int, ...], ...],
    rows: list[int],
    appended: int,
    table: int,
    k_stride: int,
    device: torch.device,
) -> RowClass:
    q_code, k_code = _slot_codes(name[:3]), _slot_codes(name[3:])
    index = q_code[:, None] + k_code[None, :]
    if appended:
        index = torch.cat([index, torch.arange(table - appended, table).expand(len(q_code), appended)], 1)
    pair = torch.arange(len(q_code))[:, None] * k_stride + torch.arange(index.shape[1])
    order = torch.argsort(index.flatten(), stable=True)
    counts = torch.bincount(index.flatten(), minlength=table)
    first = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)]).int()
    pairs = pair.flatten()[order].int()
    listed = torch.tensor(rows, dtype=torch.int32)
    return RowClass(listed.to(device), pairs.to(device), first.to(device), int(counts.max()))


def _slot_codes(axis_codes: tuple[tuple[int, ...], ...]) -> Tensor:
    c0, c1, c2 = (torch.tensor(c) for c in axis_codes)
    return (c0[:, None, None] + c1[:, None] + c2).flatten()


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


def add_bias_grad(sums: Tensor, row_class: RowClass, dbias: Tensor, add: bool) -> None:
    """sums [H, q slots, k_stride] of one class into dbias [H, T]."""
    table = dbias.shape[1]
    args = {
        "Sums": sums, "Pairs": row_class.pairs, "First": row_class.first, "DBias": dbias,
        "stride_h": sums.stride(0), "out_stride_h": dbias.stride(0), "table": table, "most": row_class.most,
        "ADD": add, "BLOCK_T": BLOCK_T, "BLOCK_M": BLOCK_M,
    }  # fmt: skip
    launch.run(bias_grad_kernel, (triton.cdiv(table, BLOCK_T), sums.shape[0]), args, warps=4)
