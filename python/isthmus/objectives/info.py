"""Objectives that match the aggregate posterior to the prior: InfoVAE, Wasserstein autoencoders, latent adversaries.

A discrepancy D(q(z), p(z)) is a number computed from codes z and from samples of the prior. Any will do:
``ops.mmd(z, prior_z)``, ``sliced_wasserstein``, ``sinkhorn_divergence``, or ``adversarial_penalty`` with a
discriminator.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import softplus


def info_vae_loss(nll: Tensor, kl: Tensor, discrepancy: Tensor, *, alpha: float = 0.0, lambda_: float = 1.0) -> Tensor:
    """InfoVAE: −log p(x | z) + (1 − α) KL(q(z | x) ‖ p(z)) + (α + λ − 1) D(q(z), p(z)) (Zhao et al. 2019, arXiv
    1706.02262).

    α = 0, λ = 1 is the ELBO. α = 1 drops the divergence of each posterior, which is what makes latents collapse, and
    with the maximum mean discrepancy is the MMD-VAE; the paper sets λ so that both terms of the loss have the same
    size.

    Args:
        nll, kl: [*], of each data vector.
        discrepancy: [], of the batch of codes from the prior.
        alpha: weight of the mutual information between x and z.
        lambda_: λ, weight of the aggregate posterior's divergence.

    Returns:
        [], the mean loss.

    Example:
        >>> z, nll, kl = torch.randn(64, 2), torch.rand(64), torch.rand(64)
        >>> discrepancy = ops.mmd(z, torch.randn(64, 2))
        >>> info_vae_loss(nll, kl, discrepancy, alpha=1.0, lambda_=10.0).shape
        torch.Size([])
    """
    return (nll + (1.0 - alpha) * kl).mean() + (alpha + lambda_ - 1.0) * discrepancy


def wae_loss(cost: Tensor, discrepancy: Tensor, *, weight: float) -> Tensor:
    """Wasserstein autoencoder: E c(x, G(z)) + λ D(q(z), p(z)) (Tolstikhin et al. 2018, arXiv 1711.01558).

    With ``ops.mmd(z, prior_z, kernel="imq")`` it is WAE-MMD, with ``adversarial_penalty`` WAE-GAN, with
    ``sliced_wasserstein`` the sliced-Wasserstein autoencoder. The encoder may be deterministic.

    Args:
        cost: [*], the transport cost from each data vector to its reconstruction, usually the squared distance.
        discrepancy: [], of the batch of codes from the prior.
        weight: λ.

    Returns:
        [], the mean loss.

    Example:
        >>> wae_loss(torch.tensor([1.0, 3.0]), torch.tensor(0.5), weight=10.0)
        tensor(7.)
    """
    return cost.mean() + weight * discrepancy


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Cross entropy of a discriminator, −E log σ(D(real)) − E log(1 − σ(D(fake))) (Goodfellow et al. 2014, arXiv
    1406.2661).

    Of a perfect one the logit is the log density ratio real / fake. WAE-GAN and adversarial autoencoders take samples
    of the prior as real and codes as fake; FactorVAE takes codes as real and ``permute_dims`` of them as fake. Train it
    on codes that are detached from the encoder.

    Args:
        real_logits, fake_logits: [*], may differ in shape.

    Returns:
        []; 2 log 2 for a discriminator that cannot tell.

    Example:
        >>> discriminator_loss(torch.zeros(4), torch.zeros(8))
        tensor(1.3863)
    """
    return softplus(-real_logits).mean() + softplus(fake_logits).mean()


def adversarial_penalty(fake_logits: Tensor) -> Tensor:
    """What codes pay for being told from the prior: −E log σ(D(z)) (Makhzani et al. 2016, arXiv 1511.05644).

    The form that keeps its gradient when the discriminator is certain. The encoder alone is trained on it.

    Args:
        fake_logits: [*], the discriminator's logits of codes, with gradients.

    Returns:
        []; log 2 for a discriminator that cannot tell.

    Example:
        >>> adversarial_penalty(torch.zeros(4))
        tensor(0.6931)
    """
    return softplus(-fake_logits).mean()
