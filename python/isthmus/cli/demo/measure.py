"""What the closing table says: time, memory kept for backward, and agreement within noise."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, variance

import torch
from scipy.stats import t as student
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from isthmus.cli.demo.systems import Part

CONFIDENCE = 0.99


@dataclass(frozen=True)
class Agreement:
    """Difference of two mean scores against what chance alone makes of it."""

    difference: float
    noise: float

    @property
    def holds(self) -> bool:
        return abs(self.difference) <= self.noise


def agreement(ours: Sequence[float], theirs: Sequence[float]) -> Agreement:
    """Compare equally many scores of two sides by the pooled t-interval of their difference."""
    runs = len(ours)
    spread = math.sqrt((variance(ours) + variance(theirs)) / runs)
    quantile = float(student.ppf(0.5 + 0.5 * CONFIDENCE, 2 * (runs - 1)))
    return Agreement(fmean(ours) - fmean(theirs), quantile * spread)


def saved_bytes(part: Part) -> int:
    """Bytes that autograd keeps for the backward of ``part``.

    Its input, parameters and buffers are in memory anyway and do not count; storage saved twice
    counts once.
    """
    given = _leaf(part.given)
    living = [given, *part.module.parameters(), *part.module.buffers()]
    exempt = {_address(tensor) for tensor in living}
    # Holding the storages keeps a freed address from being counted for another tensor.
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        if _address(tensor) not in exempt:
            kept[_address(tensor)] = tensor.untyped_storage()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        part.run(given)
    return sum(storage.nbytes() for storage in kept.values())


def seconds(part: Part) -> float:
    """Time of one forward and backward of ``part``."""
    given = _leaf(part.given)
    start = time.perf_counter()
    outputs = part.run(given)
    torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
    return time.perf_counter() - start


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.requires_grad)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
