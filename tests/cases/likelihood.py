"""Cases of the likelihood family."""

from collections.abc import Callable

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


def likelihood_cases() -> list[Case]:
    return gaussian_nll_cases()
