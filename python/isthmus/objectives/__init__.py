"""Objectives: losses, bounds and distances as plain functions over tensors.

Nothing here holds parameters. Divergences and likelihoods are in nats and minimised; bounds on log p(x) are maximised.
"""

from isthmus.objectives import schedules
from isthmus.objectives.elbo import (
    balanced_kl,
    bits_per_dim,
    capacity_penalty,
    free_bits,
    joint_vae_loss,
    negative_elbo,
)
from isthmus.objectives.embedding import hedged_match_nll
from isthmus.objectives.importance import (
    PIWAEBounds,
    ciwae_bound,
    effective_sample_size,
    importance_weighted_log_likelihood,
    iwae_bound,
    miwae_bound,
    piwae_bounds,
)
from isthmus.objectives.info import adversarial_penalty, discriminator_loss, info_vae_loss, wae_loss
from isthmus.objectives.sparse import (
    aux_k_loss,
    fraction_of_variance_explained,
    fraction_of_variance_unexplained,
    l0,
    l0_target_loss,
    l1,
    normalized_mse,
)
from isthmus.objectives.total_correlation import (
    KLTerms,
    beta_tc_loss,
    dip_penalty,
    factor_vae_loss,
    kl_decomposition,
    permute_dims,
)
from isthmus.objectives.transport import (
    frechet_distance,
    gaussian_frechet,
    max_direction,
    quasi_directions,
    random_directions,
    sinkhorn_divergence,
    sliced_wasserstein,
)

__all__ = [
    "KLTerms",
    "PIWAEBounds",
    "adversarial_penalty",
    "aux_k_loss",
    "balanced_kl",
    "beta_tc_loss",
    "bits_per_dim",
    "capacity_penalty",
    "ciwae_bound",
    "dip_penalty",
    "discriminator_loss",
    "effective_sample_size",
    "factor_vae_loss",
    "fraction_of_variance_explained",
    "fraction_of_variance_unexplained",
    "frechet_distance",
    "free_bits",
    "gaussian_frechet",
    "hedged_match_nll",
    "importance_weighted_log_likelihood",
    "info_vae_loss",
    "iwae_bound",
    "joint_vae_loss",
    "kl_decomposition",
    "l0",
    "l0_target_loss",
    "l1",
    "max_direction",
    "miwae_bound",
    "negative_elbo",
    "normalized_mse",
    "permute_dims",
    "piwae_bounds",
    "quasi_directions",
    "random_directions",
    "schedules",
    "sinkhorn_divergence",
    "sliced_wasserstein",
    "wae_loss",
]
