"""Cases of the gaussian and divergence families."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cases.case import Case, Tensors, draw, key, plain, positive, randn, with_key
from isthmus import ops, reference

POSTERIOR = ("mean", "scale")
PRIOR = ("prior_mean", "prior_scale")


def gaussians(*shape: int, prior: bool = False) -> Callable[[], Tensors]:
    """Positive scales: valid for every scale type."""

    def make() -> Tensors:
        tensors = {"mean": randn(*shape), "scale": positive(*shape)}
        return tensors | ({"prior_mean": randn(*shape), "prior_scale": positive(*shape)} if prior else {})

    return make


def expected_noise(tensors: Tensors, options: dict[str, Any], stream: torch.dtype) -> Tensor:
    return draw(tensors["key"], options["shape"], options["dtype"])


def expected_sample(function: Callable[..., Any]) -> Callable[..., Any]:
    def expected(tensors: Tensors, options: dict[str, Any], stream: torch.dtype) -> Any:
        tensors = dict(tensors)
        samples = options.get("num_samples")
        shape = tensors["mean"].shape if samples is None else (samples, *tensors["mean"].shape)
        noise = draw(tensors.pop("key"), shape, stream)
        return function(**tensors, **options, noise=noise)

    return expected


def gaussian_cases() -> list[Case]:
    sample, sample_kl = ops.gaussian_sample, ops.gaussian_sample_kl
    expect, expect_kl = map(expected_sample, (reference.gaussian_sample, reference.gaussian_sample_kl))
    kl, expect_divergence = ops.gaussian_kl, plain(reference.gaussian_kl)
    cases = [
        Case(f"noise-{dtype}".replace("torch.", ""), ops.gaussian_noise, lambda: {"key": key()}, expected_noise,
             options={"shape": (3, 5, 7), "dtype": dtype})
        for dtype in (torch.float32, torch.float64)
    ]  # fmt: skip
    cases += [
        Case(f"sample-{s}", sample, with_key(gaussians(5, 19)), expect, POSTERIOR, options={"scale_type": s})
        for s in ("logvar", "std", "softplus", "square")
    ]
    cases += [
        Case("sample-3-tempered", sample, with_key(gaussians(2, 3, 7)), expect, POSTERIOR,
             options={"num_samples": 3, "temperature": 0.7}),
        Case("sample-vector", sample, with_key(gaussians(9)), expect, POSTERIOR),
    ]  # fmt: skip
    for s in ("logvar", "std", "softplus", "square"):
        for prior in (False, True):
            name = f"{s}-{'prior' if prior else 'standard'}"
            make, wanted = gaussians(5, 19, prior=prior), POSTERIOR + (PRIOR if prior else ())
            options = {"scale_type": s}
            cases.append(Case(f"sample_kl-{name}", sample_kl, with_key(make), expect_kl, wanted, (0, 1), options))
            cases.append(Case(f"kl-{name}", kl, make, expect_divergence, wanted, options=options))
    cases += [
        Case(
            f"kl-{r}", kl, gaussians(5, 19, prior=True), expect_divergence, POSTERIOR + PRIOR, options={"reduction": r}
        )
        for r in ("none", "sum", "mean")
    ]
    cases += [
        Case(f"sample_kl-{r}", sample_kl, with_key(gaussians(5, 19)), expect_kl, POSTERIOR, (0, 1), {"reduction": r})
        for r in ("none", "sum", "mean")
    ]
    cases.append(
        Case("sample_kl-3-samples", sample_kl, with_key(gaussians(2, 4, 6)), expect_kl, POSTERIOR, (0, 1),
             {"num_samples": 3, "temperature": 0.5})
    )  # fmt: skip
    return cases
