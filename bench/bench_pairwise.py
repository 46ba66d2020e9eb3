"""Terms over all pairs: mixture densities, the aggregate posterior of beta-TC, maximum mean discrepancy."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from harness import MODES, shapes
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from isthmus import ops


def log_density(z: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    """[B, K, D]"""
    squares = (z.unsqueeze(1) - mean).square() * torch.exp(-logvar)
    return -0.5 * (squares + logvar + math.log(2 * math.pi))


def broadcast_mixture(z: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    return torch.logsumexp(log_density(z, mean, logvar).sum(-1), 1) - math.log(len(mean))


def expanded_mixture(z: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    """The square expanded into two matrix products: fast, and wrong far from the origin."""
    precision = torch.exp(-logvar)
    offset = -0.5 * (mean.square() * precision + logvar + math.log(2 * math.pi)).sum(-1)
    scores = offset - 0.5 * z.square() @ precision.t() + z @ (mean * precision).t()
    return torch.logsumexp(scores, 1) - math.log(len(mean))


def distributions_mixture(z: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    components = Independent(Normal(mean, torch.exp(0.5 * logvar), validate_args=False), 1, validate_args=False)
    weights = Categorical(logits=mean.new_zeros(len(mean)), validate_args=False)
    return MixtureSameFamily(weights, components, validate_args=False).log_prob(z)


@MODES
@shapes({"B": 256, "K": 64, "D": 32}, large=({"B": 4096, "K": 512, "D": 64},))
def bench_mixture_log_prob(contest, shape, mode):
    rows, components, dims = shape.values()
    contest(
        torch.randn(rows, dims),
        torch.randn(components, dims),
        0.3 * torch.randn(components, dims),
        plain=broadcast_mixture,
        peer=("expanded square", expanded_mixture),
        isthmus=ops.mixture_log_prob,
        compare=lambda *results: results,
        flops=4 * rows * components * dims,
    )


@MODES
@shapes({"B": 256, "K": 64, "D": 32})
def bench_mixture_log_prob_distributions(contest, shape, mode):
    rows, components, dims = shape.values()
    contest(
        torch.randn(rows, dims),
        torch.randn(components, dims),
        0.3 * torch.randn(components, dims),
        plain=broadcast_mixture,
        peer=("torch.distributions", distributions_mixture),
        isthmus=ops.mixture_log_prob,
        compare=lambda *results: results,
        flops=4 * rows * components * dims,
    )


DATASET_SIZE = 50_000


def broadcast_aggregate(z: Tensor, mean: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    """Minibatch-weighted sampling, as the authors of beta-TC-VAE write it."""
    terms = log_density(z, mean, logvar)
    constant = math.log(DATASET_SIZE * len(z))
    return torch.logsumexp(terms.sum(-1), 1) - constant, (torch.logsumexp(terms, 1) - constant).sum(-1)


def mixed_aggregate(z: Tensor, mean: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    """The joint by matrix products, the marginals one dimension at a time: memory of B x B only."""
    constant = math.log(DATASET_SIZE * len(z))
    joint = expanded_mixture(z, mean, logvar) - math.log(DATASET_SIZE)
    marginals = torch.zeros_like(joint)
    for d in range(z.shape[1]):
        terms = log_density(z[:, d : d + 1], mean[:, d : d + 1], logvar[:, d : d + 1]).squeeze(-1)
        marginals = marginals + torch.logsumexp(terms, 1) - constant
    return joint, marginals


@MODES
@shapes({"B": 128, "D": 10}, large=({"B": 1024, "D": 64},))
def bench_aggregate_log_prob(contest, shape, mode):
    mean, logvar, noise = torch.randn(3, *shape.values()).mul(0.5).unbind()
    contest(
        mean + noise,
        mean.clone(),
        logvar.clone(),
        plain=broadcast_aggregate,
        peer=("one dimension at a time", mixed_aggregate),
        isthmus=lambda z, mean, logvar: ops.aggregate_log_prob(z, mean, logvar, DATASET_SIZE),
        compare=lambda *results: results,
    )


BANDWIDTHS = (2.0, 4.0, 8.0, 16.0)


def rbf_mmd(squared_distances: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """The biased estimate over any way to squared distances."""

    def kernel_mean(x: Tensor, y: Tensor) -> Tensor:
        squares = squared_distances(x, y)
        return sum(torch.exp(-squares / (2 * h * h)).mean() for h in BANDWIDTHS)

    return lambda x, y: kernel_mean(x, x) + kernel_mean(y, y) - 2 * kernel_mean(x, y)


def broadcast_distances(x: Tensor, y: Tensor) -> Tensor:
    return (x.unsqueeze(1) - y).square().sum(-1)


def expanded_distances(x: Tensor, y: Tensor) -> Tensor:
    """Fast, but the distance of a point from itself is not 0."""
    return x.square().sum(1, keepdim=True) + y.square().sum(1) - 2 * x @ y.t()


@MODES
@shapes({"N": 256, "D": 16}, large=({"N": 1024, "D": 64},))
def bench_mmd(contest, shape, mode):
    x, y = torch.randn(2, *shape.values()).unbind()
    contest(
        x.clone(),
        1.5 * y + 0.5,
        plain=rbf_mmd(broadcast_distances),
        peer=("expanded square", rbf_mmd(expanded_distances)),
        isthmus=lambda x, y: ops.mmd(x, y, bandwidths=BANDWIDTHS, estimator="biased"),
        compare=lambda *results: results,
    )
