"""Discrete targets for self-supervised learning that nobody has to train."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus import ops


class RandomProjectionQuantizer(nn.Module):
    """Label every vector with the nearest of random codes, after a random projection; nothing learns.

    x is normalised to mean 0 and variance 1 over D, projected by a fixed matrix, and compared to fixed codes by
    cosine. The labels are what a model predicts for masked inputs.

    Args:
        num_codes: size K of a codebook.
        dim: size D of a vector.
        codebook_dim: size d of a code.
        num_codebooks: number of labels for each vector, each with its own projection and codes.
        norm: normalise x. Turn it off for inputs that are normalised already.

    Raises:
        ValueError: x has vectors of another size.

    Shapes:
        x ``[..., D]``; indices int64 ``[...]``, or ``[..., num_codebooks]`` if there are several.

    Source: Chiu et al., Self-supervised Learning with Random-projection Quantizer for Speech
    Recognition, ICML 2022; several codebooks: Zhang et al., Google USM, 2023.

    Example:
        >>> import torch, isthmus
        >>> quantizer = isthmus.nn.RandomProjectionQuantizer(8192, dim=80, codebook_dim=16)
        >>> quantizer(torch.randn(2, 50, 80)).shape
        torch.Size([2, 50])
    """

    projection: Tensor
    codebook: Tensor

    def __init__(
        self, num_codes: int, dim: int, codebook_dim: int = 16, *, num_codebooks: int = 1, norm: bool = True
    ) -> None:
        super().__init__()
        self.norm = norm
        projection = torch.stack(
            [nn.init.xavier_uniform_(torch.empty(dim, codebook_dim)) for _ in range(num_codebooks)]
        )
        self.register_buffer("projection", projection)
        self.register_buffer("codebook", F.normalize(torch.randn(num_codebooks, num_codes, codebook_dim), dim=-1))

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """The labels of ``x``."""
        books, dim, _ = self.projection.shape
        if x.dim() == 0 or x.shape[-1] != dim:
            raise ValueError(f"x has shape {list(x.shape)}; expected [..., {dim}]")
        rows = x.reshape(-1, dim).to(self.codebook.dtype)
        rows = F.layer_norm(rows, [dim]) if self.norm else rows
        indices = ops.vq_assign((rows @ self.projection).to(self.codebook.dtype), self.codebook, metric="cosine")
        return indices.T.reshape(*x.shape[:-1], *([books] if books > 1 else []))

    def extra_repr(self) -> str:
        books, codes, size = self.codebook.shape
        return f"{codes}, {self.projection.shape[1]}, codebook_dim={size}, num_codebooks={books}, norm={self.norm}"
