"""Top-k sparse codes (Makhzani & Frey, "k-Sparse Autoencoders", 2014; Gao et al., 2024)."""

import torch
from torch import Tensor

from isthmus.reference.sparse import LatentOrder, latent_order

__all__ = ["topk_encode"]


def topk_encode(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    *,
    activation: str = "relu",
    groups: int = 1,
    among: Tensor | None = None,
    return_order: bool = False,
    indices: Tensor | None = None,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, LatentOrder]:
    """The k largest of ``activation(x @ weight.T + bias)`` in each row, largest first.

    Scores are float64 whatever the dtype. Ties go to the lowest index. With "relu" a row with fewer than k positive
    features is filled with zeros, those of the lowest indices. Where fewer than k features take part, the places behind
    them have value 0 and index -1. A row with a NaN anywhere before selection has NaN values and index 0 throughout.

    Gradients go through the selected entries, the selection held fixed; none through an entry
    where relu is 0. O(N F D) time, and O(N F) memory here, which the kernels do without.

    Args:
        x: shape [..., D].
        weight: shape [F, D]; row f is what feature f listens to.
        bias: shape [F], or ``None``.
        k: 1 to F.
        activation: "relu", "identity", or "abs": by magnitude, with the sign kept.
        groups: a divisor of F and k: so many equal ranges of features give their ``k / groups`` best, one after
            another.
        among: bool [F]; only features that are True take part.
        return_order: also return the ``LatentOrder`` of the code, with "relu" without the entries that are 0.
        indices: hold this selection fixed instead of searching.

    Returns:
        values [..., k] of the dtype of ``x``; indices [..., k] int64.

    Raises:
        ValueError: ``k`` or ``groups`` out of range, or an unknown ``activation``.

    Example:
        >>> values, indices = topk_encode(torch.tensor([[1.0, 3.0, 2.0]]), torch.eye(3), None, 2)
        >>> values, indices
        (tensor([[3., 2.]]), tensor([[1, 2]]))
    """
    num_features = len(weight)
    if not 1 <= k <= num_features:
        raise ValueError(f"k is {k}; expected 1 to {num_features}, the number of features")
    if groups < 1 or num_features % groups or k % groups:
        raise ValueError(f"groups is {groups}; expected a divisor of {num_features} and {k}")
    if activation not in ("relu", "identity", "abs"):
        raise ValueError(f"activation is {activation!r}; expected 'relu', 'identity' or 'abs'")
    features = x.double() @ weight.double().T
    if bias is not None:
        features = features + bias.double()
    if activation == "relu":
        features = features.relu()

    taking_part = weight.new_ones(num_features, dtype=torch.bool) if among is None else among
    broken = (features.isnan() & taking_part).any(-1, keepdim=True)
    if indices is None:
        ranks = features.detach().abs() if activation == "abs" else features.detach()
        found = [_best(part, part_of, k // groups) for part, part_of in zip(
            ranks.chunk(groups, -1), taking_part.chunk(groups), strict=True)]  # fmt: skip
        first = torch.arange(groups, device=x.device).repeat_interleave(k // groups) * (num_features // groups)
        indices = torch.cat(found, dim=-1)
        indices = torch.where(broken, 0, torch.where(indices < 0, -1, indices + first))
    values = torch.where(indices < 0, 0, features.gather(-1, indices.clamp(min=0)))
    values = torch.where(broken, torch.nan, values).to(x.dtype)
    if not return_order:
        return values, indices
    order = latent_order(indices, num_features, values=values.detach() if activation == "relu" else None)
    return values, indices, order


def _best(ranks: Tensor, taking_part: Tensor, k: int) -> Tensor:
    """Where the k best of those that take part are; -1 behind them."""
    columns = taking_part.nonzero().squeeze(1)
    # torch.topk breaks ties as it likes; a stable sort keeps the lowest index first.
    order = ranks[..., columns].sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return torch.nn.functional.pad(columns[order], (0, k - order.shape[-1]), value=-1)
