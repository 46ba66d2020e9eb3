"""Reparameterised sampling, alone and with the KL term of a variational autoencoder."""

from __future__ import annotations

import math

import numpy as np
import torch
from harness import DTYPES, MODES, assert_standard_normal, shapes
from torch import Tensor
from torch.distributions import Normal, kl_divergence

import isthmus
from isthmus import ops


def posterior(shape: dict[str, int], dtype: str) -> tuple[Tensor, Tensor]:
    size = tuple(shape.values())
    kind = getattr(torch, dtype)
    return torch.randn(size).to(kind), (0.5 * torch.randn(size)).to(kind)


def sample_kl(mean: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    std = torch.exp(0.5 * logvar)
    z = mean + std * torch.randn_like(std)
    return z, -0.5 * (1 + logvar - mean.square() - logvar.exp()).sum(-1)


def distributions_sample_kl(mean: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    q = Normal(mean, torch.exp(0.5 * logvar), validate_args=False)
    p = Normal(torch.zeros_like(mean), torch.ones_like(mean), validate_args=False)
    return q.rsample(), kl_divergence(q, p).sum(-1)


@MODES
@DTYPES
@shapes({"N": 256, "D": 64}, large=({"N": 4096, "D": 1024},))
def bench_gaussian_sample_kl(contest, shape, dtype, mode):
    mean, logvar = posterior(shape, dtype)

    def compare(z: Tensor, kl: Tensor, *gradients: Tensor) -> tuple[Tensor, ...]:
        deviation = (z.float() - mean.float()).detach()
        assert_standard_normal(deviation / torch.exp(0.5 * logvar.float()))
        if not gradients:
            return (kl,)
        # dz/dlogvar = (z - mean) / 2 is the only random term of the gradients.
        return kl, gradients[0], gradients[1].float() - 0.5 * deviation

    contest(
        mean,
        logvar,
        plain=sample_kl,
        peer=("torch.distributions", distributions_sample_kl),
        isthmus=ops.gaussian_sample_kl,
        compare=compare,
    )


@MODES
@shapes({"N": 256, "D": 64}, large=({"N": 4096, "D": 1024},))
def bench_gaussian_sample(contest, shape, mode):
    mean, logvar = posterior(shape, "float32")

    def compare(z: Tensor, *gradients: Tensor) -> tuple[Tensor, ...]:
        deviation = (z - mean).detach()
        assert_standard_normal(deviation / torch.exp(0.5 * logvar))
        return (gradients[0], gradients[1] + 1 - 0.5 * deviation) if gradients else ()

    contest(
        mean,
        logvar,
        plain=lambda mean, logvar: mean + torch.exp(0.5 * logvar) * torch.randn_like(logvar),
        peer=(
            "torch.distributions",
            lambda mean, logvar: Normal(mean, torch.exp(0.5 * logvar), validate_args=False).rsample(),
        ),
        isthmus=ops.gaussian_sample,
        compare=compare,
    )


def log_weights(z: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    """log p(z) - log q(z) of each sample; the constants cancel."""
    return 0.5 * ((z - mean).square() * torch.exp(-logvar) + logvar - z.square()).sum(-1)


@MODES
@shapes({"K": 64, "N": 256, "D": 64})
def bench_importance_bound(contest, shape, mode):
    samples = shape["K"]
    mean, logvar = posterior({"N": shape["N"], "D": shape["D"]}, "float32")

    def plain(mean: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
        z = mean + torch.exp(0.5 * logvar) * torch.randn(samples, *mean.shape)
        return z, torch.logsumexp(log_weights(z, mean, logvar), 0) - math.log(samples)

    def distributions(mean: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
        q = Normal(mean, torch.exp(0.5 * logvar), validate_args=False)
        p = Normal(torch.zeros_like(mean), torch.ones_like(mean), validate_args=False)
        z = q.rsample((samples,))
        return z, torch.logsumexp((p.log_prob(z) - q.log_prob(z)).sum(-1), 0) - math.log(samples)

    def fused(mean: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
        z, _, log_q, log_p = ops.gaussian_sample_log_prob(mean, logvar, num_samples=samples)
        return z, ops.log_mean_exp(log_p - log_q)[0]

    def compare(z: Tensor, bound: Tensor, *gradients: Tensor) -> tuple[Tensor, ...]:
        """Each draws its own samples; the bound must be that of its samples."""
        assert_standard_normal(((z - mean) / torch.exp(0.5 * logvar)).detach())
        expected = torch.logsumexp(log_weights(z, mean, logvar), 0) - math.log(samples)
        torch.testing.assert_close(bound, expected, rtol=1e-4, atol=1e-4)
        return ()

    contest(mean, logvar, plain=plain, peer=("torch.distributions", distributions), isthmus=fused, compare=compare)


@shapes({"N": 2**14}, large=({"N": 2**22},))
def bench_gaussian_noise(contest, shape):
    size = shape["N"]
    ziggurat = np.random.Generator(np.random.SFC64(0))

    def compare(noise: Tensor) -> tuple[Tensor, ...]:
        assert_standard_normal(noise)
        return ()

    contest(
        plain=lambda: torch.randn(size),
        peer=("NumPy SFC64", lambda: torch.from_numpy(ziggurat.standard_normal(size, np.float32))),
        isthmus=lambda: ops.gaussian_noise(isthmus.key(), (size,)),
        compare=compare,
    )
