"""Subcommands. Each imports what it needs when it runs, so that `--help` is quick."""

from pathlib import Path
from typing import Annotated

import typer

from isthmus.cli.train.command import train

app = typer.Typer(
    name="isthmus",
    help="Kernels for the bottleneck of autoencoders and Bayesian networks.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(train, name="train")


@app.command()
def info() -> None:
    """Print versions, instruction sets and whether CUDA is there, or why not."""
    from isthmus.cli.info import show

    show()


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where to write the report.")] = Path("report.html"),
    quick: Annotated[bool, typer.Option("--quick", help="A few steps only: a smoke test.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the first run.")] = 0,
) -> None:
    """Train four models on handwritten digits, on Isthmus and on plain PyTorch, and compare."""
    from isthmus.cli.demo import run

    run(out, quick=quick, seed=seed)
