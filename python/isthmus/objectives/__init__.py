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
    "balanced_kl",
    "bits_per_dim",
    "capacity_penalty",
    "frechet_distance",
    "free_bits",
    "gaussian_frechet",
    "joint_vae_loss",
    "max_direction",
    "negative_elbo",
    "quasi_directions",
    "random_directions",
    "schedules",
    "sinkhorn_divergence",
    "sliced_wasserstein",
]
