"""Importance-weighted bounds on log p(x), from log-weights log w = log p(x, z) − log q(z | x) of samples z ~ q.

The first axis of the log-weights is that of the samples, as in ``ops.gaussian_sample_log_prob``, whose ``gradient``
option chooses the estimator of a bound's gradient. Bounds are maximised: the loss is ``-bound.mean()``, so the number
that is reported is the bound itself. Its gradient by a log-weight is the normalised weight, the largest for the best
sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from isthmus import ops
from isthmus.ops._arguments import key_for


class PIWAEBounds(NamedTuple):
    """What ``piwae_bounds`` returns."""

    decoder: Tensor
    encoder: Tensor


def iwae_bound(log_weights: Tensor) -> Tensor:
    """log (1/K) Σ_k w_k, a lower bound of log p(x) on average (Burda et al. 2016, arXiv 1509.00519).

    K = 1 is the ELBO with a sampled divergence. The bound rises with K, to log p(x) in the limit, and equals it for
    every K, without noise, where q is the exact posterior.

    Args:
        log_weights: [K, *].

    Returns:
        [*]; float32 for half inputs.

    Raises:
        RuntimeError: no samples.

    Example:
        >>> iwae_bound(torch.tensor([[0.0], [0.0], [-torch.inf]])).exp()
        tensor([0.6667])
    """
    return ops.log_mean_exp(log_weights).squeeze(0)


def miwae_bound(log_weights: Tensor, *, groups: int) -> Tensor:
    """Mean of M bounds of K samples each, (1/M) Σ_m log (1/K) Σ_k w_mk (Rainforth et al. 2018, arXiv 1802.04537).

    Looser than one bound of M·K samples; its gradient has the better signal-to-noise ratio for the encoder. M = 1 is
    ``iwae_bound``, K = 1 the ELBO.

    Args:
        log_weights: [M·K, *], the samples of a group next to each other.
        groups: M.

    Returns:
        [*]; float32 for half inputs.

    Raises:
        RuntimeError: no samples, or ``groups`` does not divide their number.

    Example:
        >>> miwae_bound(torch.zeros(40, 3), groups=8).shape
        torch.Size([3])
    """
    return ops.log_mean_exp(log_weights, groups=groups).mean(0)


def piwae_bounds(log_weights: Tensor, *, groups: int) -> PIWAEBounds:
    """Two bounds from the same samples: all M·K together for the decoder, M of K for the encoder (Rainforth et al.
    2018, arXiv 1802.04537).

    The decoder gains from the tighter bound, the encoder from the clearer gradient. Each learns from its own:

        bounds = piwae_bounds(log_weights, groups=8)
        (-bounds.decoder.mean()).backward(inputs=list(decoder.parameters()), retain_graph=True)
        (-bounds.encoder.mean()).backward(inputs=list(encoder.parameters()))

    For Gaussian posteriors ``ops.gaussian_sample_log_prob(gradient="partial")`` does the same with one backward pass
    of the first bound.

    Args:
        log_weights: [M·K, *], the samples of a group next to each other.
        groups: M.

    Returns:
        (decoder, encoder): [*] each; the first is never below the second.

    Raises:
        RuntimeError: no samples, or ``groups`` does not divide their number.

    Example:
        >>> bounds = piwae_bounds(torch.randn(40, 3), groups=8)
        >>> bool((bounds.decoder >= bounds.encoder).all())
        True
    """
    return PIWAEBounds(iwae_bound(log_weights), miwae_bound(log_weights, groups=groups))


def ciwae_bound(log_weights: Tensor, beta: float) -> Tensor:
    """β ELBO + (1 − β) IWAE of the same samples (Rainforth et al. 2018, arXiv 1802.04537).

    Args:
        log_weights: [K, *].
        beta: in [0, 1]; 0 is ``iwae_bound``.

    Returns:
        [*]; float32 for half inputs.

    Raises:
        ValueError: ``beta`` outside [0, 1].
        RuntimeError: no samples.

    Example:
        >>> ciwae_bound(torch.tensor([[0.0], [2.0]]), beta=1.0)
        tensor([1.])
    """
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta is {beta}; expected a number in [0, 1]")
    iwae = iwae_bound(log_weights)
    return beta * log_weights.mean(0, dtype=iwae.dtype) + (1.0 - beta) * iwae


def effective_sample_size(log_weights: Tensor) -> Tensor:
    """How many equal weights would be as good: (Σ w)² / Σ w², between 1 and K (Kong 1992).

    Near 1 a single sample carries the bound, which then says little: take a better posterior, or many more samples.

    Args:
        log_weights: [K, *].

    Returns:
        [*]; float32 for half inputs.

    Raises:
        RuntimeError: no samples.

    Example:
        >>> effective_sample_size(torch.zeros(8, 2))
        tensor([8., 8.])
    """
    second_moment = ops.log_mean_exp(2.0 * log_weights).squeeze(0)
    return len(log_weights) * (2.0 * iwae_bound(log_weights) - second_moment).exp()


# Noise comes in blocks of up to four elements. A chunk that starts at a multiple of four samples starts with a block,
# whatever the size of a sample, so its noise is the key's stream from that block on.
_ALIGNMENT = 4


@torch.no_grad()
def importance_weighted_log_likelihood(
    log_likelihood: Callable[[Tensor], Tensor],
    mean: Tensor,
    scale: Tensor,
    prior_mean: Tensor | float | None = None,
    prior_scale: Tensor | float | None = None,
    *,
    num_samples: int,
    chunk_size: int = 64,
    scale_type: str = "logvar",
    key: Tensor | None = None,
    generator: Generator | None = None,
) -> Tensor:
    """Estimate log p(x) = log E_q[p(x | z) p(z) / q(z | x)] with thousands of samples in constant memory.

    The usual test log-likelihood of a latent-variable model (Burda et al. 2016, arXiv 1509.00519). The data are
    encoded once, by the caller; samples are decoded ``chunk_size`` at a time and their weights summed as they come.
    The samples are those of one call to ``ops.gaussian_sample_log_prob`` with all of them and the same key, so the
    result does not depend on the chunk size beyond the rounding of the decoder.

    Args:
        log_likelihood: maps z [C, B, D] to log p(x | z) [C, B], for any C up to ``chunk_size``.
        mean, scale: [B, D], parameters of q(z | x).
        prior_mean, prior_scale: parameters of p(z), numbers or broadcastable with ``mean``. Default: the standard
            normal.
        num_samples: K, drawn for each data vector, exactly.
        chunk_size: a multiple of 4.
        scale_type: "logvar", "std", "softplus" or "square", of both scales.
        key: int64 [2]. Default: a fresh key drawn from ``generator``, or from torch's generator of the device.
        generator: where a fresh key is drawn from.

    Returns:
        [B], float64: lower bounds of log p(x) on average. Without gradients.

    Raises:
        ValueError: no samples, a chunk size that is no multiple of 4, key and generator both given, or a
            ``log_likelihood`` of another shape.

    Example:
        >>> mean, logvar = torch.zeros(3, 2), torch.zeros(3, 2)
        >>> def log_likelihood(z):
        ...     return -z.square().sum(-1)
        >>> importance_weighted_log_likelihood(log_likelihood, mean, logvar, num_samples=1000).shape
        torch.Size([3])
    """
    if num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}; expected at least 1")
    if chunk_size < 1 or chunk_size % _ALIGNMENT:
        raise ValueError(f"chunk_size is {chunk_size}; expected a multiple of {_ALIGNMENT}")
    key = key_for(mean, key, generator)
    per_block = 2 if mean.dtype == torch.float64 else 4
    total = mean.new_full(mean.shape[:-1], -math.inf, dtype=torch.float64)
    for first in range(0, num_samples, chunk_size):
        z, _, log_q, log_p = ops.gaussian_sample_log_prob(
            mean,
            scale,
            prior_mean,
            prior_scale,
            scale_type=scale_type,
            num_samples=min(chunk_size, num_samples - first),
            key=key + torch.tensor([0, first * mean.numel() // per_block], device=key.device),
        )
        log_x = log_likelihood(z)
        if log_x.shape != log_q.shape:
            raise ValueError(f"log_likelihood returned shape {list(log_x.shape)}; expected {list(log_q.shape)}")
        # In float64, so that a sum over thousands of chunks has no rounding worth mentioning.
        total = torch.logaddexp(total, (log_x.double() + log_p.double() - log_q.double()).logsumexp(0))
    return total - math.log(num_samples)
