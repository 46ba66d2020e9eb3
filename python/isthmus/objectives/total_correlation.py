"""Objectives for independent latent dimensions: β-TC, DIP and Factor VAE."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from isthmus import ops
from isthmus.reference._numeric import standard_deviation, widen


class KLTerms(NamedTuple):
    """What ``kl_decomposition`` returns: their sum estimates the mean divergence from the prior."""

    mutual_information: Tensor
    total_correlation: Tensor
    dimension_kl: Tensor


def kl_decomposition(
    z: Tensor,
    mean: Tensor,
    scale: Tensor,
    dataset_size: int,
    *,
    scale_type: str = "logvar",
    estimator: str = "weighted",
) -> KLTerms:
    """Split the mean divergence from N(0, 1) into three parts (Chen et al. 2018, arXiv 1802.04942).

        E KL(q(z | x) ‖ p(z)) =   E log q(z | x) − log q(z)             mutual information of index and code
                                + E log q(z) − Σ_d log q(z_d)           total correlation
                                + Σ_d E log q(z_d) − log p(z_d)         divergence of each dimension

    The densities of the aggregate posterior q(z) come from the minibatch, in O(B D) memory.

    Args:
        z: [B, D], one sample of each posterior.
        mean, scale: [B, D], the posteriors' parameters.
        dataset_size: N, the number of data vectors that the batch was drawn from.
        scale_type: "logvar", "std", "softplus" or "square".
        estimator: of log q, "weighted" or "stratified", as in ``ops.aggregate_log_prob``.

    Returns:
        Three tensors [B], to be averaged by the caller. A single entry may be negative.

    Raises:
        ValueError, RuntimeError: as ``ops.aggregate_log_prob``.

    Example:
        >>> mean, logvar = torch.randn(16, 3), torch.zeros(16, 3)
        >>> z, kl = ops.gaussian_sample_kl(mean, logvar)
        >>> terms = kl_decomposition(z, mean, logvar, dataset_size=1000)
        >>> torch.stack(terms).shape
        torch.Size([3, 16])
    """
    log_joint, log_marginals = ops.aggregate_log_prob(
        z, mean, scale, dataset_size, scale_type=scale_type, estimator=estimator
    )
    log_posterior = -ops.gaussian_nll(z, mean, scale, scale_type=scale_type)
    log_prior = -ops.gaussian_nll(z, z.new_zeros(()), 1.0, scale_type="std")
    return KLTerms(log_posterior - log_joint, log_joint - log_marginals, log_marginals - log_prior)


def beta_tc_loss(nll: Tensor, terms: KLTerms, *, alpha: float = 1.0, beta: float = 6.0, gamma: float = 1.0) -> Tensor:
    """β-TCVAE: −log p(x | z) + α I(n; z) + β TC(z) + γ Σ_d KL(q(z_d) ‖ p(z_d)) (Chen et al. 2018, arXiv 1802.04942).

    All weights 1: an estimate of the negative ELBO.

    Args:
        nll: [B].
        terms: of ``kl_decomposition``.
        alpha, beta, gamma: weights of the three terms.

    Returns:
        [B], to be averaged by the caller.

    Example:
        >>> terms = KLTerms(torch.tensor([1.0]), torch.tensor([0.5]), torch.tensor([2.0]))
        >>> beta_tc_loss(torch.tensor([10.0]), terms)
        tensor([16.])
    """
    return nll + alpha * terms.mutual_information + beta * terms.total_correlation + gamma * terms.dimension_kl


def dip_penalty(
    mean: Tensor,
    scale: Tensor | None = None,
    *,
    scale_type: str = "logvar",
    off_diagonal: float = 10.0,
    diagonal: float = 10.0,
) -> Tensor:
    """DIP-VAE: λ_od Σ_{i≠j} C_ij² + λ_d Σ_i (C_ii − 1)², to be added to the negative ELBO (Kumar et al. 2018, arXiv
    1711.00848).

    C is the covariance over the batch of the posterior means (DIP-VAE-I), or, where ``scale`` is given, the covariance
    of the aggregate posterior, Cov[mean] + E[diag(s²)] (DIP-VAE-II).

    Args:
        mean: [B, D].
        scale: [B, D], or None for DIP-VAE-I.
        scale_type: "logvar", "std", "softplus" or "square".
        off_diagonal, diagonal: λ_od and λ_d.

    Returns:
        [], in float32 for half inputs.

    Raises:
        ValueError: ``mean`` is not a batch of at least two vectors.

    Example:
        >>> mean = torch.tensor([[1.0], [-1.0]])
        >>> dip_penalty(mean, off_diagonal=1.0, diagonal=1.0)
        tensor(0.)
    """
    if mean.dim() != 2 or len(mean) < 2:
        raise ValueError(f"mean has shape {list(mean.shape)}; expected [B, D] with at least two rows")
    centred = widen(mean) - widen(mean).mean(0)
    covariance = centred.mT @ centred / len(mean)
    if scale is not None:
        covariance = covariance + standard_deviation(widen(scale), scale_type).square().mean(0).diag()
    variances = covariance.diagonal()
    between = covariance.square().sum() - variances.square().sum()
    return off_diagonal * between + diagonal * (variances - 1.0).square().sum()


def permute_dims(z: Tensor, key: Tensor) -> Tensor:
    """Shuffle every dimension over the batch by itself: samples of Π_d q(z_d) from samples of q(z) (Kim & Mnih 2018,
    arXiv 1802.05983).

    Args:
        z: [B, D].
        key: int64 [2], draws the permutations.

    Returns:
        [B, D]: each column holds the values of that column of z.

    Example:
        >>> permute_dims(torch.arange(6.0).reshape(3, 2), isthmus.key(0)).sort(dim=0).values
        tensor([[0., 1.],
                [2., 3.],
                [4., 5.]])
    """
    return z.gather(0, ops.gaussian_noise(key, z.shape).argsort(dim=0))


def factor_vae_loss(nll: Tensor, kl: Tensor, logits: Tensor, *, gamma: float) -> Tensor:
    """FactorVAE: −ELBO + γ TC(z), the total correlation by a density ratio (Kim & Mnih 2018, arXiv 1802.05983).

    A discriminator trained by ``discriminator_loss(D(z), D(permute_dims(z, key)))`` has as its logit the log of
    q(z) / Π_d q(z_d), whose mean over codes is the total correlation.

    Args:
        nll, kl: [B].
        logits: [B], the discriminator's logits of the codes, with gradients to the codes.
        gamma: weight of the total correlation.

    Returns:
        [], the mean loss.

    Example:
        >>> factor_vae_loss(torch.tensor([3.0]), torch.tensor([1.0]), torch.tensor([0.5]), gamma=10.0)
        tensor(9.)
    """
    return (nll + kl).mean() + gamma * logits.mean()
