"""Vector quantization of feature maps at several scales."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus import ops

from ._codebook_gradient import check_gradient, gather
from ._codebook_learning import check_options, check_update, mean_of_live, snapshot
from ._quantizer_dropout import QuantizerDropout
from ._residual_stages import quantize_each
from .codebook import VectorQuantizer

_CONVOLUTIONS = nn.Conv1d, nn.Conv2d, nn.Conv3d
_INTERPOLATIONS = "linear", "bicubic", "trilinear"
_OPTIONS = {
    "learning",
    "codebook_dim",
    "layernorm_after_project_in",
    "commitment_weight",
    "decay",
    "eps",
    "revive_below",
    "freeze_codebook",
    "sync_codebook",
}


class HierarchicalVQOutput(NamedTuple):
    """What :class:`HierarchicalVQ` returns."""

    quantized: Tensor
    indices: tuple[Tensor, ...]
    loss: Tensor


class HierarchicalVQ(VectorQuantizer):
    """Describe a feature map by maps of codes of growing size, all from one codebook: tokens for next-scale prediction.

    Starting from r = x, every scale pools r to its size, takes the nearest codes, brings their map back to the size of
    x by interpolation (bicubic for images, linear otherwise) and a convolution φ, and leaves r minus that to the next.
    So the maps of the first scales describe x coarsely, and all of them together best.

    loss = mean over scales k and positions of |sg(x) − x̂_k|² + commitment_weight · |x − sg(x̂_k)|², x̂_k the sum of
    what scales 0 to k brought back. It trains φ, and a codebook of ``learning="gradient"``; moving averages take the
    vectors of all scales as one batch.

    A model that predicts scale after scale sees ``decode(indices[:k])``, pooled to the size of scale k, before it.

    Args:
        num_codes: size K of the codebook.
        dim: size D of a vector.
        scales: the size of each map of codes: one number for all its sides, or one for each. The last is usually the
            size of x.
        spatial_dims: how many sides maps have: 1, 2 or 3.
        quant_resi: how much of φ is convolution: φ(h) = (1 − quant_resi) · h + quant_resi · conv(h); 0 leaves it out.
        share_quant_resi: how many φ there are; neighbouring scales share one. 0 is one for each scale.
        gradient: ``"straight_through"`` or ``"rotation"``.
        quantize_dropout, quantize_dropout_cutoff_index, quantize_dropout_multiple_of: in training, every entry of the
            batch keeps a random number of its first scales, as stages of :class:`ResidualVQ` are kept.
        options: ``learning``, ``codebook_dim``, ``layernorm_after_project_in``, ``commitment_weight``, ``decay``,
            ``eps``, ``revive_below``, ``freeze_codebook`` and ``sync_codebook``, as in :class:`VectorQuantizer`.

    Raises:
        ValueError: an argument is outside its range, or x has another number of sides.

    Shapes:
        x ``[B, D, ...]``; quantized like x; indices, for each scale, int64 ``[B, ...]`` of its size, −1 where an entry
        leaves the scale out; loss ``[]``.

    Source: Tian et al., Visual Autoregressive Modeling: Scalable Image Generation via Next-Scale Prediction, 2024.

    Example:
        >>> import torch, isthmus
        >>> quantizer = isthmus.nn.HierarchicalVQ(num_codes=16, dim=4, scales=(1, 2, 4, 8))
        >>> x = torch.randn(2, 4, 8, 8)
        >>> quantized, indices, loss = quantizer(x)
        >>> quantized.shape, [tuple(index.shape) for index in indices]
        (torch.Size([2, 4, 8, 8]), [(2, 1, 1), (2, 2, 2), (2, 4, 4), (2, 8, 8)])
        >>> torch.allclose(quantizer.eval().decode(quantizer.encode(x)), quantizer(x).quantized)
        True
        >>> coarse = quantizer.decode(indices[:2])
    """

    def __init__(
        self,
        num_codes: int,
        dim: int,
        scales: Sequence[int | Sequence[int]],
        *,
        spatial_dims: int = 2,
        quant_resi: float = 0.5,
        share_quant_resi: int = 1,
        gradient: str = "straight_through",
        quantize_dropout: bool = False,
        quantize_dropout_cutoff_index: int = 0,
        quantize_dropout_multiple_of: int = 1,
        **options: Any,
    ) -> None:
        if spatial_dims not in (1, 2, 3):
            raise ValueError(f"spatial_dims must be 1, 2 or 3, got {spatial_dims}")
        sizes = [(scale,) * spatial_dims if isinstance(scale, int) else tuple(scale) for scale in scales]
        if not sizes or any(len(size) != spatial_dims or min(size) < 1 for size in sizes):
            raise ValueError(f"scales must be sizes with {spatial_dims} sides of at least 1, got {list(scales)}")
        if not 0.0 <= quant_resi <= 1.0:
            raise ValueError(f"quant_resi must be in [0, 1], got {quant_resi}")
        if not 0 <= share_quant_resi <= len(sizes):
            raise ValueError(
                f"share_quant_resi must be 0 to {len(sizes)}, the number of scales, got {share_quant_resi}"
            )
        check_gradient(gradient, ("straight_through", "rotation"))
        check_options(options, _OPTIONS)
        super().__init__(num_codes, dim, gradient=gradient, channel_first=True, **options)
        self.scales = tuple(sizes)
        self.quant_resi = quant_resi
        self.dropout = QuantizerDropout(
            len(sizes),
            quantize_dropout=quantize_dropout,
            quantize_dropout_cutoff_index=quantize_dropout_cutoff_index,
            quantize_dropout_multiple_of=quantize_dropout_multiple_of,
        )
        count = 0 if quant_resi == 0.0 else share_quant_resi or len(sizes)
        convolution, channels = _CONVOLUTIONS[spatial_dims - 1], self.layout.code_dim
        self.convolutions = nn.ModuleList([convolution(channels, channels, 3, padding=1) for _ in range(count)])

    def forward(  # type: ignore[override]
        self, x: Tensor, *, stages: Tensor | int | None = None, update: str = "now"
    ) -> HierarchicalVQOutput:
        """Quantize ``x``; in training mode also update the codebook.

        Args:
            x: ``[B, D, ...]``.
            stages: how many scales to use: one number, or int64 ``[B]``. Default: all of them, or what dropout draws.
            update: as in :class:`VectorQuantizer`.
        """
        check_update(update)
        features = self._features(x)
        rows, positions = _rows(features), x.shape[2:].numel()
        if stages is None:
            stages = self.dropout(x.shape[:1], x.device)
        codes = self._codes(snapshot(self.codebook) if self.learns else self.codebook)
        sums, vectors, indices = self._scan(features, codes, stages)
        if self.learns:
            # Entry by entry, so that the joint batch of several ranks is that of one process.
            joint = torch.cat(vectors, dim=1).flatten(0, 1)
            hits = torch.cat([index.flatten(1) for index in indices], dim=1).flatten()
            self._learn(joint, hits, joint.isfinite().all(-1) & (hits >= 0), update, None)
        live = torch.stack([(index >= 0).flatten(1)[:, :1].expand(-1, positions).flatten() for index in indices])
        errors = [
            quantize_each(rows, _rows(known), used, commitment_weight=self.commitment_weight)[2]
            for known, used in zip(sums, live, strict=True)
        ]
        # The op weights the gradient of its error; the second term gives the value its weights.
        error = mean_of_live(torch.stack(errors), live)
        loss = error + self.commitment_weight * error.detach()
        total = _rows(sums[-1].detach())
        quantized, _, _ = quantize_each(rows, total, torch.ones_like(live[0]), gradient=self.gradient)
        return HierarchicalVQOutput(self.layout.vectors(quantized, x, None), tuple(indices), loss)

    def encode(self, x: Tensor, *, stages: Tensor | int | None = None) -> tuple[Tensor, ...]:  # type: ignore[override]
        """The map of codes of each scale: int64 ``[B, ...]``; −1 beyond the first ``stages`` (default: all)."""
        return tuple(self._scan(self._features(x), self.codes(), stages)[2])

    def decode(self, indices: Sequence[Tensor], size: Sequence[int] | None = None) -> Tensor:  # type: ignore[override]
        """Maps of codes, of all scales or the first of them, to a feature map of this ``size``, by default the last."""
        if not 0 < len(indices) <= len(self.scales):
            raise ValueError(f"indices must be maps of 1 to {len(self.scales)} scales, got {len(indices)}")
        size = self.scales[-1] if size is None else tuple(size)
        parts = [self._bring_back(self.get_codes(index), index, size, k) for k, index in enumerate(indices)]
        return self.layout.decode(torch.stack(parts).sum(dim=0).movedim(1, -1))

    def _features(self, x: Tensor) -> Tensor:
        """What is quantized: ``[B, d, ...]``."""
        sides = len(self.scales[0])
        if x.dim() != 2 + sides:
            raise ValueError(f"x has shape {list(x.shape)}; expected [B, {self.dim}] and {sides} sides")
        return self._rows(x).view(*self.layout.leading(x), self.layout.code_dim).movedim(-1, 1)

    def _scan(
        self, features: Tensor, codes: Tensor, stages: Tensor | int | None
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """For each scale the sum of what came back so far, the vectors that were quantized, and their codes."""
        count = len(self.scales) if stages is None else stages
        kept = torch.zeros(features.shape[:1], dtype=torch.int64, device=features.device) + count
        residual, known = features.detach(), torch.zeros_like(features)
        sums, vectors, indices = [], [], []
        for k, scale in enumerate(self.scales):
            pooled = F.interpolate(residual, scale, mode="area").movedim(1, -1)
            vectors.append(pooled.flatten(1, -2))
            mask = (kept > k).unsqueeze(-1).expand(vectors[-1].shape[:-1])
            index = ops.vq_assign(vectors[-1], codes, mask=mask).view(pooled.shape[:-1])
            code = gather(codes, index.flatten()).view(pooled.shape)
            part = self._bring_back(code, index, features.shape[2:], k)
            residual, known = residual - part.detach(), known + part
            sums.append(known)
            indices.append(index)
        return sums, vectors, indices

    def _bring_back(self, code: Tensor, index: Tensor, size: Sequence[int], k: int) -> Tensor:
        """The codes of scale k ``[B, ..., d]`` as a map ``[B, d, ...]`` of the size of x; zeros for entries without."""
        part = code.movedim(-1, 1)
        if part.shape[2:] != torch.Size(size):
            part = F.interpolate(part, tuple(size), mode=_INTERPOLATIONS[len(size) - 1], align_corners=False)
        if self.convolutions:
            shared = k * len(self.convolutions) // len(self.scales)
            part = torch.lerp(part, self.convolutions[shared](part).to(part.dtype), self.quant_resi)
        return torch.where((index >= 0).flatten(1)[:, 0].view(-1, *[1] * (part.dim() - 1)), part, 0.0)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scales={self.scales}, quant_resi={self.quant_resi}"


def _rows(features: Tensor) -> Tensor:
    """``[B, d, ...]`` to ``[N, d]``."""
    return features.movedim(1, -1).reshape(-1, features.shape[1])
