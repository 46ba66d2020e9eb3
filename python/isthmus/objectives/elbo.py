"""The evidence lower bound and its constrained forms: losses from a likelihood and divergence terms.

Everything is in nats and minimised. Terms come per data vector, so that the only average over a batch is the one you
write, unless the definition itself averages first: capacity and free bits act on the mean divergence of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def negative_elbo(nll: Tensor, kl: Tensor, *, beta: float = 1.0) -> Tensor:
    """Negative evidence lower bound, −ELBO = −log p(x | z) + β KL(q(z | x) ‖ p(z)).

    β = 1 is the bound of Kingma & Welling (2014, arXiv 1312.6114), β > 1 the β-VAE of Higgins et al. (ICLR 2017). With
    the cross entropy of a classifier as ``nll`` it is the variational information bottleneck (Alemi et al. 2017, arXiv
    1612.00410), whose β is small.

    Args:
        nll: [*], −log p(x | z) of each data vector.
        kl: broadcastable with ``nll``, the divergence of each data vector.
        beta: weight of the divergence; an annealing schedule gives the one of a step.

    Returns:
        [*], to be averaged by the caller.

    Example:
        >>> negative_elbo(torch.tensor([10.0, 12.0]), torch.tensor([1.0, 2.0]), beta=4.0).mean()
        tensor(17.)
    """
    return nll + beta * kl


def capacity_penalty(kl: Tensor, capacity: float, *, gamma: float = 1.0) -> Tensor:
    """Hold the divergence at a capacity: γ |E[KL] − C| (Burgess et al. 2018, arXiv 1804.03599).

    The expectation over the data is the mean over ``kl``. C starts near zero and is raised during training, for
    instance by ``schedules.linear``: each nat buys the latent that lowers the likelihood term most.

    Args:
        kl: [*], the divergence of each data vector.
        capacity: C ≥ 0, in nats.
        gamma: γ, weight of the penalty; the paper uses 1000 for images.

    Returns:
        [], in nats. Its gradient changes sign where the mean crosses the capacity.

    Raises:
        ValueError: a negative capacity.

    Example:
        >>> capacity_penalty(torch.tensor([2.0, 4.0]), capacity=5.0, gamma=10.0)
        tensor(20.)
    """
    _require_non_negative("capacity", capacity)
    return gamma * (kl.mean() - capacity).abs()


def joint_vae_loss(
    nll: Tensor,
    kl_continuous: Tensor,
    kl_discrete: Tensor,
    *,
    capacity_continuous: float,
    capacity_discrete: float,
    gamma: float,
) -> Tensor:
    """JointVAE: −log p(x | z, c) + γ |KL_z − C_z| + γ |KL_c − C_c| (Dupont 2018, arXiv 1804.00104).

    Gaussian latents z and categorical latents c each have a capacity of their own, so neither kind can take the whole
    budget. The divergence of a categorical from the uniform law is at most log K, so capacities of the discrete
    latents beyond Σ log K ask for the impossible.

    Args:
        nll: [*], −log p(x | z, c) of each data vector.
        kl_continuous, kl_discrete: [*], the divergences of each data vector.
        capacity_continuous, capacity_discrete: C_z and C_c, in nats.
        gamma: γ, weight of both penalties.

    Returns:
        [], the mean loss.

    Raises:
        ValueError: a negative capacity.

    Example:
        >>> nll, kl_z, kl_c = torch.tensor([9.0]), torch.tensor([3.0]), torch.tensor([0.5])
        >>> joint_vae_loss(nll, kl_z, kl_c, capacity_continuous=2.0, capacity_discrete=1.0, gamma=10.0)
        tensor(24.)
    """
    continuous = capacity_penalty(kl_continuous, capacity_continuous, gamma=gamma)
    return nll.mean() + continuous + capacity_penalty(kl_discrete, capacity_discrete, gamma=gamma)


def free_bits(kl: Tensor, floor: float, *, groups: int | None = None, per_sample: bool = False) -> Tensor:
    """Let every dimension, or group of dimensions, carry ``floor`` nats at no cost: Σ_g max(λ, E[KL_g]).

    Below its floor a group feels no pull to the prior, which keeps it alive early in training (Kingma et al. 2016,
    arXiv 1606.04934). The expectation is over the batch; ``per_sample`` takes the maximum for each data
    vector instead, so an easy input cannot lend its unused nats to another one. Any divergence will do; that of
    Gaussians takes its floor in the op, ``ops.gaussian_kl(reduction="dim", free_bits=…)``.

    Args:
        kl: [..., D], the divergence of each data vector in each dimension (``reduction="none"``).
        floor: λ ≥ 0, in nats for each group.
        groups: number of equal groups of neighbouring dimensions; default: every dimension for itself.
        per_sample: take the maximum before the mean over data vectors.

    Returns:
        [], or [...] with ``per_sample``.

    Gradients:
        Exactly zero to a group strictly below its floor, unchanged at and above it.

    Raises:
        ValueError: a negative floor, groups that do not divide D, or no batch to average over.

    Example:
        >>> kl = torch.tensor([[0.1, 3.0], [0.3, 1.0]])
        >>> free_bits(kl, 0.5)
        tensor(2.5000)
        >>> free_bits(kl, 0.5, per_sample=True)
        tensor([3.5000, 1.5000])
    """
    _require_non_negative("floor", floor)
    if kl.dim() < (1 if per_sample else 2):
        raise ValueError(f"kl has shape {list(kl.shape)}; expected [..., D], every dimension for itself, and a batch")
    if groups is not None:
        if groups < 1 or kl.shape[-1] % groups:
            raise ValueError(f"groups is {groups}; expected a divisor of the {kl.shape[-1]} dimensions of kl")
        kl = kl.unflatten(-1, (groups, -1)).sum(-1)
    if not per_sample:
        kl = kl.flatten(0, -2).mean(0)
    return kl.clamp(min=floor).sum(-1)


def balanced_kl(
    divergence: Callable[..., Tensor],
    posterior: Sequence[Tensor],
    prior: Sequence[Tensor],
    *,
    prior_share: float = 0.8,
) -> Tensor:
    """A divergence whose gradient is shared between prior and posterior.

    Has the value of KL(q ‖ p) and the gradient of α KL(sg(q) ‖ p) + (1 − α) KL(q ‖ sg(p)), where sg stops gradients and
    α is ``prior_share``: with α > ½ the prior learns to follow the posterior faster than the posterior is pulled
    towards a prior that is not trained yet (DreamerV2, Hafner et al. 2021, arXiv 2010.02193, algorithm 2). One
    evaluation of the divergence, not two: the gradients are scaled where they reach the parameters. For Gaussians
    ``ops.gaussian_kl(balance=…)`` does it in the op.

    Args:
        divergence: called as ``divergence(*posterior, *prior)``, for instance ``ops.gaussian_kl``.
        posterior, prior: parameters of the two distributions.
        prior_share: α in [0, 1].

    Returns:
        What ``divergence`` returns.

    Raises:
        ValueError: ``prior_share`` outside [0, 1].

    Example:
        >>> posterior = torch.ones(2, 3, requires_grad=True), torch.zeros(2, 3)
        >>> prior = torch.zeros(2, 3, requires_grad=True), torch.zeros(2, 3)
        >>> balanced_kl(ops.gaussian_kl, posterior, prior).sum().backward()
        >>> posterior[0].grad[0], prior[0].grad[0]
        (tensor([0.2000, 0.2000, 0.2000]), tensor([-0.8000, -0.8000, -0.8000]))
    """
    if not 0.0 <= prior_share <= 1.0:
        raise ValueError(f"prior_share is {prior_share}; expected a number in [0, 1]")
    shares = [1.0 - prior_share] * len(posterior) + [prior_share] * len(prior)
    # start + share · (end − start) has the value of its ends, exactly, and that share of their gradient.
    scaled = (torch.lerp(t.detach(), t, share) for t, share in zip([*posterior, *prior], shares, strict=True))
    return divergence(*scaled)


def bits_per_dim(nats: Tensor, num_dims: int, *, bin_width: float = 1.0) -> Tensor:
    """Nats of a data vector as bits per dimension: nats / (D log 2) − log₂(bin width).

    A density of continuous data becomes a code length for data quantised into bins of that width (Theis et al. 2016,
    arXiv 1511.01844). Pixels of 256 levels scaled to [0, 1] have bins of 1/256 and so 8 bits more than
    their density says; a discrete likelihood needs no correction.

    Args:
        nats: a negative log-likelihood, or the negative bound that stands for one.
        num_dims: D, the number of values in a data vector.
        bin_width: width of a quantisation bin in the units in which the density was taken.

    Returns:
        Shape of ``nats``.

    Raises:
        ValueError: ``num_dims`` or ``bin_width`` is not positive.

    Example:
        >>> bits_per_dim(torch.tensor(0.0), 3072, bin_width=1 / 256)
        tensor(8.)
    """
    if num_dims < 1:
        raise ValueError(f"num_dims is {num_dims}; expected at least 1")
    if bin_width <= 0.0:
        raise ValueError(f"bin_width is {bin_width}; expected a positive number")
    return nats / (num_dims * math.log(2.0)) - math.log2(bin_width)


def _require_non_negative(name: str, value: float) -> None:
    if value < 0.0:
        raise ValueError(f"{name} is {value}; expected at least 0")
