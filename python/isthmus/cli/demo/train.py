"""Train one system on both sides, step by step in turn."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, median

import torch
from rich.progress import Progress
from torch import nn

from isthmus.cli.demo.measure import Agreement, agreement, saved_bytes, seconds
from isthmus.cli.demo.plain import twin
from isthmus.cli.demo.systems import System

ISTHMUS, PLAIN = "Isthmus", "PyTorch"
BOTTLENECK_RUNS = 40


@dataclass
class Side:
    """All runs of one side, in the order of the seeds."""

    models: list[nn.Module] = field(default_factory=list)
    losses: list[list[float]] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    bottleneck_seconds: list[float] = field(default_factory=list)
    saved_bytes: int = 0

    @property
    def score(self) -> float:
        return fmean(self.scores)

    @property
    def step(self) -> float:
        return median(self.step_seconds)

    @property
    def bottleneck(self) -> float:
        return median(self.bottleneck_seconds)


@dataclass
class Outcome:
    """A system and what became of it on both sides."""

    system: System
    sides: dict[str, Side]

    @property
    def isthmus(self) -> Side:
        return self.sides[ISTHMUS]

    @property
    def plain(self) -> Side:
        return self.sides[PLAIN]

    @property
    def agreement(self) -> Agreement:
        return agreement(self.isthmus.scores, self.plain.scores)


def train(system: System, steps: int, seeds: Sequence[int], progress: Progress) -> Outcome:
    """Train both sides from the same weights on the same batches, once for each seed.

    The sides take turns at every step, so whatever else the machine does slows both alike.
    """
    outcome = Outcome(system, {ISTHMUS: Side(), PLAIN: Side()})
    bars = {
        name: progress.add_task(f"{system.name:<20} {name}", total=steps * len(seeds), note="")
        for name in outcome.sides
    }
    for seed in seeds:
        torch.manual_seed(seed)
        model = system.build()
        models = {ISTHMUS: model, PLAIN: twin(model)}
        optimizers = {name: system.optimizer(model) for name, model in models.items()}
        for side in outcome.sides.values():
            side.losses.append([])
        batches = torch.Generator().manual_seed(seed)
        turns = list(outcome.sides.items())
        for _ in range(steps):
            rows = torch.randint(len(system.digits.train), (system.batch_size,), generator=batches)
            # Whoever goes second finds the batch in the cache: take turns at that, too.
            turns.reverse()
            for name, side in turns:
                start = time.perf_counter()
                loss = system.loss(models[name], rows)
                optimizers[name].zero_grad()
                loss.backward()
                optimizers[name].step()
                side.step_seconds.append(time.perf_counter() - start)
                side.losses[-1].append(loss.item())
                progress.update(bars[name], advance=1, note=f"loss {loss.item():.3g}")
        for name, side in outcome.sides.items():
            side.models.append(models[name])
            side.scores.append(system.score(models[name]))
    for name, side in outcome.sides.items():
        note = f"{side.score:#.4g} {system.unit}, {side.step * 1e3:.2f} ms/step"
        progress.update(bars[name], note=note)
    _measure_bottleneck(outcome)
    return outcome


def _measure_bottleneck(outcome: Outcome) -> None:
    rows = torch.arange(outcome.system.batch_size)
    parts = {name: list(outcome.system.parts(side.models[0], rows)) for name, side in outcome.sides.items()}
    for name, side in outcome.sides.items():
        side.saved_bytes = sum(saved_bytes(part) for part in parts[name])
    for _ in range(BOTTLENECK_RUNS):
        for name, side in outcome.sides.items():
            side.bottleneck_seconds.append(sum(seconds(part) for part in parts[name]))
