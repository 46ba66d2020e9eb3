"""Cases of the pairwise family."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from cases.case import Case, Tensors, positive, randn
from isthmus import ops, reference


def positional(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with its tensors in order, whatever they are called.

    The generic suite takes the names `x`, `mean` and `scale` for a batch and cuts them together; here some inputs are
    a batch and others are not.
    """

    def call(**arguments: Any) -> Any:
        tensors = [a for a in arguments.values() if isinstance(a, Tensor)]
        return function(*tensors, **{k: a for k, a in arguments.items() if not isinstance(a, Tensor)})

    return call


def plain(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda tensors, options, stream: positional(function)(**tensors, **options)


def mixture(z: str, *shape: int, components: int, weights: int = 0) -> Callable[[], Tensors]:
    def make() -> Tensors:
        tensors = {z: randn(*shape), "centers": randn(components, shape[-1])}
        tensors["widths"] = positive(components, shape[-1])
        return tensors | ({"log_weight": randn(weights) - 2} if weights else {})

    return make


def posteriors(batch: int, dim: int) -> Callable[[], Tensors]:
    return lambda: {"x": randn(batch, dim), "mean": randn(batch, dim), "scale": positive(batch, dim)}


def two_samples(first: int, second: int, dim: int) -> Callable[[], Tensors]:
    return lambda: {"first": randn(first, dim), "second": randn(second, dim) + 0.5}


def pairwise_cases() -> list[Case]:
    batch, inputs, weighted = ("x", "centers", "widths"), ("z", "centers", "widths"), ("log_weight",)
    density, expected = positional(ops.mixture_log_prob), plain(reference.mixture_log_prob)
    support, expected_support = positional(ops.component_log_prob), plain(reference.component_log_prob)
    terms, expected_terms = positional(ops.aggregate_log_prob), plain(reference.aggregate_log_prob)
    cases = [
        Case(f"mixture-{s}", density, mixture("x", 3, 7, 5, components=11, weights=11), expected, batch + weighted,
             options={"scale_type": s})
        for s in ("logvar", "std", "softplus", "square")
    ]  # fmt: skip
    cases += [
        Case("mixture-uniform", density, mixture("x", 29, 19, components=37), expected, batch),
        Case("mixture-one", density, mixture("x", 4, 1, components=1), expected, batch),
        Case("mixture-vector", density, mixture("z", 6, components=5), expected, inputs),
        Case("component", support, mixture("z", 29, 6, components=37), expected_support, inputs),
        Case("component-weighted", support, mixture("z", 61, 6, components=5, weights=61), expected_support,
             inputs + weighted),
    ]  # fmt: skip
    cases += [
        Case(f"aggregate-{estimator}-{s}", terms, posteriors(9, 5), expected_terms, ("x", "mean", "scale"), (0, 1),
             {"dataset_size": 50, "estimator": estimator, "scale_type": s})
        for estimator, s in [("weighted", "logvar"), ("stratified", "std"), ("stratified", "softplus")]
    ]  # fmt: skip
    distance, expected_distance = positional(ops.mmd), plain(reference.mmd)
    cases += [
        Case(f"mmd-{kernel}-{estimator}", distance, two_samples(13, 9, 5), expected_distance, ("first", "second"),
             options={"kernel": kernel, "estimator": estimator})
        for kernel in ("rbf", "imq") for estimator in ("unbiased", "biased")
    ]  # fmt: skip
    cases.append(
        Case("mmd-one-bandwidth", distance, two_samples(35, 40, 1), expected_distance, ("first", "second"),
             options={"bandwidths": (0.7,)})
    )  # fmt: skip
    return cases
