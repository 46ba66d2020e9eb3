"""What modules need of the other ranks of a distributed training."""

from __future__ import annotations

import torch
from torch import Tensor
from torch import distributed as dist


def has_ranks() -> bool:
    """Whether ``torch.distributed`` is initialised."""
    return dist.is_available() and dist.is_initialized()


def all_reduce(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Sums over all ranks, by one collective."""
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return tuple(part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True))
