"""What changing one import does: torch.distributions against isthmus.distributions, in the terms of an autoencoder."""

from __future__ import annotations

from types import ModuleType

import torch
from harness import MODES, assert_standard_normal, shapes
from torch import Tensor, distributions
from torch.distributions import kl_divergence

from isthmus import distributions as fused

SHAPES = shapes({"N": 256, "D": 64}, large=({"N": 4096, "D": 1024},))
distributions.Distribution.set_default_validate_args(False)


def normals(shape: dict[str, int], count: int) -> list[Tensor]:
    return [0.5 * t for t in torch.randn(count, *shape.values()).unbind()]


def posterior_terms(library: ModuleType):
    def terms(mean: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
        posterior = library.Independent(library.Normal(mean, torch.exp(0.5 * logvar)), 1)
        prior = library.Independent(library.Normal(torch.zeros_like(mean), torch.ones_like(mean)), 1)
        return posterior.rsample(), kl_divergence(posterior, prior)

    return terms


def from_logvar_terms(mean: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    posterior = fused.Independent(fused.Normal.from_logvar(mean, logvar), 1)
    zero = mean.new_zeros(()).expand_as(mean)
    prior = fused.Independent(fused.Normal.from_logvar(zero, zero), 1)
    return posterior.rsample(), kl_divergence(posterior, prior)


def compare_posteriors(mean: Tensor, logvar: Tensor):
    def compare(z: Tensor, kl: Tensor, *gradients: Tensor) -> tuple[Tensor, ...]:
        deviation = (z - mean).detach()
        assert_standard_normal(deviation / torch.exp(0.5 * logvar))
        if not gradients:
            return (kl,)
        # dz/dlogvar = (z - mean) / 2 is the only random term of the gradients.
        return kl, gradients[0], gradients[1] - 0.5 * deviation

    return compare


@MODES
@SHAPES
def bench_normal_posterior(contest, shape, mode):
    mean, logvar = normals(shape, 2)
    contest(
        mean,
        logvar,
        plain=posterior_terms(distributions),
        isthmus=posterior_terms(fused),
        compare=compare_posteriors(mean, logvar),
    )


@MODES
@SHAPES
def bench_normal_posterior_from_logvar(contest, shape, mode):
    mean, logvar = normals(shape, 2)
    contest(
        mean,
        logvar,
        plain=posterior_terms(distributions),
        isthmus=from_logvar_terms,
        compare=compare_posteriors(mean, logvar),
    )


def log_prob(library: ModuleType):
    def density(x: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
        return library.Independent(library.Normal(mean, scale.exp()), 1).log_prob(x)

    return density


@MODES
@SHAPES
def bench_normal_log_prob(contest, shape, mode):
    contest(
        *normals(shape, 3),
        plain=log_prob(distributions),
        isthmus=log_prob(fused),
        compare=lambda *results: results,
    )
