"""Vector quantization (van den Oord et al., "Neural discrete representation learning", 2017)."""

import torch
from torch import Tensor
from torch.nn.functional import embedding

from isthmus.reference._numeric import widen

__all__ = ["code_statistics", "vq_assign", "vq_quantize"]


def vq_assign(x: Tensor, codebook: Tensor, *, metric: str = "euclidean", topk: int = 1) -> Tensor:
    """Index of the code nearest to each row of ``x``.

    The nearest code minimises ``|c|^2 / 2 - x.c``; ties go to the lowest index, and a score that
    is NaN never wins, so a row with NaN gets index 0. Not differentiable. O(N K D) time, and
    O(N K) memory here, which the kernels do without.

    Args:
        x: shape [..., D].
        codebook: shape [K, D].
        metric: "euclidean".
        topk: 1.

    Returns:
        int64, shape [...].

    Raises:
        ValueError: another ``metric`` or ``topk``.

    Example:
        >>> vq_assign(torch.tensor([[0.9], [0.5]]), torch.tensor([[0.0], [1.0]]))
        tensor([1, 0])
    """
    if topk != 1:
        raise ValueError(f"topk is {topk}; expected 1")
    _check_metric(metric)
    x, codebook = widen(x.detach()), widen(codebook.detach())
    score = 0.5 * codebook.square().sum(-1) - x @ codebook.T
    return torch.where(score.isnan(), torch.inf, score).argmin(-1)


def vq_quantize(
    x: Tensor,
    codebook: Tensor,
    *,
    metric: str = "euclidean",
    gradient: str = "straight_through",
    commitment_weight: float = 1.0,
    indices: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Replace each row of ``x`` by its nearest code.

    Gradients: ``quantized`` passes its gradient to ``x`` unchanged and gives none to ``codebook``
    (straight-through, Bengio et al., 2013). ``squared_error`` gives its gradient to ``codebook``
    in full and to ``x`` times ``commitment_weight``: its mean trains like
    ``|sg(x) - c|^2 + commitment_weight * |x - sg(c)|^2``, in second derivatives too.

    A row with NaN gets index 0, the value of code 0, and the error NaN. Half inputs give a
    float32 ``squared_error``.

    Args:
        x: shape [..., D].
        codebook: shape [K, D].
        metric: "euclidean".
        gradient: "straight_through".
        indices: hold this assignment fixed instead of searching.

    Returns:
        quantized [..., D] of the dtype of ``x``; indices [...] int64; squared_error
        ``|x - c|^2`` [...].

    Raises:
        ValueError: another ``metric`` or ``gradient``.
        IndexError: a given index outside [0, K).

    Example:
        >>> quantized, indices, error = vq_quantize(torch.tensor([[0.75]]), torch.tensor([[1.0]]))
        >>> quantized, indices, error
        (tensor([[1.]]), tensor([0]), tensor([0.0625]))
    """
    _check_metric(metric)
    if gradient != "straight_through":
        raise ValueError(f"gradient is {gradient!r}; expected 'straight_through'")
    if indices is None:
        indices = vq_assign(x, codebook)
    wide, code = widen(x), embedding(indices, widen(codebook))

    # Zero with the gradient of x, also where x is NaN or infinite: the value is the code exactly.
    carrier = (wide - wide.detach()).nan_to_num()
    quantized = (code.detach() + carrier).to(x.dtype)

    commitment = (wide - code.detach()).square().sum(-1)
    squared_error = (wide.detach() - code).square().sum(-1)
    squared_error = squared_error + commitment_weight * (commitment - commitment.detach())
    return quantized, indices, squared_error


def code_statistics(x: Tensor, indices: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """How many rows each code received, and their sum: what an EMA codebook or k-means needs.

    Not differentiable. Half inputs accumulate in float32, and both results stay float32.

    Args:
        x: shape [..., D].
        indices: int64, shape [...], values in [0, K).
        num_codes: K.

    Returns:
        counts [K] and sums [K, D], of the same dtype.

    Raises:
        IndexError: an index outside [0, K).

    Example:
        >>> code_statistics(torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([2, 0, 2]), 3)
        (tensor([1., 0., 2.]), tensor([[2.],
                [0.],
                [5.]]))
    """
    rows = widen(x.detach()).reshape(indices.numel(), x.shape[-1])
    index = indices.flatten()
    counts = rows.new_zeros(num_codes).index_add(0, index, rows.new_ones(len(index)))
    return counts, rows.new_zeros(num_codes, x.shape[-1]).index_add(0, index, rows)


def _check_metric(metric: str) -> None:
    if metric != "euclidean":
        raise ValueError(f"metric is {metric!r}; expected 'euclidean'")
