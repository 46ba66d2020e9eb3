"""Ways of a gradient through a quantizer that no op has fused."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from isthmus import ops, random


def check_gradient(gradient: str, choices: Sequence[str] = ("straight_through", "rotation", "directional")) -> None:
    """Raise ``ValueError`` unless ``gradient`` is one of the ways through a quantizer."""
    if gradient not in choices:
        raise ValueError(f"gradient must be one of {', '.join(map(repr, choices))}, got {gradient!r}")


def check_sampling(sample_temperature: float, gradient: str) -> None:
    """Raise ``ValueError`` if codes are to be drawn that gradients cannot be rotated onto."""
    if sample_temperature > 0.0 and gradient == "rotation":
        raise ValueError("gradient='rotation' needs the nearest code: rotating onto a sampled one diverges")


def check_not_negative(**options: float) -> None:
    """Raise ``ValueError`` unless all are numbers from 0 on."""
    for name, value in options.items():
        if not value >= 0.0:
            raise ValueError(f"{name} must not be negative, got {value}")


def fused(gradient: str) -> str:
    """What to ask of the op that searches: its own ways, or one to be replaced."""
    return gradient if gradient == "rotation" else "straight_through"


def gather(codes: Tensor, indices: Tensor) -> Tensor:
    """Rows of codes ``[K, d]`` at ``[N]``, or of ``[H, K, d]`` at ``[H, N]``; zeros at −1.

    Unlike an indexing, it passes its gradient in an order that does not depend on threads.
    """
    absent = codes.new_zeros(()).expand(*indices.shape, codes.shape[-1])
    return ops.vq_quantize(absent, codes, gradient="codebook", indices=indices)[0]


def directional(x: Tensor, code: Tensor, live: Tensor, variance: float) -> Tensor:
    """x + |c − x| · u, a way to c that can be differentiated: u is a constant of length 1. Zeros where not ``live``.

    u points to where c − x points after noise of this variance in every dimension. With e = (c − x) / |c − x|, a
    gradient g gives (u·g) e to c and g − (u·g) e to x: to the code the part along the step, to x what is left.
    Where c = x the code gets nothing.
    """
    x = torch.where(live.unsqueeze(-1), x, 0.0)
    step = code - x
    noise = ops.gaussian_noise(random.key(device=x.device), x.shape, x.dtype)
    direction = F.normalize(step.detach() + variance**0.5 * noise, dim=-1)
    return x + torch.linalg.vector_norm(step, dim=-1, keepdim=True) * direction
