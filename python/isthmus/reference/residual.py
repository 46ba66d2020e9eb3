"""Residual vector quantization (Zeghidour et al., "SoundStream", 2021)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from isthmus.reference._numeric import widen
from isthmus.reference.codebook import _carrier, _gather, code_statistics, rotate, vq_assign

__all__ = ["residual_code_totals", "residual_vq_quantize"]


def residual_vq_quantize(
    x: Tensor,
    codebooks: Tensor | Sequence[Tensor],
    *,
    gradient: str = "straight_through",
    commitment_weight: float = 1.0,
    beam: int = 1,
    stages: Tensor | None = None,
    mask: Tensor | None = None,
    indices: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize in stages: ``r_0 = x``, ``c_q`` the code of stage q nearest to ``r_q``, ``r_{q+1} = r_q - c_q``.

    A beam keeps the ``beam`` sequences of codes that leave the least ``|r|^2`` after each stage and
    returns the best. Of equals the one whose beginning was better comes first, then the lower last
    index; what is NaN comes last.

    Gradients: codes are constants but for their own squared error. ``quantized`` passes its gradient to ``x`` alone,
    once; squared error q gives its gradient to ``c_q`` in full and to ``x`` times ``commitment_weight``.

    Args:
        x: shape [..., D], or [G, ..., D] for grouped codebooks.
        codebooks: shape [Q, K, D] or a sequence of [K_q, D]; grouped [G, Q, K, D] or a sequence of [G, K_q, D].
        gradient: "straight_through" or "rotation": how the gradient of ``quantized`` reaches ``x``.
        beam: number of sequences kept.
        stages: int64, broadcast to the leading shape of ``x``: a row uses its first ``stages`` stages.
        mask: bool, the leading shape of ``x``; False is ``stages`` = 0.
        indices: hold this assignment fixed instead of searching.

    Returns:
        quantized [..., D], the sum of the codes, of the dtype of ``x``; indices [..., Q] int64, -1 for a stage that is
        not used; squared_error ``|r_q - c_q|^2`` [..., Q], 0 for a stage that is not used.

    Raises:
        ValueError: another ``gradient``.

    Example:
        >>> codebooks = torch.tensor([[[0.0], [4.0]], [[-1.0], [1.0]]])
        >>> residual_vq_quantize(torch.tensor([[2.75]]), codebooks)
        (tensor([[3.]]), tensor([[1, 0]]), tensor([[1.5625, 0.0625]]))
    """
    if gradient not in ("straight_through", "rotation"):
        raise ValueError(f"gradient is {gradient!r}; expected 'straight_through' or 'rotation'")
    books = _stages(codebooks)
    if indices is None:
        depth = torch.full(x.shape[:-1], len(books), device=x.device) if stages is None else stages
        depth = depth.expand(x.shape[:-1]) if mask is None else torch.where(mask, depth, 0)
        indices = _search(x, books, beam, depth)
    coded = indices >= 0
    # A row without codes is a constant, whatever it holds.
    wide = torch.where(coded.any(-1, keepdim=True), widen(x), 0.0)

    residual, total, errors = wide, torch.zeros_like(wide), []
    for q, book in enumerate(books):
        code = torch.where(coded[..., q, None], _gather(book, indices[..., q]), 0.0)
        commitment = (residual - code.detach()).square().sum(-1)
        error = (residual.detach() - code).square().sum(-1)
        error = error + commitment_weight * (commitment - commitment.detach())
        errors.append(torch.where(coded[..., q], error, 0.0))
        residual, total = residual - code.detach(), total + code.detach()
    through = wide if gradient == "straight_through" else rotate(wide, total)
    quantized = total + _carrier(through)
    return quantized.to(x.dtype), indices, torch.stack(errors, -1)


def residual_code_totals(x: Tensor, codebooks: Tensor | Sequence[Tensor], indices: Tensor) -> Tensor:
    """How many residuals each code received, and their sum, in one flat buffer.

    Not differentiable. Half inputs accumulate in float32.

    Args:
        x: shape [..., D], or [G, ..., D] for grouped codebooks.
        codebooks: as for ``residual_vq_quantize``.
        indices: int64, shape [..., Q]; -1 is left out.

    Returns:
        [T * (1 + D)] with T codes in all: the T counts, group by group and stage by stage, then the T sums.

    Example:
        >>> codebooks = torch.tensor([[[0.0], [4.0]], [[-1.0], [1.0]]])
        >>> residual_code_totals(torch.tensor([[2.75]]), codebooks, torch.tensor([[1, 0]]))
        tensor([ 0.0000,  1.0000,  1.0000,  0.0000,  0.0000,  2.7500, -1.2500,  0.0000])
    """
    books = [book.detach() for book in _stages(codebooks)]
    if books[0].dim() == 3:
        codes = sum(book.shape[-2] for book in books)
        groups = [residual_code_totals(x[g], [book[g] for book in books], indices[g]) for g in range(len(x))]
        return torch.cat([*(totals[:codes] for totals in groups), *(totals[codes:] for totals in groups)])

    residual = widen(x.detach())
    counts, sums = [], []
    for book, index in zip(books, indices.unbind(-1), strict=True):
        of_stage = code_statistics(residual, index, len(book))
        counts.append(of_stage[0])
        sums.append(of_stage[1].flatten())
        residual = residual - torch.where(index.unsqueeze(-1) >= 0, _gather(book, index), 0.0)
    return torch.cat([*counts, *sums])


def _stages(codebooks: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [widen(book) for book in (codebooks.unbind(-3) if isinstance(codebooks, Tensor) else codebooks)]


def _search(x: Tensor, books: Sequence[Tensor], beam: int, depth: Tensor) -> Tensor:
    """Of each row the best sequence of its first ``depth`` codes, then -1."""
    residual = widen(x.detach()).unsqueeze(-2)  # [..., width, D]: what the best sequences leave over, best first
    paths = torch.empty(*residual.shape[:-1], 0, dtype=torch.int64, device=x.device)
    result = torch.full((*x.shape[:-1], len(books)), -1, device=x.device)
    for q, book in enumerate(books):
        count = min(beam, book.shape[-2])
        nearest = vq_assign(residual, book, topk=count).view(*residual.shape[:-1], count)
        left = residual.unsqueeze(-2) - _gather(book.detach(), nearest)
        error = left.square().sum(-1).flatten(-2)
        order = error.sort(stable=True).indices[..., :beam]
        longer = torch.cat([paths.repeat_interleave(count, -2), nearest.flatten(-2).unsqueeze(-1)], -1)
        paths = longer.take_along_dim(order.unsqueeze(-1), -2)
        residual = left.flatten(-3, -2).take_along_dim(order.unsqueeze(-1), -2)
        ends = (depth == q + 1).unsqueeze(-1)
        result[..., : q + 1] = torch.where(ends, paths[..., 0, :], result[..., : q + 1])
    return result
