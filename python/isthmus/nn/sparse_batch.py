"""Sparse autoencoders whose batches have k active features per row: easy rows take fewer, hard ones more."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from isthmus import ops
from isthmus.objectives.sparse import fraction_of_variance_unexplained
from isthmus.ops._arguments import accumulate_dtype

from ._ranks import all_reduce, has_ranks
from ._sparse_coder import SparseCode, SparseCoder, check_k, entry_rows


class BatchTopKSAE(SparseCoder):
    """Sparse autoencoder that keeps the N · k largest features of a batch of N rows.

    Training: values = the N · k largest of relu((x − pre_bias) encoderᵀ + encoder_bias), chosen exactly and without an
    ``[N, F]`` tensor. Evaluation: one row must not depend on the others, so a feature is kept when it is above
    ``threshold``, the moving average of the smallest value that a training batch kept. It is 0, which keeps all
    positive features, until the first one; averages of ranks are averaged.

    ``loss``, AuxK, unit norm, start and dead features are those of :class:`TopKSAE`.

    Evaluation has a number of entries that depends on the data: :func:`isthmus.ops.threshold_encode` says what
    ``torch.compile`` makes of that. In training the number is fixed.

    Args:
        dim: size D of the input.
        num_features: size F of the dictionary.
        k: features kept per row on average; need not be whole.
        decay: of the moving average of the threshold.
        aux_k: dead features per row in the auxiliary loss; ``None`` means D / 2, at most F.
        aux_weight: weight of the auxiliary loss.
        dead_after: rows without firing after which a feature counts as dead.
        sync_firing: under ``torch.distributed``, count what fired on all ranks and average their thresholds.

    Raises:
        ValueError: ``k``, ``decay`` or ``aux_k`` is out of range.

    Shapes:
        x ``[..., D]``; reconstruction ``[..., D]``; ragged values and indices ``[E]``, offsets ``[N + 1]``; losses
        ``[]``. In training E is round(N · k).

    Source: Bussmann et al., BatchTopK Sparse Autoencoders, 2024 (arXiv 2412.06410).

    Example:
        >>> sae = nn.BatchTopKSAE(dim=16, num_features=64, k=2.5)
        >>> out = sae(torch.randn(32, 16))
        >>> out.values.shape, out.offsets.shape
        (torch.Size([80]), torch.Size([33]))
        >>> values, indices, offsets = sae.eval().encode(torch.randn(4, 16))
        >>> sae.decode(values, indices, offsets).shape
        torch.Size([4, 16])
    """

    threshold: Tensor
    options: tuple[str, ...] = ("k", "decay", "aux_k", "aux_weight", "dead_after")

    def __init__(
        self,
        dim: int,
        num_features: int,
        k: float,
        *,
        decay: float = 0.99,
        aux_k: int | None = None,
        aux_weight: float = 1 / 32,
        dead_after: int = 10_000_000,
        sync_firing: bool = True,
    ) -> None:
        check_k(k, num_features)
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        super().__init__(
            (dim,),
            num_features,
            aux_k=min(num_features, dim // 2) if aux_k is None else aux_k,
            aux_weight=aux_weight,
            dead_after=dead_after,
            sync_firing=sync_firing,
        )
        self.k = k
        self.decay = decay
        self.register_buffer("threshold", torch.zeros(()))

    def _apply(self, fn: Any, recurse: bool = True) -> BatchTopKSAE:
        """The threshold follows the module to its device, but into no dtype whose digits an average would outlive."""
        exact = self.threshold
        super()._apply(fn, recurse)
        if self.threshold.dtype in (torch.bfloat16, torch.float16):
            self.threshold = exact.to(self.threshold.device)
        return self

    def _code(self, centred: Tensor) -> SparseCode:
        if not self.training:
            return self._above(centred, self.threshold)
        values, indices, offsets, threshold, order = ops.batch_topk_encode(
            centred, self.encoder_weight, self.encoder_bias, self.k, return_order=True
        )
        return SparseCode(values, indices, offsets, order=order, fired=order.counts, threshold=threshold)

    def _learn_from(self, code: SparseCode, rows: int) -> None:
        super()._learn_from(code, rows)
        assert code.threshold is not None
        known = code.threshold.isfinite()  # it is not of an empty batch
        total, ranks = torch.where(known, code.threshold, 0.0), known.to(code.threshold.dtype)
        if self.sync_firing and has_ranks():
            total, ranks = all_reduce(total, ranks)
        latest = (total / ranks).to(self.threshold.dtype)
        average = torch.where(self.threshold == 0.0, latest, torch.lerp(latest, self.threshold, self.decay))
        self.threshold.copy_(torch.where(ranks > 0.0, average, self.threshold))


class MatryoshkaSAE(BatchTopKSAE):
    """Batch-top-k autoencoder with dictionaries inside one another: every prefix reconstructs on its own.

    The features are those of the widest dictionary, chosen by one encoder; the reconstruction of level i uses the first
    ``widths[i]`` of them only. ``reconstruction_loss`` is the mean over levels of the fraction of variance unexplained,
    ``reconstruction`` that of the last. So early features must be general, and cannot be absorbed by later, specific
    ones.

    One decode makes all levels: each adds the features that it has in addition to the level before, and a cumulative
    sum over levels does the rest. O(N · k · D) time as for one level, O(N · L · D) memory.

    Args:
        dim: size D of the input.
        widths: sizes of the L nested dictionaries, ascending; the last is F.
        k, decay, aux_k, aux_weight, dead_after, sync_firing: as for :class:`BatchTopKSAE`.

    Raises:
        ValueError: ``widths`` do not ascend from at least 1, or as :class:`BatchTopKSAE`.

    Shapes:
        As :class:`BatchTopKSAE`.

    Source: Bussmann et al., Learning Multi-Level Features with Matryoshka Sparse Autoencoders, 2025 (arXiv 2503.17547).

    Example:
        >>> sae = nn.MatryoshkaSAE(16, widths=(8, 24, 64), k=4)
        >>> out = sae(torch.randn(32, 16))
        >>> sae.decode_levels(out.values, out.indices, out.offsets).shape
        torch.Size([32, 3, 16])
    """

    bounds: Tensor
    options = ("widths", *BatchTopKSAE.options)

    def __init__(
        self,
        dim: int,
        widths: Sequence[int],
        k: float,
        *,
        decay: float = 0.99,
        aux_k: int | None = None,
        aux_weight: float = 1 / 32,
        dead_after: int = 10_000_000,
        sync_firing: bool = True,
    ) -> None:
        if any(after <= before for before, after in pairwise((0, *widths))) or not widths:
            raise ValueError(f"widths must ascend from at least 1, got {tuple(widths)}")
        super().__init__(
            dim,
            widths[-1],
            k,
            decay=decay,
            aux_k=aux_k,
            aux_weight=aux_weight,
            dead_after=dead_after,
            sync_firing=sync_firing,
        )
        self.widths = tuple(widths)
        self.register_buffer("bounds", torch.tensor(widths), persistent=False)

    def decode_levels(self, values: Tensor, indices: Tensor, offsets: Tensor) -> Tensor:
        """The reconstructions of all levels, ``[N, L, D]``, from what :meth:`encode` returns."""
        return self._decode_levels(SparseCode(values, indices, offsets))

    def _decode_levels(self, code: SparseCode) -> Tensor:
        indices, offsets, order = code.indices, code.offsets, code.order
        assert offsets is not None
        rows, levels = len(offsets) - 1, len(self.widths)
        # Entries of a row ascend by feature, so those of a level are neighbours: a ragged code of N · L rows.
        row = entry_rows(indices, offsets) * levels + torch.bucketize(indices, self.bounds, right=True)
        counts = torch.zeros(rows * levels, dtype=torch.int64, device=indices.device)
        counts.index_add_(0, row, torch.ones_like(indices))
        bounds = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        if order is not None:  # entries stay where they are; only rows have other numbers
            order = order._replace(rows=row[order.entries])
        added = ops.sparse_decode(code.values, indices, self.decoder_weight, offsets=bounds, order=order)
        return added.view(rows, levels, -1).cumsum(dim=1) + self.pre_bias

    def _reconstruct(self, code: SparseCode, rows: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        levels = self._decode_levels(code)
        dtype = accumulate_dtype(levels)
        squared_error = (target.unsqueeze(1).to(dtype) - levels.to(dtype)).square().sum(dim=-1)
        loss = fraction_of_variance_unexplained(squared_error, target) / len(self.widths)
        return levels[:, -1], loss
