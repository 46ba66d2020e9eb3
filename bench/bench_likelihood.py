"""Negative log-likelihoods of a decoder's prediction."""

from __future__ import annotations

import math

import torch
from harness import DTYPES, MODES, shapes
from torch import Tensor
from torch.nn.functional import gaussian_nll_loss, softplus

from isthmus import ops


def gaussian(x: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    return 0.5 * ((x - mean).square() * (-logvar).exp() + logvar + math.log(2 * math.pi)).sum(-1)


def torch_gaussian(x: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    return gaussian_nll_loss(mean, x, logvar.exp(), full=True, eps=0, reduction="none").sum(-1)


@MODES
@DTYPES
@shapes({"N": 256, "D": 64}, large=({"N": 4096, "D": 1024},))
def bench_gaussian_nll(contest, shape, dtype, mode):
    contest(
        *(0.5 * torch.randn(3, *shape.values())).to(getattr(torch, dtype)).unbind(),
        plain=gaussian,
        peer=("F.gaussian_nll_loss", torch_gaussian),
        isthmus=ops.gaussian_nll,
        compare=lambda *results: results,
    )


def logistic_mixture(x: Tensor, parameters: Tensor) -> Tensor:
    """As the public implementations do it: a difference of sigmoids, a density where that vanishes."""
    logits, rest = parameters.split([10, 90], dim=1)
    mean, log_scale, coefficient = rest.unflatten(1, (3, 3, 10)).unbind(2)
    log_scale, coefficient, x = log_scale.clamp(min=-7), coefficient.tanh(), x.unsqueeze(2)
    green = mean[:, 1] + coefficient[:, 0] * x[:, 0]
    blue = mean[:, 2] + coefficient[:, 1] * x[:, 0] + coefficient[:, 2] * x[:, 1]
    centered = x - torch.stack((mean[:, 0], green, blue), dim=1)
    inverse = torch.exp(-log_scale)
    upper, middle, lower = inverse * (centered + 1 / 255), inverse * centered, inverse * (centered - 1 / 255)
    difference = upper.sigmoid() - lower.sigmoid()
    density = middle - log_scale - 2 * softplus(middle) - math.log(127.5)
    inside = torch.where(difference > 1e-5, difference.clamp(min=1e-12).log(), density)
    ends = torch.where(x < -0.999, upper - softplus(upper), -softplus(lower))
    log_probability = torch.where(x.abs() > 0.999, ends, inside).sum(1)
    return -(logits.log_softmax(1) + log_probability).logsumexp(1).sum((1, 2))


@MODES
@shapes({"B": 4, "C": 3, "H": 8, "W": 8}, large=({"B": 32, "C": 3, "H": 32, "W": 32},))
def bench_discretized_logistic_mixture_nll(contest, shape, mode):
    batch, channels, height, width = shape.values()
    x = torch.randint(0, 256, (batch, channels, height, width)) / 127.5 - 1
    contest(
        x,
        torch.randn(batch, 100, height, width),
        plain=logistic_mixture,
        isthmus=ops.discretized_logistic_mixture_nll,
        compare=lambda *results: results[:1],
    )


@MODES
@shapes({"N": 256, "D": 64}, large=({"N": 1024, "D": 1024},))
def bench_discretized_gaussian_nll(contest, shape, mode):
    """Bins of an 8-bit image. The plain form is that of learned compression, with its floor against log 0."""
    size = tuple(shape.values())
    x, mean, logvar = torch.rand(size).mul(255).round() / 255, torch.rand(size), torch.randn(size) - 3

    def plain(x: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
        scale, half = torch.exp(0.5 * logvar), 0.5 / 255
        upper, lower = (torch.special.ndtr((x + sign * half - mean) / scale) for sign in (1, -1))
        return -torch.log((upper - lower).clamp(min=1e-9)).sum(-1)

    def fused(x: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
        return ops.discretized_gaussian_nll(x, mean, logvar, bin_width=1 / 255)

    def compare(*results: Tensor) -> tuple[Tensor, ...]:
        """Where the floor acts the two differ; where it does not, cancellation leaves the plain form three digits."""
        exact = fused(x.double(), mean.double(), logvar.double())
        torch.testing.assert_close(results[0].double().mean(), exact.mean(), rtol=0.1, atol=0)
        return ()

    contest(x, mean, logvar, plain=plain, isthmus=fused, compare=compare)


@MODES
@shapes({"N": 256, "D": 64}, large=({"N": 1024, "D": 1024},))
def bench_generalized_gaussian_nll(contest, shape, mode):
    size = tuple(shape.values())

    def plain(x: Tensor, mean: Tensor, scale: Tensor, beta: Tensor) -> Tensor:
        power = ((x - mean).abs() / scale) ** beta
        return (power - torch.log(beta) + torch.log(2 * scale) + torch.lgamma(1 / beta)).sum(-1)

    contest(
        torch.randn(size),
        torch.randn(size),
        torch.rand(size) + 0.5,
        torch.rand(size) + 1,
        plain=plain,
        isthmus=ops.generalized_gaussian_nll,
        compare=lambda *results: results,
    )
