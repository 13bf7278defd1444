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


def forward(arguments: Arguments, device: torch.device) -> None:
    with torch.cuda.device(device):
        _C.cuda_attend_fwd((*arguments, torch.cuda.current_stream().cuda_stream))


def backward(arguments: Arguments, device: torch.device) -> None:
    with torch.cuda.device(device):
        workspace = torch.empty(_C.cuda_attend_bwd_workspace(arguments), dtype=torch.uint8, device=device)
        stream = torch.cuda.current_stream().cuda_stream
        _C.cuda_attend_bwd((*arguments, workspace.data_ptr(), stream))
