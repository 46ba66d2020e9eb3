"""What the numbers were measured on: names, versions, and the two measured roofs."""

from __future__ import annotations

import platform
import re
import subprocess
import time
from collections.abc import Callable
from importlib import metadata
from itertools import pairwise
from pathlib import Path

import torch

import isthmus

DEFAULT_THREADS = 2
PACKAGES = ("isthmus", "torch", "numpy", "faiss-cpu", "vector-quantize-pytorch")
COPY_BYTES = [2**power for power in range(15, 30, 2)]
GEMM_SIZE = 2048


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def name(threads: int) -> str:
    """Of the results file: the processor, the instruction set in use and the threads, not the host."""
    words = re.findall(r"[a-z0-9]+", re.sub(r"\(\w+\)", "", cpu_model().lower()))
    return "-".join([*words, isthmus.get_isa(), f"{threads}t"])


def commit() -> str:
    """The commit that was measured, with `-dirty` where the working tree differs from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    answer = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    return answer.stdout.strip() or "unknown"


def versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {package: metadata.version(package) for package in PACKAGES}


def facts() -> dict[str, object]:
    return {
        "cpu": cpu_model(),
        "isa": isthmus.get_isa(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "commit": commit(),
    }


def best_seconds(function: Callable[[], object]) -> float:
    """A roof is what the machine can do, so the best call of half a second counts."""
    ticks = [time.perf_counter()]
    while ticks[-1] < ticks[0] + 0.5:
        function()
        ticks.append(time.perf_counter())
    return min(end - start for start, end in pairwise(ticks))


def copy_rate(traffic: int) -> float:
    """Bytes read plus bytes written per second while torch copies, `traffic` bytes in all."""
    source, target = torch.ones(2, traffic // 2, dtype=torch.uint8)
    return traffic / best_seconds(lambda: target.copy_(source))


def gemm_rate(dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large square matrix product."""
    a, b = torch.randn(2, GEMM_SIZE, GEMM_SIZE).to(dtype)
    return 2 * GEMM_SIZE**3 / best_seconds(lambda: a @ b)


def roofs() -> dict[str, object]:
    return {
        "copy": {str(traffic): copy_rate(traffic) for traffic in COPY_BYTES},
        "gemm": {kind: gemm_rate(getattr(torch, kind)) for kind in ("float32", "bfloat16")},
    }
