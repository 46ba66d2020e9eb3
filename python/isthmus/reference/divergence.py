"""Divergences between Gaussians, and the bound of importance weights."""

import math
from typing import Any

import torch
from torch import Tensor

from isthmus.reference._gaussians import posterior, reduce, unpack, without_masked_rows
from isthmus.reference._numeric import exp_tail, widen

__all__ = ["gaussian_kl", "log_mean_exp"]


def gaussian_kl(
    mean: Tensor,
    scale: Tensor | None = None,
    prior_mean: Tensor | float | None = None,
    prior_scale: Tensor | float | None = None,
    *,
    mask: Tensor | None = None,
    reduction: str = "row",
    groups: int = 1,
    unit: str = "nats",
    beta: float = 1.0,
    free_bits: float = 0.0,
    capacity: float | None = None,
    balance: float | None = None,
    **parameters: Any,
) -> Tensor:
    """KL(N(mean, s^2) || N(prior_mean, s_prior^2)) of diagonal Gaussians.

    With d = log s - log s_prior, each element is
    ``((mean - prior_mean) / s_prior)^2 / 2 + (expm1(2d) - 2d) / 2``. Both terms are non-negative
    and keep the relative accuracy of d as the posterior approaches the prior, where the textbook
    form subtracts nearly equal numbers and loses every digit.

    The reduced divergence k becomes ``beta * |max(k, free_bits) - capacity|``, without the
    absolute value where ``capacity`` is None. ``balance`` = a keeps the value and splits the gradient:
    a reaches the prior, 1 - a the posterior (Hafner et al., Mastering Atari with Discrete World Models,
    2021). Half inputs give a float32 result.

    Args:
        mean: [..., D]; without a scale, mean and scale as halves along ``packed_dim``.
        scale: shape of ``mean``; ``scale_type`` says what it stands for.
        prior_mean, prior_scale: numbers or tensors that broadcast with ``mean``; both ``None`` for N(0, 1).
        mask: [...], bool; rows where it is False count nothing.
        reduction: "none" [..., D], "row" [...] (sum over the last dimension), "group" [..., groups],
            "batch" [B] (sum over all but the first), "dim" [D] (mean over all but the last), "sum" [], or
            "mean" [] (mean over rows of the row sums).
        parameters: scale_type, packed_dim, residual, clamp, clamp_mode.

    Raises:
        ValueError: unknown option, or half of a prior.

    Example:
        >>> gaussian_kl(torch.ones(2, 3), torch.zeros(2, 3))
        tensor([1.5000, 1.5000])
    """
    mean, scale = unpack(mean, scale, parameters.pop("packed_dim", -1))
    mean, scale, prior_mean, prior_scale = without_masked_rows(mask, mean, scale, prior_mean, prior_scale)
    if balance is None:
        kl = _elements(mean, scale, prior_mean, prior_scale, parameters)
    else:
        of_posterior = _elements(mean, scale, _constant(prior_mean), _constant(prior_scale), parameters)
        of_prior = _elements(_constant(mean), _constant(scale), prior_mean, prior_scale, parameters)
        kl = (1 - balance) * of_posterior + balance * of_prior
    kl = reduce(kl, reduction, groups, mask) / (math.log(2) if unit == "bits" else 1)
    kl = kl.clamp(min=free_bits) if free_bits > 0 else kl
    return beta * (kl if capacity is None else (kl - capacity).abs())


def _elements(mean: Any, scale: Any, prior_mean: Any, prior_scale: Any, parameters: dict[str, Any]) -> Tensor:
    q = posterior(mean, scale, prior_mean, prior_scale, **parameters)
    return 0.5 * q.shift.square() + 0.5 * exp_tail(2 * q.log_ratio)


def _constant(t: Any) -> Any:
    return t.detach() if isinstance(t, Tensor) else t


def log_mean_exp(log_weights: Tensor, *, groups: int = 1) -> Tensor:
    """log mean exp over groups of the leading dimension: the importance-weighted bound.

    ``log 1/K sum_k exp(log_weights[g, k])`` with K the size of a group. Half inputs give float32.

    Args:
        log_weights: [groups * K, ...].

    Returns:
        [groups, ...].

    Example:
        >>> log_mean_exp(torch.tensor([[0.0], [math.log(3.0)]])).exp()
        tensor([[2.]])
    """
    by_group = widen(log_weights).unflatten(0, (groups, -1))
    return torch.logsumexp(by_group, 1) - math.log(by_group.shape[1])
