"""The CUDA backend: launches of csrc/cuda on PyTorch's current stream.

What is proven, and how. The kernels' results, forward and backward, every option, against float64; their
memory accesses (AddressSanitizer, UndefinedBehaviorSanitizer), their synchronisation (ThreadSanitizer,
adversarial orders of threads) and the absence of bank conflicts in ldmatrix: by running the same sources on a
CPU, where each CUDA thread is a fiber (tests/cuda_host). Registers, spills and shared memory: by compiling
them for every architecture and comparing with tests/cuda_host/budgets.json. Not proven this way: the few
lines of PTX in csrc/cuda/simt.h, and speed; those need a GPU.
"""

from __future__ import annotations

import torch

from ._backends import _C

Arguments = tuple[int | float, ...]


def launch(name: str, arguments: Arguments, device: torch.device, workspace: bool = True) -> None:
    """Launch `_C.cuda_<name>`, with as many bytes of workspace as `_C.cuda_<name>_workspace` asks for."""
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream().cuda_stream
        if not workspace:
            getattr(_C, f"cuda_{name}")((*arguments, stream))
            return
        needed = getattr(_C, f"cuda_{name}_workspace")(arguments)
        scratch = torch.empty(needed, dtype=torch.uint8, device=device)
        getattr(_C, f"cuda_{name}")((*arguments, scratch.data_ptr(), stream))


def forward(arguments: Arguments, device: torch.device) -> None:
    launch("attend_fwd", arguments, device, workspace=False)


def backward(arguments: Arguments, device: torch.device) -> None:
    launch("attend_bwd", arguments, device)
