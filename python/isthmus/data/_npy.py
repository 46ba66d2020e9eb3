"""Shards as .npy files, one for each tensor: ``NAME.npy`` the activations, ``NAME.tokens.npy`` their tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

SUFFIX = ".npy"
ACTIVATIONS = "activations"

# numpy knows no bfloat16; ml_dtypes saves it as two opaque bytes, and so does write().
_DTYPES = {
    "<f4": torch.float32,
    "<f2": torch.float16,
    "<V2": torch.bfloat16,
    "|V2": torch.bfloat16,
    "<i8": torch.int64,
    "<f8": torch.float64,
}


def is_shard(path: Path) -> bool:
    """Whether a file holds activations, not what belongs to those of another file."""
    return path.suffix == SUFFIX and "." not in path.stem


def header(path: Path, name: str) -> tuple[tuple[int, ...], torch.dtype | str] | None:
    """Shape and dtype of a tensor of the shard, or None if the shard has no such tensor."""
    file = _file(path, name)
    if not file.exists():
        return None
    array = _open(file)
    return array.shape, _DTYPES.get(array.dtype.str, str(array.dtype))


def read(path: Path, name: str, start: int, stop: int) -> Tensor:
    """Rows ``start`` to ``stop`` of a tensor of the shard; only they are copied into memory."""
    array = np.array(_open(_file(path, name))[start:stop])
    if array.dtype.kind == "V":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def write(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write the tensors of a shard; activations last, so that a shard that can be seen is whole."""
    for name in sorted(tensors, key=lambda name: name == ACTIVATIONS):
        tensor = tensors[name]
        array = tensor.view(torch.int16).numpy().view("V2") if tensor.dtype == torch.bfloat16 else tensor.numpy()
        file = _file(path, name)
        partial = file.with_suffix(".partial")
        with partial.open("wb") as out:
            np.save(out, array)
        partial.replace(file)


def _file(path: Path, name: str) -> Path:
    return path if name == ACTIVATIONS else path.with_suffix(f".{name}{SUFFIX}")


def _open(file: Path) -> np.ndarray:
    try:
        return np.load(file, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise FileNotFoundError(f"the shard {file} is gone") from None
    except ValueError as error:
        raise ValueError(f"{file} is not a whole .npy file: {error}") from None
