"""Sparse codes and their decoder."""

import torch
from torch import Tensor
from torch.nn.functional import embedding

from isthmus.reference._numeric import widen

__all__ = ["sparse_decode"]


def sparse_decode(values: Tensor, indices: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Sum of ``values[..., j] * weight[indices[..., j]]`` over j, plus ``bias``.

    An index that occurs twice counts twice. Gradients flow to ``values``, ``weight`` and
    ``bias``. O(N k D) time; O(N k D) memory here, which the kernels do without.

    Args:
        values: shape [..., k].
        indices: int64, shape [..., k], values in [0, F).
        weight: shape [F, D]; row f is the direction of feature f.
        bias: shape [D], or ``None``.

    Returns:
        Shape [..., D], dtype of ``values``.

    Raises:
        IndexError: an index outside [0, F).

    Example:
        >>> sparse_decode(torch.tensor([3.0, 2.0]), torch.tensor([1, 2]), torch.eye(3))
        tensor([0., 3., 2.])
    """
    directions = embedding(indices, widen(weight))
    out = torch.einsum("...k,...kd->...d", widen(values), directions)
    if bias is not None:
        out = out + widen(bias)
    return out.to(values.dtype)
