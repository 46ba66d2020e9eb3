"""One training run: its shards, its autoencoder, its optimizer, and one step of it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from isthmus.cli.train import processes
from isthmus.cli.train.evaluate import evaluate
from isthmus.cli.train.settings import Settings
from isthmus.data import ActivationLoader, ActivationShards
from isthmus.optim import RowAdam

# Rows that the scale is fitted to.
SCALED_ROWS = 16_384


class Trainer:
    """What changes from step to step, and what it changes by.

    Activations are multiplied by one number, ``scale``, so that their mean squared norm is D: learning rates and
    penalties then mean the same for every layer.

    Several processes start alike; each draws its part of a batch from its part of the shards, and all take the same
    step by the mean of their gradients. Each computes its losses from its own rows.

    Raises:
        FileNotFoundError, ValueError, ModuleNotFoundError: shards that cannot be read, as ``ActivationShards`` says.
        ValueError: no row is held out, or there is nothing to learn from: only zeros, NaN and infinities.
    """

    def __init__(self, settings: Settings, device: str) -> None:
        self.settings = settings
        self.device = torch.device(device)
        self.shards = ActivationShards(settings.data)
        train, self.held_out = self.shards.split(settings.held_out)
        if len(self.held_out) == 0:
            raise ValueError(f"held_out={settings.held_out} of {len(self.shards)} rows leaves none to judge by")
        self.loader = ActivationLoader(
            train,
            settings.batch_size // settings.processes,
            buffer_rows=settings.buffer_rows,
            seed=settings.seed,
            rank=processes.rank(),
            world_size=settings.processes,
        )
        sample = _finite(torch.cat([rows for _, rows in train.blocks(1024, SCALED_ROWS)]).float())
        self.scale = _scale(sample)
        torch.manual_seed(settings.seed)
        self.sae = settings.module(self.shards.dim).to(self.device)
        # Before it has learned, a code may be dense: that of more rows than a batch might not fit into memory.
        start = sample[:: -(-len(sample) // settings.batch_size)]
        self.sae.init_from(start.to(self.device) * self.scale)
        others = [parameter for parameter in self.sae.parameters() if parameter is not self.sae.decoder_weight]
        dictionary: dict[str, Any] = {"params": [self.sae.decoder_weight], "unit_norm": True}
        self.optimizer = RowAdam([dictionary, {"params": others}])
        self.step = 0
        self.skipped = 0

    def advance(self) -> tuple[Tensor, Any]:
        """One step: the rows it learned from and what the autoencoder made of them."""
        batch = next(self.loader).to(self.device)
        rows = _finite(batch) * self.scale
        self.skipped += len(batch) - len(rows)
        if len(rows) < 2:
            raise ValueError(f"step {self.step + 1}: of a batch of {len(batch)} rows {len(rows)} are finite")
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate(self.step)
        output = self.sae(rows)
        self.optimizer.zero_grad()
        output.loss.backward()
        processes.average_gradients(self.sae.parameters())
        self.optimizer.step()
        self.step += 1
        return rows, output

    @torch.no_grad()
    def describe(self, rows: Tensor, output: Any) -> dict[str, Any]:
        """The line of the log for the last step: for the rows of this process."""
        losses = {name: part.item() for name, part in output._asdict().items() if part is not None and part.ndim == 0}
        if not math.isfinite(losses["loss"]):
            raise ValueError(f"the loss of step {self.step} is {losses['loss']}: try a smaller lr")
        variance = (rows - rows.mean(dim=0)).square().sum()
        explained = 1.0 - (rows - output.reconstruction).square().sum() / variance
        return {
            "step": self.step,
            "split": "train",
            "rows": self.step * self.settings.batch_size,
            **losses,
            "explained_variance": explained.item(),
            "l0": (output.values != 0).sum().item() / len(rows),
            "dead": int(self.sae.dead.sum()),
            "skipped": self.skipped,
            "lr": self.settings.learning_rate(self.step - 1),
        }

    def judge(self) -> dict[str, Any]:
        """The line of the log for the held-out rows."""
        found = evaluate(self.sae, self.held_out, scale=self.scale, limit=self.settings.eval_rows)
        return {
            "step": self.step,
            "split": "held_out",
            "rows": found.rows,
            "explained_variance": found.explained_variance,
            "l0": found.l0,
            "silent": found.silent,
        }


def _finite(rows: Tensor) -> Tensor:
    """Rows without NaN or infinity: one of them would spoil every weight."""
    finite = rows.isfinite().all(dim=-1)
    return rows if finite.all() else rows[finite]


def _scale(rows: Tensor) -> float:
    power = rows.double().square().sum(dim=-1).mean().item() if len(rows) else 0.0
    if not power > 0.0:
        raise ValueError("the activations are all 0, NaN or infinite")
    return math.sqrt(rows.shape[1] / power)
