"""Residual quantization in a loop, for stages that no op runs together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from isthmus import ops

Quantized = tuple[Tensor, Tensor, Tensor]
"""Values, indices and squared errors."""


def stage_books(codebooks: Tensor | list[Tensor]) -> list[Tensor]:
    """The codes of each stage, from what ``ops.residual_vq_quantize`` takes: ``[..., Q, K, d]`` or a list of them."""
    return list(codebooks.unbind(-3)) if isinstance(codebooks, Tensor) else codebooks


def quantize_stages(
    rows: Tensor,
    count: int,
    quantize: Callable[[int, Tensor, Tensor, Tensor], Quantized],
    *,
    gradient: str,
    stages: Tensor | int | None,
    mask: Tensor | None,
) -> Quantized:
    """What ``ops.residual_vq_quantize`` does, with any quantizer for a stage.

    ``quantize(stage, residual, known, live)`` quantizes the residuals ``[..., d]`` of a stage, where ``known`` is the
    sum of the codes before and ``live`` says which rows take part.
    """
    if isinstance(stages, int) and not 0 <= stages <= count:
        raise ValueError(f"stages must be 0 to {count}, got {stages}")
    active = torch.zeros(rows.shape[:-1], dtype=torch.int64, device=rows.device) + (count if stages is None else stages)
    active = active if mask is None else torch.where(mask, active, 0)
    residual, known = rows, torch.zeros_like(rows)
    indices, errors = [], []
    for stage in range(count):
        code, index, error = quantize(stage, residual, known, active > stage)
        residual, known = residual - code.detach(), known + code.detach()
        indices.append(index)
        errors.append(error)
    quantized, _, _ = quantize_each(rows, known, active > 0, gradient=gradient)
    return quantized, torch.stack(indices, dim=-1), torch.stack(errors, dim=-1)


def quantize_each(rows: Tensor, codes: Tensor, live: Tensor, **options: Any) -> Quantized:
    """``ops.vq_quantize`` where every row has a code of its own, in a tensor like ``rows``."""
    own = torch.arange(rows.shape[-2], device=rows.device).expand(live.shape)
    # One code more than there are rows, so that there is one where there are none.
    return ops.vq_quantize(rows, F.pad(codes, (0, 0, 0, 1)), indices=torch.where(live, own, -1), **options)
