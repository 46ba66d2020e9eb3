"""Lookup-free quantization: codes are signs, and entropies keep all of their 2^n combinations in use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from isthmus import ops

from ._ranks import all_reduce, has_ranks
from ._scalar_quantizer import ScalarLayout, ScalarQuantizer

if TYPE_CHECKING:
    from typing_extensions import Unpack


class LFQOutput(NamedTuple):
    """What :class:`LFQ` returns: the loss, and what it is made of."""

    quantized: Tensor
    indices: Tensor
    loss: Tensor
    sample_entropy: Tensor
    batch_entropy: Tensor
    commitment: Tensor


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
        dim, num_codebooks, **layout: as in :class:`ScalarQuantizer`.
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
        spherical: bool = False,
        codebook_scale: float = 1.0,
        entropy_loss_weight: float = 0.1,
        diversity_gamma: float = 1.0,
        commitment_loss_weight: float = 0.0,
        batch_entropy: str = "exact",
        soft_clamp_input_value: float | None = None,
        **layout: Unpack[ScalarLayout],
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
        super().__init__(codebook_size, bits, dim, num_codebooks, **layout)
        self.spherical = spherical
        self.codebook_scale = codebook_scale
        self.entropy_loss_weight = entropy_loss_weight
        self.diversity_gamma = diversity_gamma
        self.commitment_loss_weight = commitment_loss_weight
        self.batch_entropy = batch_entropy
        self.soft_clamp_input_value = soft_clamp_input_value

    def forward(self, x: Tensor, mask: Tensor | None = None, *, inv_temperature: Tensor | float = 100.0) -> LFQOutput:
        """Quantize ``x``. The soft assignment is softmax(-inv_temperature · |u - code|²).

        ``torch.compile`` compiles again for each new float: to anneal, pass a tensor of one number.
        """
        rows, kept = self._codes_of(x, mask)
        stage = self._stage(self._clamped(rows), kept, self.codebook_scale, inv_temperature)
        loss, *terms = self._loss([stage])
        return LFQOutput(*self._vectors(stage.codes, stage.indices, x, kept), loss, *(term[0] for term in terms))

    def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        rows, kept = self._codes_of(x, mask)
        codes, indices, _ = ops.lfq_quantize(rows, mask=kept)
        return self._vectors(codes, indices, x, kept)[1]

    def get_codes(self, indices: Tensor) -> Tensor:
        return ops.lfq_decode(indices, self.codebook_dim, scale=self.codebook_scale, spherical=self.spherical)

    def get_indices(self, codes: Tensor) -> Tensor:
        """The index of each code, the inverse of ``get_codes``: ``[..., codebook_dim]`` to int64 ``[...]``."""
        return ops.lfq_quantize(codes)[1]

    def _clamped(self, rows: Tensor) -> Tensor:
        most = self.soft_clamp_input_value
        return rows if most is None else (rows / most).tanh() * most

    def _stage(self, rows: Tensor, kept: Tensor | None, scale: float, inv_temperature: Tensor | float) -> SignStage:
        """Rows to the corners of ``scale``; ``kept`` is the same for all codebooks of a vector."""
        options: dict[str, Any] = {
            "scale": scale,
            "spherical": self.spherical,
            "inverse_temperature": inv_temperature,
            "mask": None if kept is None else kept[:, 0],
        }
        codes, indices, error, entropy, counts = ops.lfq_quantize_entropy(
            rows, num_codebooks=self.num_codebooks, **options
        )
        if self.batch_entropy == "exact":
            counts = torch.stack([ops.lfq_code_counts(codebook, **options) for codebook in rows.unbind(1)])
        total = counts.new_full((), len(rows)) if kept is None else kept[:, 0].sum().to(counts)
        return SignStage(codes, indices, error.sum(), entropy.sum(), counts, total)

    def _loss(self, stages: list[SignStage]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Summed over stages; and the sample entropy, batch entropy and commitment of each of Q stages, ``[Q]``."""
        sums = (torch.stack(column) for column in zip(*(stage[2:] for stage in stages), strict=True))
        error, entropy, counts, total = sums
        counts, total, ranks = _over_ranks(counts, total)
        total = total.clamp_min(1)
        per_rank = total / ranks * self.num_codebooks
        sample = entropy / per_rank
        exact = self.batch_entropy == "exact"
        batch = (ops.code_entropy(counts) if exact else ops.bit_entropy(counts, total.view(-1, 1, 1))).mean(-1)
        commitment = error / (per_rank * self.codebook_dim)
        loss = self.entropy_loss_weight * (sample - self.diversity_gamma * batch)
        loss = loss + self.commitment_loss_weight * commitment
        return loss.sum(), sample, batch, commitment


class SignStage(NamedTuple):
    """Rows quantized to signs, and the sums over them that the loss is made of."""

    codes: Tensor  # [N, C, n]
    indices: Tensor  # [N, C]
    error: Tensor  # []
    entropy: Tensor  # []
    counts: Tensor  # soft, of codes [C, 2^n] or of bits [C, n]
    total: Tensor  # [], vectors that count


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
    joint = _SumOverRanks.apply(torch.cat((counts.flatten(), total)))
    return joint[: counts.numel()].view(counts.shape), joint[counts.numel() :], dist.get_world_size()
