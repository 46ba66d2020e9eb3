"""Divergences between Gaussians."""

import torch
from torch import Tensor

from isthmus.reference._numeric import log_standard_deviation, widen

__all__ = ["gaussian_kl"]


def gaussian_kl(
    mean: Tensor,
    scale: Tensor,
    prior_mean: Tensor | None = None,
    prior_scale: Tensor | None = None,
    *,
    scale_type: str = "logvar",
    reduction: str = "row",
) -> Tensor:
    """KL(N(mean, s^2) || N(prior_mean, s_prior^2)) of diagonal Gaussians, in nats.

    With d = log s - log s_prior, each element is
    ``((mean - prior_mean) / s_prior)^2 / 2 + (expm1(2d) - 2d) / 2``. Both terms are non-negative
    and keep the relative accuracy of d as the posterior approaches the prior, where the textbook
    form subtracts nearly equal numbers and loses every digit.

    Gradients flow to all four tensors. Half inputs give a float32 result.

    Args:
        mean: shape [..., D].
        scale: shape of ``mean``; ``scale_type`` says what it stands for.
        prior_mean, prior_scale: shape of ``mean``, the scale of the same type; both ``None`` for
            the standard prior N(0, 1).
        reduction: "none" [..., D], "row" [...] (sum over the last dimension), "sum" [], or
            "mean" [] (mean over rows of the row sums).

    Raises:
        ValueError: unknown ``scale_type`` or ``reduction``, or half of a prior.

    Example:
        >>> gaussian_kl(torch.ones(2, 3), torch.zeros(2, 3))
        tensor([1.5000, 1.5000])
    """
    shift, log_ratio = widen(mean), log_standard_deviation(widen(scale), scale_type)
    if prior_mean is not None and prior_scale is not None:
        log_prior_std = log_standard_deviation(widen(prior_scale), scale_type)
        shift = (shift - widen(prior_mean)) * torch.exp(-log_prior_std)
        log_ratio = log_ratio - log_prior_std
    elif prior_mean is not prior_scale:
        missing = "prior_mean" if prior_mean is None else "prior_scale"
        raise ValueError(f"{missing} is None; expected both prior_mean and prior_scale, or neither")
    return _reduce(0.5 * shift.square() + 0.5 * _exp_tail(2 * log_ratio), reduction)


def _exp_tail(x: Tensor) -> Tensor:
    """exp(x) - 1 - x, accurate in every digit also where it is about x^2 / 2."""
    near = x.abs() < 0.25
    small = torch.where(near, x, 0.0)  # where the series is not used it must not overflow either
    series = torch.ones_like(x)
    for n in range(12, 2, -1):  # the first term left out is below 2^-53 of the sum
        series = 1 + small / n * series
    return torch.where(near, 0.5 * small.square() * series, torch.expm1(x) - x)


def _reduce(kl: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return kl
    if reduction == "row":
        return kl.sum(-1)
    if reduction == "sum":
        return kl.sum()
    if reduction == "mean":
        return kl.sum(-1).mean()
    raise ValueError(f"reduction is {reduction!r}; expected 'none', 'row', 'sum' or 'mean'")
