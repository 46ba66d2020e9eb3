"""Estimators against theory, in float64: bounds of a model whose evidence is known, their gradients, and training."""

import math
from itertools import pairwise

import pytest
import torch
from torch.distributions import MultivariateNormal, Normal

import isthmus
from isthmus import ops

LATENTS, REPEATS = 3, 20_000


class LinearGaussian:
    """p(z) = N(0, I), p(x | z) = N(W z + b, s² I), and one observed x. Columns of W are orthogonal: so is p(z | x)."""

    def __init__(self):
        columns = torch.linalg.qr(torch.randn(5, LATENTS, dtype=torch.float64)).Q
        self.weight = columns * torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
        self.bias, self.x = torch.randn(2, 5, dtype=torch.float64)
        self.std = 0.7

    def log_likelihood(self, z):
        return Normal(z @ self.weight.mT + self.bias, self.std).log_prob(self.x).sum(-1)

    def log_evidence(self):
        covariance = self.weight @ self.weight.mT + self.std**2 * torch.eye(5, dtype=torch.float64)
        return MultivariateNormal(self.bias, covariance).log_prob(self.x)

    def posterior(self):
        """Mean and log-variance of p(z | x)."""
        precision = 1 + self.weight.square().sum(0) / self.std**2
        return (self.x - self.bias) @ self.weight / self.std**2 / precision, -precision.log()


@pytest.fixture
def model():
    return LinearGaussian()


def rough_posterior(model, repeats=REPEATS):
    """Not the posterior, but near: leaves with one row for each repetition of an experiment."""
    mean, logvar = model.posterior()
    return [t.expand(repeats, LATENTS).clone().requires_grad_() for t in (mean + 0.2, logvar + 0.3)]


def exact_posterior(model, repeats):
    return [t.expand(repeats, LATENTS).clone().requires_grad_() for t in model.posterior()]


def log_weights(model, posterior, samples, key, prior=(None, None), **options):
    z, _, log_q, log_p = ops.gaussian_sample_log_prob(*posterior, *prior, num_samples=samples, key=key, **options)
    return model.log_likelihood(z) + log_p - log_q


def bounds(model, posterior, samples, key=None, **options):
    """The importance-weighted bound of every row."""
    return ops.log_mean_exp(log_weights(model, posterior, samples, key, **options))[0]


def gradients(model, posterior, samples, gradient):
    """One estimate of the gradient for each row: [rows, 2 LATENTS]."""
    total = bounds(model, posterior, samples, gradient=gradient).sum()
    return torch.cat(torch.autograd.grad(total, posterior), -1)


def mean_and_error(estimates):
    return estimates.mean(0), estimates.std(0) / len(estimates) ** 0.5


def drawn(posterior, samples, key):
    """The samples of a key in plain PyTorch."""
    mean, logvar = posterior
    return mean + (logvar / 2).exp() * ops.gaussian_noise(key, (samples, *mean.shape), torch.float64)


# ---- bounds ----------------------------------------------------------------------------------------------------------


def test_bounds_lie_below_the_evidence_and_rise_with_the_number_of_samples(model):
    posterior = [t.detach() for t in rough_posterior(model)]
    found = [mean_and_error(bounds(model, posterior, samples)) for samples in (1, 4, 16, 64)]
    for (lower, error), (upper, other_error) in pairwise(found):
        assert upper - lower > 4 * (error + other_error)
    highest, error = found[-1]
    assert highest < model.log_evidence() + 4 * error
    assert model.log_evidence() - highest < 0.02


@pytest.mark.parametrize("samples", (1, 8))
def test_the_exact_posterior_makes_the_bound_the_evidence_without_variance(samples, model):
    bound = bounds(model, exact_posterior(model, 50), samples)
    torch.testing.assert_close(bound, model.log_evidence().expand(50), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("groups", (1, 3))
def test_bounds_equal_brute_force_on_the_same_noise(groups, model):
    posterior, key = rough_posterior(model, 7), isthmus.key(3)
    z = drawn(posterior, 12, key)
    densities = Normal(posterior[0], (posterior[1] / 2).exp()).log_prob(z), Normal(0, 1).log_prob(z)
    log_q, log_p = (d.sum(-1) for d in densities)
    expected = (model.log_likelihood(z) + log_p - log_q).exp().unflatten(0, (groups, -1)).mean(1).log()
    found = ops.log_mean_exp(log_weights(model, posterior, 12, key), groups=groups)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("residual", (False, True))
@pytest.mark.parametrize("antithetic", (False, True))
def test_the_divergence_is_the_mean_log_ratio_of_densities(antithetic, residual):
    mean, logvar, prior_mean, prior_logvar = torch.randn(4, 6, 5, dtype=torch.float64)
    tensors = (mean, logvar, prior_mean, 0.5 * prior_logvar)
    options = {"num_samples": 20_000, "antithetic": antithetic, "residual": residual}
    _, kl, log_q, log_p = ops.gaussian_sample_log_prob(*tensors, **options)
    # Antithetic samples are independent as pairs only.
    ratio = (log_q - log_p).unflatten(0, (-1, 2)).mean(1)
    found, error = mean_and_error(ratio)
    assert ((found - kl).abs() < 4 * error).all()
    torch.testing.assert_close(kl, ops.gaussian_kl(*tensors, residual=residual), rtol=1e-13, atol=0)


# ---- gradients of bounds ---------------------------------------------------------------------------------------------


def test_doubly_reparameterized_gradients_are_unbiased_and_better_the_more_samples(model):
    posterior, advantages = rough_posterior(model), []
    for samples in (1, 8, 64):
        total = gradients(model, posterior, samples, "total")
        doubly = gradients(model, posterior, samples, "doubly_reparameterized")
        (mean, error), (other_mean, other_error) = mean_and_error(total), mean_and_error(doubly)
        assert ((mean - other_mean).abs() < 4 * torch.hypot(error, other_error)).all()
        advantages.append((total.var(0) / doubly.var(0)).min())
    assert advantages[0] > 1
    assert advantages[1] > 2 * advantages[0] and advantages[2] > 2 * advantages[1]


@pytest.mark.parametrize("gradient", ("path", "doubly_reparameterized"))
def test_gradients_vanish_at_the_exact_posterior(gradient, model):
    posterior = exact_posterior(model, 50)
    assert gradients(model, posterior, 1, gradient).abs().max() < 1e-12
    assert gradients(model, posterior, 1, "total").abs().max() > 0.1


def surrogate(gradient, model, posterior, samples, key):
    """Plain PyTorch whose autograd gives the gradient that an estimator is defined by."""
    mean, logvar = (t.detach() for t in posterior)
    z = drawn(posterior, samples, key)
    log_q = Normal(mean, (logvar / 2).exp()).log_prob(z).sum(-1)
    weights = model.log_likelihood(z) + Normal(0, 1).log_prob(z).sum(-1) - log_q
    share = weights.detach().softmax(0)
    return (share * weights if gradient == "path" else share.square() * weights).sum()


@pytest.mark.parametrize("gradient", ("path", "doubly_reparameterized"))
def test_estimators_follow_their_definition_sample_by_sample(gradient, model):
    posterior, key = rough_posterior(model, 9), isthmus.key(1)
    found = torch.autograd.grad(bounds(model, posterior, 6, key, gradient=gradient).sum(), posterior)
    expected = torch.autograd.grad(surrogate(gradient, model, posterior, 6, key), posterior)
    for a, e in zip(found, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-11)


def test_partial_gradients_are_those_of_two_bounds(model):
    """The posterior follows MIWAE, decoder and prior follow IWAE (Rainforth et al. 2018)."""
    posterior, key, groups = rough_posterior(model, 9), isthmus.key(2), 4
    prior = [torch.full((LATENTS,), value, dtype=torch.float64, requires_grad=True) for value in (0.3, -0.2)]
    decoder = model.weight.requires_grad_(), model.bias.requires_grad_()
    found = bounds(model, posterior, 12, key, prior=prior, gradient="partial", groups=groups).sum()
    found = torch.autograd.grad(found, (*posterior, *prior, *decoder))

    z = drawn(posterior, 12, key)
    densities = (Normal(m, (v / 2).exp()).log_prob(z).sum(-1) for m, v in (posterior, prior))
    log_q, log_p = densities
    weights = model.log_likelihood(z) + log_p - log_q
    miwae = (weights.unflatten(0, (groups, -1)).logsumexp(1) - math.log(3)).mean(0).sum()
    iwae = (weights.logsumexp(0) - math.log(12)).sum()
    expected = torch.autograd.grad(miwae, posterior, retain_graph=True)
    expected += torch.autograd.grad(iwae, (*prior, *decoder))
    for a, e in zip(found, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-11)


# ---- gradient origin networks ----------------------------------------------------------------------------------------

PIXEL_LOGVAR = 2 * math.log(0.25)


def decoder_of(latents, dtype):
    """Small weights: the first codes, gradients through them, are of the order of 1."""
    layers = torch.nn.Linear(latents, 64), torch.nn.Tanh(), torch.nn.Linear(64, 64)
    decoder = torch.nn.Sequential(*layers).to(dtype)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(0.3)
    return decoder


def digits(dtype):
    data = pytest.importorskip("sklearn.datasets").load_digits().data
    return torch.tensor(data / 16, dtype=dtype)


def fused_terms(parameters, key, x, decoder):
    z, kl = ops.gaussian_sample_kl(parameters, key=key, reduction="sum")
    return ops.gaussian_nll(x, decoder(z), PIXEL_LOGVAR, reduction="sum"), kl


def plain_terms(parameters, key, x, decoder):
    mean, logvar = parameters.chunk(2, -1)
    z = mean + (logvar / 2).exp() * ops.gaussian_noise(key, mean.shape, mean.dtype)
    nll = -Normal(decoder(z), math.exp(PIXEL_LOGVAR / 2)).log_prob(x).sum()
    return nll, 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum()


def origin_network_terms(terms, keys, x, decoder, latents):
    """No encoder: the code is the negative gradient of the loss at the origin (Bond-Taylor & Willcocks 2021)."""
    origin = x.new_zeros(len(x), 2 * latents, requires_grad=True)
    (gradient,) = torch.autograd.grad(sum(terms(origin, keys[0], x, decoder)), origin, create_graph=True)
    return terms(-gradient, keys[1], x, decoder)


def test_origin_network_has_the_gradients_of_plain_pytorch():
    x, decoder = digits(torch.float64)[:20], decoder_of(4, torch.float64)
    keys = isthmus.split(isthmus.key(0), 2)
    found, expected = (
        torch.autograd.grad(sum(origin_network_terms(terms, keys, x, decoder, 4)), list(decoder.parameters()))
        for terms in (fused_terms, plain_terms)
    )
    for a, e in zip(found, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9 * e.abs().max().item())


def test_origin_network_learns_digits():
    """The loss falls to less than a third, below that of the mean digit, which is what a decoder without code knows."""
    torch.set_num_threads(1)
    x, decoder, batch_size, steps = digits(torch.float32), decoder_of(8, torch.float32), 128, 200
    perfect = 0.5 * 64 * (math.log(2 * math.pi) + PIXEL_LOGVAR)
    mean_digit = 0.5 * x.var(0).sum().item() * math.exp(-PIXEL_LOGVAR)
    optimizer = torch.optim.Adam(decoder.parameters(), lr=5e-3)
    excess = []
    for step in range(steps):
        batch = x[torch.randint(len(x), (batch_size,))]
        keys = isthmus.split(isthmus.key(step), 2)
        loss = sum(origin_network_terms(fused_terms, keys, batch, decoder, 8)) / batch_size
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        excess.append(loss.item() - perfect)
    last = sum(excess[-20:]) / 20
    assert last < excess[0] / 3 and last < 0.95 * mean_digit
