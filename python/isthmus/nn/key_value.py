"""A bottleneck of key-value pairs, of which a gradient changes only those that were fetched."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .codebook import VectorQuantizer


class KeyValueBottleneckOutput(NamedTuple):
    """What :class:`KeyValueBottleneck` returns."""

    values: Tensor
    indices: Tensor


class KeyValueBottleneck(nn.Module):
    """Look every vector up under its nearest keys; what is fetched learns, and nothing else.

    C heads see the vector through a fixed random projection each. Every head fetches the value of its nearest key.
    Gradients reach the fetched values alone: not the keys, not x. So what is learned about one region of the input
    stays when another is learned later.

    First let the keys follow the data: in training mode they are moving averages of what meets them, for which no
    label is needed. Then call :meth:`freeze_keys` and train the values.

    Args:
        num_pairs: number K of pairs of a head.
        dim: size D of a vector.
        value_dim: size V of a value.
        heads: number C of heads.
        key_dim: size of a key. Default: D / C, and the heads are parts of the vector, without projection.
        decay, revive_below, sync_codebook, ...: how keys learn, as in :class:`VectorQuantizer`.

    Raises:
        ValueError: an argument is outside its range.

    Shapes:
        x ``[..., D]``; values ``[..., C, V]``; indices int64 ``[..., C]``.

    Source: Träuble et al., Discrete Key-Value Bottleneck, ICML 2023.

    Example:
        >>> import torch, isthmus
        >>> bottleneck = isthmus.nn.KeyValueBottleneck(64, dim=16, value_dim=10, heads=4, key_dim=8)
        >>> x = torch.randn(100, 16)
        >>> bottleneck.init_from(x)
        >>> bottleneck.freeze_keys()
        >>> logits = bottleneck(x).values.mean(dim=-2)
        >>> logits.shape
        torch.Size([100, 10])
    """

    projection: Tensor | None

    def __init__(
        self,
        num_pairs: int,
        dim: int,
        value_dim: int,
        *,
        heads: int = 1,
        key_dim: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.heads = heads
        projection = None if key_dim is None else torch.randn(dim, heads * key_dim) * dim**-0.5
        self.register_buffer("projection", projection)
        self.keys = VectorQuantizer(
            num_pairs,
            dim if key_dim is None else heads * key_dim,
            heads=heads,
            separate_codebook_per_head=True,
            **options,
        )
        self.values = nn.Parameter(torch.randn(heads, num_pairs, value_dim))

    def forward(self, x: Tensor) -> KeyValueBottleneckOutput:
        """Fetch; in training mode move the keys, too, unless they are frozen."""
        with torch.no_grad():
            x = self._project(x)
            indices = self.keys(x).indices if self.keys.learns else self.keys.encode(x)
        indices = indices.view(*x.shape[:-1], self.heads)
        pairs = self.values.shape[1]
        rows = indices + pairs * torch.arange(self.heads, device=x.device)
        return KeyValueBottleneckOutput(F.embedding(rows, self.values.flatten(0, 1)), indices)

    def freeze_keys(self, frozen: bool = True) -> None:
        """Keep the keys where they are, or let them follow the data again."""
        self.keys.freeze_codebook = frozen

    @torch.no_grad()
    def init_from(self, x: Tensor, iterations: int = 10) -> None:
        """Set the keys by k-means on ``x`` ``[..., D]``."""
        self.keys.init_from(self._project(x), iterations)

    def _project(self, x: Tensor) -> Tensor:
        return x if self.projection is None else x.to(self.projection.dtype) @ self.projection

    def extra_repr(self) -> str:
        return f"{self.values.shape[1]}, {self.dim}, value_dim={self.values.shape[2]}, heads={self.heads}"
