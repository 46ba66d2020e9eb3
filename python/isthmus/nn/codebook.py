"""Vector quantization with a codebook that learns by moving averages or by gradient."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus import ops

from ._codebook_gradient import check_gradient, check_not_negative, check_sampling, directional, fused, gather
from ._codebook_layout import VectorLayout
from ._codebook_learning import Codebook, check_update, embed, mean_of_live, pick, snapshot


class VectorQuantizerOutput(NamedTuple):
    """What :class:`VectorQuantizer` returns."""

    quantized: Tensor
    indices: Tensor
    loss: Tensor


class VectorQuantizer(Codebook):
    """Replace every vector by its nearest code; the gradient passes through.

    The codebook learns in training mode only, in one of two ways:

    - ``learning="ema"``: the codebook is a buffer. Moving averages of the hits of each code
      (``usage``) and of the vectors that hit it (``sums``) follow
      a ← decay · a + (1 − decay) · batch, and code = sums / usage. Both are counted in units of
      the mean hits of a code, N / K, so a usage of 1 is average whatever the batch size.
      loss = commitment_weight · |x − sg(c)|².
    - ``learning="gradient"``: the codebook is a parameter.
      loss = |sg(x) − c|² + commitment_weight · |x − sg(c)|².

    Both losses are the mean over vectors (of all heads) of a sum over d, as in the paper; divide by
    d where the other loss terms are means over elements. ``losses`` add their own.

    Dead codes: a code whose ``usage`` falls below ``revive_below`` moves onto a random vector of
    the batch and starts again with a usage of 1. Candidates are drawn for every code and kept by
    a mask, so nothing waits for the device and no graph breaks; they follow from
    ``revival_key``, which is state. A revived parameter keeps the moments that the optimizer has
    for it.

    Start from k-means: call :meth:`init_from` once on encoder outputs before training. It is a
    method and not a lazy first step because a hidden flag would have to be read back from the
    device in every forward, or the Lloyd iterations be paid for in each of them. An untrained
    encoder gives vectors of an arbitrary scale, to which k-means would tie the codebook: train it
    a little without quantization first.

    Searching runs in the dtype of the codebook, whatever ``x`` is, and ``quantized`` returns in
    the dtype of ``x``. ``usage`` and ``sums`` stay in float32 in a half-precision module: in ``bfloat16``
    averages would stop moving once a step changes them by less than one part in 256.

    Distributed: where ``torch.distributed`` is initialised, hits, sums and candidates of all ranks
    are added up in one all-reduce a step, and all ranks hold the codebook that one process would
    have learned from the joint batch. Every rank must take part in every step, with batches of one
    shape (batches of different sizes only cost revivals); otherwise, set ``sync_codebook=False``.
    Under activation checkpointing the recomputation updates the averages a second time, as it does
    for batch normalisation.

    Args:
        num_codes: size K of the codebook.
        dim: size D of a vector.
        learning: ``"ema"`` or ``"gradient"``.
        metric: ``"euclidean"``, or ``"cosine"``: vectors and codes are scaled to norm 1 first.
        gradient: what ``quantized`` passes on of its gradient g. ``"straight_through"``: g to x. ``"rotation"``: g
            to x, rotated and scaled as x is into its code. ``"directional"``: in training ``quantized`` is
            x + |x − c| · u, where u is the direction of c − x with a little noise, held constant. So c gets the part
            of g along c − x, and x the rest; codes learn from it in place of |sg(x) − c|², and the pull on x can go,
            too (``commitment_weight=0``). ``"gumbel"``: codes are drawn, and x and all codes get what the
            noisy softmax that they are the largest part of gives them.
        directional_variance: of the noise of ``"directional"``, in every dimension of a code.
        sync_update_v: ν ≥ 0; codes get ν · g beside. Needs ``"gradient"`` learning.
        codebook_dim: size d of a code; linear layers project to heads · d and back where that is
            not D. Default: D / heads.
        layernorm_after_project_in: normalise what the first of them gives.
        heads: number H of codes that describe one vector together.
        separate_codebook_per_head: H codebooks instead of one.
        channel_first: x is ``[B, D, ...]``: images, video, audio.
        commitment_weight: pull of the vectors towards their codes.
        losses: further terms, called with (vectors ``[N, d]`` or ``[H, N, d]``, codes ``[K, d]`` or
            ``[H, K, d]``, indices, −1 where masked) and added up, such as
            :class:`CodeDiversity`.
        transform: module through which the codes pass before use. Needs ``"gradient"``.
        decay: of the moving averages, in [0, 1).
        eps: Laplace smoothing of the usage that sums are divided by.
        revive_below: usage below which a code is dead, in [0, 1); 0 revives nothing.
        sample_temperature: above 0, codes are drawn in training with probabilities
            softmax(−|x − c|² / temperature), or of the cosines. For ``gradient="gumbel"``, which needs it.
        freeze_codebook: the codebook does not learn. An attribute: set it at any time.
        sync_codebook: add up over the ranks of ``torch.distributed``.

    Raises:
        ValueError: an argument is outside its range, or two exclude each other.

    Shapes:
        x ``[..., D]`` or ``[B, D, ...]``; quantized like x; indices int64, x without D, then ``[H]``
        if H > 1; loss ``[]``. codebook ``[K, d]``, or ``[H · K, d]`` where heads have codebooks of their own.

    Source: van den Oord et al., Neural Discrete Representation Learning, NeurIPS 2017 (moving
    averages: its appendix A.1); revival: Dhariwal et al., Jukebox, 2020; rotation: Fifty et al.,
    Restructuring Vector Quantization with the Rotation Trick, 2024; directional: Vali et al., DiVeQ: Differentiable
    Vector Quantization Using the Reparameterization Trick, 2025; Gumbel: Jang et al., Categorical Reparameterization
    with Gumbel-Softmax, 2017; ν: Huh et al., Straightening Out the Straight-Through Estimator, ICML 2023; d < D and
    cosine: Yu et al., Vector-quantized Image Modeling with Improved VQGAN, 2022.

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
        >>> images = torch.randn(2, 8, 5, 5)
        >>> quantizer = isthmus.nn.VectorQuantizer(16, 8, heads=2, channel_first=True, metric="cosine")
        >>> quantizer(images).indices.shape
        torch.Size([2, 5, 5, 2])
    """

    def __init__(
        self,
        num_codes: int,
        dim: int,
        *,
        learning: str = "ema",
        metric: str = "euclidean",
        gradient: str = "straight_through",
        directional_variance: float = 5e-3,
        sync_update_v: float = 0.0,
        codebook_dim: int | None = None,
        layernorm_after_project_in: bool = False,
        heads: int = 1,
        separate_codebook_per_head: bool = False,
        channel_first: bool = False,
        commitment_weight: float = 0.25,
        losses: Iterable[nn.Module] = (),
        transform: nn.Module | None = None,
        decay: float = 0.99,
        eps: float = 0.0,
        revive_below: float = 0.05,
        sample_temperature: float = 0.0,
        freeze_codebook: bool = False,
        sync_codebook: bool = True,
    ) -> None:
        if metric not in ("euclidean", "cosine"):
            raise ValueError(f"metric must be 'euclidean' or 'cosine', got {metric!r}")
        check_gradient(gradient, ("straight_through", "rotation", "directional", "gumbel"))
        check_not_negative(
            directional_variance=directional_variance,
            sync_update_v=sync_update_v,
            sample_temperature=sample_temperature,
        )
        check_sampling(sample_temperature, gradient)
        if sample_temperature == 0.0 and gradient == "gumbel":
            raise ValueError("gradient='gumbel' needs sample_temperature above 0, got 0")
        if sync_update_v > 0.0 and learning != "gradient":
            raise ValueError(f"sync_update_v needs learning='gradient', got learning={learning!r}")
        if transform is not None and (learning != "gradient" or revive_below > 0.0):
            raise ValueError(
                "transform needs learning='gradient' and revive_below=0: vectors that a code should average, or "
                f"move onto, lie behind the transform; got learning={learning!r}, revive_below={revive_below}"
            )
        losses = list(losses)
        if len({type(term) for term in losses}) < len(losses):
            raise ValueError(f"losses holds a kind of term twice: {[type(term).__name__ for term in losses]}")
        layout = VectorLayout(
            dim,
            codebook_dim,
            heads=heads,
            separate=separate_codebook_per_head,
            channel_first=channel_first,
            layernorm=layernorm_after_project_in,
        )
        super().__init__(
            [num_codes] * (heads if layout.separate else 1),
            layout.code_dim,
            learning=learning,
            decay=decay,
            eps=eps,
            revive_below=revive_below,
            freeze_codebook=freeze_codebook,
            sync_codebook=sync_codebook,
        )
        self.num_codes = num_codes
        self.dim = dim
        self.metric = metric
        self.gradient = gradient
        self.directional_variance = directional_variance
        self.sync_update_v = sync_update_v
        self.commitment_weight = commitment_weight
        self.sample_temperature = sample_temperature
        self.layout = layout
        self.losses = nn.ModuleList(losses)
        self.transform = transform

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        lengths: Tensor | None = None,
        update: str = "now",
        code_weight: Tensor | None = None,
        return_loss_breakdown: bool = False,
    ) -> VectorQuantizerOutput | tuple[VectorQuantizerOutput, dict[str, Tensor]]:
        """Quantize ``x``; in training mode also update the codebook.

        Args:
            x: ``[..., D]``, or ``[B, D, ...]`` with ``channel_first``.
            mask: bool, ``x`` without D. False: quantized is 0, indices are −1, nothing is learned.
            lengths: int ``[B]`` for x ``[B, T, D]`` or ``[B, D, T]``: the mask t < lengths[b].
            update: ``"now"``, or ``"later"`` for all micro-batches of a step but the last: their
                hits and sums wait for the next ``"now"``.
            code_weight: ``[K]`` (or ``[H · K]``), multiplies the step 1 − decay of each code.
            return_loss_breakdown: return (output, terms of the loss by name, as they add up to it).
        """
        check_update(update)
        mask = self.layout.mask(x, mask, lengths)
        rows = self._rows(x)
        observe = getattr(self.transform, "observe", None)
        if self.learns and observe is not None:
            observe(rows.detach(), mask)
        # The update below writes to the codebook before backward reads it.
        codes = self._codes(snapshot(self.codebook) if self.learns else self.codebook)
        quantized, indices, error = self._quantize(rows, codes, mask)
        if self.learns:
            # Vectors that hold a NaN or an infinity teach nothing: the averages would never recover.
            self._learn(rows.detach(), indices, error.isfinite() & (indices >= 0), update, code_weight)
        # The op weights the gradient of its error; the second term gives the value its weights.
        error = mean_of_live(error, mask)
        learned = self.learning == "gradient" and not self.freeze_codebook and self.gradient != "directional"
        weight = self.commitment_weight + learned
        terms = {"codes": error + (weight - 1.0) * error.detach()}
        for term in self.losses:
            terms[type(term).__name__] = term(rows, codes, indices)
        loss = torch.stack(list(terms.values())).sum()
        output = VectorQuantizerOutput(self.layout.vectors(quantized, x, mask), self.layout.indices(indices, x), loss)
        return (output, terms) if return_loss_breakdown else output

    def codes(self) -> Tensor:
        """The codes in use, transformed and scaled: ``[K, d]``, or ``[H, K, d]`` where each head has its own."""
        return self._codes(self.codebook)

    def encode(self, x: Tensor, *, topk: int = 1) -> Tensor:
        """Indices of the nearest codes: int64, ``x`` without D, then ``[H]`` if H > 1, then ``[topk]`` if topk > 1."""
        indices = ops.vq_assign(self._rows(x), self.codes(), metric=self.metric, topk=topk)
        return self.layout.indices(indices, x, *([topk] if topk > 1 else []))

    def get_codes(self, indices: Tensor) -> Tensor:
        """The codes themselves: int64 ``[...]``, or ``[..., H]``, to ``[..., d]``. An index of −1 gives zeros."""
        return embed(indices, self.codes())

    def decode(self, indices: Tensor) -> Tensor:
        """Indices to vectors, as ``quantized`` has them."""
        return self.layout.decode(self.get_codes(indices), indices)

    def cross_entropy(self, x: Tensor, indices: Tensor, *, temperature: float = 1.0) -> Tensor:
        """−log softmax(−|x − c|² / temperature), or of the cosines, at the given indices: a mean, in nats.

        Trains a model to predict codes by where they are. Vectors whose index is −1 are left out.
        """
        rows = self.layout.of_rows(indices)
        loss = ops.vq_cross_entropy(self._rows(x), self.codes(), rows, temperature=temperature, metric=self.metric)
        return mean_of_live(loss, rows >= 0)

    @torch.no_grad()
    def init_from(self, x: Tensor, iterations: int = 10) -> None:
        """Set the codebook by :func:`isthmus.clustering.kmeans` on ``x``, and the averages as if it had been learned.

        Random distinct vectors, then ``iterations`` ≥ 1 of Lloyd's. Repeatable: the draws follow from ``revival_key``.
        Distributed: from the vectors of all ranks, gathered on each.

        Raises:
            ValueError: ``x`` holds fewer vectors than there are codes, or the codes pass through a transform.
        """
        if self.transform is not None:
            raise ValueError("init_from: the means of k-means lie behind the transform of this codebook")
        rows = self._rows(x)
        for book, vectors in enumerate(rows if self.layout.separate else [rows]):
            self.fit(book, vectors, iterations, self.metric)

    def _codes(self, codes: Tensor) -> Tensor:
        if self.transform is not None:
            codes = self.transform(codes).to(codes.dtype)
        if self.metric == "cosine":
            codes = F.normalize(codes, dim=-1)
        if self.freeze_codebook:
            codes = codes.detach()
        return codes.view(self.layout.heads, self.num_codes, -1) if self.layout.separate else codes

    def _rows(self, x: Tensor) -> Tensor:
        rows = self.layout.rows(x, self.codebook.dtype)
        return F.normalize(rows, dim=-1) if self.metric == "cosine" else rows

    def _quantize(self, rows: Tensor, codes: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Values, indices and squared errors; the gradient of the errors reaches what they are to train."""
        drawn, indices = self._draw(rows, codes, mask)
        quantized, indices, error = ops.vq_quantize(
            rows,
            codes.detach() if self.gradient == "directional" else codes,
            metric=self.metric,
            gradient=fused(self.gradient),
            commitment_weight=self.commitment_weight,
            mask=mask if indices is None else None,
            indices=indices,
        )
        if drawn is not None:
            quantized = drawn
        elif self.training and self.gradient == "directional":
            quantized = directional(rows, gather(codes, indices), indices >= 0, self.directional_variance)
        if self.sync_update_v > 0.0:
            code = gather(codes, indices)
            quantized = quantized + self.sync_update_v * (code - code.detach())
        return quantized, indices, error

    def _draw(self, rows: Tensor, codes: Tensor, mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Codes drawn by their distance, if they are, and what they pass gradients by, if that is the softmax."""
        if not self.training or self.sample_temperature == 0.0:
            return None, None
        options: dict[str, Any] = {"metric": self.metric, "temperature": self.sample_temperature, "mask": mask}
        if self.gradient == "gumbel":
            return ops.vq_soft_quantize(rows, codes, gumbel=True, hard=True, **options)
        return None, ops.vq_sample(rows, codes, **options)

    @torch.no_grad()
    def _learn(self, rows: Tensor, indices: Tensor, live: Tensor, update: str, code_weight: Tensor | None) -> None:
        books = rows if self.layout.separate else rows.unsqueeze(0)
        offset = self.num_codes * torch.arange(len(books), device=rows.device).unsqueeze(-1)
        live = live.view(len(books), -1)
        indices = torch.where(live, indices.view(len(books), -1) + offset, -1).view(-1)
        # Where gradients move the codes, only the hits are asked for: vectors of size 0.
        counted = books if self.learning == "ema" else books[..., :0]
        totals = ops.code_totals(counted.reshape(len(indices), counted.shape[-1]), indices, len(self.usage))
        if update == "later":
            self.accumulate(totals)
        elif self.revive_below > 0.0:
            number, owned = (part.view(len(books), -1) for part in self.draw(len(self.usage), books.shape[1]))
            owned = owned & pick(live.unsqueeze(-1), number).squeeze(-1)
            self.update(totals, pick(books, number).flatten(0, 1), owned.flatten(), code_weight)
        else:
            self.update(totals, code_weight=code_weight)

    def extra_repr(self) -> str:
        return (
            f"{self.num_codes}, {self.dim}, learning={self.learning!r}, metric={self.metric!r}, "
            f"gradient={self.gradient!r}, commitment_weight={self.commitment_weight}, decay={self.decay}, "
            f"revive_below={self.revive_below}"
        )
