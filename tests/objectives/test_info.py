import math

import pytest
import torch

from isthmus import objectives, ops


def terms():
    return torch.rand(3, 16, dtype=torch.float64).unbind()[:2], torch.tensor(0.7, dtype=torch.float64)


def test_info_vae_contains_the_elbo_and_the_mmd_vae():
    (nll, kl), discrepancy = terms()
    elbo = objectives.negative_elbo(nll, kl).mean()
    torch.testing.assert_close(objectives.info_vae_loss(nll, kl, discrepancy), elbo)
    mmd_vae = objectives.info_vae_loss(nll, kl, discrepancy, alpha=1.0, lambda_=5.0)
    torch.testing.assert_close(mmd_vae, nll.mean() + 5.0 * discrepancy)


def test_info_vae_equals_its_form_with_the_mutual_information():
    # −log p(x|z) + λ D(q(z), p(z)) + (1 − α) I(x; z), where KL(q(z|x) ‖ p(z)) = I(x; z) + D(q(z), p(z)).
    (nll, information), discrepancy = terms()
    kl = information + discrepancy
    expected = (nll + (1 - 0.3) * information).mean() + 2.5 * discrepancy
    torch.testing.assert_close(objectives.info_vae_loss(nll, kl, discrepancy, alpha=0.3, lambda_=2.5), expected)


@pytest.mark.parametrize(
    "discrepancy",
    [
        lambda z, prior: ops.mmd(z, prior, kernel="imq"),
        lambda z, prior: objectives.sliced_wasserstein(z, prior, objectives.quasi_directions(64, 2)),
        lambda z, prior: objectives.sinkhorn_divergence(z, prior, epsilon=0.5, iterations=20),
    ],
    ids=["mmd", "sliced", "sinkhorn"],
)
def test_wasserstein_autoencoder_moves_codes_to_the_prior(discrepancy):
    prior = torch.randn(128, 2)
    z = (0.3 * torch.randn(128, 2) + 1.0).requires_grad_()
    optimizer = torch.optim.Adam([z], lr=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        objectives.wae_loss(torch.zeros(128), discrepancy(z, prior), weight=1.0).backward()
        optimizer.step()
    assert z.mean(0).abs().max() < 0.3
    assert (z.std(0) - 1.0).abs().max() < 0.35


def test_discriminator_learns_the_density_ratio():
    # Real N(1, 1) against fake N(0, 1): the log density ratio is z − 1/2.
    real, fake = torch.randn(20_000, dtype=torch.float64) + 1.0, torch.randn(20_000, dtype=torch.float64)
    slope, offset = (torch.zeros((), dtype=torch.float64, requires_grad=True) for _ in range(2))
    optimizer = torch.optim.LBFGS([slope, offset], line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = objectives.discriminator_loss(slope * real + offset, slope * fake + offset)
        value.backward()
        return value

    optimizer.step(loss)
    assert slope.item() == pytest.approx(1.0, abs=0.06)
    assert offset.item() == pytest.approx(-0.5, abs=0.06)
    assert loss().item() < 2 * math.log(2) - 0.1


def test_adversarial_penalty_pushes_codes_towards_real():
    logits = torch.tensor([-50.0, 0.0, 50.0], requires_grad=True)
    objectives.adversarial_penalty(logits).backward()
    # Strongest where the discriminator is certain, gone where it is fooled.
    torch.testing.assert_close(logits.grad, torch.tensor([-1.0, -0.5, 0.0]) / 3)
