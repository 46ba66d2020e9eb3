"""KL divergence of diagonal Gaussians, to the standard normal and to a learned prior."""

from __future__ import annotations

import torch
from harness import DTYPES, MODES, shapes
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from isthmus import ops


def kl_standard(mean: Tensor, logvar: Tensor) -> Tensor:
    return -0.5 * (1 + logvar - mean.square() - logvar.exp()).sum(-1)


def kl_prior(mean: Tensor, logvar: Tensor, prior_mean: Tensor, prior_logvar: Tensor) -> Tensor:
    ratio = (logvar - prior_logvar).exp()
    distance = (mean - prior_mean).square() * (-prior_logvar).exp()
    return 0.5 * (ratio + distance - 1 + prior_logvar - logvar).sum(-1)


def normal(mean: Tensor, logvar: Tensor) -> Normal:
    return Normal(mean, torch.exp(0.5 * logvar), validate_args=False)


def distributions_kl(mean: Tensor, logvar: Tensor, *prior: Tensor) -> Tensor:
    p = normal(*prior) if prior else normal(torch.zeros_like(mean), torch.zeros_like(logvar))
    return kl_divergence(normal(mean, logvar), p).sum(-1)


@MODES
@DTYPES
@shapes({"N": 256, "D": 64}, large=({"N": 4096, "D": 1024},))
def bench_gaussian_kl(contest, shape, dtype, mode):
    mean, logvar = torch.randn(2, *shape.values()).mul(0.5).to(getattr(torch, dtype)).unbind()
    contest(
        mean.clone(),
        logvar.clone(),
        plain=kl_standard,
        peer=("torch.distributions", distributions_kl),
        isthmus=ops.gaussian_kl,
        compare=lambda *results: results,
    )


@MODES
@shapes({"N": 256, "D": 64}, large=({"N": 4096, "D": 1024},))
def bench_gaussian_kl_prior(contest, shape, mode):
    contest(
        *(0.5 * torch.randn(4, *shape.values())).unbind(),
        plain=kl_prior,
        peer=("torch.distributions", distributions_kl),
        isthmus=ops.gaussian_kl,
        compare=lambda *results: results,
    )
