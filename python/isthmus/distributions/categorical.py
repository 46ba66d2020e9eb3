"""Categorical and RelaxedOneHotCategorical with one-kernel samples and divergences."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor, distributions
from torch.distributions.kl import register_kl

from isthmus import ops
from isthmus.distributions._sampling import ReparameterizedFromKey

__all__ = ["Categorical", "RelaxedOneHotCategorical"]


class Categorical(distributions.Categorical):
    """``torch.distributions.Categorical`` with a divergence in one pass each way, exact near the prior, and samples
    that can be repeated from a key.

    Example:
        >>> q, p = Categorical(logits=torch.zeros(2, 3)), Categorical(probs=torch.ones(2, 3))
        >>> torch.distributions.kl_divergence(q, p).max() < 1e-7
        tensor(True)
        >>> q.sample((5,), key=isthmus.key(0)).shape
        torch.Size([5, 2])
    """

    def expand(self, batch_shape: Any, _instance: Any = None) -> "Categorical":
        return super().expand(batch_shape, self._get_checked_instance(Categorical, _instance))

    def sample(
        self, sample_shape: Sequence[int] = (), *, generator: Generator | None = None, key: Tensor | None = None
    ) -> Tensor:
        """Indices, by the Gumbel-max trick: the largest of logits + ``gumbel_noise(key, …)``."""
        shape = self._extended_shape(torch.Size(sample_shape)) + self.param_shape[-1:]
        with torch.no_grad():
            y = ops.gumbel_softmax(self.logits.expand(shape), hard=True, key=key, generator=generator)
            return y.argmax(-1)


class RelaxedOneHotCategorical(ReparameterizedFromKey, distributions.RelaxedOneHotCategorical):
    """``torch.distributions.RelaxedOneHotCategorical`` with samples in one pass each way and no stored noise.

    Args:
        temperature: a positive number, or a tensor of one element without gradient, whose value is read at each sample.
        probs, logits, validate_args: as in torch.

    Example:
        >>> q = RelaxedOneHotCategorical(torch.tensor(0.5), logits=torch.zeros(2, 3))
        >>> q.rsample(key=isthmus.key(0)).sum(-1)
        tensor([1., 1.])
    """

    def __init__(
        self,
        temperature: Tensor | float,
        probs: Tensor | None = None,
        logits: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        if isinstance(temperature, Tensor) and (temperature.numel() != 1 or temperature.requires_grad):
            raise ValueError(
                f"temperature is a tensor of shape {list(temperature.shape)} with requires_grad="
                f"{temperature.requires_grad}; expected a number, or one element without gradient"
            )
        super().__init__(torch.as_tensor(temperature), probs, logits, validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "RelaxedOneHotCategorical":
        return super().expand(batch_shape, self._get_checked_instance(RelaxedOneHotCategorical, _instance))

    def rsample(
        self, sample_shape: Sequence[int] = (), *, generator: Generator | None = None, key: Tensor | None = None
    ) -> Tensor:
        """A differentiable sample: ``gumbel_softmax`` of the logits, [*sample_shape, *batch_shape, K]."""
        logits = self.logits.expand(self._extended_shape(torch.Size(sample_shape)))
        return ops.gumbel_softmax(logits, temperature=float(self.temperature), key=key, generator=generator)


@register_kl(Categorical, Categorical)
@register_kl(Categorical, distributions.Categorical)
@register_kl(distributions.Categorical, Categorical)
def _categorical_categorical(q: distributions.Categorical, p: distributions.Categorical) -> Tensor:
    return ops.categorical_kl(q.logits, p.logits)
