"""Reading a results file: one Row for each piece of work, with all its implementations."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

IMPLEMENTATIONS = ("plain", "compiled", "peer", "isthmus")


@dataclass(frozen=True)
class Machine:
    """What was measured on, with its two roofs."""

    name: str
    facts: dict[str, Any]

    def copy_rate(self, traffic: int) -> float:
        """Bytes per second of a copy that moves `traffic` bytes, from the sizes measured."""
        sizes, rates = zip(*((int(size), rate) for size, rate in self.facts["copy"].items()), strict=True)
        return float(np.exp(np.interp(np.log(traffic), np.log(sizes), np.log(rates))))

    def gemm_rate(self, dtype: str) -> float:
        """Floating-point operations per second of a matrix product."""
        return self.facts["gemm"][dtype]


@dataclass(frozen=True)
class Row:
    """One piece of work on one machine, in seconds."""

    machine: Machine
    info: dict[str, Any]
    median: dict[str, float]
    iqr: dict[str, float]

    @property
    def label(self) -> str:
        shape = " ".join(f"{axis}{size}" for axis, size in self.info["shape"].items())
        options = [self.info[key] for key in ("dtype", "estimator", "mode") if key in self.info]
        return " ".join([shape, *options])

    @property
    def strongest(self) -> float:
        return min(seconds for name, seconds in self.median.items() if name != "isthmus")

    @property
    def loses(self) -> bool:
        return self.median["isthmus"] > self.strongest

    @property
    def memory_roof(self) -> float:
        """Seconds that a copy of the floor traffic takes."""
        return self.info["bytes"] / self.machine.copy_rate(self.info["bytes"])

    @property
    def arithmetic_roof(self) -> float:
        """Seconds that a float32 matrix product of as many operations takes."""
        return self.info["flops"] / self.machine.gemm_rate("float32")

    @property
    def memory_bound(self) -> bool:
        return self.memory_roof >= self.arithmetic_roof


def read(path: Path) -> tuple[Machine, list[Row]]:
    """The machine of one results file, and its rows in the order in which they were measured."""
    content = json.loads(path.read_text())
    machine = Machine(path.stem, content["machine_info"])
    groups: dict[str, dict[str, Any]] = {}
    for entry in content["benchmarks"]:
        groups.setdefault(entry["group"], {})[entry["extra_info"]["implementation"]] = entry

    def times(entries: dict[str, Any], statistic: str) -> dict[str, float]:
        return {name: entry["stats"][statistic] for name, entry in entries.items()}

    return machine, [
        Row(
            machine,
            entries["isthmus"]["extra_info"],
            times(entries, "median"),
            times(entries, "iqr"),
        )
        for entries in groups.values()
    ]
