"""Turns bench/results/*.json into docs/performance.md and its figures: `python bench/report.py`."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

import figures
import rows
from rows import Machine, Row

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
PAGE = ROOT / "docs" / "performance.md"
IMAGES = ROOT / "docs" / "images"

METHOD = """\
# Performance

Written by `python bench/report.py` from `bench/results/`; `make bench` measures and rewrites it.

## How to read the tables

- **plain** is eager PyTorch as people write it, **compiled** is `torch.compile` of the same
  function, **peer** is the strongest other library or PyTorch function known for the work, and
  **isthmus** is the public function or module of this library, with the drawing of a random key
  where one is needed.
- Times are medians over rounds, with the interquartile range in brackets; ~ marks a range above a
  quarter of the median, a time measured on a busy machine and not to be trusted. Ratios divide
  medians: 2× means that isthmus takes half the time. *Strongest* is the fastest of the other
  three. Where isthmus is slower than that, the row says **loses**.
- *fwd* runs without autograd. *fwd+bwd* adds the gradients of all outputs in all floating-point
  inputs.
- *Of roof* is the time that the measured roofs allow, divided by the time taken. The memory roof is
  the rate at which torch copies as many bytes as the work must move: inputs read once and outputs
  written once; in the backward pass inputs and incoming gradients read once more and gradients
  written. The arithmetic roof is a float32 matrix product. A row is held against the slower of
  the two. More than 100 % means that a cheaper way was found, such as screening candidates in
  bfloat16 and scoring only the survivors in float32.

## How it was measured

- The implementations of a row take turns: each round times every one of them once, in an order
  that changes, so that a slow moment of the machine slows them all. A turn is one untimed call and
  then as many calls as fill 2 ms. Caches hold what the row itself left there, threads are awake.
- Before a turn the process sleeps for 20 ms. OpenMP workers of the previous implementation spin
  before they sleep, and would keep the cores from the next one.
- Before anything is timed, the results must agree: outputs and gradients in relative norm, to 1e-4
  in float32 and 3e-2 in bfloat16; random outputs in mean and variance, to six standard errors.
- Inputs are standard normal. For a nearest-code search that is hard: no code is clearly the best.
- `torch.compile` runs with `fullgraph=True, dynamic=False`; compilation is not timed. Outputs are
  allocated inside the timed call, as in use. All implementations have the same number of threads.
- Fresh memory costs page faults. isthmus asks for huge pages for gradients of 32 MB and more; torch
  does for all its tensors if `THP_MEM_ALLOC_ENABLE=1` is set, which it was not. Part of the lead
  over the gradients of large dictionaries is this.
"""


def number(value: float) -> str:
    """Three significant digits, never in exponent form."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def duration(median: float, iqr: float) -> str:
    unit, scale = ("s", 1) if median >= 1 else ("ms", 1e3) if median >= 1e-3 else ("µs", 1e6)
    doubt = "~" if iqr > median / 4 else ""
    return f"{doubt}{number(median * scale)} {unit} ({number(iqr * scale)})"


def line(row: Row) -> str:
    ours = row.median["isthmus"]
    against_strongest = f"{number(row.strongest / ours)}×"
    cells = [
        row.label,
        *(duration(row.median[name], row.iqr[name]) if name in row.median else "–" for name in rows.IMPLEMENTATIONS),
        f"{number(row.median['plain'] / ours)}×",
        f"**loses {against_strongest}**" if row.loses else against_strongest,
        f"{number(100 * max(row.memory_roof, row.arithmetic_roof) / ours)} %",
    ]
    return f"| {' | '.join(cells)} |"


def table(operation: str, members: list[Row]) -> str:
    peer = members[0].info["peer"]
    times = ["plain", "compiled", f"peer: {peer}" if peer else "peer", "isthmus"]
    heads = ["work", *times, "against plain", "against strongest", "of roof"]
    lines = [f"| {' | '.join(heads)} |", "|---" + "|--:" * (len(heads) - 1) + "|"]
    return "\n".join([f"### {operation}", "", *lines, *map(line, members), ""])


def verdict(members: list[Row]) -> str:
    lost = [row for row in members if row.loses]
    won = len(members) - len(lost)
    items = [f"- {row.info['operation']} {row.label}" for row in lost]
    losses = [f"It **loses** in {len(lost)}:", "", *items] if lost else []
    return "\n".join([f"isthmus is the fastest in {won} of {len(members)} rows.", *losses, ""])


def conditions(machine: Machine) -> str:
    facts = machine.facts
    versions = ", ".join(f"{package} {version}" for package, version in facts["versions"].items())
    copies = ", ".join(
        f"{number(rate / 1e9)} at {number(int(size) / 2**20)} MiB" for size, rate in facts["copy"].items()
    )
    products = ", ".join(f"{number(rate / 1e9)} in {dtype}" for dtype, rate in facts["gemm"].items())
    return f"""\
## {facts["cpu"]}, {facts["isa"]}, {facts["threads"]} threads

- Commit {facts["commit"]}; {versions}.
- Copy, GB/s read and written: {copies}.
- Matrix product, GFLOP/s: {products}.
"""


def drawings(machine: Machine, members: list[Row]) -> str:
    links = []
    for title, draw, memory_bound in (("memory", figures.memory, True), ("arithmetic", figures.arithmetic, False)):
        chosen = [row for row in members if row.memory_bound == memory_bound]
        if chosen:  # a run of a few rows may have none of one kind
            path = IMAGES / f"{machine.name}-{title}.png"
            draw(chosen, path)
            links.append(f"![{title} roof]({path.relative_to(PAGE.parent)})\n")
    return "\n".join(links)


def section(machine: Machine, members: list[Row]) -> str:
    """One machine: what it is, the verdict, the tables, the figures."""
    operations = groupby(members, key=lambda row: row.info["operation"])
    tables = [table(operation, list(group)) for operation, group in operations]
    return "\n".join([conditions(machine), verdict(members), *tables, drawings(machine, members)])


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    sections = [section(*rows.read(path)) for path in sorted(RESULTS.glob("*.json"))]
    PAGE.write_text("\n".join([METHOD, *sections]))


if __name__ == "__main__":
    main()
