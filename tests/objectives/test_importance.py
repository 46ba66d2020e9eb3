"""Importance-weighted bounds on a linear-Gaussian model, whose likelihood is known."""

import math

import pytest
import torch
from checks import extra_memory, measures_memory
from torch.distributions import MultivariateNormal, Normal, kl_divergence

import isthmus
from isthmus import objectives, ops

BATCH, FEATURES, LATENT = 3, 5, 3
NOISE_VARIANCE = 0.5


class PPCA:
    """p(z) = N(0, I), p(x | z) = N(W z, σ² I): probabilistic PCA, with orthogonal columns in W.

    Then the exact posterior is a diagonal Gaussian, with precision 1 + |w|² / σ² and mean wᵀx / (|w|² + σ²).
    """

    def __init__(self):
        noise = torch.randn(FEATURES + BATCH, FEATURES, dtype=torch.float64)
        directions = torch.linalg.qr(noise[:FEATURES]).Q[:, :LATENT]
        self.weight = directions * torch.tensor([2.0, 1.0, 0.5]).double()
        self.x = 2.0 * noise[FEATURES:]

    def evidence(self):
        covariance = self.weight @ self.weight.mT + NOISE_VARIANCE * torch.eye(FEATURES)
        return MultivariateNormal(torch.zeros(FEATURES).double(), covariance).log_prob(self.x)

    def posterior(self):
        gain = self.weight.square().sum(0) + NOISE_VARIANCE
        return self.x @ self.weight / gain, (NOISE_VARIANCE / gain).log().expand(BATCH, LATENT)

    def log_likelihood(self, z):
        return Normal(z @ self.weight.mT, NOISE_VARIANCE**0.5).log_prob(self.x).sum(-1)

    def approximate(self):
        """A posterior that is off the exact one, and wider, so that weights are bounded."""
        mean, logvar = self.posterior()
        return mean + 0.2, logvar + 0.4

    def log_weights(self, num_samples, key, posterior):
        z, _, log_q, log_p = ops.gaussian_sample_log_prob(*posterior, num_samples=num_samples, key=key)
        return self.log_likelihood(z) + log_p - log_q


@pytest.fixture
def model():
    return PPCA()


# ---- bounds ----------------------------------------------------------------------------------------------------------


def test_bounds_equal_the_evidence_without_noise_at_the_exact_posterior(model):
    log_weights = model.log_weights(12, isthmus.key(0), model.posterior())
    expected = model.evidence()
    torch.testing.assert_close(log_weights, expected.expand(12, BATCH))
    for bound in (
        objectives.iwae_bound(log_weights),
        objectives.miwae_bound(log_weights, groups=3),
        objectives.ciwae_bound(log_weights, 0.3),
        *objectives.piwae_bounds(log_weights, groups=3),
    ):
        torch.testing.assert_close(bound, expected)


def test_one_sample_is_the_evidence_lower_bound(model):
    mean, logvar = model.approximate()
    exact_mean, exact_logvar = model.posterior()
    gap = kl_divergence(Normal(mean, (logvar / 2).exp()), Normal(exact_mean, (exact_logvar / 2).exp())).sum(-1)
    log_weights = model.log_weights(20_000, isthmus.key(1), (mean, logvar))
    elbo = objectives.miwae_bound(log_weights, groups=20_000)
    standard_error = log_weights.std(0) / math.sqrt(20_000)
    assert ((elbo - (model.evidence() - gap)).abs() < 4 * standard_error).all()


def test_the_bound_rises_with_the_number_of_samples_to_the_evidence(model):
    total = 2**14
    log_weights = model.log_weights(total, isthmus.key(2), model.approximate())
    bounds = torch.stack([objectives.miwae_bound(log_weights, groups=total // k) for k in (1, 2, 4, 8, 32, 128)])
    assert (bounds.diff(dim=0) > 0).all()
    # The gap of K samples is Var[w] / (2 K E[w]²) to first order (Domke & Sheldon 2018, arXiv 1808.09034).
    weights = (log_weights - model.evidence()).exp()
    expected = -weights.var(0) / (2 * 128)
    noise = 4 * weights.std(0) / math.sqrt(total)
    gap = bounds[-1] - model.evidence()
    assert ((gap - expected).abs() < noise + 0.3 * expected.abs()).all()
    assert (bounds[-1] < model.evidence() + noise).all()
    torch.testing.assert_close(objectives.iwae_bound(log_weights), model.evidence(), atol=0.02, rtol=0)


def test_the_gradient_weighs_samples_by_their_weights_and_favours_the_best():
    log_weights = torch.tensor([[-3.0], [0.0], [1.0]], requires_grad=True)
    objectives.iwae_bound(log_weights).sum().backward()
    torch.testing.assert_close(log_weights.grad, log_weights.detach().softmax(0))
    assert log_weights.grad.argmax() == 2


def test_weights_are_normalised_over_samples_not_over_estimates(model):
    log_weights = model.log_weights(16, isthmus.key(3), model.approximate())
    iwae = objectives.iwae_bound(log_weights)
    # One estimate of 16 samples is IWAE; sixteen of one sample are the plain bound.
    torch.testing.assert_close(objectives.miwae_bound(log_weights, groups=1), iwae)
    torch.testing.assert_close(objectives.miwae_bound(log_weights, groups=16), log_weights.mean(0))
    assert (iwae > log_weights.mean(0) + 1e-3).all()


def test_the_value_is_the_bound_not_the_weighted_sum(model):
    log_weights = model.log_weights(16, isthmus.key(3), model.approximate())
    bound = objectives.iwae_bound(log_weights)
    torch.testing.assert_close(bound, log_weights.exp().mean(0).log())
    assert (bound < (log_weights.softmax(0) * log_weights).sum(0) - 1e-3).all()


def test_piwae_gives_each_network_its_own_bound():
    log_weights = torch.randn(20, 2, dtype=torch.float64, requires_grad=True)
    decoder, encoder = objectives.piwae_bounds(log_weights, groups=4)
    torch.testing.assert_close(decoder, objectives.iwae_bound(log_weights))
    torch.testing.assert_close(encoder, objectives.miwae_bound(log_weights, groups=4))
    (to_decoder,) = torch.autograd.grad(decoder.sum(), log_weights, retain_graph=True)
    (to_encoder,) = torch.autograd.grad(encoder.sum(), log_weights)
    torch.testing.assert_close(to_decoder, log_weights.softmax(0))
    torch.testing.assert_close(to_encoder, log_weights.unflatten(0, (4, 5)).softmax(1).flatten(0, 1) / 4)


def test_piwae_in_one_backward_pass_of_the_op(model):
    mean, logvar = (t.clone().requires_grad_() for t in model.approximate())
    model.weight.requires_grad_()
    key = isthmus.key(7)

    def log_weights(**options):
        z, _, log_q, log_p = ops.gaussian_sample_log_prob(mean, logvar, num_samples=12, key=key, **options)
        return model.log_likelihood(z) + log_p - log_q

    bounds = objectives.piwae_bounds(log_weights(), groups=3)
    expected = (
        *torch.autograd.grad(bounds.encoder.sum(), (mean, logvar), retain_graph=True),
        *torch.autograd.grad(bounds.decoder.sum(), (model.weight,)),
    )
    bound = objectives.iwae_bound(log_weights(gradient="partial", groups=3))
    torch.testing.assert_close(bound, bounds.decoder)
    torch.testing.assert_close(torch.autograd.grad(bound.sum(), (mean, logvar, model.weight)), expected)


def encoder_gradients(model, num_samples, gradient, replicas=1500):
    """Independent estimates of the gradient of one data vector's bound in the posterior's six parameters."""
    posterior = [t[:1].expand(replicas, -1).clone().requires_grad_() for t in model.approximate()]
    z, _, log_q, log_p = ops.gaussian_sample_log_prob(
        *posterior, num_samples=num_samples, gradient=gradient, key=isthmus.key(num_samples)
    )
    log_likelihood = Normal(z @ model.weight.mT, NOISE_VARIANCE**0.5).log_prob(model.x[0]).sum(-1)
    bound = objectives.iwae_bound(log_likelihood + log_p - log_q)
    return torch.cat(torch.autograd.grad(bound.sum(), posterior), dim=-1)


@pytest.mark.parametrize("num_samples", [1, 4, 16])
def test_doubly_reparameterized_gradients_are_unbiased(model, num_samples):
    total = encoder_gradients(model, num_samples, "total")
    reparameterized = encoder_gradients(model, num_samples, "doubly_reparameterized")
    # The same noise in both: the difference has the smaller error.
    difference = total - reparameterized
    assert (difference.mean(0).abs() < 4.5 * difference.std(0) / math.sqrt(len(difference))).all()
    path = total - encoder_gradients(model, num_samples, "path")
    biased = path.mean(0).abs() > 6 * path.std(0) / math.sqrt(len(path))
    assert biased.any() == (num_samples > 1)


def test_doubly_reparameterized_gradients_gain_with_the_number_of_samples(model):
    def signal_to_noise(num_samples, gradient):
        gradients = encoder_gradients(model, num_samples, gradient)
        return (gradients.mean(0).norm() / gradients.var(0).sum().sqrt()).item()

    few, many = (signal_to_noise(k, "doubly_reparameterized") for k in (2, 32))
    few_total, many_total = (signal_to_noise(k, "total") for k in (2, 32))
    # Tucker et al. (2019): it grows as √K, where that of the plain estimator falls as 1 / √K.
    assert many > 2.0 * few
    assert many_total < 0.7 * few_total
    assert few > few_total


def test_ciwae_lies_between_its_ends():
    log_weights = torch.randn(6, 2, dtype=torch.float64)
    elbo, iwae = log_weights.mean(0), objectives.iwae_bound(log_weights)
    torch.testing.assert_close(objectives.ciwae_bound(log_weights, 0.0), iwae)
    torch.testing.assert_close(objectives.ciwae_bound(log_weights, 1.0), elbo)
    torch.testing.assert_close(objectives.ciwae_bound(log_weights, 0.25), 0.25 * elbo + 0.75 * iwae)


def test_bounds_of_very_unlikely_data_stay_finite():
    log_weights = torch.tensor([[-1e4, -2e4], [-1e4, -3e4]])
    torch.testing.assert_close(objectives.iwae_bound(log_weights), torch.tensor([-1e4, -2e4 - math.log(2)]))


def test_effective_sample_size():
    weights = torch.rand(10, 3, dtype=torch.float64)
    expected = weights.sum(0).square() / weights.square().sum(0)
    torch.testing.assert_close(objectives.effective_sample_size(weights.log() - 1e4), expected)
    alone = torch.tensor([[0.0], [-100.0], [-torch.inf]])
    torch.testing.assert_close(objectives.effective_sample_size(alone), torch.ones(1))


# ---- evaluation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_chunk_size_does_not_change_the_number(model, dtype):
    # 3 · 3 values to a sample: only every fourth sample begins with a whole block of the noise stream.
    mean, logvar = (t.to(dtype) for t in model.approximate())
    key = isthmus.key(4)

    def estimate(chunk_size):
        return objectives.importance_weighted_log_likelihood(
            lambda z: model.log_likelihood(z.double()), mean, logvar, num_samples=50, chunk_size=chunk_size, key=key
        )

    at_once = model.log_weights(50, key, (mean, logvar)) if dtype == torch.float64 else None
    expected = estimate(64) if at_once is None else objectives.iwae_bound(at_once)
    for chunk_size in (4, 8, 20, 48, 64):
        torch.testing.assert_close(
            estimate(chunk_size), expected, rtol=1e-12 if dtype == torch.float64 else 1e-6, atol=0
        )


def test_evaluation_is_exact_at_the_exact_posterior(model):
    mean, logvar = model.posterior()
    estimate = objectives.importance_weighted_log_likelihood(model.log_likelihood, mean, logvar, num_samples=3)
    torch.testing.assert_close(estimate, model.evidence())


def test_evaluation_approaches_the_evidence(model):
    mean, logvar = model.approximate()
    estimate = objectives.importance_weighted_log_likelihood(
        model.log_likelihood, mean, logvar, num_samples=20_000, chunk_size=2000, key=isthmus.key(5)
    )
    torch.testing.assert_close(estimate, model.evidence(), atol=0.02, rtol=0)


def test_evaluation_under_another_prior(model):
    # A change of variables: the latent 2 z + 1 has prior N(1, 4), and the evidence does not know about it.
    mean, logvar = model.approximate()
    mean, logvar = 2 * mean + 1, logvar + math.log(4.0)
    one, two = torch.ones((), dtype=torch.float64), torch.tensor(4.0).double().log()
    estimate = objectives.importance_weighted_log_likelihood(
        lambda z: model.log_likelihood((z - 1) / 2),
        mean,
        logvar,
        one.expand_as(mean),
        two.expand_as(mean),
        num_samples=40,
        key=isthmus.key(6),
    )
    plain = objectives.importance_weighted_log_likelihood(
        model.log_likelihood, *model.approximate(), num_samples=40, key=isthmus.key(6)
    )
    torch.testing.assert_close(estimate, plain)


@pytest.mark.parametrize("num_samples", [1, 5, 100, 250])
def test_as_many_samples_are_decoded_as_were_asked_for(model, num_samples):
    sizes = []

    def log_likelihood(z):
        sizes.append(len(z))
        assert not z.requires_grad
        return model.log_likelihood(z)

    mean, logvar = (t.clone().requires_grad_() for t in model.approximate())
    estimate = objectives.importance_weighted_log_likelihood(
        log_likelihood, mean, logvar, num_samples=num_samples, chunk_size=100
    )
    assert sum(sizes) == num_samples
    assert max(sizes) <= 100
    assert not estimate.requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "num_samples is 0"),
        ({"num_samples": 8, "chunk_size": 6}, "chunk_size is 6; expected a multiple of 4"),
        ({"num_samples": 8, "key": isthmus.key(0), "generator": torch.Generator()}, "key and generator"),
    ],
)
def test_evaluation_refuses(model, options, message):
    with pytest.raises(ValueError, match=message):
        objectives.importance_weighted_log_likelihood(model.log_likelihood, *model.posterior(), **options)


def test_bad_arguments_are_named(model):
    with pytest.raises(ValueError, match="beta is 2"):
        objectives.ciwae_bound(torch.zeros(4, 3), 2.0)
    with pytest.raises(ValueError, match=r"log_likelihood returned shape \[8\]; expected \[8, 3\]"):
        objectives.importance_weighted_log_likelihood(
            lambda z: model.log_likelihood(z).sum(-1), *model.posterior(), num_samples=8
        )


@measures_memory
def test_evaluation_takes_the_memory_of_one_chunk():
    """A chunk of 64 samples is 4 MB; 4096 samples at once would be 268 MB."""
    mean, logvar = torch.zeros(256, 64), torch.zeros(256, 64)

    def log_likelihood(z: torch.Tensor) -> torch.Tensor:
        return -z.square().sum(-1)

    def evaluate(num_samples: int) -> None:
        objectives.importance_weighted_log_likelihood(log_likelihood, mean, logvar, num_samples=num_samples)

    assert extra_memory(lambda: evaluate(4096), lambda: evaluate(128)) < 16e6
