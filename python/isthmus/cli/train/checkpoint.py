"""State of a run as one .safetensors file: weights, moments of the optimizer, loader, and random numbers."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from isthmus.cli.train import processes
from isthmus.cli.train.settings import Settings
from isthmus.cli.train.trainer import Trainer
from isthmus.data import _safetensors


def save_checkpoint(path: Path, trainer: Trainer) -> None:
    """Write all that the next step depends on."""
    tensors = {f"model.{name}": tensor for name, tensor in trainer.sae.state_dict().items()}
    numbers: dict[str, dict[str, Any]] = {}
    for index, state in trainer.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": part for name, part in state.items() if isinstance(part, Tensor)}
        numbers[str(index)] = {name: part for name, part in state.items() if not isinstance(part, Tensor)}
    tensors["random"] = torch.get_rng_state()
    about = {
        "step": trainer.step,
        "skipped": trainer.skipped,
        "scale": trainer.scale,
        "loader": trainer.loader.state_dict(),
        "optimizer": numbers,
    }
    _save(path, tensors, about)


def load_checkpoint(path: Path, trainer: Trainer) -> None:
    """Bring a trainer of the same settings to where another one saved its state.

    Raises:
        ValueError: the shards have changed since.
    """
    tensors, about = _load(path)
    loader = about["loader"]
    if processes.rank() > 0:  # it is that of the first process, and all have drawn equally often
        loader = {**trainer.loader.state_dict(), "batches": loader["batches"]}
    trainer.loader.load_state_dict(loader)
    trainer.step, trainer.skipped, trainer.scale = about["step"], about["skipped"], about["scale"]
    trainer.sae.load_state_dict(_under("model.", tensors))
    state = trainer.optimizer.state_dict()
    state["state"] = {
        int(index): {**numbers, **_under(f"optimizer.{index}.", tensors)}
        for index, numbers in about["optimizer"].items()
    }
    trainer.optimizer.load_state_dict(state)
    torch.set_rng_state(tensors["random"])


def save_sae(path: Path, trainer: Trainer) -> None:
    """Write the autoencoder alone, with the settings it is built from and the scale of its inputs."""
    about = {"settings": asdict(trainer.settings), "dim": trainer.shards.dim, "scale": trainer.scale}
    _save(path, trainer.sae.state_dict(), about)


def load_sae(path: str | Path) -> tuple[nn.Module, float]:
    """A trained autoencoder and its scale: it explains activations x as ``sae(x * scale).reconstruction / scale``."""
    tensors, about = _load(Path(path))
    sae = Settings(**about["settings"]).module(about["dim"])
    sae.load_state_dict(tensors)
    return sae.eval(), about["scale"]


def _save(path: Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    _safetensors.write(path, contiguous, {"isthmus": json.dumps(about)})


def _load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, json.loads(file.metadata()["isthmus"])


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
