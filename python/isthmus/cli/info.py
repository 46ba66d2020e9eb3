"""`isthmus info`: what was built, and what of it this machine uses."""

import os
import platform
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import isthmus


def show() -> None:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts().items():
        table.add_row(name, value)
    Console().print(table)


def facts() -> dict[str, str]:
    """Name and value of everything worth quoting in a bug report or beside a timing."""
    build = isthmus.build_info()
    levels = ", ".join(
        level if level in build["isa_available"] else f"{level} (not on this CPU)" for level in build["isa_compiled"]
    )
    return {
        "isthmus": build["version"],
        "torch": f"{build['torch']}, built against {build['torch_built_against']}",
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "compiler": build["compiler"],
        "ISA compiled": levels,
        "ISA in use": build["isa"],
        "CUDA": build["cuda"],
        "CPU": f"{_cpu_name()}, {os.cpu_count()} cores, torch threads: {torch.get_num_threads()}",
    }


def _cpu_name() -> str:
    # platform.processor() is empty on most Linux systems.
    listing = Path("/proc/cpuinfo")
    if listing.exists():
        for line in listing.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
