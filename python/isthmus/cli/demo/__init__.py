"""`isthmus demo`: four models on real digits, each on Isthmus and on plain PyTorch.

- digits: the data
- systems: what is built, what it learns, how it is judged
- plain: the bottlenecks again, in plain PyTorch
- train, measure: both sides step by step; time, memory and agreement
- table: the closing table
- pictures, sections, report: the page
"""

from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column

from isthmus.cli.demo.digits import load
from isthmus.cli.demo.report import write
from isthmus.cli.demo.systems import SYSTEMS
from isthmus.cli.demo.table import closing_table, notes
from isthmus.cli.demo.train import train
from isthmus.cli.info import facts

RUNS = 3
QUICK_STEPS = 20


def run(out: Path, *, quick: bool, seed: int) -> None:
    """Train everything, print the table, write the report."""
    if not out.parent.is_dir():
        raise SystemExit(f"Cannot write {out}: {out.parent} is not a directory.")
    # Threads of one process wait for each other at every op: with any other work on the machine two are slower than
    # one, and what would be timed is the scheduler.
    torch.set_num_threads(1)
    console = Console()
    machine = facts()
    console.print(f"Isthmus {machine['isthmus']} ({machine['ISA in use']}), {machine['CPU']}\n")
    digits = load()
    seeds = range(seed, seed + RUNS)
    columns = (
        TextColumn("{task.description}", table_column=Column(no_wrap=True)),
        BarColumn(bar_width=20),
        TimeElapsedColumn(),
        TextColumn("[dim]{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as progress:
        outcomes = [
            train(system, QUICK_STEPS if quick else system.steps, seeds, progress)
            for system in (make(digits) for make in SYSTEMS)
        ]
    console.print()
    console.print(closing_table(outcomes))
    for note in notes(len(seeds)):
        console.print(f"[dim]{note}")
    with console.status("Drawing the report"):
        write(out, outcomes, digits, machine)
    console.print(f"\nReport: [bold]{out.resolve()}")
