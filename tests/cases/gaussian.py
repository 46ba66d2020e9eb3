"""Cases of the gaussian and divergence families."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cases.case import Case, Tensors, draw, key, plain, positive, randn, with_key
from isthmus import ops, reference

POSTERIOR = ("mean", "scale")
PRIOR = ("prior_mean", "prior_scale")
SCALE_TYPES = ("logvar", "std", "softplus", "square")
CLAMP_MODES = ("hard", "pass_through", "tanh")
UNSMOOTH = ("balance", "clamp-pass_through")  # options whose gradient is not the derivative of the value


def gaussians(*shape: int, prior: bool = False) -> Callable[[], Tensors]:
    """Positive scales: valid for every scale type."""

    def make() -> Tensors:
        tensors = {"mean": randn(*shape), "scale": positive(*shape)}
        return tensors | ({"prior_mean": randn(*shape), "prior_scale": positive(*shape)} if prior else {})

    return make


def expected_noise(tensors: Tensors, options: dict[str, Any], stream: torch.dtype) -> Tensor:
    return draw(tensors["key"], options["shape"], options["dtype"])


def packed(*shape: int, dim: int) -> Callable[[], Tensors]:
    """Mean and positive scale as halves of one tensor."""
    return lambda: {"mean": torch.cat((randn(*shape), positive(*shape)), dim)}


def with_mask(make: Callable[[], Tensors]) -> Callable[[], Tensors]:
    """Every second row kept, the first left out."""

    def masked() -> Tensors:
        tensors = make()
        rows = torch.arange(tensors["mean"][..., 0].numel()).reshape(tensors["mean"].shape[:-1])
        return tensors | {"mask": rows % 2 == 1}

    return masked


def expected_sample(function: Callable[..., Any]) -> Callable[..., Any]:
    def expected(tensors: Tensors, options: dict[str, Any], stream: torch.dtype) -> Any:
        tensors = dict(tensors)
        shape = list(tensors["mean"].shape)
        if "scale" not in tensors:
            shape[options.get("packed_dim", -1)] //= 2
        samples = options.get("num_samples")
        if samples is not None:
            shape.insert(0, samples // 2 if options.get("antithetic") else samples)
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
        for s in SCALE_TYPES
    ]
    cases += [
        Case("sample-3-tempered", sample, with_key(gaussians(2, 3, 7)), expect, POSTERIOR,
             options={"num_samples": 3, "temperature": 0.7}),
        Case("sample-vector", sample, with_key(gaussians(9)), expect, POSTERIOR),
    ]  # fmt: skip
    for s in SCALE_TYPES:
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
    cases += [
        Case("sample_kl-3-samples", sample_kl, with_key(gaussians(2, 4, 6)), expect_kl, POSTERIOR, (0, 1),
             {"num_samples": 3, "temperature": 0.5}),
        Case("sample-antithetic", sample, with_key(gaussians(3, 7)), expect, POSTERIOR,
             options={"num_samples": 4, "antithetic": True}),
        Case("sample-packed", sample, with_key(packed(5, 19, dim=-1)), expect, ("mean",)),
    ]  # fmt: skip
    return cases + kl_option_cases() + log_prob_cases() + bound_cases()


def kl_option_cases() -> list[Case]:
    """Each option of the divergence, on gaussian_kl and gaussian_sample_kl alike."""
    four = POSTERIOR + PRIOR
    given = gaussians(2, 3, 8, prior=True)
    ways: list[tuple[str, Callable[[], Tensors], tuple[str, ...], dict[str, Any]]] = [
        ("packed", packed(5, 19, dim=-1), ("mean",), {"scale_type": "softplus"}),
        ("packed-channels", packed(3, 2, 4, 5, dim=1), ("mean",), {"packed_dim": 1, "reduction": "batch"}),
        ("group", given, four, {"reduction": "group", "groups": 4}),
        ("batch", given, four, {"reduction": "batch"}),
        ("dim", gaussians(70, 19, prior=True), four, {"reduction": "dim"}),
        ("shared-prior", gaussians(5, 19), POSTERIOR, {"prior_mean": 0.25, "prior_scale": 0.75, "scale_type": "std"}),
        ("mask", with_mask(given), four, {}),
        ("mask-none", with_mask(given), four, {"reduction": "none"}),
        ("mask-mean", with_mask(gaussians(5, 19)), POSTERIOR, {"reduction": "mean"}),
        ("mask-dim", with_mask(gaussians(5, 19)), POSTERIOR, {"reduction": "dim"}),
        ("bits", given, four, {"unit": "bits", "reduction": "sum", "beta": 0.5}),
        ("free-bits", given, four, {"reduction": "dim", "free_bits": 1.0}),
        ("capacity", given, four, {"capacity": 3.0}),
        ("balance", given, four, {"balance": 0.8}),
    ]
    ways += [(f"residual-{s}", given, four, {"residual": True, "scale_type": s}) for s in SCALE_TYPES]
    ways += [(f"clamp-{m}", given, four, {"clamp": (0.8, 1.2), "clamp_mode": m}) for m in CLAMP_MODES]
    expect, expect_kl = plain(reference.gaussian_kl), expected_sample(reference.gaussian_sample_kl)
    # The divergence of a residual posterior does not depend on the prior's mean.
    cases = [
        Case(
            f"kl-{name}",
            ops.gaussian_kl,
            make,
            expect,
            tuple(w for w in wanted if w != "prior_mean" or "residual" not in name),
            () if name in UNSMOOTH else (0,),
            options,
        )
        for name, make, wanted, options in ways
    ]
    cases += [
        Case(f"sample_kl-{name}", ops.gaussian_sample_kl, with_key(make), expect_kl, wanted,
             (0,) if name == "balance" else () if name in UNSMOOTH else (0, 1), options)
        for name, make, wanted, options in ways
    ]  # fmt: skip
    return cases


def log_prob_cases() -> list[Case]:
    def expect(tensors: Tensors, options: dict[str, Any], stream: torch.dtype) -> Any:
        options = dict(options)
        path_only = options.pop("gradient", "total") == "path"
        function = partial(reference.gaussian_sample_log_prob, path_only=path_only)
        return expected_sample(function)(tensors, options, stream)

    log_prob, four, everything = ops.gaussian_sample_log_prob, POSTERIOR + PRIOR, (0, 1, 2, 3)
    given, several = gaussians(3, 4, 7, prior=True), {"num_samples": 3}
    cases = [
        Case(f"log_prob-{s}-{'prior' if prior else 'standard'}", log_prob, with_key(gaussians(5, 19, prior=prior)),
             expect, POSTERIOR + (PRIOR if prior else ()), everything, {"scale_type": s})
        for s in SCALE_TYPES for prior in (False, True)
    ]  # fmt: skip
    cases += [
        Case("log_prob-samples", log_prob, with_key(given), expect, four, everything, several),
        Case("log_prob-tempered-antithetic", log_prob, with_key(given), expect, four, everything,
             {"num_samples": 4, "antithetic": True, "temperature": 0.6}),
        Case("log_prob-residual", log_prob, with_key(given), expect, four, everything, several | {"residual": True}),
        Case("log_prob-packed", log_prob, with_key(packed(5, 6, dim=-1)), expect, ("mean",), everything, several),
        Case("log_prob-path", log_prob, with_key(given), expect, four, (0, 1), several | {"gradient": "path"}),
    ]  # fmt: skip
    return cases


def bound_cases() -> list[Case]:
    bound, expect = ops.log_mean_exp, plain(reference.log_mean_exp)
    return [
        Case("bound", bound, lambda: {"log_weights": 3 * randn(7, 5, 9)}, expect, ("log_weights",)),
        Case("bound-groups", bound, lambda: {"log_weights": randn(12, 35)}, expect, ("log_weights",),
             options={"groups": 3}),
    ]  # fmt: skip
