"""Quantizers whose codes are numbers, signs or bits: nothing to search, and no codebook to lose codes of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from isthmus import ops

from ._codebook_layout import VectorLayout
from ._codebook_learning import mean_of_live
from ._ranks import all_reduce, has_ranks


class ScalarQuantizerOutput(NamedTuple):
    """What :class:`FSQ`, :class:`LatentQuantizer` and :class:`BinaryMapper` return."""

    quantized: Tensor
    indices: Tensor
    loss: Tensor


class LFQOutput(NamedTuple):
    """What :class:`LFQ` returns: the loss, and what it is made of."""

    quantized: Tensor
    indices: Tensor
    loss: Tensor
    sample_entropy: Tensor
    batch_entropy: Tensor
    commitment: Tensor


class ScalarQuantizer(nn.Module):
    """What the quantizers of this file share: layouts, projections, and the way back from indices.

    Vectors of size ``dim`` are projected to ``num_codebooks`` codes of ``codebook_dim`` numbers, and back, unless that
    is their size already. Quantization runs in float32 (float64 for float64) whatever comes in, autocast or not.

    Shapes:
        x ``[..., dim]``, or with ``channel_first`` ``[B, dim, ...]``: images, video, audio. indices int64 ``[...]``, or
        ``[..., num_codebooks]`` if there are several; loss ``[]``. mask bool, the shape of x without its vectors:
        where it is False, quantized is zero, the index -1, and nothing is learned.
    """

    def __init__(
        self, codebook_size: int, codebook_dim: int, dim: int | None, num_codebooks: int, channel_first: bool
    ) -> None:
        super().__init__()
        dim = codebook_dim * num_codebooks if dim is None else dim
        self.codebook_size = codebook_size
        self.num_codebooks = num_codebooks
        self.codebook_dim = codebook_dim
        self.layout = VectorLayout(dim, codebook_dim, heads=num_codebooks, channel_first=channel_first)

    def get_codes(self, indices: Tensor) -> Tensor:
        """The codes themselves, before projection: int64 ``[...]`` to ``[..., codebook_dim]``."""
        raise NotImplementedError

    def decode(self, indices: Tensor) -> Tensor:
        """What ``forward`` returns for these indices: ``[...]`` or ``[..., num_codebooks]`` to the layout of x."""
        codes = self.get_codes(indices)
        return self.layout.decode(codes.to(self._weight_dtype(codes)))

    def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The indices of ``x`` alone."""
        return self(x, mask).indices

    def extra_repr(self) -> str:
        return f"codebook_size={self.codebook_size}, dim={self.layout.dim}, num_codebooks={self.num_codebooks}"

    def _weight_dtype(self, like: Tensor) -> torch.dtype:
        return next((p.dtype for p in self.layout.parameters()), like.dtype)

    def _codes_of(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Rows [N, num_codebooks, codebook_dim] in the type they are quantized in, and the mask [N, num_codebooks]."""
        rows = self.layout.rows(x, self._weight_dtype(x))
        rows = rows.view(-1, self.num_codebooks, self.codebook_dim)
        kept = self.layout.mask(x, mask, None)
        kept = None if kept is None else kept.view(-1, self.num_codebooks)
        return rows if rows.dtype == torch.float64 else rows.float(), kept

    def _vectors(self, codes: Tensor, indices: Tensor, x: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor]:
        rows = codes.to(self._weight_dtype(codes))
        kept = None if kept is None else kept.reshape(-1)
        return self.layout.vectors(rows, x, kept), self.layout.indices(indices, x)


class FSQ(ScalarQuantizer):
    """Finite scalar quantization: a few numbers, each rounded to one of a few levels.

    Args:
        levels: number of levels of each dimension of a code; their product is the number of codes, below 2^63.
        dim: size of a vector. Default: ``num_codebooks · len(levels)``, and no projections.
        num_codebooks: codes that describe one vector together.
        channel_first: vectors lie along dimension 1.
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
    """

    def __init__(
        self,
        levels: Sequence[int],
        dim: int | None = None,
        *,
        num_codebooks: int = 1,
        channel_first: bool = False,
        preserve_symmetry: bool = False,
        bound_hard_clamp: bool = False,
        noise_dropout: float = 0.0,
    ) -> None:
        super().__init__(math.prod(levels), len(levels), dim, num_codebooks, channel_first)
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


_MOST_EXACT_BITS = 20


class LFQ(ScalarQuantizer):
    """Lookup-free quantization: the signs of n numbers are one of 2^n codes; ``spherical`` on the sphere (BSQ).

    loss = entropy_loss_weight · (sample_entropy - diversity_gamma · batch_entropy)
         + commitment_loss_weight · commitment

    ``sample_entropy`` is the mean entropy of the soft assignment of a vector, ``batch_entropy`` that of the mean
    assignment, both in nats and averaged over codebooks; ``commitment`` the mean over numbers of (u - code)².

    Distributed: where ``torch.distributed`` is initialised, the mean assignment is that of the joint batch of all
    ranks, by one differentiable all-reduce, and the other means are divided by the vectors that a rank has on average.
    So the mean of the ranks' losses, and the gradients that ``DistributedDataParallel`` averages, are those of one
    process with the joint batch, also where masks leave ranks different numbers of vectors. Every rank must take part.

    Args:
        codebook_size: 2^n codes. Default: ``2 ** dim`` without projections.
        dim: size of a vector. Default: ``num_codebooks · n``, and no projections.
        num_codebooks, channel_first: as in :class:`FSQ`.
        spherical: project onto the sphere of radius ``codebook_scale`` first.
        codebook_scale: a code is ±codebook_scale in each number; on the sphere, of that norm.
        entropy_loss_weight, diversity_gamma, commitment_loss_weight: of the loss.
        batch_entropy: ``"exact"`` over all 2^n codes, for n up to 18 or so: rows · 2^n multiplications in a matrix
            product; or ``"factorized"``, the sum of the entropies of bits, an upper bound that costs nothing.
        soft_clamp_input_value: squash inputs smoothly to ±this.

    Raises:
        ValueError: an argument is outside its range.

    Source: Yu et al. 2023, arXiv 2310.05737; on the sphere: Zhao et al. 2024, arXiv 2406.07548.

    Example:
        >>> import torch, isthmus
        >>> quantizer = isthmus.nn.LFQ(2**10, dim=16, spherical=True, batch_entropy="factorized")
        >>> out = quantizer(torch.randn(4, 50, 16), inv_temperature=10.0)
        >>> out.quantized.shape, out.indices.shape
        (torch.Size([4, 50, 16]), torch.Size([4, 50]))
    """

    def __init__(
        self,
        codebook_size: int | None = None,
        dim: int | None = None,
        *,
        num_codebooks: int = 1,
        channel_first: bool = False,
        spherical: bool = False,
        codebook_scale: float = 1.0,
        entropy_loss_weight: float = 0.1,
        diversity_gamma: float = 1.0,
        commitment_loss_weight: float = 0.0,
        batch_entropy: str = "exact",
        soft_clamp_input_value: float | None = None,
    ) -> None:
        if codebook_size is None:
            if dim is None:
                raise ValueError("codebook_size and dim are both None; expected at least one of them")
            codebook_size = 2**dim
        bits = codebook_size.bit_length() - 1
        if bits < 1 or codebook_size != 2**bits:
            raise ValueError(f"codebook_size is {codebook_size}; expected a power of two from 2 on")
        if batch_entropy not in ("exact", "factorized"):
            raise ValueError(f"batch_entropy is {batch_entropy!r}; expected 'exact' or 'factorized'")
        if batch_entropy == "exact" and bits > _MOST_EXACT_BITS:
            raise ValueError(
                f"codebook_size is 2^{bits}; batch_entropy='exact' visits all codes, expected at most "
                f"2^{_MOST_EXACT_BITS}, or batch_entropy='factorized'"
            )
        super().__init__(codebook_size, bits, dim, num_codebooks, channel_first)
        self.spherical = spherical
        self.codebook_scale = codebook_scale
        self.entropy_loss_weight = entropy_loss_weight
        self.diversity_gamma = diversity_gamma
        self.commitment_loss_weight = commitment_loss_weight
        self.batch_entropy = batch_entropy
        self.soft_clamp_input_value = soft_clamp_input_value

    def forward(self, x: Tensor, mask: Tensor | None = None, *, inv_temperature: float = 100.0) -> LFQOutput:
        """Quantize ``x``. The soft assignment is softmax(-inv_temperature · |u - code|²).

        ``torch.compile`` takes the number as a constant: anneal it in a few steps, not in every iteration.
        """
        rows, kept = self._codes_of(x, mask)
        if self.soft_clamp_input_value is not None:
            rows = (rows / self.soft_clamp_input_value).tanh() * self.soft_clamp_input_value
        options: dict[str, Any] = {
            "scale": self.codebook_scale,
            "spherical": self.spherical,
            "inverse_temperature": inv_temperature,
        }
        vectors = None if kept is None else kept[:, 0]
        codes, indices, error, entropy, counts = ops.lfq_quantize_entropy(
            rows, num_codebooks=self.num_codebooks, mask=vectors, **options
        )
        if self.batch_entropy == "exact":
            counts = torch.stack([ops.lfq_code_counts(c, mask=vectors, **options) for c in rows.unbind(1)])
        total = counts.new_full((), len(rows)) if vectors is None else vectors.sum().to(counts)
        counts, total, ranks = _over_ranks(counts, total)
        total = total.clamp_min(1)
        per_rank = total / ranks * self.num_codebooks
        sample = entropy.sum() / per_rank
        batch = (ops.code_entropy(counts) if self.batch_entropy == "exact" else ops.bit_entropy(counts, total)).mean()
        commitment = error.sum() / (per_rank * self.codebook_dim)
        loss = self.entropy_loss_weight * (sample - self.diversity_gamma * batch)
        loss = loss + self.commitment_loss_weight * commitment
        return LFQOutput(*self._vectors(codes, indices, x, kept), loss, sample, batch, commitment)

    def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        rows, kept = self._codes_of(x, mask)
        return self.layout.indices(ops.lfq_quantize(rows, mask=kept)[1], x)

    def get_codes(self, indices: Tensor) -> Tensor:
        return ops.lfq_decode(indices, self.codebook_dim, scale=self.codebook_scale, spherical=self.spherical)


class _SumOverRanks(torch.autograd.Function):
    """Every rank's loss depends on every rank's part, so gradients are summed over the ranks as well."""

    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        return all_reduce(t)[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return all_reduce(grad)[0]


def _over_ranks(counts: Tensor, total: Tensor) -> tuple[Tensor, Tensor, int]:
    """Both summed over the ranks, and how many these are."""
    if not has_ranks():
        return counts, total, 1
    joint = _SumOverRanks.apply(torch.cat((counts.flatten(), total.reshape(1))))
    return joint[:-1].view(counts.shape), joint[-1], dist.get_world_size()


class LatentQuantizer(ScalarQuantizer):
    """Latent quantization: each number of a code goes to the nearest of its dimension's own few learnable values.

    loss = quantization_loss_weight · (sg(x) - value)² + commitment_loss_weight · (x - sg(value))², means over numbers.
    The paper pairs it with a strong weight decay on the encoder and decoder, which is the optimizer's business.

    Args:
        levels: number of values of each dimension of a code.
        dim, num_codebooks, channel_first: as in :class:`FSQ`; all codebooks share the values.
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
        channel_first: bool = False,
        quantization_loss_weight: float = 0.1,
        commitment_loss_weight: float = 0.1,
        optimize_values: bool = True,
    ) -> None:
        if not quantization_loss_weight > 0:
            raise ValueError(f"quantization_loss_weight is {quantization_loss_weight}; expected a positive number")
        super().__init__(math.prod(levels), len(levels), dim, num_codebooks, channel_first)
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
        dim, num_codebooks, channel_first: as in :class:`FSQ`.
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
        channel_first: bool = False,
        kl_loss_threshold: float = math.log(2.0),
        gradient: str = "mean",
        temperature: float = 1.0,
        deterministic_on_eval: bool = False,
    ) -> None:
        super().__init__(2**bits, bits, dim, num_codebooks, channel_first)
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
