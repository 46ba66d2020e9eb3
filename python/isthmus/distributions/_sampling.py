"""Samples from a key: what every distribution here has in common."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from isthmus import ops
from isthmus.ops._arguments import key_for

__all__ = ["ReparameterizedFromKey", "second_stream", "standard_normal"]


class ReparameterizedFromKey:
    """``sample`` for classes whose ``rsample`` takes a key. Stands before the torch class among the bases."""

    rsample: Any

    def sample(
        self, sample_shape: Sequence[int] = (), *, generator: Generator | None = None, key: Tensor | None = None
    ) -> Tensor:
        """``rsample`` without gradients."""
        with torch.no_grad():
            return self.rsample(sample_shape, generator=generator, key=key)


def standard_normal(like: Tensor, shape: Sequence[int], key: Tensor | None, generator: Generator | None) -> Tensor:
    """Noise of the key, or of a fresh one drawn from the generator, in the dtype and on the device of ``like``."""
    return ops.gaussian_noise(key_for(like, key, generator), shape, like.dtype)


def second_stream(key: Tensor) -> Tensor:
    """A key whose noise shares no block with that of ``key``: 2^62 blocks further on in the same stream."""
    return torch.stack((key[0], key[1] + (1 << 62)))
