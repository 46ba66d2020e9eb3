"""Quantizers whose codes are numbers or bits: nothing to search, and no codebook to lose codes of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from isthmus import ops

from ._codebook_learning import mean_of_live
from ._scalar_quantizer import ScalarLayout, ScalarQuantizer

if TYPE_CHECKING:
    from typing_extensions import Unpack


class ScalarQuantizerOutput(NamedTuple):
    """What :class:`FSQ`, :class:`ResidualFSQ`, :class:`LatentQuantizer` and :class:`BinaryMapper` return."""

    quantized: Tensor
    indices: Tensor
    loss: Tensor


class FSQ(ScalarQuantizer):
    """Finite scalar quantization: a few numbers, each rounded to one of a few levels.

    Args:
        levels: number of levels of each dimension of a code; their product is the number of codes, below 2^63.
        dim, num_codebooks, **layout: as in :class:`ScalarQuantizer`.
        preserve_symmetry: levels spread evenly over [-1, 1]; otherwise 0 is one of them.
        bound_hard_clamp: bound by a clamp instead of tanh.
        noise_dropout: in training, the part of the numbers that get noise of one level's width instead of rounding.

    Source: Mentzer et al. 2023, arXiv 2309.15505; symmetry and noise: Parker et al. 2024, arXiv 2411.19842.

    Example:
        >>> import torch, isthmus
        >>> quantizer = isthmus.nn.FSQ((8, 5, 5, 5), dim=32, channel_first=True)
        >>> quantized, indices, loss = quantizer(torch.randn(2, 32, 7, 7))
        >>> quantized.shape, indices.shape
        (torch.Size([2, 32, 7, 7]), torch.Size([2, 7, 7]))
        >>> torch.allclose(quantizer.decode(indices), quantized, atol=1e-6)
        True
        >>> torch.equal(quantizer.get_indices(quantizer.get_codes(indices)), indices)
        True
    """

    def __init__(
        self,
        levels: Sequence[int],
        dim: int | None = None,
        *,
        num_codebooks: int = 1,
        preserve_symmetry: bool = False,
        bound_hard_clamp: bool = False,
        noise_dropout: float = 0.0,
        **layout: Unpack[ScalarLayout],
    ) -> None:
        super().__init__(math.prod(levels), len(levels), dim, num_codebooks, **layout)
        self.levels = tuple(levels)
        self.preserve_symmetry = preserve_symmetry
        self.bound_hard_clamp = bound_hard_clamp
        self.noise_dropout = noise_dropout

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        key: Tensor | None = None,
        generator: Generator | None = None,
    ) -> ScalarQuantizerOutput:
        """Quantize ``x``. ``key`` and ``generator`` are of the noise of ``noise_dropout``; loss is zero."""
        rows, kept = self._codes_of(x, mask)
        codes, indices = ops.fsq_quantize(
            rows,
            self.levels,
            symmetric=self.preserve_symmetry,
            hard_clamp=self.bound_hard_clamp,
            noise_dropout=self.noise_dropout if self.training else 0.0,
            mask=kept,
            key=key,
            generator=generator,
        )
        return ScalarQuantizerOutput(*self._vectors(codes, indices, x, kept), rows.new_zeros(()))

    def get_codes(self, indices: Tensor) -> Tensor:
        return ops.fsq_decode(indices, self.levels, symmetric=self.preserve_symmetry)

    def get_level_indices(self, indices: Tensor) -> Tensor:
        """The level of each number of a code: int64 ``[...]`` to ``[..., codebook_dim]``; -1 stays -1.

        For models that predict one level after the other instead of one of all codes.
        """
        strides, levels = self._radices(indices)
        digits = indices.clamp_min(0).unsqueeze(-1) // strides % levels
        return torch.where((indices >= 0).unsqueeze(-1), digits, -1)

    def get_indices(self, codes: Tensor) -> Tensor:
        """The index of each code, the inverse of ``get_codes``: ``[..., codebook_dim]`` to int64 ``[...]``."""
        strides, levels = self._radices(codes)
        codes = codes.double()
        digits = (codes + 1) * (levels - 1) / 2 if self.preserve_symmetry else (codes + 1) * (levels // 2)
        return (digits.round().long() * strides).sum(-1)

    def _radices(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """What a digit of an index is worth, and how many it can be, of each dimension."""
        strides = [math.prod(self.levels[:d]) for d in range(len(self.levels))]
        return torch.tensor(strides, device=like.device), torch.tensor(self.levels, device=like.device)


class LatentQuantizer(ScalarQuantizer):
    """Latent quantization: each number of a code goes to the nearest of its dimension's own few learnable values.

    loss = quantization_loss_weight · (sg(x) - value)² + commitment_loss_weight · (x - sg(value))², means over numbers.
    The paper pairs it with a strong weight decay on the encoder and decoder, which is the optimizer's business.

    Args:
        levels: number of values of each dimension of a code.
        dim, num_codebooks, **layout: as in :class:`ScalarQuantizer`; all codebooks share the values.
        quantization_loss_weight: pull of the values towards the numbers, above 0.
        commitment_loss_weight: pull of the numbers towards their values.
        optimize_values: learn the values; else they stay evenly spread over [-1/2, 1/2].

    Raises:
        ValueError: ``quantization_loss_weight`` is not positive.

    Source: Hsu et al. 2023, Disentanglement via Latent Quantization, arXiv 2305.18378.

    Example:
        >>> import torch, isthmus
        >>> quantizer = isthmus.nn.LatentQuantizer((5, 5, 8))
        >>> quantized, indices, loss = quantizer(torch.randn(10, 3))
        >>> torch.equal(quantizer.decode(indices), quantized)
        True
    """

    def __init__(
        self,
        levels: Sequence[int],
        dim: int | None = None,
        *,
        num_codebooks: int = 1,
        quantization_loss_weight: float = 0.1,
        commitment_loss_weight: float = 0.1,
        optimize_values: bool = True,
        **layout: Unpack[ScalarLayout],
    ) -> None:
        if not quantization_loss_weight > 0:
            raise ValueError(f"quantization_loss_weight is {quantization_loss_weight}; expected a positive number")
        super().__init__(math.prod(levels), len(levels), dim, num_codebooks, **layout)
        self.levels = tuple(levels)
        self.quantization_loss_weight = quantization_loss_weight
        self.commitment_loss_weight = commitment_loss_weight
        values = torch.cat([torch.linspace(-0.5, 0.5, size) for size in levels])
        self.codebooks = nn.Parameter(values, requires_grad=optimize_values)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> ScalarQuantizerOutput:
        """Quantize ``x``."""
        rows, kept = self._codes_of(x, mask)
        weight, commitment = self.quantization_loss_weight, self.commitment_loss_weight
        codes, indices, error = ops.latent_quantize(
            rows, self.codebooks.to(rows.dtype), self.levels, commitment_weight=commitment / weight, mask=kept
        )
        # The op weights the gradient of its error to x; the second term gives the value its weight.
        error = mean_of_live(error, kept) / self.codebook_dim
        loss = weight * error + commitment * error.detach()
        return ScalarQuantizerOutput(*self._vectors(codes, indices, x, kept), loss)

    def get_codes(self, indices: Tensor) -> Tensor:
        return ops.latent_decode(indices, self.codebooks, self.levels)


class BinaryMapper(ScalarQuantizer):
    """Sample n bits from their logits: one of 2^n codes, with a gradient through the draw.

    loss = mean of max(0, KL - kl_loss_threshold), where KL = n · log 2 - entropy is the divergence, in nats, of the
    bits from fair coins: the information a vector carries, free up to the threshold.

    Args:
        bits: number n of bits of a code, up to 62.
        dim, num_codebooks, **layout: as in :class:`ScalarQuantizer`.
        kl_loss_threshold: nats that cost nothing. Default: one bit.
        gradient, temperature: ``"mean"`` or ``"gumbel"``, as in :func:`isthmus.ops.binary_map`.
        deterministic_on_eval: take the likelier bits in eval mode.

    Source: Fleuret 2025, The Free Transformer, arXiv 2510.17558.

    Example:
        >>> import torch, isthmus
        >>> mapper = isthmus.nn.BinaryMapper(8)
        >>> bits, indices, loss = mapper(torch.randn(4, 10, 8), key=isthmus.key(0))
        >>> torch.equal(mapper.decode(indices), bits)
        True
    """

    def __init__(
        self,
        bits: int,
        dim: int | None = None,
        *,
        num_codebooks: int = 1,
        kl_loss_threshold: float = math.log(2.0),
        gradient: str = "mean",
        temperature: float = 1.0,
        deterministic_on_eval: bool = False,
        **layout: Unpack[ScalarLayout],
    ) -> None:
        super().__init__(2**bits, bits, dim, num_codebooks, **layout)
        self.kl_loss_threshold = kl_loss_threshold
        self.gradient = gradient
        self.temperature = temperature
        self.deterministic_on_eval = deterministic_on_eval

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        key: Tensor | None = None,
        generator: Generator | None = None,
    ) -> ScalarQuantizerOutput:
        """Sample the bits of the logits ``x``."""
        rows, kept = self._codes_of(x, mask)
        bits, indices, entropy = ops.binary_map(
            rows,
            gradient=self.gradient,
            temperature=self.temperature,
            deterministic=self.deterministic_on_eval and not self.training,
            key=key,
            generator=generator,
        )
        divergence = F.relu(self.codebook_dim * math.log(2.0) - entropy - self.kl_loss_threshold)
        if kept is not None:
            divergence, indices = torch.where(kept, divergence, 0.0), torch.where(kept, indices, -1)
        return ScalarQuantizerOutput(*self._vectors(bits, indices, x, kept), mean_of_live(divergence, kept))

    def get_codes(self, indices: Tensor) -> Tensor:
        return torch.where(ops.lfq_decode(indices, self.codebook_dim) > 0, 1.0, 0.0)
