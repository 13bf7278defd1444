"""Keys of voxels: packed fields, one stable sort, runs of equal fields. Native on CPUs, PyTorch elsewhere.

A key is a sum of table entries, one table per column of the coordinates: field widths follow from sizes that
are known on the host, so nothing is read back from a device, and keys are injective.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._backends import _C

KEY_BITS = 63
ORDERS = {"bxyz": (1, 2, 3), "bzyx": (3, 2, 1)}


class Sorted(NamedTuple):
    """Rows in ascending order of their keys: `order` int32 [N], the rows; `keys` [N], sorted, int32 or
    int64."""

    order: Tensor
    keys: Tensor


class Runs(NamedTuple):
    """Runs of equal keys: `ptr` int32 [S + 1], where they begin, then N. On CPUs S is their number; elsewhere
    a bound of it, and the last runs are empty."""

    ptr: Tensor

    def lengths(self) -> Tensor:
        return self.ptr[1:] - self.ptr[:-1]


def bits_of(size: int) -> int:
    """Bits of a field that holds 0 .. size - 1."""
    return max(size - 1, 0).bit_length()


def native(*tensors: Tensor) -> bool:
    """Whether the native code takes these tensors."""
    plain = all(type(t) is Tensor and t.device.type == "cpu" for t in tensors)
    return plain and _C is not None and not torch.compiler.is_compiling()


def key_dtype(bits: int, what: str = "the key") -> torch.dtype:
    if bits > KEY_BITS:
        raise ValueError(f"{what} needs {bits} bits; it may have {KEY_BITS}")
    return torch.int32 if bits <= 31 else torch.int64


class Tables(NamedTuple):
    """What turns coordinates into keys: per column of the coordinates a table of its values."""

    columns: tuple[int, ...]
    sizes: tuple[int, ...]
    table: Tensor  # int64, one after the other
    bits: int


def make_tables(
    columns: Sequence[int], tables: Sequence[Tensor], bits: int, device: torch.device, what: str = "the key"
) -> Tables:
    key_dtype(bits, what)
    sizes = tuple(len(t) for t in tables)
    joined = torch.cat([t.to(torch.int64) for t in tables]) if tables else torch.zeros(0, dtype=torch.int64)
    return Tables(tuple(columns), sizes, joined.to(device), bits)


def pack(coords: Tensor, tables: Tables, names: Sequence[str], validate: bool | None) -> Tensor:
    """keys [N]; a coordinate outside its table raises (`validate`: see `confirm`) and is never looked up."""
    dtype = key_dtype(tables.bits)
    keys = torch.empty(len(coords), dtype=dtype, device=coords.device)
    if coords.stride(-1) != 1:
        coords = coords.contiguous()
    if native(coords, tables.table):
        sizes = (coords.element_size(), len(coords), coords.stride(0), tables.columns, tables.sizes)
        threads = torch.get_num_threads()
        wrong = _C.pack_keys(
            coords.data_ptr(), *sizes, tables.table.data_ptr(), keys.data_ptr(), keys.element_size(), threads
        )
        if wrong >= 0 and validate is not False:
            _raise_outside(coords, tables, names, wrong)
        return keys
    keys.zero_()
    outside = torch.zeros((), dtype=torch.bool, device=coords.device)
    begin = 0
    for column, size in zip(tables.columns, tables.sizes, strict=True):
        c = coords[:, column]
        wrong_here = (c < 0) | (c >= size)
        outside = outside | wrong_here.any()
        values = tables.table[begin : begin + size] if size else tables.table.new_zeros(1)
        looked_up = values.index_select(0, c.clamp(0, max(size - 1, 0)).long())
        keys += torch.where(wrong_here, 0, looked_up).to(dtype)
        begin += size
    if confirm(outside, validate, "a coordinate lies outside the grid or the batch"):
        first = torch.zeros(len(coords), dtype=torch.bool, device=coords.device)
        for column, size in zip(tables.columns, tables.sizes, strict=True):
            first |= (coords[:, column] < 0) | (coords[:, column] >= size)
        _raise_outside(coords, tables, names, int(torch.nonzero(first)[0]))
    return keys


def _raise_outside(coords: Tensor, tables: Tables, names: Sequence[str], row: int) -> None:
    for column, size, name in zip(tables.columns, tables.sizes, names, strict=True):
        value = int(coords[row, column])
        if not 0 <= value < size:
            raise ValueError(f"coords has {name} {value} in row {row}; it must be 0 <= {name} < {size}")


def confirm(wrong: Tensor, validate: bool | None, message: str) -> bool:
    """Whether the caller has to raise now. True: asks the device (one synchronisation). None, the default:
    asks CPUs, and leaves other devices an assertion that fails at their next synchronisation. False:
    never."""
    if validate is False:
        return False
    if validate is None and wrong.device.type != "cpu":
        torch._assert_async(~wrong, message)
        return False
    return bool(wrong)


def sort(keys: Tensor, bits: int) -> Sorted:
    """The stable order of keys [N] below 2**bits."""
    if not native(keys):
        ascending, order = torch.sort(keys, stable=True)
        return Sorted(order.to(torch.int32), ascending)
    order, ascending = torch.empty(len(keys), dtype=torch.int32), torch.empty_like(keys)
    pointers = (order.data_ptr(), ascending.data_ptr())
    _C.sort_keys(keys.data_ptr(), keys.element_size(), len(keys), bits, *pointers, torch.get_num_threads())
    return Sorted(order, ascending)


def runs(rows: Sorted, shift: int, bound: int, validate: bool | None, unique: bool) -> Runs:
    """The runs of keys that agree above their lowest `shift` bits, at most `bound`. With `unique`, two equal
    keys raise."""
    keys = rows.keys
    if native(keys):
        ptr = torch.empty(len(keys) + 1, dtype=torch.int32)
        count, equal = _C.run_starts(keys.data_ptr(), keys.element_size(), len(keys), shift, ptr.data_ptr())
        if unique and equal >= 0 and validate is not False:
            _raise_duplicate(rows, equal)
        return Runs(ptr[: count + 1])
    if unique and len(keys) > 1:
        equal_pairs = keys[1:] == keys[:-1]
        if confirm(equal_pairs.any(), validate, "coords has two equal rows"):
            _raise_duplicate(rows, int(torch.nonzero(equal_pairs)[-1]) + 1)
    upper = keys >> shift
    begins = torch.ones_like(keys, dtype=torch.bool)
    begins[1:] = upper[1:] != upper[:-1]
    return begun(begins, bound)


def begun(begins: Tensor, bound: int) -> Runs:
    """Runs that begin where `begins` [N] says (its first entry must)."""
    n = len(begins)
    bound = min(bound, n)
    if begins.device.type == "cpu":
        ptr = torch.nonzero(begins).flatten().to(torch.int32)
        return Runs(torch.cat([ptr, ptr.new_full((1,), n)]))
    run = torch.where(begins, torch.cumsum(begins, 0) - 1, bound + 1)
    ptr = torch.full((bound + 2,), n, dtype=torch.int32, device=begins.device)
    place = torch.arange(n, dtype=torch.int32, device=begins.device)
    return Runs(ptr.scatter_(0, run.clamp_max(bound + 1), place)[: bound + 1])


def _raise_duplicate(rows: Sorted, place: int) -> None:
    first, second = (int(rows.order[p]) for p in (place - 1, place))
    raise ValueError(
        f"coords has the same voxel in rows {first} and {second}; rows must be unique, or duplicates='keep' "
        "given"
    )


def exact_or_bound(count: Tensor, bound: int) -> int:
    """A number that CPUs know exactly and other devices, without a synchronisation, only bound."""
    return int(count) if count.device.type == "cpu" else bound


def expand(counts: Tensor, bound: int) -> tuple[Tensor, Tensor]:
    """Owner and place within its owner's items, int64 [T], of `counts[i]` items of owner i each. T is their
    number on CPUs; elsewhere `bound`, and items above their number belong to owner len(counts)."""
    ends = torch.cumsum(counts, 0)
    total = exact_or_bound(ends[-1], bound) if len(counts) else 0
    item = torch.arange(total, device=counts.device)
    owner = torch.searchsorted(ends, item, right=True)
    first = torch.cat([ends.new_zeros(1), ends])  # the items of owner i begin at first[i]
    return owner, item - first[owner]


def check_coords(coords: Any, grid: Any, batch_size: Any, order: Any, rank: int = 3) -> tuple[int, ...]:
    """Types and shapes; returns the columns of x, y, z."""
    if not isinstance(coords, Tensor):
        raise TypeError(f"coords is a {type(coords).__name__}; it must be an integer tensor [N, {1 + rank}]")
    if coords.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"coords is {coords.dtype}; it must be torch.int32 or torch.int64")
    if coords.dim() != 2 or coords.shape[1] != 1 + rank:
        raise ValueError(f"coords has shape {list(coords.shape)}; it must be [N, {1 + rank}], batch first")
    if len(coords) > 2**29 - 2:
        raise ValueError(f"coords has {len(coords)} rows; it may have {2**29 - 2}")
    if order not in ORDERS:
        raise ValueError(f"order is {order!r}; it must be one of {', '.join(map(repr, ORDERS))}")
    positive("grid", grid, rank)
    positive("batch_size", batch_size, 0, lowest=0)
    return ORDERS[order]


def positive(name: str, value: Any, rank: int, lowest: int = 1) -> None:
    """An int (rank 0) or a tuple of `rank` ints, each at least `lowest`."""
    entries = (value,) if rank == 0 else value
    shape = "an int" if rank == 0 else f"a tuple of {rank} ints"
    accepted = f"{shape} >= {lowest}"
    if not isinstance(entries, (tuple, list)) or len(entries) != max(rank, 1):
        raise TypeError(f"{name} is {value!r}; it must be {accepted}")
    if not all(isinstance(e, int) and not isinstance(e, bool) for e in entries):
        raise TypeError(f"{name} is {value!r}; it must be {accepted}")
    if not all(e >= lowest for e in entries):
        raise ValueError(f"{name} is {value!r}; it must be {accepted}")


@lru_cache(maxsize=256)
def batch_table(batch_size: int, shift: int) -> Tensor:
    return torch.arange(batch_size) << shift


def spread_bits(x: Tensor, stride: int, bits: int) -> Tensor:
    """Bit i of x moves to bit stride * i."""
    spread = torch.zeros_like(x)
    for i in range(bits):
        spread |= ((x >> i) & 1) << (stride * i)
    return spread
