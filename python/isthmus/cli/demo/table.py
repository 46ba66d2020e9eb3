"""The closing table: one block of three lines for each system."""

from collections.abc import Sequence

from rich.box import HORIZONTALS
from rich.table import Table

from isthmus.cli.demo.train import ISTHMUS, PLAIN, Outcome, Side

HEADINGS = ("held-out score", "training step", "bottleneck", "saved for backward")


def lines(outcome: Outcome) -> list[list[str]]:
    """Numbers of Isthmus, numbers of plain PyTorch, and how they compare."""
    ours, theirs = outcome.isthmus, outcome.plain
    agreement = outcome.agreement
    verdict = "agree" if agreement.holds else "DISAGREE"
    return [
        _numbers(ours, outcome.system.unit),
        _numbers(theirs, outcome.system.unit),
        [
            f"{verdict} (±{agreement.noise:.2g})",
            _ratio(theirs.step / ours.step, "faster", "slower"),
            _ratio(theirs.bottleneck / ours.bottleneck, "faster", "slower"),
            _ratio(theirs.saved_bytes / ours.saved_bytes, "less", "more"),
        ],
    ]


def closing_table(outcomes: Sequence[Outcome]) -> Table:
    table = Table(box=HORIZONTALS, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    table.add_column()
    for heading in HEADINGS:
        table.add_column(heading, justify="right")
    for outcome in outcomes:
        ours, theirs, verdict = lines(outcome)
        table.add_row(outcome.system.name, ISTHMUS, *ours, style="cyan")
        table.add_row(outcome.system.score_name, PLAIN, *theirs, style="yellow")
        table.add_row("", "", *verdict, style="bold" if outcome.agreement.holds else "bold red")
        table.add_section()
    return table


def notes(runs: int) -> list[str]:
    """What the columns mean and how they were measured."""
    return [
        f"Held-out score: lower is better, mean of {runs} training runs from different seeds. Both "
        "sides start each run from the same weights and see the same batches; their noise "
        "differs. The scores agree when they differ by less than the number in brackets, which "
        "chance alone exceeds in 1 of 100 comparisons, judged by the spread between runs.",
        "Training step: median over all steps of forward, backward and optimizer. The sides take "
        "turns, on one thread, so both meet the same machine. Encoder, decoder and optimizer are the same.",
        "Bottleneck: median time of forward and backward of the part that differs.",
        "Saved for backward: bytes that autograd keeps for the backward of that part, seen by "
        "torch.autograd.graph.saved_tensors_hooks. Its inputs, parameters and buffers are in "
        "memory on both sides and are not counted.",
    ]


def _numbers(side: Side, unit: str) -> list[str]:
    return [
        f"{side.score:#.4g} {unit}",
        f"{side.step * 1e3:.2f} ms",
        f"{side.bottleneck * 1e3:.2f} ms",
        _size(side.saved_bytes),
    ]


def _size(count: float) -> str:
    for unit in ("B", "kB"):
        if count < 1000.0:
            return f"{count:.3g} {unit}"
        count /= 1000.0
    return f"{count:.3g} MB"


def _ratio(ratio: float, more: str, less: str) -> str:
    word, factor = (more, ratio) if ratio >= 1.0 else (less, 1.0 / ratio)
    if factor < 1.01:
        return "the same"
    return f"{factor:,.0f}× {word}" if factor >= 100.0 else f"{factor:.2f}× {word}"
