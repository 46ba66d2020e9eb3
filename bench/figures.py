"""Roofline figures: what each implementation achieves, and what the machine can do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rows import IMPLEMENTATIONS, Row

STYLE = {
    "plain": ("o", "#9a9a9a"),
    "compiled": ("s", "#c8a24a"),
    "peer": ("^", "#4a7fb5"),
    "isthmus": ("D", "#b5354a"),
}


def draw(rows: list[Row], work: str, unit: str, roofs: Callable[[Axes], None], path: Path) -> None:
    """One line per row, one dot per implementation, at 1e9 units of `work` per second."""
    figure = Figure(figsize=(9, 1.2 + 0.24 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for name in IMPLEMENTATIONS:
        lines = [y for y, row in enumerate(rows) if name in row.median]
        rates = [rows[y].info[work] / rows[y].median[name] / 1e9 for y in lines]
        marker, color = STYLE[name]
        axes.plot(rates, lines, marker, color=color, label=name, markersize=5)
    roofs(axes)
    labels = [f"{row.info['operation']} {row.label}" for row in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel(unit)
    axes.grid(axis="y", linewidth=0.3)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=6, frameon=False, fontsize=8)
    figure.savefig(path, dpi=100)


def memory(rows: list[Row], path: Path) -> None:
    def roofs(axes: Axes) -> None:
        rates = [row.machine.copy_rate(row.info["bytes"]) / 1e9 for row in rows]
        lines = range(len(rows))
        axes.plot(rates, lines, "|", color="black", markersize=12, label="copy of as many bytes")

    draw(rows, "bytes", "GB/s of the least traffic", roofs, path)


def arithmetic(rows: list[Row], path: Path) -> None:
    def roofs(axes: Axes) -> None:
        for dtype, style in (("float32", "-"), ("bfloat16", ":")):
            rate = rows[0].machine.gemm_rate(dtype) / 1e9
            axes.axvline(rate, color="black", linestyle=style, linewidth=1, label=f"{dtype} GEMM")

    draw(rows, "flops", "GFLOP/s", roofs, path)
