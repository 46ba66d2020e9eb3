"""Residual quantizers without a codebook table: every stage codes what the stages before it left over."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from isthmus import ops

from ._quantizer_dropout import QuantizerDropout
from ._scalar_quantizer import ScalarLayout, ScalarQuantizer
from .lookup_free import LFQ, LFQOutput
from .scalar import ScalarQuantizerOutput

if TYPE_CHECKING:
    from typing_extensions import Unpack


class ResidualScalarQuantizer(ScalarQuantizer):
    """Base of quantizers whose indices have a last dimension of Q stages; -1 marks stages that a vector lacks."""

    dropout: QuantizerDropout

    def encode(self, x: Tensor, mask: Tensor | None = None, *, stages: int | None = None) -> Tensor:
        """The indices of ``x`` alone, of the first ``stages`` stages (default: all) and -1 for the others."""
        return self(x, mask, stages=self.dropout.num_quantizers if stages is None else stages).indices

    def get_codes(self, indices: Tensor) -> Tensor:
        """The code of each stage: int64 ``[..., Q]``, or fewer stages, to ``[..., Q, codebook_dim]``; zeros at -1."""
        return torch.stack([self._stage_codes(index, q) for q, index in enumerate(indices.unbind(-1))], dim=-2)

    def decode(self, indices: Tensor) -> Tensor:
        """Indices, of all stages or the first of them, to vectors, as ``quantized`` has them."""
        return self._decode(self.get_codes(indices).sum(dim=-2), indices)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_quantizers={self.dropout.num_quantizers}"

    def _stage_codes(self, indices: Tensor, stage: int) -> Tensor:
        raise NotImplementedError

    def _stages(self, x: Tensor, kept: Tensor | None, stages: Tensor | int | None) -> Tensor | None:
        """How many stages each row [N, num_codebooks] has, masked ones none; None if all have all of them."""
        leading = self.layout.leading(x)
        stages = self.dropout(leading, x.device) if stages is None else stages
        if stages is None:
            return None if kept is None else kept * self.dropout.num_quantizers
        stages = torch.as_tensor(stages, device=x.device).expand(leading)
        stages = self.layout.spread(stages).view(-1, self.num_codebooks)
        return stages if kept is None else stages * kept


def _having(counts: Tensor | None, stage: int) -> Tensor | None:
    """The rows that have a stage, as a mask."""
    return None if counts is None else counts > stage


class ResidualFSQ(ResidualScalarQuantizer):
    """Finite scalars to more digits: stage q rounds what the stages before it left over, on a scale of L^-q.

    A number is bounded to ±L/(L - 1), where all L bins have the same width, and what a stage leaves over lies in a bin
    of that stage. So Q stages of L levels tell L^Q evenly spread values apart, and fewer stages are the same value with
    fewer digits. Float32 holds 24 bits: stages beyond L^Q = 2^24 code noise.

    Loss is zero. The gradient of ``quantized`` reaches x once, through the bound.

    Args:
        levels: number L of levels of each dimension of a code, from 2 on; their product is the number of codes.
        dim, **layout: as in :class:`ScalarQuantizer`.
        num_quantizers: number Q of stages.
        groups: quantizers side by side; see :class:`GroupedResidualFSQ`.
        bound_hard_clamp: bound by a clamp instead of tanh.
        quantize_dropout, quantize_dropout_cutoff_index, quantize_dropout_multiple_of: in training, every entry of the
            batch keeps a random number of stages, as in :class:`ResidualVQ`.

    Raises:
        ValueError: an argument is outside its range.

    Shapes:
        x ``[..., dim]`` or ``[B, dim, ...]``; quantized like x; indices int64 ``[..., Q]``, x without dim; loss ``[]``.

    Source: Mentzer et al. 2023, arXiv 2309.15505; stages: Zeghidour et al. 2021, arXiv 2107.03312.

    Example:
        >>> import torch, isthmus
        >>> quantizer = isthmus.nn.ResidualFSQ((8, 5, 5), dim=16, num_quantizers=4)
        >>> quantized, indices, loss = quantizer(torch.randn(2, 10, 16))
        >>> quantized.shape, indices.shape
        (torch.Size([2, 10, 16]), torch.Size([2, 10, 4]))
        >>> torch.allclose(quantizer.decode(indices), quantized, atol=1e-6)
        True
        >>> quantizer.decode(indices[..., :2]).shape  # coarser
        torch.Size([2, 10, 16])
    """

    def __init__(
        self,
        levels: Sequence[int],
        dim: int | None = None,
        *,
        num_quantizers: int,
        groups: int = 1,
        bound_hard_clamp: bool = False,
        quantize_dropout: bool = False,
        quantize_dropout_cutoff_index: int = 0,
        quantize_dropout_multiple_of: int = 1,
        **layout: Unpack[ScalarLayout],
    ) -> None:
        super().__init__(math.prod(levels), len(levels), dim, groups, **layout)
        self.levels = tuple(levels)
        self.bound_hard_clamp = bound_hard_clamp
        self.dropout = QuantizerDropout(
            num_quantizers,
            quantize_dropout=quantize_dropout,
            quantize_dropout_cutoff_index=quantize_dropout_cutoff_index,
            quantize_dropout_multiple_of=quantize_dropout_multiple_of,
        )

    def forward(
        self, x: Tensor, mask: Tensor | None = None, *, stages: Tensor | int | None = None
    ) -> ScalarQuantizerOutput:
        """Quantize ``x``.

        Args:
            x, mask: as in :class:`ScalarQuantizer`.
            stages: how many stages to use: one number, or int64, ``x`` without dim. Default: all of them, or what
                quantizer dropout draws.
        """
        rows, kept = self._codes_of(x, mask)
        counts = self._stages(x, kept, stages)
        codes, indices = ops.residual_fsq_quantize(
            rows, self.levels, self.dropout.num_quantizers, hard_clamp=self.bound_hard_clamp, stages=counts
        )
        return ScalarQuantizerOutput(*self._vectors(codes, indices, x, _having(counts, 0)), rows.new_zeros(()))

    def _stage_codes(self, indices: Tensor, stage: int) -> Tensor:
        codes = ops.fsq_decode(indices, self.levels, symmetric=True)
        return codes * codes.new_tensor([float(size) ** -stage for size in self.levels])


class GroupedResidualFSQ(ResidualFSQ):
    """G residual quantizers side by side, one for each G-th of a vector.

    Args:
        groups: number G of groups.
        levels, dim, num_quantizers, **options: as in :class:`ResidualFSQ`.

    Shapes:
        x ``[..., dim]`` or ``[B, dim, ...]``; quantized like x; indices int64 ``[..., G, Q]``, x without dim; loss
        ``[]``.

    Source: Yang et al., HiFi-Codec: Group-residual Vector Quantization, 2023.

    Example:
        >>> import torch, isthmus
        >>> quantizer = isthmus.nn.GroupedResidualFSQ((8, 5, 5), num_quantizers=4, groups=2)
        >>> quantizer(torch.randn(2, 10, 6)).indices.shape
        torch.Size([2, 10, 2, 4])
    """

    def __init__(
        self, levels: Sequence[int], dim: int | None = None, *, num_quantizers: int, groups: int, **options: Any
    ) -> None:
        super().__init__(levels, dim, num_quantizers=num_quantizers, groups=groups, **options)


class LFQOptions(ScalarLayout, total=False):
    """Arguments that residual quantizers of signs hand on to :class:`LFQ`."""

    codebook_scale: float
    entropy_loss_weight: float
    diversity_gamma: float
    commitment_loss_weight: float
    batch_entropy: str
    soft_clamp_input_value: float | None


class ResidualLFQ(ResidualScalarQuantizer, LFQ):
    """Signs of what is left: stage q adds ±codebook_scale · 2^-q to each number, so that Q stages are its Q bits.

    loss = Σ over stages of the loss of :class:`LFQ`; the entropies and the commitment of the output are those of each
    stage, ``[Q]``, means over the vectors that have the stage. Residuals and codes shrink by 2 from stage to stage, so
    one temperature makes the soft assignment of stage q 4^q times softer. All losses reach x, ``quantized`` once.

    Args:
        codebook_size, dim, **options: as in :class:`LFQ`; on a sphere residuals have no place.
        num_quantizers: number Q of stages.
        groups: quantizers side by side; see :class:`GroupedResidualLFQ`.
        quantize_dropout, quantize_dropout_cutoff_index, quantize_dropout_multiple_of: as in :class:`ResidualFSQ`.

    Raises:
        ValueError: an argument is outside its range.

    Shapes:
        x ``[..., dim]`` or ``[B, dim, ...]``; quantized like x; indices int64 ``[..., Q]``, x without dim; loss ``[]``.

    Source: Yu et al. 2023, arXiv 2310.05737; stages: Zeghidour et al. 2021, arXiv 2107.03312.

    Example:
        >>> import torch, isthmus
        >>> quantizer = isthmus.nn.ResidualLFQ(2**6, dim=16, num_quantizers=4)
        >>> out = quantizer(torch.randn(2, 10, 16))
        >>> out.quantized.shape, out.indices.shape, out.batch_entropy.shape
        (torch.Size([2, 10, 16]), torch.Size([2, 10, 4]), torch.Size([4]))
    """

    def __init__(
        self,
        codebook_size: int | None = None,
        dim: int | None = None,
        *,
        num_quantizers: int,
        groups: int = 1,
        quantize_dropout: bool = False,
        quantize_dropout_cutoff_index: int = 0,
        quantize_dropout_multiple_of: int = 1,
        **options: Unpack[LFQOptions],
    ) -> None:
        super().__init__(codebook_size, dim, num_codebooks=groups, **options)
        self.dropout = QuantizerDropout(
            num_quantizers,
            quantize_dropout=quantize_dropout,
            quantize_dropout_cutoff_index=quantize_dropout_cutoff_index,
            quantize_dropout_multiple_of=quantize_dropout_multiple_of,
        )

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        stages: Tensor | int | None = None,
        inv_temperature: Tensor | float = 100.0,
    ) -> LFQOutput:
        """Quantize ``x``; ``stages`` as in :class:`ResidualFSQ`, ``inv_temperature`` as in :class:`LFQ`."""
        rows, kept = self._codes_of(x, mask)
        rows = self._clamped(rows)
        counts, found, total = self._stages(x, kept, stages), [], torch.zeros_like(rows)
        for q in range(self.dropout.num_quantizers):
            found.append(self._stage(rows - total, _having(counts, q), self._stage_scale(q), inv_temperature))
            total = total + found[-1].codes.detach()
        loss, *terms = self._loss(found)
        indices = torch.stack([stage.indices for stage in found], dim=-1)
        vectors = self._vectors(rows + (total - rows).detach(), indices, x, _having(counts, 0))
        return LFQOutput(*vectors, loss, *terms)

    def encode(self, x: Tensor, mask: Tensor | None = None, *, stages: int | None = None) -> Tensor:
        rows, kept = self._codes_of(x, mask)
        counts = self._stages(x, kept, self.dropout.num_quantizers if stages is None else stages)
        left, indices = self._clamped(rows), []
        for q in range(self.dropout.num_quantizers):
            codes, index, _ = ops.lfq_quantize(left, scale=self._stage_scale(q), mask=_having(counts, q))
            left = left - codes
            indices.append(index)
        return self._vectors(left, torch.stack(indices, dim=-1), x, kept)[1]

    def _stage_codes(self, indices: Tensor, stage: int) -> Tensor:
        return ops.lfq_decode(indices, self.codebook_dim, scale=self._stage_scale(stage))

    def _stage_scale(self, stage: int) -> float:
        return self.codebook_scale * 2.0**-stage


class GroupedResidualLFQ(ResidualLFQ):
    """G residual quantizers of signs side by side, one for each G-th of a vector.

    Args:
        groups: number G of groups.
        codebook_size, dim, num_quantizers, **options: as in :class:`ResidualLFQ`.

    Shapes:
        x ``[..., dim]`` or ``[B, dim, ...]``; quantized like x; indices int64 ``[..., G, Q]``, x without dim; loss
        ``[]``, entropies averaged over groups.

    Source: Yang et al., HiFi-Codec: Group-residual Vector Quantization, 2023.

    Example:
        >>> import torch, isthmus
        >>> quantizer = isthmus.nn.GroupedResidualLFQ(2**6, num_quantizers=4, groups=2)
        >>> quantizer(torch.randn(2, 10, 12)).indices.shape
        torch.Size([2, 10, 2, 4])
    """

    def __init__(
        self,
        codebook_size: int | None = None,
        dim: int | None = None,
        *,
        num_quantizers: int,
        groups: int,
        **options: Any,
    ) -> None:
        super().__init__(codebook_size, dim, num_quantizers=num_quantizers, groups=groups, **options)
