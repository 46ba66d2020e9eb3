"""MultivariateNormal: samples from a key, and a divergence that keeps its digits near the prior."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor, distributions
from torch.distributions.kl import register_kl

from isthmus.distributions._numeric import triangular_gap
from isthmus.distributions._sampling import ReparameterizedFromKey, standard_normal

__all__ = ["MultivariateNormal", "multivariate_normal_kl"]


def multivariate_normal_kl(loc: Tensor, scale_tril: Tensor, prior_loc: Tensor, prior_scale_tril: Tensor) -> Tensor:
    """KL(N(loc, L Lᵀ) ‖ N(prior_loc, L₀ L₀ᵀ)) by Cholesky factors, in nats.

    With E = L₀⁻¹ (L - L₀) and ε its diagonal: ½ [Σ_{i>j} E² + Σ (exp(d) - 1 - d) + ‖L₀⁻¹ (loc - prior_loc)‖²],
    d = 2 log(1 + ε). One triangular solve, no inverse, no determinant; every term is non-negative.

    Args:
        loc, prior_loc: [*, D].
        scale_tril, prior_scale_tril: [*, D, D], lower triangular with positive diagonals; batches broadcast.

    Returns:
        [*].

    Example:
        >>> multivariate_normal_kl(torch.ones(3), torch.eye(3), torch.zeros(3), torch.eye(3))
        tensor(1.5000)
    """
    gap, _ = triangular_gap(scale_tril, prior_scale_tril)
    shift = (loc - prior_loc).unsqueeze(-1)
    batch = torch.broadcast_shapes(prior_scale_tril.shape[:-2], shift.shape[:-2])
    whitened = torch.linalg.solve_triangular(
        prior_scale_tril.expand(*batch, *prior_scale_tril.shape[-2:]),
        shift.expand(*batch, *shift.shape[-2:]),
        upper=False,
    )
    return 0.5 * (gap + whitened.square().sum((-2, -1)))


class MultivariateNormal(ReparameterizedFromKey, distributions.MultivariateNormal):
    """``torch.distributions.MultivariateNormal`` with samples from a key and an accurate divergence.

    Example:
        >>> q = MultivariateNormal(torch.zeros(3), scale_tril=torch.eye(3))
        >>> q.rsample((2,), key=isthmus.key(0)).shape
        torch.Size([2, 3])
    """

    def expand(self, batch_shape: Any, _instance: Any = None) -> "MultivariateNormal":
        return super().expand(batch_shape, self._get_checked_instance(MultivariateNormal, _instance))

    def rsample(
        self, sample_shape: Sequence[int] = (), *, generator: Generator | None = None, key: Tensor | None = None
    ) -> Tensor:
        """loc + L · noise, [*sample_shape, *batch_shape, D]."""
        noise = standard_normal(self.loc, self._extended_shape(torch.Size(sample_shape)), key, generator)
        return self.loc + (self._unbroadcasted_scale_tril @ noise.unsqueeze(-1)).squeeze(-1)


@register_kl(MultivariateNormal, MultivariateNormal)
@register_kl(MultivariateNormal, distributions.MultivariateNormal)
@register_kl(distributions.MultivariateNormal, MultivariateNormal)
def _multivariate_multivariate(q: distributions.MultivariateNormal, p: distributions.MultivariateNormal) -> Tensor:
    return multivariate_normal_kl(q.loc, q.scale_tril, p.loc, p.scale_tril)


@register_kl(distributions.Independent, MultivariateNormal)
def _independent_multivariate(q: distributions.Independent, p: MultivariateNormal) -> Tensor:
    """Of a diagonal Gaussian from a full one, which torch does not have."""
    if not isinstance(q.base_dist, distributions.Normal) or q.reinterpreted_batch_ndims != 1:
        raise NotImplementedError(f"no closed form for {type(q.base_dist).__name__} with {q.event_shape} from {p}")
    return multivariate_normal_kl(q.base_dist.loc, torch.diag_embed(q.base_dist.scale), p.loc, p.scale_tril)
