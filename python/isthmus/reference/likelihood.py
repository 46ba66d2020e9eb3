"""Negative log-likelihoods of data under what a decoder predicts."""

import math

import torch
from torch import Tensor

from isthmus.reference._numeric import log_standard_deviation, widen

__all__ = ["gaussian_nll"]


def gaussian_nll(
    x: Tensor,
    mean: Tensor,
    scale: Tensor | float,
    weight: Tensor | None = None,
    *,
    scale_type: str = "logvar",
    beta: float = 0.0,
    reduction: str = "row",
) -> Tensor:
    """-log N(x; mean, s^2), each element times ``weight * s^(2 beta)``.

    Gradients flow to x, mean and scale. The factor is a constant: none flows through it (beta-NLL,
    Seitzer et al., 2022). Half inputs give a float32 result.

    Args:
        x: shape [..., D].
        mean, scale, weight: broadcastable with ``x``; ``scale_type`` says what ``scale`` stands for.
        reduction: "none" [..., D], "row" [...] (sum over the last dimension), "sum" [], or
            "mean" [] (mean over rows of the row sums).

    Raises:
        ValueError: unknown ``scale_type`` or ``reduction``.

    Example:
        >>> gaussian_nll(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 3))
        tensor([2.7568, 2.7568])
    """
    x, mean, log_std = widen(x), widen(mean), log_standard_deviation(_as_tensor(scale, x), scale_type)
    factor = torch.exp(2 * beta * log_std).detach()
    if weight is not None:
        factor = factor * widen(weight).detach()
    q = (x - mean) * torch.exp(-log_std)
    return _reduce(factor * (0.5 * q.square() + log_std + 0.5 * math.log(2 * math.pi)), reduction)


def _as_tensor(scale: Tensor | float, x: Tensor) -> Tensor:
    return widen(scale) if isinstance(scale, Tensor) else torch.as_tensor(scale, dtype=widen(x).dtype, device=x.device)


def _reduce(nll: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return nll
    if reduction == "row":
        return nll.sum(-1)
    if reduction == "sum":
        return nll.sum()
    if reduction == "mean":
        return nll.sum(-1).mean()
    raise ValueError(f"reduction is {reduction!r}; expected 'none', 'row', 'sum' or 'mean'")
