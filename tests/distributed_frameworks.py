"""Cases of tests/test_distributed.py: PyTorch's own ways to spread a model."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from distributed_support import close, random
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from vicinal import (
    Windows,
    distributed,
    hash_attention,
    joint_attention,
    linear_attention,
    neighborhood_attention,
    windowed_attention,
    windowed_attention_qkvpacked,
)
from vicinal.nn import NeighborhoodAttention2D, WindowedAttention


@cache
def mesh() -> DeviceMesh:
    distributed.register_dtensor()
    return init_device_mesh("cpu", (dist.get_world_size(),))


def agrees(
    function: Callable[..., Any],
    tensors: dict[str, Tensor],
    shards: dict[str, int],
    result: int | None = None,
) -> None:
    """Outputs and gradients on DTensors, with the tensors of `shards` sharded on these dimensions and the
    others everywhere; result: the dimension on which the first output is sharded (None: PyTorch's choice)."""
    leaves = {n: t.clone().requires_grad_(t.is_floating_point()) for n, t in tensors.items()}
    spread = {}
    for n, t in tensors.items():
        placement = Shard(shards[n]) if n in shards else Replicate()
        spread[n] = distribute_tensor(t, mesh(), [placement]).requires_grad_(t.is_floating_point())
    whole, got = function(**leaves), function(**spread)
    whole, got = (x if isinstance(x, tuple) else (x,) for x in (whole, got))
    assert result is None or got[0].placements == (Shard(result),)
    for a, b in zip(whole, got, strict=True):
        close("output", b.full_tensor().detach(), a.detach())
    for outputs in (whole, got):
        sum(x.square().sum() for x in outputs).backward()
    for name, x in leaves.items():
        if x.grad is not None:
            grad = spread[name].grad
            assert isinstance(grad, DTensor)
            close(f"d{name}", grad.full_tensor(), x.grad)


def qkv(*space: int) -> dict[str, Tensor]:
    return {n: random(4, *space, 4, 6, seed=i) for i, n in enumerate("qkv")}


def on(tensors: dict[str, Tensor], dim: int) -> dict[str, int]:
    return dict.fromkeys(tensors, dim)


def case_dtensor_windowed() -> None:
    windows, grid = Windows(4, shift=2), qkv(8, 8)
    bias = {"bias": random(4, 16, 16, seed=9)}

    def call(**t: Any) -> Any:
        return windowed_attention(**t, windows=windows, return_lse=True)

    agrees(call, grid | bias, on(grid, 0), 0)
    agrees(call, grid | bias, on(grid, 3), 3)
    agrees(call, grid | bias, on(grid, 3) | {"bias": 0}, 3)
    agrees(call, grid, on(grid, 1))
    stripes = Windows(None, head_groups=((2, (-1, 2)), (2, (2, -1))))
    agrees(lambda **t: windowed_attention(**t, windows=stripes), grid, on(grid, 3))
    extra = {
        n: random(1, 3, 4, 6, seed=5 + i).expand(4, -1, -1, -1) for i, n in enumerate(("extra_k", "extra_v"))
    }
    agrees(call, grid | extra, on(grid, 0), 0)


def case_dtensor_packed() -> None:
    tensors = {"qkv": random(4, 8, 8, 3, 4, 6)}
    for dim, result in ((0, 0), (4, 3)):
        agrees(lambda qkv: windowed_attention_qkvpacked(qkv, 4), tensors, {"qkv": dim}, result)


def case_dtensor_neighborhood() -> None:
    grid, bias = qkv(7, 9), {"bias": random(4, 5, 5, seed=9)}
    for dim in (0, 3):
        agrees(lambda **t: neighborhood_attention(**t, kernel_size=3), grid | bias, on(grid, dim), dim)


def case_dtensor_sums() -> None:
    tokens = qkv(12)
    for dim in (0, 2):
        agrees(lambda **t: linear_attention(**t), tokens, on(tokens, dim), dim)
        agrees(
            lambda **t: linear_attention(**t, is_causal=True),
            tokens | {"decay": -random(4).abs()},
            on(tokens, dim),
            dim,
        )
    steps = tokens | {"decay": -random(4, 12, 4, seed=8).abs()}
    agrees(lambda **t: linear_attention(**t, is_causal=True, normalize=False), steps, on(steps, 2), 2)
    joint = {n: random(4, 10, 6, seed=i) for i, n in enumerate(("quad_q", "quad_k", "lin_q", "lin_k", "v"))}
    agrees(lambda **t: joint_attention(**t, group_size=4), joint, on(joint, 0), 0)


def case_dtensor_hash() -> None:
    tables = random(4, 25, 6, seed=2), random(4, 16, 25, seed=3), random(4, 25, seed=4)
    tensors = {"qk": random(4, 10, 4, 6), "v": random(4, 10, 4, 5, seed=1)}
    for dim in (0, 2):
        spread = [distribute_tensor(t, mesh(), [Replicate()]) for t in tables]

        def call(qk: Tensor, v: Tensor, spread: list[DTensor] = spread) -> Any:
            return hash_attention(qk, v, *(spread if isinstance(qk, DTensor) else tables))

        agrees(call, tensors, on(tensors, dim), dim)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = WindowedAttention(12, (4, 4), 2, shift_size=(2, 2))
        self.second = NeighborhoodAttention2D(12, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(x + self.first(x))


def _blocks() -> tuple[Block, Block]:
    torch.manual_seed(0)
    one = Block().double()
    two = Block().double()
    two.load_state_dict(one.state_dict())
    return one, two


def case_data_parallel() -> None:
    """Gradients are averaged over ranks, as those of one process over the whole batch."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    one, two = _blocks()
    x = random(2 * ranks, 8, 8, 12)
    one(x).square().mean().backward()
    parallel = DistributedDataParallel(two)  # its hooks live as long as it
    parallel(x[2 * rank : 2 * rank + 2]).square().mean().backward()
    for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        close(name, b.grad, a.grad)


def case_fully_sharded() -> None:
    ranks, rank = dist.get_world_size(), dist.get_rank()
    one, two = _blocks()
    x = random(2 * ranks, 8, 8, 12)
    one(x).square().mean().backward()
    for module in (two.first, two.second, two):
        fully_shard(module, mesh=mesh())
    two(x[2 * rank : 2 * rank + 2]).square().mean().backward()
    for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        assert a.grad is not None
        assert isinstance(b.grad, DTensor)
        close(name, b.grad.full_tensor(), a.grad)
