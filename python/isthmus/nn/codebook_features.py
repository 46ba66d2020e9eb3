"""Activations written as sums of a few codes: sparse and discrete, so that a network can be read and steered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from isthmus import clustering, ops


class CodebookFeaturesOutput(NamedTuple):
    """What :class:`CodebookFeatures` returns."""

    features: Tensor
    indices: Tensor
    loss: Tensor


class CodebookFeatures(nn.Module):
    """Replace every activation by the sum of the k codes most similar to it by cosine.

    The gradient of ``features`` passes straight through to x. Codes learn from loss = mean over vectors of
    |sg(x) − Σ c|², which gives none to x: add it to the loss of the network.

    Args:
        num_codes: size K of the codebook.
        dim: size D of a vector.
        k: codes for each vector, 1 to K.

    Raises:
        ValueError: k is outside its range, or more codes are to be activated than k.

    Shapes:
        x ``[..., D]``; features ``[..., D]``; indices int64 ``[..., k]``, most similar first; loss ``[]``.

    Source: Tamkin et al., Codebook Features: Sparse and Discrete Interpretability for Neural Networks, 2023.

    Example:
        >>> import torch, isthmus
        >>> layer = isthmus.nn.CodebookFeatures(num_codes=64, dim=8, k=4)
        >>> x = torch.randn(2, 5, 8)
        >>> features, indices, loss = layer(x)
        >>> features.shape, indices.shape
        (torch.Size([2, 5, 8]), torch.Size([2, 5, 4]))
        >>> bool((layer(x, activate=[7]).indices[..., 0] == 7).all())
        True
    """

    def __init__(self, num_codes: int, dim: int, k: int) -> None:
        if not 1 <= k <= num_codes:
            raise ValueError(f"k must be in [1, num_codes={num_codes}], got {k}")
        super().__init__()
        self.k = k
        self.codebook = nn.Parameter(torch.randn(num_codes, dim) / k)

    def forward(self, x: Tensor, *, activate: Tensor | Sequence[int] | None = None) -> CodebookFeaturesOutput:
        """Write ``x`` as codes. Those to ``activate``, n ≤ k of them, take the places of the least similar."""
        rows = x.to(self.codebook.dtype)
        indices = self.encode(x)
        if activate is not None:
            indices = self._activate(indices, torch.as_tensor(activate, device=x.device))
        total = self.decode(indices)
        loss = (rows.detach() - total).square().sum(dim=-1).mean()
        features = total.detach() + (rows - rows.detach())
        return CodebookFeaturesOutput(features.to(x.dtype), indices, loss)

    def encode(self, x: Tensor) -> Tensor:
        """The k most similar codes: ``[..., D]`` to int64 ``[..., k]``."""
        indices = ops.vq_assign(x.to(self.codebook.dtype), self.codebook, metric="cosine", topk=self.k)
        return indices.view(*x.shape[:-1], self.k)

    def decode(self, indices: Tensor) -> Tensor:
        """The sum of codes: int64 ``[..., k]`` to ``[..., D]``."""
        ones = torch.ones_like(indices, dtype=self.codebook.dtype)
        return ops.sparse_decode(ones, indices, self.codebook)

    @torch.no_grad()
    def init_from(self, x: Tensor, iterations: int = 10) -> None:
        """Set the codes to 1/k of the means that k-means finds in ``x`` ``[..., D]``."""
        rows = x.reshape(-1, x.shape[-1]).to(self.codebook.dtype)
        codebook, _ = clustering.kmeans(rows, len(self.codebook), iterations=iterations)
        self.codebook.copy_(codebook / self.k)

    def _activate(self, indices: Tensor, chosen: Tensor) -> Tensor:
        if chosen.dim() != 1 or len(chosen) > self.k:
            raise ValueError(f"activate has shape {list(chosen.shape)}; expected [n] with n at most k={self.k}")
        # Codes that are both chosen and among the nearest go to the end, where they are dropped first.
        twice = (indices.unsqueeze(-1) == chosen).any(dim=-1)
        nearest = indices.take_along_dim(twice.to(torch.int8).argsort(dim=-1, stable=True), dim=-1)
        return torch.cat([chosen.expand(*indices.shape[:-1], -1), nearest[..., : self.k - len(chosen)]], dim=-1)

    def extra_repr(self) -> str:
        return f"{len(self.codebook)}, {self.codebook.shape[1]}, k={self.k}"
