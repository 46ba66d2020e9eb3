"""Codebooks that move as a whole: the codes in use are a function of stored ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ._codebook_learning import snapshot
from ._ranks import all_reduce, has_ranks
from .codebook import VectorQuantizer
from .residual import ResidualVQ


class AffineCodebook(nn.Module):
    """Give the codes the mean and the standard deviation that the vectors have, per dimension.

    A ``transform`` of :class:`VectorQuantizer`: when the encoder's outputs shift or grow, all codes follow at once, and
    not only those that are hit. c becomes (c − mean c) · s / std c + m, with m and s from moving averages of the
    moments of the vectors. Moments carry no gradient. Until vectors were seen, codes pass unchanged.

    Args:
        dim: size d of a code.
        decay: of the moving averages, in [0, 1).

    Shapes:
        codes ``[..., K, d]`` to the same.

    Source: Huh et al., Straightening Out the Straight-Through Estimator, ICML 2023.

    Example:
        >>> import torch, isthmus
        >>> quantizer = isthmus.nn.VectorQuantizer(
        ...     64, 4, learning="gradient", revive_below=0.0, transform=isthmus.nn.AffineCodebook(4)
        ... )
        >>> out = quantizer(5.0 + 0.1 * torch.randn(256, 4))
        >>> bool(((quantizer.codes().mean(dim=0) - 5.0).abs() < 0.1).all())
        True
    """

    moments: Tensor

    def __init__(self, dim: int, decay: float = 0.99) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        super().__init__()
        self.decay = decay
        # Averages of (1, x, x²) from a start of 0: the first entry is the weight that they have so far.
        self.register_buffer("moments", torch.zeros(3, dim))

    @torch.no_grad()
    def observe(self, rows: Tensor, mask: Tensor | None) -> None:
        """Take the vectors ``[..., d]`` of a step, of all ranks, into the moving averages."""
        rows = rows.reshape(-1, rows.shape[-1])
        live = rows.new_ones(len(rows), 1) if mask is None else mask.reshape(-1, 1).to(rows.dtype)
        rows = torch.where(live > 0, rows, 0.0)
        batch = torch.stack([live.sum(0).expand(rows.shape[-1]), rows.sum(0), rows.square().sum(0)])
        if has_ranks():
            (batch,) = all_reduce(batch)
        batch = torch.where(batch[0] > 0, batch / batch[0], self.moments)
        self.moments.copy_(snapshot(self.moments.lerp(batch.to(self.moments.dtype), 1.0 - self.decay)))

    def forward(self, codes: Tensor) -> Tensor:
        """The codes in use."""
        weight, mean, square = self.moments
        mean, square = mean / weight, square / weight
        own_std, own_mean = torch.std_mean(codes.detach(), dim=-2, keepdim=True, correction=0)
        scale = (square - mean.square()).clamp_min(0.0).sqrt() / own_std
        return torch.where(weight > 0, (codes - own_mean) * scale + mean, codes)


class SimVQ(VectorQuantizer):
    """Vector quantization with a frozen codebook behind a trained linear layer.

    The stored codes never change; the layer moves all codes with every step, so none dies. The codes in
    use, W c, learn from loss = |sg(x) − W c|² + commitment_weight · |x − sg(W c)|².

    Args:
        num_codes: size K of the codebook.
        dim: size D of a vector.
        transform: module in place of the linear layer, ``[K, d]`` to ``[K, d]``.
        options: as in :class:`VectorQuantizer`, which decides shapes, errors and methods, too; the
            codebook needs no ``learning`` and no ``revive_below``.

    Source: Zhu et al., Addressing Representation Collapse in Vector Quantized Models with One Linear
    Layer, 2024.

    Example:
        >>> import torch, isthmus
        >>> quantizer = isthmus.nn.SimVQ(num_codes=16, dim=4)
        >>> quantizer(torch.randn(8, 10, 4)).loss.backward()
        >>> quantizer.codebook.grad is None, quantizer.transform.weight.grad.shape
        (True, torch.Size([4, 4]))
    """

    def __init__(self, num_codes: int, dim: int, *, transform: nn.Module | None = None, **options: Any) -> None:
        placeholder = nn.Identity()  # until the size of a code is known
        super().__init__(
            num_codes,
            dim,
            learning="gradient",
            revive_below=0.0,
            transform=placeholder if transform is None else transform,
            **options,
        )
        size = self.codebook.shape[-1]
        if self.transform is placeholder:
            self.transform = nn.Linear(size, size, bias=False)
        _freeze(self)


class ResidualSimVQ(ResidualVQ):
    """Residual quantization with frozen codebooks, each behind a trained linear layer of its own, as in :class:`SimVQ`.

    All stages run in one op, as those of :class:`ResidualVQ` do. The codes in use, W_q c, learn from loss = mean over
    vectors of Σ_q |sg(r_q) − W_q c_q|² + commitment_weight · |r_q − sg(W_q c_q)|².

    Args:
        num_codes, dim, num_quantizers, options: as in :class:`ResidualVQ`, which decides shapes, errors and methods,
            too; the codebooks need no ``learning`` and no ``revive_below``. Groups have layers of their own; a
            ``shared_codebook`` is seen through the layer of each stage.

    Source: as for :class:`SimVQ`.

    Example:
        >>> import torch, isthmus
        >>> quantizer = isthmus.nn.ResidualSimVQ(16, dim=4, num_quantizers=3)
        >>> quantized, indices, loss = quantizer(torch.randn(8, 10, 4))
        >>> indices.shape
        torch.Size([8, 10, 3])
        >>> loss.backward()
        >>> quantizer.codebook.grad is None, quantizer.weight.grad.shape
        (True, torch.Size([3, 4, 4]))
    """

    def __init__(
        self, num_codes: int | Sequence[int], dim: int, num_quantizers: int | None = None, **options: Any
    ) -> None:
        super().__init__(num_codes, dim, num_quantizers, learning="gradient", revive_below=0.0, **options)
        size = self.codebook.shape[-1]
        _freeze(self)
        groups = (self.groups,) if self.groups > 1 else ()
        self.weight = nn.Parameter(torch.empty(self.num_quantizers, *groups, size, size))
        nn.init.uniform_(self.weight, -(size**-0.5), size**-0.5)

    def stage_list(self, codebook: Tensor | None = None) -> list[Tensor]:
        """The codes of each stage behind its layer: ``[K_q, d]``, or ``[G, K_q, d]`` for groups."""
        books = super().stage_list(codebook)
        return [(book @ weight.mT).to(book.dtype) for book, weight in zip(books, self.weight, strict=True)]

    def init_from(self, x: Tensor, iterations: int = 10) -> None:
        """Not possible: raises ``ValueError``."""
        raise ValueError("init_from: the means of k-means lie behind the layers of these codebooks")

    def _stage_codes(self) -> list[Tensor]:
        # An update counts hits, and is written where the codes are.
        books = self.stage_list(snapshot(self.codebook) if self.learns else self.codebook)
        return [book.detach() for book in books] if self.freeze_codebook else books


def _freeze(quantizer: VectorQuantizer | ResidualVQ) -> None:
    """Make the codebook a buffer of codes whose length is about 1."""
    stored = quantizer.codebook.detach() * quantizer.codebook.shape[-1] ** -0.5
    del quantizer.codebook
    quantizer.register_buffer("codebook", stored)
