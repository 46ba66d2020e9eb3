"""Residual vector quantization: every stage codes what the stages before it left over."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from isthmus import ops

from ._codebook_gradient import check_gradient, check_not_negative, check_sampling, directional, fused, gather
from ._codebook_layout import VectorLayout
from ._codebook_learning import Codebook, check_update, embed, mean_of_live, pick, snapshot
from ._quantizer_dropout import QuantizerDropout
from ._residual_stages import Quantized, quantize_stages, stage_books


class ResidualVQOutput(NamedTuple):
    """What :class:`ResidualVQ` and :class:`GroupedResidualVQ` return."""

    quantized: Tensor
    indices: Tensor
    loss: Tensor


class ResidualVQ(Codebook):
    """Describe every vector by Q codes: r_0 = x, c_q the code of stage q nearest to r_q, r_{q+1} = r_q − c_q.

    All stages run in one op while the residual is in cache. Their codebooks learn as that of
    :class:`VectorQuantizer` does, each from the residuals of its own stage; dead codes of a stage move onto
    residuals of that stage. A stage that no vector of a step reached is left alone.

    loss = mean over vectors of Σ_q weight · |r_q − c_q|²: weight is ``commitment_weight``, plus 1 for
    ``learning="gradient"``, where that part moves the codes. The gradient of ``quantized`` reaches x once.

    ``metric="cosine"`` looks for the direction of a residual, r_q·c / |c|, whatever its length; what is subtracted
    is still the code, with the length that it has learned. Stages then run one after the other.

    Quantizer dropout, in training: every entry of the batch (dimension 0) keeps a random number of stages,
    so that a prefix of the codes is a good code of fewer bits. Indices of dropped stages are −1, and decode
    to nothing.

    Args:
        num_codes: size K of all codebooks, or of each.
        dim: size D of a vector.
        num_quantizers: number Q of stages; may be left out where ``num_codes`` names every size.
        groups: quantizers side by side; see :class:`GroupedResidualVQ`.
        shared_codebook: one codebook for all stages.
        quantize_dropout: drop stages in training.
        quantize_dropout_cutoff_index: stages 0 to this one are always kept.
        quantize_dropout_multiple_of: keep a multiple of this many stages.
        beam_size: sequences of codes that the search keeps from stage to stage; ``"euclidean"`` only.
        eval_beam_size: the same outside of training. Default: ``beam_size``.
        metric: ``"euclidean"`` or ``"cosine"``, see above.
        sample_temperature: above 0, every stage draws its codes in training, as :class:`VectorQuantizer` does. Stages
            then run one after the other.
        gradient: ``"straight_through"``, ``"rotation"`` or ``"directional"``, as in :class:`VectorQuantizer`, with
            the sum of the codes as the code.
        learning, directional_variance, codebook_dim, layernorm_after_project_in, channel_first, commitment_weight,
        decay, eps, revive_below, freeze_codebook, sync_codebook: as in :class:`VectorQuantizer`.

    Raises:
        ValueError: an argument is outside its range, or two exclude each other.

    Shapes:
        x ``[..., D]`` or ``[B, D, ...]``; quantized like x; indices int64 ``[..., Q]``, x without D; loss ``[]``.

    Source: Zeghidour et al., SoundStream: An End-to-End Neural Audio Codec, 2021.

    Example:
        >>> import torch, isthmus
        >>> quantizer = isthmus.nn.ResidualVQ(16, dim=4, num_quantizers=3, quantize_dropout=True)
        >>> x = torch.randn(8, 10, 4)
        >>> quantizer.init_from(x)
        >>> quantized, indices, loss = quantizer(x)
        >>> quantized.shape, indices.shape
        (torch.Size([8, 10, 4]), torch.Size([8, 10, 3]))
        >>> quantizer.get_codes(indices).shape
        torch.Size([8, 10, 3, 4])
        >>> torch.allclose(quantizer.eval().decode(quantizer.encode(x)), quantizer(x).quantized)
        True
    """

    def __init__(
        self,
        num_codes: int | Sequence[int],
        dim: int,
        num_quantizers: int | None = None,
        *,
        groups: int = 1,
        shared_codebook: bool = False,
        learning: str = "ema",
        metric: str = "euclidean",
        gradient: str = "straight_through",
        directional_variance: float = 5e-3,
        sample_temperature: float = 0.0,
        codebook_dim: int | None = None,
        layernorm_after_project_in: bool = False,
        channel_first: bool = False,
        commitment_weight: float = 0.25,
        quantize_dropout: bool = False,
        quantize_dropout_cutoff_index: int = 0,
        quantize_dropout_multiple_of: int = 1,
        beam_size: int = 1,
        eval_beam_size: int | None = None,
        decay: float = 0.99,
        eps: float = 0.0,
        revive_below: float = 0.05,
        freeze_codebook: bool = False,
        sync_codebook: bool = True,
    ) -> None:
        sizes = _stage_sizes(num_codes, num_quantizers)
        check_gradient(gradient)
        if metric not in ("euclidean", "cosine"):
            raise ValueError(f"metric must be 'euclidean' or 'cosine', got {metric!r}")
        if metric == "cosine" and max(beam_size, eval_beam_size or 1) > 1:
            raise ValueError("metric='cosine' searches without a beam: sequences compare by the error that they leave")
        check_not_negative(directional_variance=directional_variance, sample_temperature=sample_temperature)
        check_sampling(sample_temperature, gradient)
        if sample_temperature > 0.0 and beam_size > 1:
            raise ValueError(f"codes that are drawn need no beam: give eval_beam_size={beam_size}, not beam_size")
        if shared_codebook and len(set(sizes)) > 1:
            raise ValueError(f"shared_codebook needs stages of one size, got num_codes={sizes}")
        for name, value in (
            ("beam_size", beam_size),
            ("eval_beam_size", beam_size if eval_beam_size is None else eval_beam_size),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        layout = VectorLayout(
            dim,
            codebook_dim,
            heads=groups,
            separate=True,
            channel_first=channel_first,
            layernorm=layernorm_after_project_in,
        )
        super().__init__(
            (sizes[:1] if shared_codebook else sizes) * groups,
            layout.code_dim,
            learning=learning,
            decay=decay,
            eps=eps,
            revive_below=revive_below,
            freeze_codebook=freeze_codebook,
            sync_codebook=sync_codebook,
        )
        self.num_codes = sizes
        self.groups = groups
        self.dim = dim
        self.num_quantizers = len(sizes)
        self.shared_codebook = shared_codebook
        self.metric = metric
        self.gradient = gradient
        self.directional_variance = directional_variance
        self.sample_temperature = sample_temperature
        self.commitment_weight = commitment_weight
        self.dropout = QuantizerDropout(
            len(sizes),
            quantize_dropout=quantize_dropout,
            quantize_dropout_cutoff_index=quantize_dropout_cutoff_index,
            quantize_dropout_multiple_of=quantize_dropout_multiple_of,
        )
        self.beam_size = beam_size
        self.eval_beam_size = eval_beam_size
        self.layout = layout

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        lengths: Tensor | None = None,
        stages: Tensor | int | None = None,
        update: str = "now",
        code_weight: Tensor | None = None,
    ) -> ResidualVQOutput:
        """Quantize ``x``; in training mode also update the codebooks.

        Args:
            x: ``[..., D]``, or ``[B, D, ...]`` with ``channel_first``.
            mask: bool, ``x`` without D. False: quantized is 0, indices are −1, nothing is learned.
            lengths: int ``[B]`` for x ``[B, T, D]`` or ``[B, D, T]``: the mask t < lengths[b].
            stages: how many stages to use: one number, or int64, ``x`` without D. Default: all of them, or what
                quantizer dropout draws.
            update, code_weight: as in :class:`VectorQuantizer`.
        """
        check_update(update)
        mask = self.layout.mask(x, mask, lengths)
        rows = self.layout.rows(x, self.codebook.dtype)
        stages = self.dropout(self.layout.leading(x), x.device) if stages is None else stages
        stages = self.layout.spread(stages) if isinstance(stages, Tensor) and stages.dim() > 0 else stages
        quantized, indices, error = self._quantize(rows, stages, mask, self.training)
        if self.learns:
            # Vectors that hold a NaN or an infinity teach nothing: the averages would never recover.
            finite = error.isfinite().all(dim=-1, keepdim=True)
            self._learn(rows.detach(), torch.where(finite, indices, -1), update, code_weight)
        # The op weights the gradient of its error; the second term gives the value its weights.
        error = mean_of_live(error.sum(-1), mask)
        learned = self.learning == "gradient" and not self.freeze_codebook and self.gradient != "directional"
        weight = self.commitment_weight + learned
        loss = error + (weight - 1.0) * error.detach()
        coded = None if mask is None and stages is None else indices[..., 0] >= 0
        quantized = self.layout.vectors(quantized, x, coded)
        return ResidualVQOutput(quantized, self.layout.indices(indices, x, self.num_quantizers), loss)

    def encode(self, x: Tensor, *, stages: int | None = None) -> Tensor:
        """Codes of the first ``stages`` stages (default: all): int64 ``[..., Q]``, −1 for the others; none is drawn."""
        rows = self.layout.rows(x, self.codebook.dtype)
        _, indices, _ = self._quantize(rows, stages, None, training=False)
        return self.layout.indices(indices, x, self.num_quantizers)

    def get_codes(self, indices: Tensor) -> Tensor:
        """The code of each stage: int64 ``[..., Q]``, or fewer stages, to ``[..., Q, d]``; zeros where −1."""
        books = self.stage_list()[: indices.shape[-1]]
        return torch.stack([embed(index, book) for index, book in zip(indices.unbind(-1), books, strict=True)], dim=-2)

    def decode(self, indices: Tensor) -> Tensor:
        """Indices, of all stages or the first of them, to vectors, as ``quantized`` has them."""
        return self.layout.decode(self.get_codes(indices).sum(dim=-2), indices)

    @torch.no_grad()
    def init_from(self, x: Tensor, iterations: int = 10) -> None:
        """Set the codebooks by k-means, each on the residuals of its stage; a shared one on ``x`` itself.

        Raises:
            ValueError: ``x`` holds fewer vectors than a stage has codes.
        """
        rows = self.layout.rows(x, self.codebook.dtype)
        stages = 1 if self.shared_codebook else self.num_quantizers
        for group, residual in enumerate(rows if self.groups > 1 else [rows]):
            for stage in range(stages):
                book = group * stages + stage
                self.fit(book, residual, iterations)
                codes = self.books(self.codebook)[book]
                residual = residual - embed(ops.vq_assign(residual, codes, metric=self.metric), codes)

    def stage_list(self, codebook: Tensor | None = None) -> list[Tensor]:
        """The codes of each stage: ``[K_q, d]``, or ``[G, K_q, d]`` for groups."""
        codebook = self.codebook if codebook is None else codebook
        if self.groups > 1:
            codebook = codebook.view(self.groups, -1, codebook.shape[-1])
        if self.shared_codebook:
            return [codebook] * self.num_quantizers
        return list(codebook.split(self.num_codes, dim=-2))

    def _quantize(self, rows: Tensor, stages: Tensor | int | None, mask: Tensor | None, training: bool) -> Quantized:
        """Values, indices and squared errors of all stages; the gradient of the errors reaches what they train."""
        codes = self._stage_codes()
        quantized, indices, error = self._search(rows, codes, stages, mask, training)
        if training and self.gradient == "directional":
            picked = [gather(book, index) for book, index in zip(stage_books(codes), indices.unbind(-1), strict=True)]
            total = torch.stack(picked).sum(dim=0)
            quantized = directional(rows, total, indices[..., 0] >= 0, self.directional_variance)
        return quantized, indices, error

    def _search(
        self,
        rows: Tensor,
        codes: Tensor | list[Tensor],
        stages: Tensor | int | None,
        mask: Tensor | None,
        training: bool,
    ) -> Quantized:
        if self.gradient == "directional":
            codes = [book.detach() for book in stage_books(codes)]
        sampled = training and self.sample_temperature > 0.0
        if self.metric == "euclidean" and not sampled:
            return ops.residual_vq_quantize(
                rows,
                codes,
                gradient=fused(self.gradient),
                commitment_weight=self.commitment_weight,
                beam=self.beam_size if training or self.eval_beam_size is None else self.eval_beam_size,
                stages=stages,
                mask=mask,
            )
        books = stage_books(codes)

        def quantize(stage: int, residual: Tensor, known: Tensor, live: Tensor) -> Quantized:
            book, index = books[stage], None
            if sampled:
                index = ops.vq_sample(
                    residual, book, metric=self.metric, temperature=self.sample_temperature, mask=live
                )
            return ops.vq_quantize(
                residual,
                book,
                metric=self.metric,
                commitment_weight=self.commitment_weight,
                mask=None if sampled else live,
                indices=index,
            )

        return quantize_stages(
            rows, self.num_quantizers, quantize, gradient=fused(self.gradient), stages=stages, mask=mask
        )

    def _stage_codes(self) -> Tensor | list[Tensor]:
        """What the op takes, safe from the update: stages of one size are one tensor already."""
        codebook = snapshot(self.codebook) if self.learns else self.codebook
        if self.freeze_codebook:
            codebook = codebook.detach()
        if self.shared_codebook or len(set(self.num_codes)) > 1:
            return self.stage_list(codebook)
        lead = (self.groups,) if self.groups > 1 else ()
        return codebook.view(*lead, self.num_quantizers, self.num_codes[0], -1)

    @torch.no_grad()
    def _learn(self, rows: Tensor, indices: Tensor, update: str, code_weight: Tensor | None) -> None:
        totals = self._totals(rows, indices)
        if update == "later":
            self.accumulate(totals)
        elif self.revive_below > 0.0:
            self.update(totals, *self._candidates(rows, indices), code_weight)
        else:
            self.update(totals, code_weight=code_weight)

    def _totals(self, rows: Tensor, indices: Tensor) -> Tensor:
        books = self.stage_list()
        if self.learning == "gradient":
            # Gradients move the codes, only the hits are asked for: residuals of size 0.
            rows, books = rows[..., :0], [book[..., :0] for book in books]
        totals = ops.residual_code_totals(rows, books, indices)
        if not self.shared_codebook:
            return totals
        hits = self.num_quantizers * len(self.usage)
        parts = totals.split([hits, len(totals) - hits])
        return torch.cat([part.view(self.groups, self.num_quantizers, -1).sum(dim=1).view(-1) for part in parts])

    def _candidates(self, rows: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """For each code a residual of its stage, all of the same few rows, and whether this rank has it."""
        most = max(self.num_codes)
        rows, indices = (part.view(self.groups, rows.shape[-2], part.shape[-1]) for part in (rows, indices))
        number, owned = (part.view(self.groups, most) for part in self.draw(self.groups * most, rows.shape[1]))
        residual, path = pick(rows, number), pick(indices, number)
        codes = self.get_codes(path.transpose(0, 1).squeeze(1)).view(most, self.groups, self.num_quantizers, -1)
        of_stage, reached = [], []
        for stage, size in enumerate(self.num_codes):
            of_stage.append(residual[:, :size])
            reached.append((owned & (path[..., stage] >= 0))[:, :size])
            residual = residual - codes[:, :, stage].transpose(0, 1)
        if self.shared_codebook:
            # Code k takes the residual of stage k mod Q, so that codes of every magnitude come back.
            code = torch.arange(most, device=rows.device)
            chosen = slice(None), code % self.num_quantizers, code
            candidates, owned = torch.stack(of_stage, 1)[chosen], torch.stack(reached, 1)[chosen]
        else:
            candidates, owned = torch.cat(of_stage, 1), torch.cat(reached, 1)
        return candidates.flatten(0, 1), owned.flatten()

    def extra_repr(self) -> str:
        return (
            f"{self.num_codes}, {self.dim}, num_quantizers={self.num_quantizers}, learning={self.learning!r}, "
            f"gradient={self.gradient!r}, commitment_weight={self.commitment_weight}, decay={self.decay}, "
            f"revive_below={self.revive_below}, beam_size={self.beam_size}"
        )


class GroupedResidualVQ(ResidualVQ):
    """G residual quantizers side by side, one for each G-th of a vector, all in one op.

    Args:
        groups: number G of groups.
        num_codes, dim, num_quantizers, ...: as in :class:`ResidualVQ`. ``codebook_dim`` is the size of a group's
            codes, by default D / G.

    Shapes:
        x ``[..., D]`` or ``[B, D, ...]``; quantized like x; indices int64 ``[..., G, Q]``, x without D; loss ``[]``,
        the mean over vectors and groups.

    Source: Yang et al., HiFi-Codec: Group-residual Vector Quantization, 2023.

    Example:
        >>> import torch, isthmus
        >>> quantizer = isthmus.nn.GroupedResidualVQ(16, dim=4, num_quantizers=3, groups=2)
        >>> quantized, indices, loss = quantizer(torch.randn(8, 10, 4))
        >>> quantized.shape, indices.shape
        (torch.Size([8, 10, 4]), torch.Size([8, 10, 2, 3]))
    """

    def __init__(
        self,
        num_codes: int | Sequence[int],
        dim: int,
        num_quantizers: int | None = None,
        *,
        groups: int,
        **options: Any,
    ) -> None:
        super().__init__(num_codes, dim, num_quantizers, groups=groups, **options)


def _stage_sizes(num_codes: int | Sequence[int], num_quantizers: int | None) -> tuple[int, ...]:
    if isinstance(num_codes, int):
        if num_quantizers is None or num_quantizers < 1:
            raise ValueError(f"num_quantizers must be at least 1, got {num_quantizers}")
        return (num_codes,) * num_quantizers
    sizes = tuple(num_codes)
    if not sizes or num_quantizers not in (None, len(sizes)):
        raise ValueError(f"num_codes names {len(sizes)} stages, num_quantizers is {num_quantizers}")
    return sizes
