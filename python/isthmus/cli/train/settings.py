"""What a training run is told. With the same settings and shards two runs agree bit for bit."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from isthmus import nn

# The module of each kind, and which of the options that not all kinds have it takes.
KINDS: dict[str, tuple[str, frozenset[str]]] = {
    "topk": ("TopKSAE", frozenset({"k", "aux_k"})),
    "batch_topk": ("BatchTopKSAE", frozenset({"k", "aux_k"})),
    "matryoshka": ("MatryoshkaSAE", frozenset({"k", "aux_k", "levels"})),
    "jumprelu": ("JumpReLUSAE", frozenset({"sparsity", "target_l0", "aux_k"})),
    "gated": ("GatedSAE", frozenset({"sparsity"})),
    "relu": ("ReLUSAE", frozenset({"sparsity", "aux_k"})),
}
K = 32
LEVELS = 5


@dataclass(frozen=True)
class Settings:
    """Everything the result depends on, as the command line names it.

    Raises:
        ValueError: an unknown kind, a number out of range, or an option that the kind does not have.
    """

    data: str
    features: int
    kind: str = "topk"
    k: float | None = None
    sparsity: float | None = None
    target_l0: float | None = None
    levels: int | None = None
    steps: int = 10_000
    batch_size: int = 2048
    lr: float | None = None
    warmup: float = 0.05
    decay: float = 0.2
    aux_k: int | None = None
    dead_after: int | None = None
    held_out: float = 0.02
    buffer_rows: int = 65_536
    log_every: int = 50
    eval_every: int = 1000
    eval_rows: int = 16_384
    checkpoint_every: int = 1000
    seed: int = 0
    processes: int = 1

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        for name in ("features", "steps", "batch_size", "log_every", "eval_every", "eval_rows", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("warmup", "decay"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} is a fraction of the steps, in [0, 1], got {getattr(self, name)}")
        if self.batch_size % self.processes:
            raise ValueError(f"batch_size must be a multiple of the {self.processes} processes, got {self.batch_size}")
        allowed = KINDS[self.kind][1]
        for name in ("k", "sparsity", "target_l0", "levels", "aux_k"):
            if getattr(self, name) is not None and name not in allowed:
                raise ValueError(f"kind {self.kind} has no {name}; it has {', '.join(sorted(allowed))}")
        if self.k is not None and self.k != int(self.k) and self.kind == "topk":
            raise ValueError(f"k must be a whole number for kind topk, got {self.k}")

    def module(self, dim: int) -> Any:
        """The sparse autoencoder of these settings, untrained."""
        name, allowed = KINDS[self.kind]
        options: dict[str, Any] = {"dead_after": self.dead_after or min(10_000_000, self.steps * self.batch_size // 10)}
        if "k" in allowed:
            k = K if self.k is None else self.k
            options["k"] = int(k) if k == int(k) else k
        if self.sparsity is not None:
            options["sparsity_weight"] = self.sparsity
        if self.aux_k is not None:
            options["aux_k"] = self.aux_k
        if self.target_l0 is not None:
            # On the way down more features find something to do.
            options |= {"target_l0": self.target_l0, "start_l0": min(2 * self.target_l0, self.features)}
        if self.kind == "matryoshka":
            # Each level is half of the next.
            levels = LEVELS if self.levels is None else self.levels
            options["widths"] = [self.features >> level for level in reversed(range(levels))]
        else:
            options["num_features"] = self.features
        return getattr(nn, name)(dim, **options)

    def learning_rate(self, step: int) -> float:
        """Of the step with this number, counted from 0: up in a straight line, level, and down to 0."""
        # The rate that Gao et al. (2024) found best shrinks with the square root of the size of the dictionary.
        peak = 2e-4 * (16384 / self.features) ** 0.5 if self.lr is None else self.lr
        rise, fall = self.warmup * self.steps, self.decay * self.steps
        return peak * min(1.0, (step + 1) / rise if rise else 1.0, (self.steps - step) / fall if fall else 1.0)

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    def check_same(self, path: Path) -> None:
        """Refuse to go on with a run that was started with other settings."""
        saved = json.loads(path.read_text(encoding="utf-8"))
        for field in fields(self):
            # Shards may have moved; whether they are the same is for the loader to see.
            before = saved.get(field.name, field.default)
            if field.name != "data" and before != getattr(self, field.name):
                raise ValueError(
                    f"{field.name} was {before} when this run was started, now it is "
                    f"{getattr(self, field.name)}; --resume takes the same options"
                )
