"""Negative log-likelihoods of data under what a decoder predicts."""

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.special import log_ndtr

from isthmus.reference._numeric import log_standard_deviation, widen

__all__ = ["discretized_gaussian_nll", "discretized_logistic_mixture_nll", "gaussian_nll", "generalized_gaussian_nll"]


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


def discretized_gaussian_nll(
    x: Tensor,
    mean: Tensor,
    scale: Tensor | float,
    *,
    bin_width: float,
    low: float | None = None,
    high: float | None = None,
    scale_type: str = "logvar",
    reduction: str = "row",
) -> Tensor:
    """-log of the probability that N(mean, s^2) gives to the bin of width ``bin_width`` around x.

    From ``low`` down and from ``high`` up the bin is open. The probability is that between two
    edges on one side of the mean: a difference of tails, taken as logs. Where the bin is narrow
    the tails are nearly equal, and the density is integrated by Gauss-Legendre quadrature instead.

    Gradients flow to x, mean and scale. Half inputs give a float32 result.

    Args:
        x, mean, scale, scale_type, reduction: as in ``gaussian_nll``.

    Example:
        >>> discretized_gaussian_nll(torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1, 2), bin_width=2.0)
        tensor([0.7634])
    """
    x, log_std = widen(x), log_standard_deviation(_as_tensor(scale, x), scale_type)
    first, last = x <= (-math.inf if low is None else low), x >= (math.inf if high is None else high)
    offset = x - widen(mean)
    offset = torch.where(first | (~last & (offset < 0)), -offset, offset)  # bins are mirrored to the upper side
    inverse = torch.exp(-log_std)
    u, h = offset * inverse, 0.5 * bin_width * inverse
    narrow = ~first & ~last & (h < 0.5) & (u * h < 1)
    log_near = log_ndtr((0.5 * bin_width - offset) * inverse)
    log_ratio = log_ndtr(-(0.5 * bin_width + offset) * inverse) - log_near
    closed = log_near + torch.log1p(-torch.exp(torch.where(first | last | narrow, -1.0, log_ratio)))
    log_density = math.log(bin_width) - log_std - 0.5 * math.log(2 * math.pi) - 0.5 * u.square()
    integral = _mean_density(torch.where(narrow, u, 0.0), torch.where(narrow, h, 0.0))
    nll = -torch.where(first | last, log_near, torch.where(narrow, log_density + integral.log(), closed))
    return _reduce(nll, reduction)


def _mean_density(u: Tensor, h: Tensor) -> Tensor:
    """Mean of the standard normal density over [u - h, u + h], relative to that at u."""
    nodes, weights = (torch.from_numpy(t).to(u) for t in np.polynomial.legendre.leggauss(20))
    step = h.unsqueeze(-1) * nodes
    return (0.5 * weights * torch.exp(-step * (u.unsqueeze(-1) + 0.5 * step))).sum(-1)


def generalized_gaussian_nll(
    x: Tensor, mean: Tensor, scale: Tensor | float, shape: Tensor | float, *, reduction: str = "row"
) -> Tensor:
    """-log of the generalised Gaussian: (|x - mean| / scale)^shape + log(2 scale / shape) + log Gamma(1 / shape).

    Gradients flow to all four; at x = mean that of the power is 0. Half inputs give a float32 result.

    Example:
        >>> x = torch.zeros(1, 2)
        >>> generalized_gaussian_nll(x, x, 2**0.5, 2.0)  # shape 2, scale sqrt(2): the standard normal
        tensor([1.8379])
    """
    x, mean = widen(x), widen(mean)
    alpha, beta = _as_tensor(scale, x), _as_tensor(shape, x)
    d = (x - mean).abs()
    power = torch.where(d > 0, (torch.where(d > 0, d, 1.0) / alpha) ** beta, 0.0)
    return _reduce(power + torch.log(2 * alpha) - beta.log() + torch.lgamma(1 / beta), reduction)


def discretized_logistic_mixture_nll(
    x: Tensor,
    parameters: Tensor,
    *,
    num_mixtures: int = 10,
    bins: int = 256,
    min_log_scale: float = -7.0,
    reduction: str = "image",
) -> Tensor:
    """The likelihood of PixelCNN++ (Salimans et al., 2017), of images scaled to [-1, 1].

    A pixel's channels are bins of width 2 / (bins - 1) of logistics; the first and the last bin
    are open. Green's mean is moved by red, blue's by red and green, through tanh of coefficients.
    With the bin's edges a and b in units of the scale, ``sigmoid(b) - sigmoid(a)`` is the product
    ``sigmoid(b) sigmoid(-a) (1 - exp(a - b))``: its log has no cancellation anywhere.

    Gradients flow to both tensors; a log-scale below ``min_log_scale`` gets none.

    Args:
        x: shape [B, C, H, W], C 1 or 3.
        parameters: shape [B, num_mixtures * (1 + 2C + C(C-1)/2), H, W]: the logits of the
            mixtures, then for each channel their means, their log-scales and, if C is 3, their
            coefficients. Those of red move green by red; of green, blue by red; of blue, blue by
            green.
        reduction: "none" [B, H, W], "image" [B], "sum" [], or "mean" [] (mean over images).

    Raises:
        ValueError: unknown ``reduction``.

    Example:
        >>> discretized_logistic_mixture_nll(torch.zeros(1, 1, 1, 1), torch.zeros(1, 3, 1, 1), num_mixtures=1)
        tensor([6.2344])
    """
    x, parameters = widen(x), widen(parameters)
    logits, rest = parameters[:, :num_mixtures], parameters[:, num_mixtures:]
    per_channel = rest.unflatten(1, (x.shape[1], -1, num_mixtures))  # [B, C, kinds, K, H, W]
    mean, log_scale = per_channel[:, :, 0], per_channel[:, :, 1].clamp(min=min_log_scale)
    if x.shape[1] == 3:
        coefficient = per_channel[:, :, 2].tanh()
        red, green = x[:, 0, None], x[:, 1, None]
        shift_green = coefficient[:, 0] * red
        shift_blue = coefficient[:, 1] * red + coefficient[:, 2] * green
        mean = mean + torch.stack((torch.zeros_like(shift_green), shift_green, shift_blue), dim=1)
    x, half_bin = x[:, :, None], 1 / (bins - 1)
    inverse = torch.exp(-log_scale)
    below = logsigmoid((x - mean + half_bin) * inverse)  # log probabilities of lying below the upper edge,
    above = logsigmoid((mean - x + half_bin) * inverse)  # and above the lower one
    inside = below + above + torch.log(-torch.expm1(-2 * half_bin * inverse))
    log_probability = torch.where(x < half_bin - 1, below, torch.where(x > 1 - half_bin, above, inside))
    nll = logits.logsumexp(1) - (logits + log_probability.sum(1)).logsumexp(1)
    if reduction == "none":
        return nll
    if reduction == "image":
        return nll.sum((1, 2))
    return _reduce(nll.flatten(1), reduction)


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
