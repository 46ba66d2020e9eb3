import math

import pytest
import torch

import isthmus
from isthmus import objectives, ops


def correlated_codes(num, correlation, width=0.5):
    """Posteriors whose aggregate is a Gaussian of unit variances with the given correlation."""
    x = torch.randn(num, 2, dtype=torch.float64)
    root = torch.linalg.cholesky(
        torch.tensor([[1.0, correlation], [correlation, 1.0]]).double() - width**2 * torch.eye(2)
    )
    mean = x @ root.mT
    return mean, torch.full_like(mean, 2 * math.log(width))


@pytest.mark.parametrize("estimator", ["weighted", "stratified"])
def test_the_three_terms_add_up_to_the_sampled_divergence(estimator):
    mean, logvar = torch.randn(2, 32, 4, dtype=torch.float64).unbind()
    z = ops.gaussian_sample(mean, logvar)
    terms = objectives.kl_decomposition(z, mean, logvar, 1000, estimator=estimator)
    posterior = torch.distributions.Normal(mean, (logvar / 2).exp())
    prior = torch.distributions.Normal(0.0, 1.0)
    expected = (posterior.log_prob(z) - prior.log_prob(z)).sum(-1)
    torch.testing.assert_close(sum(terms), expected)
    loss = objectives.beta_tc_loss(expected, terms, beta=1.0)
    torch.testing.assert_close(loss, 2 * expected)


def test_the_three_terms_of_a_gaussian():
    correlation, width = 0.6, 0.5
    mean, logvar = correlated_codes(1500, correlation, width)
    z = ops.gaussian_sample(mean, logvar)
    terms = [t.mean().item() for t in objectives.kl_decomposition(z, mean, logvar, 1500, estimator="stratified")]
    determinant = 1 - correlation**2
    assert terms[0] == pytest.approx(0.5 * math.log(determinant) - 2 * math.log(width), abs=0.1)
    assert terms[1] == pytest.approx(-0.5 * math.log(determinant), abs=0.06)
    assert terms[2] == pytest.approx(0.0, abs=0.03)


def test_a_collapsed_code_has_no_terms():
    mean = torch.zeros(16, 3, dtype=torch.float64)
    z = ops.gaussian_sample(mean, mean)
    for term in objectives.kl_decomposition(z, mean, mean, 16, estimator="stratified"):
        torch.testing.assert_close(term, torch.zeros(16, dtype=torch.float64))


def test_beta_tc_weighs_each_term():
    nll, *terms = torch.rand(4, 8).unbind()
    loss = objectives.beta_tc_loss(nll, objectives.KLTerms(*terms), alpha=2.0, beta=3.0, gamma=4.0)
    torch.testing.assert_close(loss, nll + 2 * terms[0] + 3 * terms[1] + 4 * terms[2])


def test_total_correlation_trains_codes_apart():
    mean, logvar = (t.requires_grad_() for t in correlated_codes(200, 0.7))
    key = isthmus.key(0)

    def total_correlation():
        z = ops.gaussian_sample(mean, logvar, key=key)
        return objectives.kl_decomposition(z, mean, logvar, 200).total_correlation.mean()

    before = total_correlation()
    (downhill,) = torch.autograd.grad(before, mean)
    with torch.no_grad():
        mean -= 0.1 * downhill / downhill.norm() * mean.norm()
    assert total_correlation() < before - 0.01


# ---- DIP -------------------------------------------------------------------------------------------------------------


def test_dip_is_the_distance_of_the_covariance_from_the_identity():
    mean, logvar = torch.randn(2, 50, 3, dtype=torch.float64).unbind()
    covariance = mean.mT.cov(correction=0)
    off = covariance - covariance.diag().diag()
    expected = 2 * off.square().sum() + 3 * (covariance.diag() - 1).square().sum()
    torch.testing.assert_close(objectives.dip_penalty(mean, off_diagonal=2.0, diagonal=3.0), expected)
    variances = covariance.diag() + logvar.exp().mean(0)
    expected = 2 * off.square().sum() + 3 * (variances - 1).square().sum()
    torch.testing.assert_close(objectives.dip_penalty(mean, logvar, off_diagonal=2.0, diagonal=3.0), expected)


def test_dip_of_the_second_kind_is_that_of_the_samples():
    mean, logvar = correlated_codes(4000, 0.6)
    z = ops.gaussian_sample(mean, logvar)
    penalty = objectives.dip_penalty(mean, logvar, off_diagonal=1.0, diagonal=1.0)
    torch.testing.assert_close(penalty, objectives.dip_penalty(z, off_diagonal=1.0, diagonal=1.0), atol=0.1, rtol=0)
    assert penalty.item() == pytest.approx(2 * 0.6**2, abs=0.1)


@pytest.mark.parametrize("shape", [(4,), (1, 3), (2, 3, 4)])
def test_dip_refuses_what_has_no_covariance(shape):
    with pytest.raises(ValueError, match="mean has shape"):
        objectives.dip_penalty(torch.zeros(shape))


# ---- Factor VAE ------------------------------------------------------------------------------------------------------


def test_permute_dims_keeps_the_marginals_and_breaks_the_joint():
    z = torch.randn(2000, 1, dtype=torch.float64).expand(-1, 3)
    permuted = objectives.permute_dims(z, isthmus.key(0))
    assert torch.equal(permuted.sort(dim=0).values, z.sort(dim=0).values)
    correlation = permuted.mT.corrcoef() - torch.eye(3)
    assert correlation.abs().max() < 4 / math.sqrt(2000)
    assert torch.equal(permuted, objectives.permute_dims(z, isthmus.key(0)))
    assert not torch.equal(permuted, objectives.permute_dims(z, isthmus.key(1)))


def test_factor_vae_estimates_the_total_correlation_of_a_gaussian():
    correlation = 0.6
    mean, logvar = correlated_codes(20_000, correlation)
    z = ops.gaussian_sample(mean, logvar)
    shuffled = objectives.permute_dims(z, isthmus.key(0))

    # The log density ratio is quadratic in z, so a discriminator linear in these features can be perfect.
    def features(z):
        return torch.stack((torch.ones_like(z[:, 0]), z[:, 0].square(), z[:, 1].square(), z.prod(-1)), dim=-1)

    weight = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = objectives.discriminator_loss(features(z) @ weight, features(shuffled) @ weight)
        value.backward()
        return value

    optimizer.step(loss)
    nll, kl = torch.rand(2, 20_000, dtype=torch.float64).unbind()
    factor = objectives.factor_vae_loss(nll, kl, features(z) @ weight, gamma=10.0)
    estimate = (factor - objectives.negative_elbo(nll, kl).mean()) / 10
    assert estimate.item() == pytest.approx(-0.5 * math.log(1 - correlation**2), abs=0.03)
