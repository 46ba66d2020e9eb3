"""What sparse autoencoders are trained on and judged by: reconstruction, sparsity, and the loss that revives features.

Functions of what the ops return: a squared error for each row, and a sparse code. A padded code has values and indices
[..., k], where index −1 marks an empty place of value 0. A ragged one has values and indices [E], and offsets [N + 1]:
row n owns the entries from offsets[n] up to offsets[n + 1].
"""

from __future__ import annotations

import torch
from torch import Tensor

from isthmus import ops
from isthmus.ops._arguments import accumulate_dtype


def fraction_of_variance_unexplained(squared_error: Tensor, target: Tensor) -> Tensor:
    """Σ |x − x̂|² / Σ |x − mean of the batch|²: 0 for a perfect reconstruction, 1 for predicting the mean.

    The loss of Gao et al. (2024, arXiv 2406.04093), which does not depend on the scale of x. It needs a batch of at
    least two different rows. No gradient flows into the denominator.

    Args:
        squared_error: [...], |x − x̂|² of each row, as ``ops.sparse_reconstruct`` returns it. With one more dimension,
            for several reconstructions of each row, the result is their sum.
        target: [..., D], x.

    Returns:
        [], of the dtype of ``squared_error``.

    Example:
        >>> target = torch.tensor([[0.0, 0.0], [2.0, 2.0]])
        >>> fraction_of_variance_unexplained(torch.tensor([0.5, 0.5]), target)
        tensor(0.2500)
    """
    rows = target.detach().reshape(-1, target.shape[-1]).to(squared_error.dtype)
    variance = (rows - rows.mean(dim=0)).square().sum()
    return squared_error.sum() / variance.clamp_min(torch.finfo(variance.dtype).tiny)


def fraction_of_variance_explained(squared_error: Tensor, target: Tensor) -> Tensor:
    """1 − Σ |x − x̂|² / Σ |x − mean of the batch|²: 1 for a perfect reconstruction, 0 for predicting the mean.

    Args:
        squared_error: [...], |x − x̂|² of each row, as ``ops.sparse_reconstruct`` returns it.
        target: [..., D], x: at least two different rows.

    Returns:
        [], of the dtype of ``squared_error``.

    Example:
        >>> target = torch.tensor([[0.0, 0.0], [2.0, 2.0]])
        >>> fraction_of_variance_explained(torch.tensor([0.5, 0.5]), target)
        tensor(0.7500)
    """
    return 1.0 - fraction_of_variance_unexplained(squared_error, target)


def normalized_mse(squared_error: Tensor, target: Tensor) -> Tensor:
    """Mean over rows of |x − x̂|² / |x|²: every row counts alike, however long it is.

    Args:
        squared_error: [...], |x − x̂|² of each row, as ``ops.sparse_reconstruct`` returns it.
        target: [..., D], x; no gradient flows into its norm.

    Returns:
        [], of the dtype of ``squared_error``.

    Example:
        >>> normalized_mse(torch.tensor([1.0, 1.0]), torch.tensor([[1.0, 1.0], [0.0, 2.0]]))
        tensor(0.3750)
    """
    power = target.detach().to(squared_error.dtype).square().sum(dim=-1)
    return (squared_error / power.clamp_min(torch.finfo(power.dtype).tiny)).mean()


def l0(values: Tensor, offsets: Tensor | None = None) -> Tensor:
    """Mean over rows of the number of features that fire, which is that of values other than 0. It has no gradient.

    Args:
        values: [..., k], or [E] with ``offsets``.
        offsets: [N + 1] of a ragged code.

    Returns:
        [], in float32 (float64 for float64).

    Example:
        >>> l0(torch.tensor([[3.0, 2.0], [1.0, 0.0]]))
        tensor(1.5000)
        >>> l0(torch.tensor([3.0, 2.0, 1.0]), torch.tensor([0, 0, 1, 3]))
        tensor(1.)
    """
    return _row_mean(values.detach() != 0, accumulate_dtype(values), values, offsets)


def l1(values: Tensor, indices: Tensor, decoder_weight: Tensor, offsets: Tensor | None = None) -> Tensor:
    """Mean over rows of Σ |value| · |decoder row|, the penalty of Conerly et al. (2024, "Update on how we train SAEs").

    The norms keep a model from making its values small and its decoder rows long. Of a decoder with rows of norm 1 it
    is the plain L1 norm. It has the unit of x, unlike a fraction of variance: the weight of this penalty goes with the
    scale of the data.

    Args:
        values, indices: [..., k], or [E] with ``offsets``.
        decoder_weight: [F, D].
        offsets: [N + 1] of a ragged code.

    Returns:
        [], in float32 (float64 for float64).

    Example:
        >>> l1(torch.tensor([[1.0, 2.0]]), torch.tensor([[0, 2]]), torch.diag(torch.tensor([3.0, 4.0, 0.5])))
        tensor(4.)
    """
    dtype = accumulate_dtype(values)
    norms = torch.linalg.vector_norm(decoder_weight, dim=-1, dtype=dtype)
    # An empty place reads the last norm, and multiplies it by 0.
    return _row_mean(values.to(dtype).abs() * norms[indices], dtype, values, offsets)


def l0_target_loss(l0: Tensor, target: float) -> Tensor:
    """(L0 / target − 1)²: a penalty that asks for a number of active features, instead of for few.

    Rajamanoharan et al. (2024, arXiv 2407.14435, appendix): no weight has to be tried out to arrive at a given L0.

    Args:
        l0: [], the mean number of active features of a row, with whatever gradient its estimator has.
        target: what it should be.

    Returns:
        [], of the dtype of ``l0``.

    Example:
        >>> l0_target_loss(torch.tensor(48.0), 32)
        tensor(0.2500)
    """
    return (l0 / target - 1.0).square()


def aux_k_loss(
    residual: Tensor, values: Tensor, indices: Tensor, decoder_weight: Tensor, *, order: ops.LatentOrder | None = None
) -> Tensor:
    """The fraction of what the live features left over that dead ones leave over, too (Gao et al. 2024, appendix A.2).

    The residual is held constant, and it has no bias in it: the reconstruction that left it over has used that already.

    Args:
        residual: [..., D], x − x̂.
        values, indices: [..., k], a code of dead features, by ``ops.topk_encode(..., among=dead)``. Gradients reach
            the encoder through ``values``.
        decoder_weight: [F, D].
        order: what ``topk_encode`` returned with ``return_order=True``, which saves a sort in backward.

    Returns:
        [], in float32 (float64 for float64); 0 while no place is taken, which is while nothing is dead.

    Example:
        >>> residual = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
        >>> aux_k_loss(residual, torch.tensor([[1.0], [0.0]]), torch.tensor([[1], [-1]]), torch.eye(2).flip(0))
        tensor(0.5000)
    """
    residual = residual.detach()
    _, squared_error = ops.sparse_reconstruct(values, indices, decoder_weight, None, residual, order=order)
    return fraction_of_variance_unexplained(squared_error, residual) * (indices >= 0).any()


def _row_mean(terms: Tensor, dtype: torch.dtype, values: Tensor, offsets: Tensor | None) -> Tensor:
    """The sum of ``terms`` of all entries, over the number of rows."""
    rows = values.shape[:-1].numel() if offsets is None else len(offsets) - 1
    return terms.sum(dtype=dtype) / max(rows, 1)
