"""Independent whose samples can be repeated from a key."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor, distributions

__all__ = ["Independent"]


class Independent(distributions.Independent):
    """``torch.distributions.Independent`` that hands ``key`` and ``generator`` on to its base distribution.

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
