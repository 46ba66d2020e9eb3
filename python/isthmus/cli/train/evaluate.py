"""How well a sparse autoencoder explains the rows of some shards, which features fire, and where each fires most."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from isthmus.data import ActivationShards

BATCH = 2048


class Entries(NamedTuple):
    """What is not 0 of the code of some rows, as equally long lists."""

    rows: Tensor
    features: Tensor
    values: Tensor


@dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate` found.

    Attributes:
        rows: how many were judged. skipped: how many had a value that is not finite.
        explained_variance: 1 − Σ |x − x̂|² / Σ |x − mean|²; NaN where rows do not vary.
        l0: active features per row.
        density: [F], the fraction of rows in which each feature fires.
        strongest: where each fires most.
    """

    rows: int
    skipped: int
    explained_variance: float
    l0: float
    density: Tensor
    strongest: Strongest

    @property
    def silent(self) -> int:
        """Features that fired in no row."""
        return int((self.density == 0).sum())


class Strongest:
    """For each of F features the ``count`` rows in which it is most active, kept up to date as rows come by.

    ``values`` and ``rows`` are [F, count] in descending order; where a feature fired less often the value is 0.
    """

    def __init__(self, num_features: int, count: int) -> None:
        self.values = torch.zeros(num_features, count)
        self.rows = torch.full((num_features, count), -1)

    def add(self, entries: Entries) -> None:
        # Soon hardly any entry beats the least of what its feature has, so what follows is small.
        better = entries.values > self.values[entries.features, -1]
        rows, features, values = (part[better] for part in entries)
        touched, group = features.unique(return_inverse=True)
        count = self.values.shape[1]
        group = torch.cat([torch.arange(len(touched)).repeat_interleave(count), group])
        values = torch.cat([self.values[touched].flatten(), values])
        rows = torch.cat([self.rows[touched].flatten(), rows])
        order = values.argsort(descending=True, stable=True)
        order = order[group[order].argsort(stable=True)]
        sizes = group.bincount(minlength=len(touched))
        place = torch.arange(len(order)) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
        best = order[place < count]
        self.values[touched] = values[best].view(-1, count)
        self.rows[touched] = rows[best].view(-1, count)


@torch.no_grad()
def evaluate(
    sae: Any, shards: ActivationShards, *, scale: float = 1.0, limit: int | None = None, strongest: int = 1
) -> Evaluation:
    """Explain rows that were multiplied by ``scale``: all, or ``limit`` of them in evenly spread blocks.

    Rows with NaN or infinity count as skipped and are left out. ``strongest`` is how many rows to remember for each
    feature.
    """
    best = Strongest(sae.num_features, strongest)
    fired = torch.zeros(sae.num_features, dtype=torch.int64)
    count = skipped = 0
    error = power = 0.0
    total = torch.zeros(shards.dim, dtype=torch.float64)
    for first, raw in shards.blocks(BATCH, limit):
        kept = raw.isfinite().all(dim=-1).nonzero().squeeze(-1)
        skipped += len(raw) - len(kept)
        if len(kept) == 0:
            continue
        rows = raw[kept].to(sae.encoder_weight.device, torch.float32) * scale
        code, entries = encode(sae, rows)
        error += (rows - sae.decode(*code)).double().square().sum().item()
        power += rows.double().square().sum().item()
        total += rows.double().sum(dim=0).cpu()
        count += len(rows)
        fired += entries.features.bincount(minlength=sae.num_features)
        best.add(entries._replace(rows=first + kept[entries.rows]))
    variance = power - total.square().sum().item() / max(count, 1)
    # What is left of a constant by cancellation is no variance.
    explained = 1.0 - error / variance if variance > 1e-9 * power else math.nan
    density = fired / max(count, 1)
    return Evaluation(count, skipped, explained, fired.sum().item() / max(count, 1), density, best)


@torch.no_grad()
def activations_around(
    sae: Any, shards: ActivationShards, windows: list[tuple[int, int]], features: Tensor, *, scale: float = 1.0
) -> list[Tensor]:
    """How active one feature, ``features[i]``, is in the rows of each window (first row, end)."""
    sizes = [end - first for first, end in windows]
    wanted = features.repeat_interleave(torch.tensor(sizes, dtype=torch.int64))
    raw = torch.cat([shards.read(*window) for window in windows])
    strength = torch.zeros(len(raw))
    for start in range(0, len(raw), BATCH):
        rows = raw[start : start + BATCH].to(sae.encoder_weight.device, torch.float32) * scale
        _, entries = encode(sae, rows.nan_to_num(0.0, 0.0, 0.0))
        hit = entries.features == wanted[start + entries.rows]
        strength[start + entries.rows[hit]] = entries.values[hit]
    return list(strength.split(sizes))


def encode(sae: Any, rows: Tensor) -> tuple[tuple[Tensor, ...], Entries]:
    """The code of ``rows`` as the autoencoder gives it in evaluation mode, and as lists."""
    training = sae.training
    code = sae.eval().encode(rows)
    sae.train(training)
    values, indices = code[0], code[1]
    if len(code) == 3:
        number = torch.arange(len(rows)).repeat_interleave(code[2].diff().cpu())
    else:
        number = torch.arange(len(rows)).repeat_interleave(values.shape[-1])
    values, indices = values.flatten().float().cpu(), indices.flatten().cpu()
    active = (values != 0) & (indices >= 0)
    return code, Entries(number[active], indices[active], values[active])
