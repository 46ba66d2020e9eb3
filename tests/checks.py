"""What tests of several families measure: how near a result is, and how much memory a call takes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

_RESET = Path("/proc/self/clear_refs")

measures_memory = pytest.mark.skipif(not _RESET.exists(), reason="the peak can be reset on Linux only")


def extra_memory(call: Callable[[], object], warm_up: Callable[[], object] | None = None) -> int:
    """Bytes that the process grows by at the highest point of a call, when pools and stacks are there."""
    (warm_up or call)()
    _RESET.write_text("5")
    before = _peak_memory()
    call()
    return _peak_memory() - before


def _peak_memory() -> int:
    """Bytes at the highest point since the last reset."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def assert_near(actual: Tensor, expected: Tensor, factor: float = 1.0) -> None:
    """Equal to some roundings of the type of the result, relative to the largest entry."""
    unit = torch.finfo(actual.dtype).eps
    worst = (actual.double() - expected).abs().max().item() if expected.numel() else 0.0
    size = max(1.0, expected.abs().max().item() if expected.numel() else 0.0)
    assert actual.shape == expected.shape and worst <= 16 * factor * unit * size
