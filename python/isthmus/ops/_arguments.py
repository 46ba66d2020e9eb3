"""Argument handling shared by the public functions."""

import math
from typing import Any

import torch
from torch import Tensor

from isthmus.random import key as draw_key


def key_for(like: Tensor, key: Tensor | None, generator: torch.Generator | None) -> Tensor:
    """The given key, or a fresh one from torch's generator of the tensor's device."""
    if key is None:
        return draw_key(device=like.device, generator=generator)
    if generator is not None:
        raise ValueError("key and generator were both given; expected at most one source of randomness")
    return key


def broadcast(**tensors: Tensor | None) -> tuple[Any, ...]:
    """The named tensors, expanded to their common shape; None stays None."""
    first_name, first = next((n, t) for n, t in tensors.items() if t is not None)
    shape = first.shape
    for name, t in tensors.items():
        if t is None or t.shape == shape:
            continue
        try:
            shape = torch.broadcast_shapes(shape, t.shape)
        except RuntimeError as error:
            raise ValueError(
                f"{name} has shape {list(t.shape)}, which does not broadcast with {first_name}, {list(shape)}"
            ) from error
    return tuple(t if t is None or t.shape == shape else t.expand(shape) for t in tensors.values())


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(repr, choices))}")


def accumulate_dtype(t: Tensor) -> torch.dtype:
    """What sums over ``t`` are made and returned in."""
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def as_rows(name: str, t: Tensor) -> Tensor:
    """All dimensions but the last as one."""
    if t.dim() == 0:
        raise ValueError(f"{name} has shape []; expected at least one dimension")
    return t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


def active_stages(x: Tensor, count: int, stages: Tensor | int | None, mask: Tensor | None) -> Tensor | None:
    """How many stages each row uses; None if all use all."""
    shape = x.shape[:-1]
    if isinstance(stages, int):
        stages = torch.full(shape, stages, device=x.device)
    elif stages is not None and stages.dim() == 0:
        stages = stages.expand(shape)
    if mask is None:
        return stages
    if mask.dtype != torch.bool or mask.shape != shape:
        raise ValueError(f"mask is {mask.dtype} {list(mask.shape)}; expected torch.bool {list(shape)}")
    return torch.where(mask, count if stages is None else stages, 0)


# ---- results without data, for fake kernels --------------------------------------------------------------------------


def like(x: Tensor) -> Tensor:
    """Contiguous, whatever the strides of ``x``."""
    return x.new_empty(x.shape)


def row_values(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:-1], dtype=accumulate_dtype(x))


def gradients_like(*wanted: tuple[Tensor, bool]) -> tuple[Tensor, ...]:
    """Tensors like those that are wanted; empty ones for the others."""
    return tuple(t.new_empty(t.shape if needed else (0,)) for t, needed in wanted)
