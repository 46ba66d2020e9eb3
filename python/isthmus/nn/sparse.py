"""A top-k sparse autoencoder: k features per row survive, dead features are brought back."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from isthmus import ops


class TopKSAEOutput(NamedTuple):
    """What :class:`TopKSAE` returns."""

    reconstruction: Tensor
    values: Tensor
    indices: Tensor
    loss: Tensor
    aux_loss: Tensor


class TopKSAE(nn.Module):
    """Sparse autoencoder that keeps the k largest features of every row.

    values, indices = topk(relu((x − pre_bias) encoderᵀ + encoder_bias)) and
    reconstruction = Σ values · decoder[indices] + pre_bias. No ``[rows, num_features]`` tensor
    is formed, forward or backward.

    ``loss`` = fraction of variance unexplained, |x − reconstruction|² / |x − mean of the batch|²,
    plus ``aux_weight`` · ``aux_loss``. It needs a batch of at least two different rows.

    AuxK: a feature is dead when it has not fired for ``dead_after`` rows in training mode
    (``idle`` counts them). In training the ``aux_k`` strongest dead features of every row
    reconstruct what the live ones left over, x − reconstruction held constant and without
    ``pre_bias``; ``aux_loss`` is the fraction of it that stays unexplained. Its gradient reaches
    the decoder and the encoder of those features. It is 0 while no feature is dead, and costs a
    second encoder pass; ``aux_k=0`` turns it off.

    Unit norm: rows of ``decoder_weight`` start with norm 1. After
    ``sae.keep_unit_norm(optimizer)`` each step of that optimizer first removes the part of the
    gradient parallel to each row and then normalises the rows, so a training loop has nothing to
    remember. Both halves are also public methods.

    Start: ``encoder_weight`` is the transpose of the decoder (the same ``[F, D]`` layout, so a
    copy). :meth:`init_from` then fits ``pre_bias`` and the encoder's magnitude to data.

    Distributed: ``idle`` is a buffer, which ``DistributedDataParallel`` broadcasts from rank 0:
    all ranks agree on what is dead, judged by the rows of rank 0. Gradient projection is linear and
    commutes with gradient averaging. Parameters flattened by FSDP cannot be projected row by row.

    Args:
        dim: size D of the input.
        num_features: size F of the dictionary.
        k: features kept per row.
        aux_k: dead features per row in the auxiliary loss; ``None`` means D / 2, at most F.
        aux_weight: weight of the auxiliary loss.
        dead_after: rows without firing after which a feature counts as dead.

    Raises:
        ValueError: ``k`` or ``aux_k`` is out of range.

    Shapes:
        x ``[..., D]``; reconstruction ``[..., D]``; values, indices ``[..., k]``; loss, aux_loss
        ``[]``.

    Source: Gao et al., Scaling and evaluating sparse autoencoders, 2024.

    Example:
        >>> import torch, isthmus
        >>> sae = isthmus.nn.TopKSAE(dim=16, num_features=64, k=4)
        >>> optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3)
        >>> sae.keep_unit_norm(optimizer)
        >>> x = torch.randn(32, 16)
        >>> sae.init_from(x)
        >>> out = sae(x)
        >>> out.loss.backward()
        >>> optimizer.step()
        >>> out.reconstruction.shape, out.indices.shape
        (torch.Size([32, 16]), torch.Size([32, 4]))
    """

    idle: Tensor

    def __init__(
        self,
        dim: int,
        num_features: int,
        k: int,
        *,
        aux_k: int | None = None,
        aux_weight: float = 1 / 32,
        dead_after: int = 10_000_000,
    ) -> None:
        aux_k = min(num_features, dim // 2) if aux_k is None else aux_k
        if not 1 <= k <= num_features:
            raise ValueError(f"k must be in [1, num_features={num_features}], got {k}")
        if not 0 <= aux_k <= num_features:
            raise ValueError(f"aux_k must be in [0, num_features={num_features}], got {aux_k}")
        super().__init__()
        self.dim = dim
        self.num_features = num_features
        self.k = k
        self.aux_k = aux_k
        self.aux_weight = aux_weight
        self.dead_after = dead_after
        directions = nn.functional.normalize(torch.randn(num_features, dim), dim=-1)
        self.encoder_weight = nn.Parameter(directions.clone())
        self.encoder_bias = nn.Parameter(torch.zeros(num_features))
        self.decoder_weight = nn.Parameter(directions)
        self.pre_bias = nn.Parameter(torch.zeros(dim))
        self.register_buffer("idle", torch.zeros(num_features, dtype=torch.int64))

    @property
    def dead(self) -> Tensor:
        """Bool ``[F]``: features that have not fired for ``dead_after`` rows."""
        return self.idle >= self.dead_after

    def forward(self, x: Tensor) -> TopKSAEOutput:
        """Reconstruct ``x`` ``[..., D]``; in training mode also update ``idle``."""
        values, indices = self.encode(x)
        reconstruction = self.decode(values, indices)
        residual = x - reconstruction
        loss = _unexplained(residual, x)
        aux_loss = torch.zeros_like(loss)
        if self.training:
            self._track_firing(values.detach(), indices)
            if self.aux_k > 0:
                aux_loss = self._aux_loss(x, residual.detach())
        return TopKSAEOutput(reconstruction, values, indices, loss + self.aux_weight * aux_loss, aux_loss)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Values (descending, ≥ 0) and indices of the k largest features, each ``[..., k]``."""
        return ops.topk_encode(x - self.pre_bias, self.encoder_weight, self.encoder_bias, self.k)

    def decode(self, values: Tensor, indices: Tensor) -> Tensor:
        """Weighted sum of decoder rows plus ``pre_bias``: ``[..., k]`` twice to ``[..., D]``."""
        return ops.sparse_decode(values, indices, self.decoder_weight, self.pre_bias)

    def keep_unit_norm(self, optimizer: Optimizer) -> None:
        """Project the decoder's gradient before, and normalise its rows after, every step."""

        def before(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            self.project_decoder_grad()

        def after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            self.normalize_decoder()

        optimizer.register_step_pre_hook(before)
        optimizer.register_step_post_hook(after)

    @torch.no_grad()
    def project_decoder_grad(self) -> None:
        """Remove from the gradient of each (unit-norm) decoder row the part along the row.

        Without it an adaptive optimizer spends its step on a norm that is then thrown away.
        """
        weight, grad = self.decoder_weight, self.decoder_weight.grad
        if grad is not None:
            grad.sub_((grad * weight).sum(dim=-1, keepdim=True) * weight)

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Scale every decoder row to Euclidean norm 1."""
        self.decoder_weight.copy_(nn.functional.normalize(self.decoder_weight, dim=-1))

    @torch.no_grad()
    def init_from(self, x: Tensor, iterations: int = 20) -> None:
        """Fit the start to ``x`` ``[..., D]``.

        ``pre_bias`` becomes the geometric median (Weiszfeld iterations from the mean); then the
        encoder is scaled so that the reconstruction has the least squared error that one factor
        can give. Memory O(N · D).
        """
        rows = x.reshape(-1, self.dim).to(self.pre_bias.dtype)
        median = rows.mean(dim=0)
        tiny = torch.finfo(rows.dtype).tiny
        for _ in range(iterations):
            inverse = 1.0 / torch.linalg.vector_norm(rows - median, dim=-1).clamp_min(tiny)
            median = (inverse / inverse.sum()) @ rows
        self.pre_bias.copy_(median)
        centred = rows - median
        read = self.decode(*self.encode(rows)) - median
        self.encoder_weight.mul_((centred * read).sum() / (read * read).sum().clamp_min(tiny))

    def _track_firing(self, values: Tensor, indices: Tensor) -> None:
        hits = torch.zeros_like(self.idle)
        hits.index_add_(0, indices.flatten(), (values > 0).flatten().to(hits.dtype))
        rows = indices.numel() // self.k
        self.idle.copy_(torch.where(hits > 0, 0, self.idle + rows))

    def _aux_loss(self, x: Tensor, residual: Tensor) -> Tensor:
        # Live features leave the ranking through their bias: relu(-inf) is 0, adding nothing.
        bias = self.encoder_bias.masked_fill(~self.dead, -math.inf)
        values, indices = ops.topk_encode(x - self.pre_bias, self.encoder_weight, bias, self.aux_k)
        rest = residual - ops.sparse_decode(values, indices, self.decoder_weight)
        return _unexplained(rest, residual) * self.dead.any()

    def extra_repr(self) -> str:
        return (
            f"{self.dim}, {self.num_features}, k={self.k}, aux_k={self.aux_k}, "
            f"aux_weight={self.aux_weight}, dead_after={self.dead_after}"
        )


def _unexplained(residual: Tensor, target: Tensor) -> Tensor:
    """Fraction of the variance of ``target`` that ``residual`` leaves; no gradient to the scale."""
    dtype = torch.promote_types(residual.dtype, torch.float32)
    rows = target.detach().reshape(-1, target.shape[-1]).to(dtype)
    variance = (rows - rows.mean(dim=0)).square().sum()
    return residual.to(dtype).square().sum() / variance.clamp_min(torch.finfo(dtype).tiny)
