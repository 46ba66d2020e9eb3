"""Cases of the likelihood family."""

from collections.abc import Callable

import torch

from cases.case import Case, Tensors, plain, positive, randn
from isthmus import ops, reference

PREDICTION = ("x", "mean", "scale")


def predictions(*shape: int, scale: tuple[int, ...] | None = None, weight: bool = False) -> Callable[[], Tensors]:
    """Positive scales: valid for every scale type. Weights are those of the columns."""

    def make() -> Tensors:
        tensors = {"x": randn(*shape), "mean": randn(*shape), "scale": positive(*(scale or shape))}
        return tensors | ({"weight": positive(shape[-1])} if weight else {})

    return make


def gaussian_nll_cases() -> list[Case]:
    op, expect = ops.gaussian_nll, plain(reference.gaussian_nll)
    cases = [
        Case(f"nll-{s}", op, predictions(5, 19), expect, PREDICTION, options={"scale_type": s})
        for s in ("logvar", "std", "softplus", "square")
    ]
    cases += [
        Case(f"nll-{r}", op, predictions(5, 19, weight=True), expect, PREDICTION, options={"reduction": r})
        for r in ("none", "row", "sum", "mean")
    ]
    one = predictions(5, 19, scale=(1, 1), weight=True)
    cases += [
        Case("nll-shared-scale", op, one, expect, PREDICTION, options={"scale_type": "std"}),
        # The factor carries no gradient: what comes back is not the derivative of the value.
        Case("nll-beta", op, predictions(5, 19, weight=True), expect, PREDICTION, (), {"beta": 0.5}),
    ]
    return cases


def discretized_gaussian_cases() -> list[Case]:
    op, expect = ops.discretized_gaussian_nll, plain(reference.discretized_gaussian_nll)
    wide, narrow = {"bin_width": 1.5, "low": -1.0, "high": 1.2}, {"bin_width": 0.05}
    cases = [
        Case(f"discretized-{s}", op, predictions(5, 19), expect, PREDICTION, options=wide | {"scale_type": s})
        for s in ("logvar", "std", "softplus", "square")
    ]
    cases += [
        Case(f"discretized-{r}", op, predictions(5, 19), expect, PREDICTION, options=narrow | {"reduction": r})
        for r in ("none", "row", "sum", "mean")
    ]
    one = predictions(5, 19, scale=(1, 1))
    return [*cases, Case("discretized-shared-scale", op, one, expect, PREDICTION, options=wide)]


def generalized_gaussian_cases() -> list[Case]:
    op, expect, four = ops.generalized_gaussian_nll, plain(reference.generalized_gaussian_nll), (*PREDICTION, "shape")

    def make(scale: tuple[int, ...] = (5, 19), shape: tuple[int, ...] = (5, 19)) -> Callable[[], Tensors]:
        def tensors() -> Tensors:
            # Shapes from 1/2 to 5 and scales around 1; x keeps away from the mean, where the density has a kink.
            return {
                "x": (1 + torch.rand(5, 19, dtype=torch.float64)) * (2 * torch.randint(2, (5, 19)) - 1),
                "mean": 0.3 * torch.rand(5, 19, dtype=torch.float64),
                "scale": positive(*scale),
                "shape": 0.5 + 4.5 * torch.rand(*shape, dtype=torch.float64),
            }

        return tensors

    cases = [
        Case(f"generalized-{r}", op, make(), expect, four, options={"reduction": r})
        for r in ("none", "row", "sum", "mean")
    ]
    return [*cases, Case("generalized-shared", op, make((1, 1), (1, 1)), expect, four)]


def image(channels: int, mixtures: int, height: int = 3, width: int = 7) -> Callable[[], Tensors]:
    """Pixels on the grid of 256 values, both ends among them, and the mixtures' parameters."""

    def make() -> Tensors:
        levels = torch.randint(0, 256, (2, channels, height, width))
        levels[0, :, 0, :2] = torch.tensor([0, 255])
        planes = mixtures * (3 if channels == 1 else 10)
        return {"x": levels.double() / 127.5 - 1, "parameters": 0.7 * randn(2, planes, height, width)}

    return make


def logistic_mixture_cases() -> list[Case]:
    op, expect = ops.discretized_logistic_mixture_nll, plain(reference.discretized_logistic_mixture_nll)
    wanted = ("x", "parameters")
    cases = [
        Case(f"logistic-{r}", op, image(3, 4), expect, wanted, options={"num_mixtures": 4, "reduction": r})
        for r in ("none", "image", "sum", "mean")
    ]
    grey = {"num_mixtures": 3, "min_log_scale": -0.5}
    return [*cases, Case("logistic-grey-floor", op, image(1, 3, 5, 14), expect, wanted, options=grey)]


def likelihood_cases() -> list[Case]:
    return gaussian_nll_cases() + discretized_gaussian_cases() + generalized_gaussian_cases() + logistic_mixture_cases()
