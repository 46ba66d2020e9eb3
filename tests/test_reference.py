"""The specification, held against independent evidence: closed forms, brute force, other libraries.

Everything else is tested against ``isthmus.reference``, so nothing here may use another part of
Isthmus as its oracle.
"""

import doctest
import importlib
import math

import mpmath
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.distributions import Categorical, Normal, kl_divergence
from torch.nn.functional import softplus

from isthmus import reference
from isthmus.random import key

needs_torch_random = pytest.mark.skipif(
    torch.__version__ < (2, 14), reason="torch.func._random runs on the CPU from torch 2.14 on"
)

STD = {
    "logvar": lambda scale: torch.exp(0.5 * scale),
    "std": lambda scale: scale,
    "softplus": softplus,
    "square": lambda scale: scale * scale,
}
scale_types = pytest.mark.parametrize("scale_type", list(STD))
half_types = pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
HALF_EPS = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # unit roundoff


def positive(x):
    """A leaf that is valid as a scale of any type."""
    return (x.detach().abs() + 0.5).requires_grad_()


def ulps(a, b):
    """Largest distance of a from b, in units of the last place of b."""
    spacing = torch.nextafter(b.abs(), torch.full_like(b, torch.inf)) - b.abs()
    return ((a.double() - b.double()).abs() / spacing.double()).max().item()


# noise


# From torch 2.15: torch.func._random.normal(torch.func._random.key(0), 8, dtype=...).
NOISE_OF_0 = {
    torch.float32: [
        *(0.99113774299621582, -0.92466241121292114, -0.61760884523391724, -0.48206874728202820),
        *(-0.15363818407058716, 0.18082579970359802, 0.83173507452011108, 0.19743970036506653),
    ],
    torch.float64: [
        *(-0.12151797595308224, -1.35003265985765508, -0.08187420991589159, -0.22270905893902698),
        *(1.77642433315204151, 2.17352073746283070, -0.54734414261101150, -0.42253290352103795),
    ],
}


@pytest.mark.parametrize("dtype", list(NOISE_OF_0))
def test_noise_known_answers(dtype):
    noise = reference.gaussian_noise(key(0), [8], dtype)
    assert noise.dtype == dtype
    assert ulps(noise, torch.tensor(NOISE_OF_0[dtype], dtype=dtype)) <= 3


@needs_torch_random
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("words", [(1, 0), (-1, -1), (2**40 + 3, 2**32 - 1), (5, 2**62 - 1)])
def test_noise_equals_torch_within_3_ulp(dtype, words):
    from torch.func import _random as torch_random

    ours = torch.tensor(words)
    theirs = torch_random.normal(ours.view(torch.uint64), (50_001,), dtype=dtype)
    assert ulps(reference.gaussian_noise(ours, [50_001], dtype), theirs) <= 3


@half_types
def test_half_noise_rounds_the_float32_stream(half):
    noise = reference.gaussian_noise(key(2), [1001], half)
    assert torch.equal(noise, reference.gaussian_noise(key(2), [1001]).to(half))


@needs_torch_random
@half_types
def test_half_noise_equals_torch_but_for_rounding_across_a_tie(half):
    from torch.func import _random as torch_random

    noise = reference.gaussian_noise(key(2), [10_001], half)
    theirs = torch_random.normal(key(2).view(torch.uint64), (10_001,), dtype=half)
    assert ulps(noise, theirs) <= 1
    assert (noise == theirs).double().mean() > 0.999


@pytest.mark.parametrize(("dtype", "lanes"), [(torch.float32, 4), (torch.bfloat16, 4), (torch.float64, 2)])
def test_one_step_of_offset_skips_one_block(dtype, lanes):
    for offset in (0, 2**32 - 2, 2**63 - 2, -2):
        blocks = [offset + step for step in range(3)]
        keys = [torch.tensor([11, (b + 2**63) % 2**64 - 2**63]) for b in blocks]
        whole = reference.gaussian_noise(keys[0], [3 * lanes], dtype)
        parts = [reference.gaussian_noise(k, [lanes], dtype) for k in keys]
        assert torch.equal(whole, torch.cat(parts))


def test_noise_depends_on_the_contiguous_index_alone():
    flat = reference.gaussian_noise(key(3), [30])
    assert torch.equal(reference.gaussian_noise(key(3), [2, 3, 5]), flat.view(2, 3, 5))
    assert torch.equal(reference.gaussian_noise(key(3), [7]), flat[:7])
    assert torch.equal(reference.gaussian_noise(key(3), []), flat[0])
    assert reference.gaussian_noise(key(3), [4, 0]).shape == (4, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_is_standard_normal(dtype):
    n = 400_000
    noise = reference.gaussian_noise(key(4), [n], dtype).double()
    # Each moment within 4 of its standard errors; E z^2k = (2k - 1)!!.
    for power, moment, square in [(1, 0, 1), (2, 1, 3), (3, 0, 15), (4, 3, 105)]:
        error = (noise**power).mean().item() - moment
        assert abs(error) < 4 * math.sqrt((square - moment**2) / n)
    # Kolmogorov-Smirnov: 1.95 / sqrt(n) is exceeded once in a thousand keys.
    cdf = torch.special.ndtr(noise.sort().values)
    steps = torch.arange(n + 1) / n
    assert max((steps[1:] - cdf).max(), (cdf - steps[:-1]).max()) < 1.95 / math.sqrt(n)
    # Neighbours share words: neither they nor their squares may be correlated.
    for step in (1, 2, 3, 4):
        for x in (noise, (noise**2 - 1) / math.sqrt(2)):
            assert abs((x[step:] * x[:-step]).mean()) < 4 / math.sqrt(n)


def test_noise_stays_finite_for_the_extreme_words():
    # Block words are not ours to choose, so this looks at the map from words to normals.
    gaussian = importlib.import_module("isthmus.reference.gaussian")
    extremes = torch.tensor([0, 2**32 - 1])
    uniform = gaussian._uniform32(extremes)
    assert uniform.dtype == torch.float32 and uniform.tolist() == [2.0**-33, 1.0]
    normals = gaussian._box_muller(uniform, uniform)
    assert normals.isfinite().all() and 6.76 < normals.abs().max() < 6.77
    uniform = gaussian._uniform64(extremes, extremes)
    assert uniform.dtype == torch.float64 and uniform.tolist() == [2.0**-65, 1.0]
    assert gaussian._box_muller(uniform, uniform).isfinite().all()


# sampling


@scale_types
@pytest.mark.parametrize("num_samples", [None, 3])
def test_sample_is_mean_plus_scaled_noise(rand, scale_type, num_samples):
    mean, scale = rand(4, 5), positive(rand(4, 5))
    noise = rand(*([] if num_samples is None else [num_samples]), 4, 5).detach()
    z = reference.gaussian_sample(
        mean, scale, scale_type=scale_type, num_samples=num_samples, temperature=0.7, noise=noise
    )
    assert z.shape == noise.shape
    torch.testing.assert_close(z, mean + 0.7 * STD[scale_type](scale) * noise)


def test_softplus_keeps_float64_accuracy_where_torch_switches_to_the_identity():
    scale = torch.tensor([21.0, 30.0], dtype=torch.float64)
    z = reference.gaussian_sample(torch.zeros_like(scale), scale, scale_type="softplus", noise=torch.ones_like(scale))
    expected = [float(mpmath.log(1 + mpmath.exp(s))) for s in (21, 30)]
    assert z.tolist() == pytest.approx(expected, rel=1e-15)


@half_types
def test_half_sample_is_computed_in_float32_and_rounded_once(half):
    mean, scale = torch.linspace(-2, 2, 64).to(half), torch.linspace(-1, 1, 64).to(half)
    noise = reference.gaussian_noise(key(1), [64])
    z, kl = reference.gaussian_sample_kl(mean, scale, noise=noise)
    exact, exact_kl = reference.gaussian_sample_kl(mean.double(), scale.double(), noise=noise)
    assert z.dtype == half and kl.dtype == torch.float32
    assert ((z.double() - exact).abs() <= 1.001 * HALF_EPS[half] * exact.abs()).all()
    torch.testing.assert_close(kl.double(), exact_kl, rtol=1e-6, atol=0)


# divergence


def with_and_without_prior(rand, shape):
    mean, scale = rand(*shape), positive(rand(*shape))
    return [(mean, scale), (mean, scale, rand(*shape), positive(rand(*shape)))]


@scale_types
def test_kl_equals_torch_distributions(rand, scale_type):
    std = STD[scale_type]
    for mean, scale, *prior in with_and_without_prior(rand, (6, 7)):
        q = Normal(mean, std(scale))
        p = Normal(prior[0], std(prior[1])) if prior else Normal(0.0, 1.0)
        expected = kl_divergence(q, p)
        for reduction, reduced in {
            "none": expected,
            "row": expected.sum(-1),
            "sum": expected.sum(),
            "mean": expected.sum(-1).mean(),
        }.items():
            kl = reference.gaussian_kl(mean, scale, *prior, scale_type=scale_type, reduction=reduction)
            torch.testing.assert_close(kl, reduced)


def exact_kl(mean, logvar):
    """KL from the standard prior in 60 digits."""
    with mpmath.workdps(60):
        mean, logvar = mpmath.mpf(mean), mpmath.mpf(logvar)
        return (mean**2 + mpmath.exp(logvar) - 1 - logvar) / 2


@pytest.mark.parametrize(("dtype", "digits"), [(torch.float64, 1e-15), (torch.float32, 1e-6)])
def test_kl_keeps_every_digit_near_the_prior(dtype, digits):
    steps = [sign * m * 10.0**-e for e in range(1, 9) for m in (1, 2.4, 2.6, 7) for sign in (1, -1)]
    logvar = torch.tensor([0.0, *steps], dtype=dtype, requires_grad=True)
    kl = reference.gaussian_kl(torch.zeros_like(logvar), logvar, reduction="none")
    (gradient,) = torch.autograd.grad(kl.sum(), logvar)
    for i, v in enumerate(logvar.tolist()):
        assert kl[i].item() == pytest.approx(float(exact_kl(0, v)), rel=10 * digits, abs=0)
        assert gradient[i].item() == pytest.approx(math.expm1(v) / 2, rel=10 * digits, abs=0)


def test_kl_near_a_tensor_prior_is_that_near_the_standard_one(rand):
    # Powers of two, so that the differences and the quotient are exact.
    scale, step = torch.tensor([2.0, 4.0], dtype=torch.float64), 2.0**-30
    mean = torch.full_like(scale, 8.0)
    kl = reference.gaussian_kl(mean + step, scale + step, mean, scale, reduction="none")
    for i, logvar in enumerate(scale.tolist()):
        expected = float(exact_kl(step * mpmath.exp(-mpmath.mpf(logvar) / 2), step))
        assert kl[i].item() == pytest.approx(expected, rel=1e-14, abs=0)


def test_kl_far_from_the_prior_overflows_to_infinity_and_nan_stays_in_its_row():
    logvar = torch.tensor([[800.0, 0.0], [-torch.inf, 0.0], [torch.nan, 0.0], [0.0, 0.0]])
    kl = reference.gaussian_kl(torch.zeros(4, 2), logvar)
    assert kl[0] == torch.inf and kl[1] == torch.inf and kl[2].isnan() and kl[3] == 0


def test_kl_gradient_of_a_vanishing_variance_is_finite():
    logvar = torch.tensor([-1e6, -torch.inf], requires_grad=True)
    reference.gaussian_kl(torch.zeros(2), logvar).backward()
    assert logvar.grad.tolist() == [-0.5, -0.5]


@scale_types
def test_sample_kl_gradients(rand, scale_type):
    noise = rand(2, 3, 4).detach()
    for inputs in with_and_without_prior(rand, (3, 4)):

        def f(*inputs):
            return reference.gaussian_sample_kl(
                *inputs, scale_type=scale_type, num_samples=2, temperature=0.5, noise=noise
            )

        assert gradcheck(f, inputs) and gradgradcheck(f, inputs)


# bayes


@scale_types
def test_bayes_weight_equals_a_linear_layer_with_the_sampled_weights(rand, scale_type):
    x, mean, scale = rand(2, 5, 3), rand(4, 3), positive(rand(4, 3))
    bias_mean, bias_scale = rand(4), positive(rand(4))
    noise, bias_noise = rand(4, 3).detach(), rand(4).detach()
    out = reference.bayes_linear(
        *(x, mean, scale, bias_mean, bias_scale),
        scale_type=scale_type,
        noise=noise,
        bias_noise=bias_noise,
    )
    weight = Normal(mean, STD[scale_type](scale))
    bias = Normal(bias_mean, STD[scale_type](bias_scale))
    expected = x @ (weight.mean + weight.stddev * noise).T + bias.mean + bias.stddev * bias_noise
    torch.testing.assert_close(out, expected)


def test_bayes_local_has_the_moments_of_sampled_weights(rand):
    draws = 100_000
    x, mean, std = rand(3).detach(), rand(2, 3).detach(), positive(rand(2, 3)).detach()
    bias_mean, bias_std = rand(2).detach(), positive(rand(2)).detach()
    weights = mean + std * torch.randn(draws, 2, 3, dtype=torch.float64, generator=seeded(1))
    biases = bias_mean + bias_std * torch.randn(draws, 2, dtype=torch.float64, generator=seeded(2))
    outputs = weights @ x + biases

    def local(noise):
        return reference.bayes_linear(
            *(x, mean, std, bias_mean, bias_std),
            scale_type="std",
            estimator="local",
            noise=torch.full((2,), noise, dtype=torch.float64),
        )

    centre, spread = local(0.0), local(1.0) - local(0.0)
    assert ((outputs.mean(0) - centre).abs() < 4 * spread / math.sqrt(draws)).all()
    assert ((outputs.std(0) / spread - 1).abs() < 4 / math.sqrt(2 * draws)).all()


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("estimator", ["weight", "local"])
def test_bayes_gradients(rand, estimator):
    shapes = (5, 3), (4, 3), (4, 3), (4,), (4,)
    inputs = [rand(*shape) for shape in shapes]
    noise = rand(*((4, 3) if estimator == "weight" else (5, 4))).detach()
    bias_noise = rand(4).detach()

    def f(*inputs):
        return reference.bayes_linear(*inputs, estimator=estimator, noise=noise, bias_noise=bias_noise)

    for count in (3, 4, 5):  # no bias, an ordinary bias, a sampled bias
        assert gradcheck(f, inputs[:count]) and gradgradcheck(f, inputs[:count])


def test_bayes_local_gradient_at_zero_variance_is_0(rand):
    x = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    mean, scale = rand(4, 3), rand(4, 3)
    out = reference.bayes_linear(x, mean, scale, estimator="local", noise=rand(2, 4).detach())
    gradients = torch.autograd.grad(out.sum(), (x, mean, scale))
    torch.testing.assert_close(gradients[0], mean.detach().sum(0).expand(2, 3))
    assert not gradients[1].any() and not gradients[2].any()


# all of them


@half_types
def test_half_results_are_rounded_from_float32(rand, half):
    def compare(f, *tensors):
        narrow = [t.detach().to(half) for t in tensors]
        ours, exact = f(*narrow), f(*(t.double() for t in narrow))
        assert ours.dtype == half
        allowed = 1.01 * HALF_EPS[half] * exact.abs() + 1e-6
        assert ((ours.double() - exact).abs() <= allowed).all()

    picked = torch.tensor([0, 2, 1, 2])
    compare(lambda x, c: reference.vq_quantize(x, c, indices=picked)[0], rand(4, 3), rand(5, 3))
    compare(lambda x, w, b: reference.topk_encode(x, w, b, 2)[0], rand(4, 3), rand(5, 3), rand(5))
    compare(lambda v, w: reference.sparse_decode(v, picked, w), rand(4), rand(3, 6))
    noise = rand(5, 3).detach().to(half)
    compare(
        lambda x, m, s: reference.bayes_linear(x, m, s, noise=noise),
        *(rand(4, 3), rand(5, 3), rand(5, 3)),
    )


# categorical


def test_gumbel_noise_is_that_of_its_words():
    noise = reference.gumbel_noise(torch.tensor([0, 0]), [4], torch.float64)
    words = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    with mpmath.workdps(40):
        for i in (0, 1):
            v = (words[2 * i] * mpmath.mpf(2) ** 32 + words[2 * i + 1] + 0.5) / mpmath.mpf(2) ** 64
            assert noise[i].item() == pytest.approx(float(-mpmath.log(-mpmath.log1p(-v))), rel=1e-14)
        for i, word in enumerate(words):
            expected = -mpmath.log(-mpmath.log1p(-(word + 0.5) / mpmath.mpf(2) ** 32))
            found = reference.gumbel_noise(torch.tensor([0, 0]), [4])[i].item()
            assert found == pytest.approx(float(expected), abs=3e-7)


def test_categorical_kl_equals_torch_distributions(rand):
    logits, prior = rand(4, 3, 7), rand(4, 3, 7)
    for other, p in ((None, torch.zeros_like(logits)), (prior, prior)):
        expected = kl_divergence(Categorical(logits=logits), Categorical(logits=p))
        for reduction, reduced in {"row": expected, "sum": expected.sum(), "mean": expected.mean()}.items():
            torch.testing.assert_close(reference.categorical_kl(logits, other, reduction=reduction), reduced)


def test_categorical_kl_keeps_every_digit_near_the_prior():
    for e in range(1, 9):
        step = torch.tensor([0.0, 1.0, 2.5], dtype=torch.float64) * 10.0**-e
        with mpmath.workdps(60):
            x = [mpmath.mpf(v) for v in step.tolist()]
            log_sum = mpmath.log(sum(map(mpmath.exp, x)))
            exact = sum(mpmath.exp(v - log_sum) * (v - log_sum + mpmath.log(3)) for v in x)
        assert reference.categorical_kl(step).item() == pytest.approx(float(exact), rel=1e-6, abs=0)


def test_categorical_kl_of_impossible_classes():
    inf = torch.inf
    logits = torch.tensor([[0.0, -inf], [0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    kl = reference.categorical_kl(logits)
    torch.testing.assert_close(kl, torch.tensor([math.log(2), 0.0], dtype=torch.float64))
    kl.sum().backward()
    assert logits.grad.abs().max() < 1e-12
    assert reference.categorical_kl(logits, torch.tensor([0.0, -inf]).expand(2, 2).double()).tolist() == [0, inf]


def test_categorical_derivatives(rand):
    logits, prior, noise = rand(2, 5), rand(2, 5), rand(2, 5).detach()
    assert gradcheck(reference.categorical_kl, (logits, prior))
    assert gradgradcheck(reference.categorical_kl, (logits, prior))

    def sample(logits):
        return reference.gumbel_softmax(logits, temperature=0.7, noise=noise)

    assert gradcheck(sample, logits)
    assert gradgradcheck(sample, logits)
    weight = rand(2, 5).detach()
    for hard in (False, True):
        y = reference.gumbel_softmax(logits, temperature=0.7, noise=noise, hard=hard)
        (gradient,) = torch.autograd.grad((y * weight).sum(), logits)
        torch.testing.assert_close(gradient, torch.autograd.grad((sample(logits) * weight).sum(), logits)[0])


one = torch.ones(1, 2)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (
            lambda: reference.gaussian_sample(one, one, scale_type="var", noise=one),
            r"scale_type is 'var'; expected 'logvar', 'std', 'softplus' or 'square'",
        ),
        (
            lambda: reference.gaussian_sample(one, one, num_samples=3, noise=one),
            r"noise has shape \[1, 2\]; expected \[3, 1, 2\]",
        ),
        (lambda: reference.gaussian_kl(one, one, reduction="max"), r"reduction is 'max'; expected"),
        (lambda: reference.gaussian_kl(one, one, one), r"prior_scale is None; expected both"),
        (
            lambda: reference.gaussian_kl(one, one, None, one),
            r"prior_mean is None; expected both",
        ),
        (
            lambda: reference.gumbel_softmax(one, temperature=0, noise=one),
            r"temperature is 0; expected a positive number",
        ),
        (lambda: reference.gumbel_softmax(one, noise=one[0]), r"noise has shape \[2\]; expected \[1, 2\]"),
        (lambda: reference.categorical_kl(one, reduction="none"), r"reduction is 'none'; expected 'row', 'sum'"),
        (lambda: reference.vq_assign(one, one, topk=2), r"topk is 2; expected 1 to 1"),
        (lambda: reference.vq_assign(one, one, metric="l1"), r"metric is 'l1'; expected"),
        (lambda: reference.vq_quantize(one, one, metric="l1"), r"metric is 'l1'; expected"),
        (lambda: reference.vq_quantize(one, one, gradient="no"), r"gradient is 'no'; expected"),
        (lambda: reference.topk_encode(one, one, None, 2), r"k is 2; expected 1 to 1"),
        (lambda: reference.topk_encode(one, one, None, 0), r"k is 0; expected 1 to 1"),
        (
            lambda: reference.topk_encode(one, one, None, 1, activation="gelu"),
            r"activation is 'gelu'; expected 'relu', 'identity' or 'abs'",
        ),
        (
            lambda: reference.bayes_linear(one, one, one, estimator="flip", noise=one),
            r"estimator is 'flip'; expected 'weight' or 'local'",
        ),
        (
            lambda: reference.bayes_linear(one, one, one, noise=one[0]),
            r"noise is of shape \[2\]; expected shape \[1, 2\]",
        ),
        (
            lambda: reference.bayes_linear(one, one, one, one[0, :1], one[0, :1], noise=one),
            r"bias_noise is None; expected shape \[1\]",
        ),
        (
            lambda: reference.bayes_linear(one, one, one, None, one[0, :1], noise=one),
            r"bias_mean is None; expected a tensor",
        ),
    ],
)
def test_wrong_arguments_are_told_what_was_expected(call, told):
    with pytest.raises(ValueError, match=told):
        call()


def test_indices_out_of_range_are_refused():
    rows, table = torch.ones(1, 2), torch.ones(5, 2)
    for call, lowest in (
        (lambda indices: reference.vq_quantize(rows, table, indices=indices), -1),  # -1: no code, an empty place
        (lambda indices: reference.code_statistics(rows, indices, 5), -1),
        (lambda indices: reference.sparse_decode(torch.ones(1), indices, table), -1),
    ):
        for index in (lowest - 1, 5):
            with pytest.raises((IndexError, RuntimeError), match=r"out of (range|bounds)"):
                call(torch.tensor([index]))
        call(torch.tensor([lowest]))


@pytest.mark.parametrize(
    "family",
    [
        "gaussian",
        "likelihood",
        "divergence",
        "pairwise",
        "categorical",
        "codebook",
        "assignment",
        "residual",
        "scalar",
        "topk",
        "selection",
        "sparse",
        "adam",
        "bayes",
    ],
)
def test_docstring_examples(family):
    failed, attempted = doctest.testmod(importlib.import_module(f"isthmus.reference.{family}"))
    assert attempted > 0 and failed == 0
