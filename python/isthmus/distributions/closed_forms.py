"""Closed-form divergences whose textbook form loses its digits where the two distributions are close.

All are in nats, elementwise over broadcast parameters, and differentiable. Written as sums of terms that are never
negative, each accurate by itself: x - log(1 + x), exp(x) - 1 - x, and the gap between lgamma and its tangent.
"""

import torch
from torch import Tensor

from isthmus import ops
from isthmus.distributions._numeric import exp_tail, lgamma_gap, log1p_tail

__all__ = ["bernoulli_kl", "beta_kl", "dirichlet_kl", "gamma_kl", "laplace_kl"]


def bernoulli_kl(logits: Tensor, prior_logits: Tensor) -> Tensor:
    """KL(Bernoulli(σ(logits)) ‖ Bernoulli(σ(prior_logits))): the categorical kernel on two classes.

    Infinite logits mean probabilities 0 and 1.

    Args:
        logits, prior_logits: log-odds, broadcastable.

    Returns:
        The broadcast shape; float32 for half types.

    Example:
        >>> bernoulli_kl(torch.tensor([0.0, torch.inf]), torch.tensor(0.0))
        tensor([0.0000, 0.6931])
    """

    def classes(logits: Tensor) -> Tensor:
        return torch.stack((logits.clamp(max=0), (-logits).clamp(max=0)), dim=-1)

    return ops.categorical_kl(*map(classes, torch.broadcast_tensors(logits, prior_logits)))


def laplace_kl(loc: Tensor, scale: Tensor, prior_loc: Tensor, prior_scale: Tensor) -> Tensor:
    """KL(Laplace(loc, scale) ‖ Laplace(prior_loc, prior_scale)).

    With r = scale / prior_scale and t = |loc - prior_loc| / scale: (r - 1 - log r) + r (exp(-t) - 1 + t).

    Example:
        >>> one = torch.ones(())
        >>> laplace_kl(one, one, one, one)
        tensor(0.)
    """
    growth = (scale - prior_scale) / prior_scale
    distance = (loc - prior_loc).abs() / scale
    return log1p_tail(growth) + (1 + growth) * exp_tail(-distance)


def gamma_kl(concentration: Tensor, rate: Tensor, prior_concentration: Tensor, prior_rate: Tensor) -> Tensor:
    """KL(Gamma(a, b) ‖ Gamma(a₀, b₀)), a the concentrations and b the rates.

    With g = (b₀ - b) / b: a₀ (g - log(1 + g)) + (a - a₀) g + [lgamma(a₀) - lgamma(a) - digamma(a) (a₀ - a)].

    Example:
        >>> gamma_kl(torch.tensor(2.0), torch.tensor(1.0), torch.tensor(1.0), torch.tensor(1.0))
        tensor(0.4228)
    """
    growth = (prior_rate - rate) / rate
    through_rate = prior_concentration * log1p_tail(growth) + (concentration - prior_concentration) * growth
    return through_rate + lgamma_gap(concentration, prior_concentration - concentration)


def dirichlet_kl(concentration: Tensor, prior_concentration: Tensor) -> Tensor:
    """KL(Dirichlet(α) ‖ Dirichlet(β)) over the last dimension.

    With gap(y, step) = lgamma(y + step) - lgamma(y) - digamma(y) step: Σ gap(α_k, β_k - α_k) - gap(Σ α, Σ (β - α)).

    Args:
        concentration, prior_concentration: [..., K], broadcastable.

    Returns:
        [...].

    Example:
        >>> dirichlet_kl(torch.ones(3), torch.ones(3))
        tensor(0.)
    """
    alpha, beta = torch.broadcast_tensors(concentration, prior_concentration)
    step = beta - alpha
    return lgamma_gap(alpha, step).sum(-1) - lgamma_gap(alpha.sum(-1), step.sum(-1))


def beta_kl(
    concentration1: Tensor, concentration0: Tensor, prior_concentration1: Tensor, prior_concentration0: Tensor
) -> Tensor:
    """KL(Beta(a, b) ‖ Beta(a₀, b₀)): the Dirichlet form on two classes.

    Example:
        >>> beta_kl(*torch.tensor([2.0, 2.0, 1.0, 1.0]))
        tensor(0.1251)
    """
    posterior = torch.stack(torch.broadcast_tensors(concentration1, concentration0), dim=-1)
    prior = torch.stack(torch.broadcast_tensors(prior_concentration1, prior_concentration0), dim=-1)
    return dirichlet_kl(posterior, prior)
