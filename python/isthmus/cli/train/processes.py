"""Training by several processes, as torchrun starts them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import distributed as dist

from isthmus.nn._ranks import has_ranks


@contextmanager
def joined(device: str) -> Iterator[str]:
    """Join the other processes, if torchrun started this one; gives the device that is this one's."""
    if has_ranks() or "WORLD_SIZE" not in os.environ:
        yield device
        return
    dist.init_process_group()
    try:
        yield f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" else device
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """The number of this process; the first, 0, writes files and talks."""
    return dist.get_rank() if has_ranks() else 0


def count() -> int:
    """How many processes train."""
    return dist.get_world_size() if has_ranks() else 1


def average_gradients(parameters: Iterator[torch.nn.Parameter]) -> None:
    """Replace gradients by their means over all processes."""
    for parameter in parameters if has_ranks() else ():
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad.div_(count())


def wait_for_all() -> None:
    """Return when all processes have come here."""
    if has_ranks():
        dist.barrier()
