"""What the softmax families share on the way from a call to an op: the memory of earlier calls, and tensors
in the kernels' form.
"""

from __future__ import annotations

from collections.abc import Callable
from types import NoneType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _backends
from ._attend import accumulator


def draw_seed(dropout_p: float, device: torch.device) -> Tensor | None:
    """One element from the device's default generator, where there is something to drop."""
    return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device) if dropout_p > 0 else None


def key_bias(mask: Tensor | None, acc: torch.dtype) -> Tensor | None:
    """A key_padding_mask as [B, N] in the accumulation type, -inf where ignored."""
    if mask is None:
        return None
    mask = mask.reshape(mask.shape[0], -1)
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=acc, device=mask.device).masked_fill(mask, -torch.inf)
    return mask.to(acc)


class Settled(NamedTuple):
    """What was found for the first call of a signature."""

    backend: str
    geometry: str
    scale: float
    mask_value: float


class CallMemory:
    """Earlier calls that had no tensors but q, k, v and a bias: the checks and the choice of a backend depend
    on shapes, dtypes and geometry alone and are not repeated. `apply` is the family's op; `table(bias, q)`
    brings a bias to [h, T].
    """

    def __init__(
        self, apply: Callable[..., tuple[Tensor, ...]], table: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        self._apply, self._table = apply, table
        self._known: dict[Any, Settled] = {}
        _backends.on_change(self.clear)

    def clear(self) -> None:
        self._known.clear()

    def key(self, q: Any, k: Any, v: Any, bias: Any, geometry: Any, scale: Any, backend: Any) -> Any:
        """What decides the checks and the choice; None for a call that is not remembered. `geometry` is
        hashable and of checked types: False == 0, so equal is not enough."""
        if not (isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)):
            return None
        if torch.compiler.is_compiling() or torch.is_autocast_enabled(q.device.type):
            return None
        if not (
            isinstance(bias, (Tensor, NoneType))
            and type(scale) in (float, NoneType)
            and type(backend) in (str, NoneType)
        ):
            return None
        table = None if bias is None else (bias.shape, bias.dtype, bias.device)
        tensors = (q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, q.device, k.device, v.device)
        return (*tensors, table, geometry, scale, backend)

    def get(self, key: Any) -> Settled | None:
        return None if key is None else self._known.get(key)

    def put(self, key: Any, found: Settled) -> None:
        if key is None:
            return
        if len(self._known) >= 4096:
            self._known.clear()
        self._known[key] = found

    def run(
        self, found: Settled, q: Tensor, k: Tensor, v: Tensor, qkv: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """out and lse; the checks were passed before. qkv: the packed tensor whose views q, k and v are."""
        backend, text, scale, mask_value = found
        if bias is not None:
            bias = self._table(bias, q).to(accumulator(q.dtype)).contiguous()
        first = (q, k, v) if qkv is None else (qkv, None, None)
        options = (text, scale, mask_value, 0, "softmax", 0.0)
        out, lse = self._apply(backend, qkv is not None, options, *first, bias, *[None] * 7)
        return out, lse
