"""A linear layer with Gaussian weights, under its two estimators."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from harness import MODES, assert_standard_normal, shapes
from torch import Tensor

from isthmus import ops


def sampled_weight(x: Tensor, mean: Tensor, rho: Tensor, bias_mean: Tensor, bias_rho: Tensor) -> Tensor:
    weight = mean + F.softplus(rho) * torch.randn_like(rho)
    bias = bias_mean + F.softplus(bias_rho) * torch.randn_like(bias_rho)
    return F.linear(x, weight, bias)


def output_moments(x: Tensor, mean: Tensor, rho: Tensor, bias_mean: Tensor, bias_rho: Tensor) -> tuple[Tensor, Tensor]:
    variance = F.linear(x.square(), F.softplus(rho).square(), F.softplus(bias_rho).square())
    return F.linear(x, mean, bias_mean), variance.sqrt()


def sampled_output(x: Tensor, mean: Tensor, rho: Tensor, bias_mean: Tensor, bias_rho: Tensor) -> Tensor:
    location, std = output_moments(x, mean, rho, bias_mean, bias_rho)
    return location + std * torch.randn_like(std)


PLAIN: dict[str, Callable[..., Tensor]] = {"weight": sampled_weight, "local": sampled_output}


@MODES
@pytest.mark.parametrize("estimator", PLAIN)
@shapes({"N": 32, "D": 64, "F": 64}, large=({"N": 256, "D": 512, "F": 512},))
def bench_bayes_linear(contest, shape, estimator, mode):
    rows, dims, features = shape.values()
    inputs = (
        torch.randn(rows, dims),
        torch.randn(features, dims) / dims**0.5,
        torch.randn(features, dims) - 3,
        torch.randn(features),
        torch.randn(features) - 3,
    )

    def compare(out: Tensor, *gradients: Tensor) -> tuple[Tensor, ...]:
        """Each output is normal with known moments; the gradients in the means are not random."""
        with torch.no_grad():
            location, std = output_moments(*inputs)
        assert_standard_normal((out.detach() - location) / std)
        return (gradients[1], gradients[3]) if gradients else ()

    products = {"weight": 1, "local": 2}[estimator] * (1 if mode == "fwd" else 3)
    contest(
        *inputs,
        plain=PLAIN[estimator],
        isthmus=lambda *inputs: ops.bayes_linear(*inputs, estimator=estimator),
        compare=compare,
        flops=2 * rows * dims * features * products,
    )
