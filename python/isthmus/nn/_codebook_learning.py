"""A codebook as state: how it learns from hits, how dead codes come back, and how ranks agree on both."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from isthmus import clustering, ops, random
from isthmus.diagnostics import perplexity

from ._ranks import all_reduce, has_ranks


class Codebook(nn.Module):
    """The codes of one or several books, and what they learn from.

    Books lie one after the other in ``codebook`` ``[R, d]``, R the sum of ``sizes``: one book, one for each head or
    group, one for each stage.

    A step of learning needs from the ranks the hits of each code, the sums of the vectors that hit it and the
    vectors that dead codes may move onto. They travel in one flat buffer, in one all-reduce. Candidate k is row
    u_k · N of the joint batch of N rows, with u_k from the noise stream of ``revival_key``: state, the same on all
    ranks and advanced by each step. So every rank computes the same codebook, and it is the codebook that one
    process would have computed from the joint batch.
    """

    codebook: Tensor
    usage: Tensor
    sums: Tensor | None
    pending: Tensor | None
    revival_key: Tensor

    def __init__(
        self,
        sizes: Sequence[int],
        dim: int,
        *,
        learning: str,
        decay: float,
        eps: float,
        revive_below: float,
        freeze_codebook: bool,
        sync_codebook: bool,
    ) -> None:
        if learning not in ("ema", "gradient"):
            raise ValueError(f"learning must be 'ema' or 'gradient', got {learning!r}")
        for name, value in (("decay", decay), ("revive_below", revive_below)):
            if not 0.0 <= value < 1.0:
                raise ValueError(f"{name} must be in [0, 1), got {value}")
        if not 0.0 <= eps < math.inf:
            raise ValueError(f"eps must be finite and not negative, got {eps}")
        if min(sizes) < 1:
            raise ValueError(f"num_codes must be at least 1, got {min(sizes)}")
        super().__init__()
        self.sizes = tuple(sizes)
        self.learning = learning
        self.decay = decay
        self.eps = eps
        self.revive_below = revive_below
        self.freeze_codebook = freeze_codebook
        self.sync_codebook = sync_codebook
        codebook = torch.randn(sum(sizes), dim)
        self.register_buffer("usage", torch.ones(len(codebook)))
        self.register_buffer("revival_key", random.key())
        # Hits and sums of micro-batches whose update is still to come; made by the first of them.
        self.register_buffer("pending", None, persistent=False)
        if learning == "ema":
            self.register_buffer("codebook", codebook)
            self.register_buffer("sums", codebook.clone())
        else:
            self.codebook = nn.Parameter(codebook)
            self.register_buffer("sums", None)

    def _apply(self, fn: Any, recurse: bool = True) -> Codebook:
        """Averages follow the module to its device, but into no dtype whose digits they would outlive."""
        exact = {name: buffer for name, buffer in (("usage", self.usage), ("sums", self.sums)) if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            moved = getattr(self, name)
            if moved.dtype in (torch.bfloat16, torch.float16):
                setattr(self, name, buffer.to(moved.device))
        return self

    @property
    def perplexity(self) -> Tensor:
        """How many codes of a book are in use, by how evenly they are: ``[]``, or one number for each book."""
        return torch.stack([perplexity(usage) for usage in self.books(self.usage)]).squeeze()

    @property
    def learns(self) -> bool:
        """Whether a forward changes the codebook."""
        return self.training and not self.freeze_codebook

    @property
    def distributed(self) -> bool:
        """Whether hits, sums and candidates are those of all ranks."""
        return self.sync_codebook and has_ranks()

    @torch.no_grad()
    def set_codebook(self, codes: Tensor) -> None:
        """Put ``codes``, of the shape of ``codebook``, in its place; each has a usage of 1, and learning starts there.

        Writing to ``codebook`` itself is undone by the next step of its moving averages.

        Raises:
            ValueError: ``codes`` has another shape.
        """
        if codes.shape != self.codebook.shape:
            raise ValueError(f"codes has shape {list(codes.shape)}; expected {list(self.codebook.shape)}")
        self.codebook.copy_(codes)
        self.usage.fill_(1.0)
        if self.sums is not None:
            self.sums.copy_(codes)
        if self.pending is not None:
            self.pending.zero_()

    def books(self, flat: Tensor) -> list[Tensor]:
        """What belongs to all codes, cut into what belongs to those of each book."""
        return list(flat.split(self.sizes))

    @torch.no_grad()
    def fit(self, book: int, rows: Tensor, iterations: int, metric: str = "euclidean") -> None:
        """Set one book by k-means on ``rows`` ``[N, d]`` of all ranks; its means and usage are those of the vectors."""
        rows = _gather(rows) if self.distributed else rows
        size = self.sizes[book]
        if len(rows) < size:
            raise ValueError(f"k-means needs at least num_codes={size} vectors, got {len(rows)}")
        key = random.fold_in(self.revival_key, 0)
        self.revival_key[1].add_(1)
        codebook, counts = clustering.kmeans(rows, size, iterations=iterations, metric=metric, key=key)
        usage = counts * (size / len(rows))
        self.books(self.usage)[book].copy_(usage)
        self.books(self.codebook)[book].copy_(codebook)
        if self.sums is not None:
            self.books(self.sums)[book].copy_(codebook * usage.unsqueeze(-1))

    @torch.no_grad()
    def accumulate(self, totals: Tensor) -> None:
        """Keep hits and sums of a micro-batch for the update to come."""
        if self.pending is None:
            self.pending = torch.zeros_like(totals)
        self.pending.add_(totals)

    @torch.no_grad()
    def draw(self, count: int, rows: int) -> tuple[Tensor, Tensor]:
        """Rows of the joint batch, drawn with replacement: their numbers on this rank, and whether they are on it.

        The joint batch is that of the ranks one after the other, each with as many ``rows`` as this one.
        """
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if self.distributed else (0, 1)
        # Uniform, as the distribution function of normals.
        uniform = torch.special.ndtr(ops.gaussian_noise(self.revival_key, (count,), torch.float64))
        self.revival_key[1].add_(count)
        number = (uniform * (rows * ranks)).long().clamp_max(rows * ranks - 1) - rank * rows
        return number.clamp(0, max(rows - 1, 0)), (number >= 0) & (number < rows)

    @torch.no_grad()
    def update(
        self,
        totals: Tensor,
        candidates: Tensor | None = None,
        owned: Tensor | None = None,
        code_weight: Tensor | None = None,
    ) -> None:
        """Move the codebook by the hits and sums of a step, and dead codes onto candidates.

        Args:
            totals: [R · (1 + d)], counts and then sums; [R] counts alone for a codebook learned by gradient.
            candidates: [R, d], the vector of this rank that a code may move onto; overwritten.
            owned: bool [R], whether this rank has one.
            code_weight: [R], multiplies the step 1 − decay of a code.
        """
        if self.pending is not None:
            totals = totals + self.pending
            self.pending.zero_()
        if candidates is not None and owned is not None:
            candidates = candidates.to(totals.dtype)
            if self.distributed:
                candidates.masked_fill_(~owned.unsqueeze(-1), 0.0)
                totals, owners, candidates = all_reduce(totals, owned.to(totals.dtype), candidates)
                # Where ranks have batches of different sizes, a row may be nobody's, or that of two.
                owned = owners == 1.0
            # What is nobody's or masked is no candidate, which the update reads as NaN.
            candidates.masked_fill_(~owned.unsqueeze(-1), torch.nan)
        elif self.distributed:
            (totals,) = all_reduce(totals)
        counts, sums = totals.split([len(self.usage), len(totals) - len(self.usage)])
        of_code = [self.codebook, self.usage, counts, code_weight, candidates]
        of_code += [None, None] if self.sums is None else [self.sums, sums.view_as(self.sums)]
        for codebook, usage, counts, code_weight, candidates, sums, batch_sums in zip(
            *(self._stacks(tensor) for tensor in of_code), strict=True
        ):
            ops.update_codebook_(
                codebook,
                usage,
                sums,
                counts,
                batch_sums,
                decay=self.decay,
                eps=self.eps,
                code_weight=code_weight,
                candidates=None if candidates is None else candidates.to(codebook.dtype),
                revive_below=self.revive_below,
            )

    def _stacks(self, flat: Tensor | None) -> list[Tensor | None]:
        """Books of equal size as one batch ``[books, K, ...]``; others one by one."""
        if len(set(self.sizes)) == 1:
            return [None if flat is None else flat.view(len(self.sizes), self.sizes[0], *flat.shape[1:])]
        return [None] * len(self.sizes) if flat is None else list(flat.split(self.sizes))


def check_options(options: Mapping[str, Any], known: Set[str]) -> None:
    """Raise ``ValueError`` if there are others than those that are ``known``."""
    unknown = sorted(options.keys() - known)
    if unknown:
        raise ValueError(f"options are {', '.join(sorted(known))}; got {', '.join(unknown)}")


def check_update(update: str) -> None:
    """Raise ``ValueError`` unless ``update`` is one of the two times."""
    if update not in ("now", "later"):
        raise ValueError(f"update must be 'now' or 'later', got {update!r}")


@torch.library.custom_op("isthmus_nn::snapshot", mutates_args=())
def _snapshot(x: Tensor) -> Tensor:
    return x.clone()


_snapshot.register_fake(torch.empty_like)
_snapshot.register_autograd(lambda ctx, grad: grad)


def snapshot(x: Tensor) -> Tensor:
    """A copy for autograd of what is written to before backward reads it.

    torch.compile does not store the result of ``clone`` for backward, it clones again, and then finds what was
    written since. An op that it does not know it stores.
    """
    return _snapshot(x) if torch.compiler.is_compiling() else x.clone()


def embed(indices: Tensor, codes: Tensor) -> Tensor:
    """Rows of codes ``[K, d]`` at ``[...]``, or of ``[H, K, d]`` at ``[..., H]``: ``[..., d]``; zeros at −1."""
    if codes.dim() == 3:
        return torch.stack([embed(indices[..., h], book) for h, book in enumerate(codes)], dim=-2)
    absent = indices == -1
    return F.embedding(indices.masked_fill(absent, 0), codes).masked_fill(absent.unsqueeze(-1), 0.0)


def pick(books: Tensor, number: Tensor) -> Tensor:
    """Rows of each book: ``[B, N, d]`` at ``[B, M]``, to ``[B, M, d]``; zeros where there are none."""
    if books.shape[1] == 0:
        return books.new_zeros(*number.shape, books.shape[-1])
    return torch.stack([rows.index_select(0, chosen) for rows, chosen in zip(books, number, strict=True)])


def mean_of_live(values: Tensor, mask: Tensor | None) -> Tensor:
    """The mean over rows that count; the others hold zeros."""
    return values.mean() if mask is None else values.sum() / mask.sum().clamp_min(1)


def _gather(rows: Tensor) -> Tensor:
    """The rows of all ranks one after the other, however many each has."""
    lengths = [torch.zeros((), dtype=torch.int64, device=rows.device) for _ in range(dist.get_world_size())]
    dist.all_gather(lengths, torch.tensor(len(rows), device=rows.device))
    counts = [int(length) for length in lengths]
    padded = [rows.new_empty(max(counts), rows.shape[1]) for _ in counts]
    dist.all_gather(padded, F.pad(rows, (0, 0, 0, max(counts) - len(rows))))
    return torch.cat([part[:count] for part, count in zip(padded, counts, strict=True)])
