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
    return gaussian_nll_cases() + logistic_mixture_cases()
