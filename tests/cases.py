"""One case for each way of calling a public op: small inputs, options, and the reference it must equal.

The generic tests (test_every_op.py) run over all of them; what is particular to a family stands in tests/ops/.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from isthmus import fold_in, ops, reference

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    name: str
    op: Callable[..., Any]
    inputs: Callable[[], Tensors]  # float64 and integer tensors; cast for each dtype
    # (wide tensors, options, dtype of the noise stream) -> the same outputs in plain PyTorch
    expected: Callable[[Tensors, dict[str, Any], torch.dtype], Any]
    differentiable: tuple[str, ...] = ()
    smooth: tuple[int, ...] = (0,)  # outputs whose gradient is the true derivative of their value
    options: dict[str, Any] = field(default_factory=dict)

    def tensors(self, dtype: torch.dtype, device: str = "cpu") -> Tensors:
        """Inputs rounded to `dtype`: the same draw for every dtype."""
        torch.manual_seed(0)
        return {k: cast(v, dtype, device) for k, v in self.inputs().items()}

    def call(self, tensors: Tensors) -> tuple[Tensor, ...]:
        return as_tuple(self.op(**tensors, **self.options))

    def reference(self, tensors: Tensors) -> tuple[Tensor, ...]:
        """The reference in float64 on these tensors (differentiable with respect to them)."""
        first = next(iter(tensors.values()))
        stream = torch.float64 if first.dtype == torch.float64 else torch.float32
        wide = {k: cast(v, torch.float64) for k, v in tensors.items()}
        return as_tuple(self.expected(wide, self.options, stream))

    def __str__(self) -> str:
        return self.name


def cast(t: Tensor | None, dtype: torch.dtype, device: str | None = None) -> Tensor | None:
    if t is None:
        return None
    return t.to(device=device, dtype=dtype if t.is_floating_point() else t.dtype)


def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return tuple(outputs) if isinstance(outputs, tuple | list) else (outputs,)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def positive(*shape: int) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64) + 0.5


def key() -> Tensor:
    return torch.tensor([1234567, 89])


def plain(function: Callable[..., Any]) -> Callable[..., Any]:
    """A reference that takes exactly the arguments of the op."""
    return lambda tensors, options, stream: function(**tensors, **options)


# ---- gaussian and divergence -----------------------------------------------------------------------------------------

POSTERIOR = ("mean", "scale")
PRIOR = ("prior_mean", "prior_scale")


def gaussians(*shape: int, prior: bool = False) -> Callable[[], Tensors]:
    """Positive scales: valid for every scale type."""

    def make() -> Tensors:
        tensors = {"mean": randn(*shape), "scale": positive(*shape)}
        return tensors | ({"prior_mean": randn(*shape), "prior_scale": positive(*shape)} if prior else {})

    return make


def with_key(make: Callable[[], Tensors]) -> Callable[[], Tensors]:
    return lambda: make() | {"key": key()}


def draw(key: Tensor, shape: Any, stream: torch.dtype) -> Tensor:
    return reference.gaussian_noise(key.cpu(), shape, stream).to(key.device, torch.float64)


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


# ---- codebook --------------------------------------------------------------------------------------------------------


def codes(*shape: int, num_codes: int) -> Callable[[], Tensors]:
    return lambda: {"x": randn(*shape), "codebook": randn(num_codes, shape[-1])}


def assigned(*shape: int, num_codes: int) -> Callable[[], Tensors]:
    return lambda: {"x": randn(*shape), "indices": torch.randint(num_codes, shape[:-1])}


def codebook_cases() -> list[Case]:
    assign, quantize = plain(reference.vq_assign), plain(reference.vq_quantize)
    statistics = plain(reference.code_statistics)
    wanted = ("x", "codebook")
    return [
        Case("assign", ops.vq_assign, codes(33, 10, num_codes=37), assign),
        Case("assign-scalar", ops.vq_assign, codes(2, 9, 1, num_codes=5), assign),
        Case("assign-wide", ops.vq_assign, codes(14, 70, num_codes=130), assign),
        Case("quantize", ops.vq_quantize, codes(33, 10, num_codes=7), quantize, wanted, (2,)),
        Case("quantize-weighted", ops.vq_quantize, codes(3, 4, 6, num_codes=5), quantize, wanted, (),
             {"commitment_weight": 0.25}),
        Case("statistics", ops.code_statistics, assigned(33, 10, num_codes=7), statistics, options={"num_codes": 7}),
    ]  # fmt: skip


# ---- sparse ----------------------------------------------------------------------------------------------------------


def dictionary(*shape: int, features: int, bias: bool) -> Callable[[], Tensors]:
    def make() -> Tensors:
        tensors = {"x": randn(*shape), "weight": randn(features, shape[-1]) / shape[-1] ** 0.5}
        return tensors | {"bias": randn(features) if bias else None}

    return make


def chosen(*shape: int, features: int, dim: int, bias: bool) -> Callable[[], Tensors]:
    def make() -> Tensors:
        tensors = {"values": randn(*shape), "indices": torch.randint(features, shape)}
        tensors["weight"] = randn(features, dim) / dim**0.5
        return tensors | ({"bias": randn(dim)} if bias else {})

    return make


def sparse_cases() -> list[Case]:
    encode, decode = plain(reference.topk_encode), plain(reference.sparse_decode)
    encoder, decoder = ("x", "weight", "bias"), ("values", "weight", "bias")
    return [
        Case("encode", ops.topk_encode, dictionary(17, 10, features=43, bias=True), encode, encoder, options={"k": 5}),
        Case("encode-identity", ops.topk_encode, dictionary(3, 4, 9, features=50, bias=False), encode, encoder[:2],
             options={"k": 7, "activation": "identity"}),
        Case("encode-all", ops.topk_encode, dictionary(5, 6, features=12, bias=True), encode, encoder,
             options={"k": 12}),
        Case("decode", ops.sparse_decode, chosen(17, 4, features=43, dim=10, bias=True), decode, decoder),
        Case("decode-wide", ops.sparse_decode, chosen(2, 3, 5, features=9, dim=70, bias=False), decode, decoder[:2]),
    ]  # fmt: skip


# ---- bayes -----------------------------------------------------------------------------------------------------------


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


CASES = gaussian_cases() + codebook_cases() + sparse_cases() + bayes_cases()
