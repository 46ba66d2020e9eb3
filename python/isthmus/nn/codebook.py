"""Vector quantization with a codebook that learns by moving averages or by gradient."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from isthmus import ops

# Averages of a code that is never hit shrink together until their ratio loses its digits in the
# denormal range. Below this usage the code stays where it is.
_FORGOTTEN = 1e-12


class VectorQuantizerOutput(NamedTuple):
    """What :class:`VectorQuantizer` returns."""

    quantized: Tensor
    indices: Tensor
    loss: Tensor


class VectorQuantizer(nn.Module):
    """Replace every vector by its nearest code; the gradient passes straight through.

    The codebook learns in training mode only, in one of two ways:

    - ``learning="ema"``: the codebook is a buffer. Moving averages of the hits of each code
      (``usage``) and of the vectors that hit it (``sums``) follow
      a ← decay · a + (1 − decay) · batch, and code = sums / usage. Both are counted in units of
      the mean hits of a code, N / K, so a usage of 1 is average whatever the batch size.
      loss = commitment_weight · |x − sg(c)|².
    - ``learning="gradient"``: the codebook is a parameter.
      loss = |sg(x) − c|² + commitment_weight · |x − sg(c)|².

    Both losses are the mean over vectors of a sum over D, as in the paper; divide by ``dim``
    where the other loss terms are means over elements.

    Dead codes: a code whose ``usage`` falls below ``revive_below`` moves onto a random vector of
    the batch and starts again with a usage of 1. Candidates are drawn for every code and kept by
    a mask, so nothing waits for the device and no graph breaks; they come from torch's global
    generator, so ``torch.manual_seed`` repeats them. A revived parameter keeps the moments that
    the optimizer has for it.

    Start from k-means: call :meth:`init_from` once on encoder outputs before training. It is a
    method and not a lazy first step because a hidden flag would have to be read back from the
    device in every forward, or the Lloyd iterations be paid for in each of them. An untrained
    encoder gives vectors of an arbitrary scale, to which k-means would tie the codebook: train it
    a little without quantization first.

    Searching runs in the dtype of the codebook, whatever ``x`` is, and ``quantized`` returns in
    the dtype of ``x``. Keep the module in float32 (autocast is fine): averages kept in
    ``bfloat16`` stop moving once a step changes them by less than one part in 256.

    Distributed: ``DistributedDataParallel`` broadcasts buffers from rank 0 before each forward, so
    with ``"ema"`` all ranks hold one codebook, learned from the vectors of rank 0. With
    ``"gradient"`` set ``revive_below=0``, or ranks revive codes differently; call
    :meth:`init_from` before wrapping. Under activation checkpointing the recomputation updates
    the averages a second time, as it does for batch normalisation.

    Args:
        num_codes: size K of the codebook.
        dim: size D of a vector.
        learning: ``"ema"`` or ``"gradient"``.
        commitment_weight: pull of the vectors towards their codes.
        decay: of the moving averages, in [0, 1).
        revive_below: usage below which a code is dead, in [0, 1); 0 revives nothing.

    Raises:
        ValueError: an argument is outside its range.

    Shapes:
        x ``[..., D]``; quantized ``[..., D]``; indices int64 ``[...]``; loss ``[]``.

    Source: van den Oord et al., Neural Discrete Representation Learning, NeurIPS 2017 (moving
    averages: its appendix A.1); revival: Dhariwal et al., Jukebox, 2020.

    Example:
        >>> import torch, isthmus
        >>> quantizer = isthmus.nn.VectorQuantizer(num_codes=16, dim=4)
        >>> x = torch.randn(8, 10, 4)
        >>> quantizer.init_from(x)
        >>> quantized, indices, loss = quantizer(x)
        >>> quantized.shape, indices.shape
        (torch.Size([8, 10, 4]), torch.Size([8, 10]))
        >>> torch.equal(quantizer.eval().decode(quantizer.encode(x)), quantizer(x).quantized)
        True
    """

    codebook: Tensor
    usage: Tensor
    sums: Tensor

    def __init__(
        self,
        num_codes: int,
        dim: int,
        *,
        learning: str = "ema",
        commitment_weight: float = 0.25,
        decay: float = 0.99,
        revive_below: float = 0.05,
    ) -> None:
        if learning not in ("ema", "gradient"):
            raise ValueError(f"learning must be 'ema' or 'gradient', got {learning!r}")
        for name, value in (("decay", decay), ("revive_below", revive_below)):
            if not 0.0 <= value < 1.0:
                raise ValueError(f"{name} must be in [0, 1), got {value}")
        super().__init__()
        self.num_codes = num_codes
        self.dim = dim
        self.learning = learning
        self.commitment_weight = commitment_weight
        self.decay = decay
        self.revive_below = revive_below
        codebook = torch.randn(num_codes, dim)
        self.register_buffer("usage", torch.ones(num_codes))
        if learning == "ema":
            self.register_buffer("codebook", codebook)
            self.register_buffer("sums", codebook.clone())
        else:
            self.codebook = nn.Parameter(codebook)

    def forward(self, x: Tensor) -> VectorQuantizerOutput:
        """Quantize ``x`` ``[..., D]``; in training mode also update the codebook."""
        # The update below writes to the codebook before backward reads it: give autograd a copy.
        codebook = self.codebook.clone() if self.training else self.codebook
        rows = x.to(codebook.dtype)
        quantized, indices, error = ops.vq_quantize(rows, codebook, commitment_weight=self.commitment_weight)
        if self.training:
            self._update(rows.reshape(-1, self.dim), indices.reshape(-1))
        # The op weights the gradient of its error; the second term gives the value its weights.
        error = error.mean()
        weight = self.commitment_weight + (self.learning == "gradient")
        loss = error + (weight - 1.0) * error.detach()
        return VectorQuantizerOutput(quantized.to(x.dtype), indices, loss)

    def encode(self, x: Tensor) -> Tensor:
        """Index of the code nearest to each vector: ``[..., D]`` to int64 ``[...]``."""
        return ops.vq_assign(x.to(self.codebook.dtype), self.codebook)

    def decode(self, indices: Tensor) -> Tensor:
        """The codes themselves: int64 ``[...]`` to ``[..., D]``."""
        return nn.functional.embedding(indices, self.codebook)

    @torch.no_grad()
    def init_from(self, x: Tensor, iterations: int = 10) -> None:
        """Set the codebook by k-means on ``x`` ``[..., D]``: random distinct rows, then Lloyd.

        A code that loses all its vectors moves onto a random row. Time O(iterations · N · K · D),
        memory O(N + K · D) beside ``x``.

        Raises:
            ValueError: ``x`` holds fewer vectors than there are codes.
        """
        rows = x.reshape(-1, self.dim).to(self.codebook.dtype)
        if rows.shape[0] < self.num_codes:
            raise ValueError(f"k-means needs at least num_codes={self.num_codes} vectors, got {rows.shape[0]}")
        codebook = rows[torch.randperm(rows.shape[0], device=rows.device)[: self.num_codes]]
        usage = torch.ones_like(self.usage)
        for _ in range(iterations):
            usage, sums = self._statistics(rows, ops.vq_assign(rows, codebook))
            hit = usage.unsqueeze(-1) > 0
            codebook = torch.where(hit, sums / usage.unsqueeze(-1), self._random_rows(rows))
        self.codebook.copy_(codebook)
        self.usage.copy_(usage)
        if self.learning == "ema":
            self.sums.copy_(codebook * usage.unsqueeze(-1))

    @torch.no_grad()
    def _update(self, rows: Tensor, indices: Tensor) -> None:
        usage, sums = self._statistics(rows, indices)
        self.usage.mul_(self.decay).add_(usage, alpha=1.0 - self.decay)
        if self.learning == "ema":
            self.sums.mul_(self.decay).add_(sums, alpha=1.0 - self.decay)
            remembered = self.usage.unsqueeze(-1) > _FORGOTTEN
            means = self.sums / self.usage.unsqueeze(-1)
            self.codebook.copy_(torch.where(remembered, means, self.codebook))
        if self.revive_below > 0.0:
            self._revive(rows)

    def _statistics(self, rows: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        counts, sums = ops.code_statistics(rows, indices, self.num_codes)
        per_code = self.num_codes / rows.shape[0]
        return counts * per_code, sums * per_code

    def _revive(self, rows: Tensor) -> None:
        dead = self.usage < self.revive_below
        fresh = self._random_rows(rows)
        self.usage.masked_fill_(dead, 1.0)
        dead = dead.unsqueeze(-1)
        self.codebook.copy_(torch.where(dead, fresh, self.codebook))
        if self.learning == "ema":
            self.sums.copy_(torch.where(dead, fresh, self.sums))

    def _random_rows(self, rows: Tensor) -> Tensor:
        return rows[torch.randint(rows.shape[0], (self.num_codes,), device=rows.device)]

    def extra_repr(self) -> str:
        return (
            f"{self.num_codes}, {self.dim}, learning={self.learning!r}, "
            f"commitment_weight={self.commitment_weight}, decay={self.decay}, "
            f"revive_below={self.revive_below}"
        )
