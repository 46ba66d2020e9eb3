"""The loop of `isthmus train sae`: steps, log, checkpoints, and the page in the end."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from isthmus.cli.info import facts
from isthmus.cli.train import processes
from isthmus.cli.train.charts import number
from isthmus.cli.train.checkpoint import load_checkpoint, save_checkpoint, save_sae
from isthmus.cli.train.features import write_page
from isthmus.cli.train.settings import Settings
from isthmus.cli.train.trainer import Trainer

SETTINGS = "settings.json"
METRICS = "metrics.jsonl"
CHECKPOINT = "checkpoint.safetensors"
SAE = "sae.safetensors"
PAGE = "features.html"


def run(settings: Settings, out: Path, *, resume: bool, device: str, page_features: int) -> None:
    """Train, or go on with training, in the folder ``out``. Of several processes the first writes and reports."""
    console = Console(quiet=processes.rank() > 0)
    try:
        trainer = _prepare(settings, out, resume, device)
    except (FileNotFoundError, ModuleNotFoundError, ValueError) as error:
        raise SystemExit(str(error)) from None
    console.print(f"{trainer.shards} → [bold]{type(trainer.sae).__name__}[/bold], {number(settings.features)} features")
    if trainer.step:
        console.print(f"Resuming after step {trainer.step}")
    if processes.rank() > 0:
        while trainer.step < settings.steps:
            trainer.advance()
        return
    columns = (
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as progress, (out / METRICS).open("a", encoding="utf-8") as log:
        bar = progress.add_task("steps", total=settings.steps, completed=trainer.step, note="")
        try:
            _train(trainer, out, _Log(log), lambda note: progress.update(bar, completed=trainer.step, note=note))
        except ValueError as error:
            raise SystemExit(str(error)) from None
    save_sae(out / SAE, trainer)
    with console.status("Writing the feature page"):
        found = write_page(
            out / PAGE,
            trainer.sae,
            trainer.held_out,
            scale=trainer.scale,
            history=_lines(out / METRICS),
            title=f"Features of {trainer.shards.metadata.get('layer') or Path(settings.data).name}",
            features=page_features,
            facts=_facts(settings),
        )
    console.print(
        f"Explained variance [bold]{number(found.explained_variance)}[/bold] of {number(found.rows)} held-out rows, "
        f"{number(found.l0)} active features per row, {number(found.silent)} that never fire"
    )
    console.print(f"Feature page: [bold]{(out / PAGE).resolve()}")


def _prepare(settings: Settings, out: Path, resume: bool, device: str) -> Trainer:
    checkpoint = out / CHECKPOINT
    if (out / SETTINGS).exists():
        if not resume:
            raise ValueError(f"{out} already holds a run: go on with it by --resume, or choose another folder")
        settings.check_same(out / SETTINGS)
    trainer = Trainer(settings, device)
    # A run that was stopped before its first checkpoint starts again.
    if checkpoint.exists():
        load_checkpoint(checkpoint, trainer)
    # Before any process writes, all have seen what was there.
    processes.wait_for_all()
    if processes.rank() > 0:
        return trainer
    out.mkdir(parents=True, exist_ok=True)
    settings.save(out / SETTINGS)
    # Lines that were written after the checkpoint will be written again.
    kept = [line for line in _lines(out / METRICS) if line["step"] <= trainer.step and trainer.step > 0]
    (out / METRICS).write_text("".join(f"{json.dumps(line)}\n" for line in kept), encoding="utf-8")
    return trainer


def _train(trainer: Trainer, out: Path, log: _Log, show: Any) -> None:
    settings = trainer.settings
    started, first = time.perf_counter(), trainer.step
    while trainer.step < settings.steps:
        rows, output = trainer.advance()
        last = trainer.step == settings.steps
        if last or trainer.step % settings.log_every == 0:
            line = trainer.describe(rows, output)
            log.write(line)
            speed = (trainer.step - first) * settings.batch_size / (time.perf_counter() - started)
            show(f"loss {line['loss']:.4g} · explained {line['explained_variance']:.3f} · {speed:,.0f} rows/s")
        if last or trainer.step % settings.eval_every == 0:
            log.write(trainer.judge())
        if last or trainer.step % settings.checkpoint_every == 0:
            save_checkpoint(out / CHECKPOINT, trainer)


class _Log:
    """Lines of JSON, each in the file before the next step begins."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def write(self, line: dict[str, Any]) -> None:
        # JSON knows no NaN.
        finite = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in line.items()}
        self._file.write(json.dumps(finite) + "\n")
        self._file.flush()


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _facts(settings: Settings) -> dict[str, str]:
    machine = facts()
    told = {name.replace("_", " "): str(value) for name, value in vars(settings).items() if value is not None}
    return {**told, **{name: machine[name] for name in ("isthmus", "torch", "ISA in use", "CPU")}}
