"""Top-k sparse codes (Makhzani & Frey, "k-Sparse Autoencoders", 2014; Gao et al., 2024)."""

import torch
from torch import Tensor

from isthmus.reference._numeric import widen

__all__ = ["topk_encode"]


def topk_encode(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    *,
    activation: str = "relu",
    indices: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The k largest of ``activation(x @ weight.T + bias)`` in each row, largest first.

    Ties go to the lowest index. With "relu" a row with fewer than k positive features is filled
    with zeros, those of the lowest indices. A row with a NaN anywhere before selection has NaN
    values and index 0 throughout.

    Gradients go through the selected entries, the selection held fixed; none through an entry
    where relu is 0. O(N F D) time, and O(N F) memory here, which the kernels do without.

    Args:
        x: shape [..., D].
        weight: shape [F, D]; row f is what feature f listens to.
        bias: shape [F], or ``None``.
        k: 1 to F.
        activation: "relu" or "identity".
        indices: hold this selection fixed instead of searching.

    Returns:
        values [..., k] of the dtype of ``x``; indices [..., k] int64.

    Raises:
        ValueError: ``k`` out of range, or an unknown ``activation``.

    Example:
        >>> values, indices = topk_encode(torch.tensor([[1.0, 3.0, 2.0]]), torch.eye(3), None, 2)
        >>> values, indices
        (tensor([[3., 2.]]), tensor([[1, 2]]))
    """
    if not 1 <= k <= len(weight):
        raise ValueError(f"k is {k}; expected 1 to {len(weight)}, the number of features")
    features = widen(x) @ widen(weight).T
    if bias is not None:
        features = features + widen(bias)
    if activation == "relu":
        features = features.relu()
    elif activation != "identity":
        raise ValueError(f"activation is {activation!r}; expected 'relu' or 'identity'")

    broken = features.isnan().any(-1, keepdim=True)
    if indices is None:
        # torch.topk breaks ties as it likes; a stable sort keeps the lowest index first.
        order = features.detach().sort(dim=-1, descending=True, stable=True).indices
        indices = torch.where(broken, 0, order[..., :k])
    values = torch.where(broken, torch.nan, features.gather(-1, indices))
    return values.to(x.dtype), indices
