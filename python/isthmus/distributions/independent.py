"""Independent whose samples can be repeated from a key, and whose sums are part of the kernels."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor, distributions
from torch.distributions.kl import _kl_independent_independent, register_kl

from isthmus.distributions.normal import Normal, normal_kl

__all__ = ["Independent"]


class Independent(distributions.Independent):
    """``torch.distributions.Independent`` that hands ``key`` and ``generator`` on to its base distribution.

    Over the last dimension of Normals, density and divergence are summed in the pass that computes them.

    Example:
        >>> from isthmus.distributions import Normal
        >>> q = Independent(Normal(torch.zeros(2, 3), torch.ones(2, 3)), 1)
        >>> q.rsample(key=isthmus.key(0)).shape, q.log_prob(torch.zeros(2, 3)).shape
        (torch.Size([2, 3]), torch.Size([2]))
    """

    def expand(self, batch_shape: Any, _instance: Any = None) -> "Independent":
        return super().expand(batch_shape, self._get_checked_instance(Independent, _instance))

    def rsample(
        self, sample_shape: Sequence[int] = (), *, generator: Generator | None = None, key: Tensor | None = None
    ) -> Tensor:
        """A sample of the base distribution."""
        return self.base_dist.rsample(torch.Size(sample_shape), generator=generator, key=key)

    def sample(
        self, sample_shape: Sequence[int] = (), *, generator: Generator | None = None, key: Tensor | None = None
    ) -> Tensor:
        """A sample of the base distribution, without gradients."""
        return self.base_dist.sample(torch.Size(sample_shape), generator=generator, key=key)

    def log_prob(self, value: Tensor) -> Tensor:
        if isinstance(self.base_dist, Normal) and self.reinterpreted_batch_ndims == 1:
            return self.base_dist.reduced_log_prob(value, "row")
        return super().log_prob(value)


@register_kl(Independent, Independent)
@register_kl(Independent, distributions.Independent)
@register_kl(distributions.Independent, Independent)
def _independent_independent(q: distributions.Independent, p: distributions.Independent) -> Tensor:
    normals = isinstance(q.base_dist, distributions.Normal) and isinstance(p.base_dist, distributions.Normal)
    if normals and q.reinterpreted_batch_ndims == p.reinterpreted_batch_ndims == 1:
        return normal_kl(q.base_dist, p.base_dist, "row")
    return _kl_independent_independent(q, p)
