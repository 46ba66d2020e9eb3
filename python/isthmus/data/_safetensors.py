"""Shards as .safetensors files: one file with the activations, their tokens and their sequences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SUFFIX = ".safetensors"
ACTIVATIONS = "activations"

_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "F64": torch.float64,
}


def is_shard(path: Path) -> bool:
    """Whether a file holds activations."""
    return path.suffix == SUFFIX


def header(path: Path, name: str) -> tuple[tuple[int, ...], torch.dtype | str] | None:
    """Shape and dtype of a tensor of the shard, or None if the shard has no such tensor."""
    with _open(path) as file:
        key = _key(file, name)
        if key is None:
            return None
        tensor = file.get_slice(key)
        return tuple(tensor.get_shape()), _DTYPES.get(tensor.get_dtype(), tensor.get_dtype())


def read(path: Path, name: str, start: int, stop: int) -> Tensor:
    """Rows ``start`` to ``stop`` of a tensor of the shard; only they are copied into memory."""
    with _open(path) as file:
        # The slice is a view of the mapped file; the caller gets rows of its own.
        return file.get_slice(_key(file, name))[start:stop].clone()


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write the tensors of a shard, or any others. Whoever looks finds the file of before, or all of the new one."""
    save_file = _library().torch.save_file
    partial = path.with_suffix(".partial")
    # The library makes files that only their owner can read; these get the mode of any other new file.
    partial.touch()
    mode = partial.stat().st_mode
    save_file(tensors, partial, metadata=metadata)
    partial.chmod(mode)
    partial.replace(path)


def _key(file: Any, name: str) -> str | None:
    keys = list(file.keys())
    if name in keys:
        return name
    # Files of other programs call their only tensor after the layer.
    return keys[0] if name == ACTIVATIONS and len(keys) == 1 else None


def _open(path: Path) -> Any:
    library = _library()
    try:
        return library.safe_open(path, framework="pt")
    except FileNotFoundError:
        raise FileNotFoundError(f"the shard {path} is gone") from None
    except library.SafetensorError as error:
        raise ValueError(f"{path} is not a whole .safetensors file: {error}") from None


def _library() -> Any:
    try:
        import safetensors.torch
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            'shards in .safetensors files need safetensors: run pip install "isthmus[data]", or write .npy files'
        ) from None
    return safetensors
