"""Cases of the bayes family."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cases.case import Case, Tensors, draw, positive, randn, with_key
from isthmus import fold_in, ops, reference


def layer(*shape: int, features: int, bias: bool) -> Callable[[], Tensors]:
    def make() -> Tensors:
        tensors = {
            "x": randn(*shape),
            "weight_mean": randn(features, shape[-1]) / shape[-1] ** 0.5,
            "weight_scale": positive(features, shape[-1]),
        }
        return tensors | ({"bias_mean": randn(features), "bias_scale": positive(features)} if bias else {})

    return make


def expected_linear(tensors: Tensors, options: dict[str, Any], stream: torch.dtype) -> Tensor:
    tensors = dict(tensors)
    key, weight = tensors.pop("key"), tensors["weight_mean"]
    if options["estimator"] == "local":
        noise = draw(key, (*tensors["x"].shape[:-1], weight.shape[0]), stream)
        return reference.bayes_linear(**tensors, **options, noise=noise)
    bias_noise = draw(fold_in(key, 1), weight.shape[:1], stream)
    return reference.bayes_linear(**tensors, **options, noise=draw(key, weight.shape, stream), bias_noise=bias_noise)


def bayes_cases() -> list[Case]:
    weights, biases = ("x", "weight_mean", "weight_scale"), ("bias_mean", "bias_scale")
    cases = [
        Case(f"linear-{estimator}-{s}", ops.bayes_linear, with_key(layer(6, 11, features=13, bias=True)),
             expected_linear, weights + biases, options={"estimator": estimator, "scale_type": s})
        for estimator in ("weight", "local") for s in ("logvar", "std", "softplus", "square")
    ]  # fmt: skip
    cases += [
        Case(f"linear-{estimator}-no-bias", ops.bayes_linear, with_key(layer(2, 3, 5, features=35, bias=False)),
             expected_linear, weights, options={"estimator": estimator})
        for estimator in ("weight", "local")
    ]  # fmt: skip
    return cases
