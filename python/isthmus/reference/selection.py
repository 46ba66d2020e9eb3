"""Ragged codes: all above a threshold (Rajamanoharan et al. 2024), the best of a batch (Bussmann et al. 2024)."""

import torch
from torch import Tensor

from isthmus.reference.sparse import LatentOrder, latent_order

__all__ = ["batch_topk_encode", "threshold_encode"]


def threshold_encode(
    x: Tensor, weight: Tensor, bias: Tensor | None, threshold: Tensor | float, *, return_order: bool = False
) -> tuple[Tensor, Tensor, Tensor] | tuple[Tensor, Tensor, Tensor, LatentOrder]:
    """All pre-activations ``x @ weight.T + bias`` above a threshold, as a ragged code.

    Compared in float64: a > threshold. A row with a NaN among its pre-activations gives one entry, of
    value NaN and index 0. Gradients go through the entries; none to ``threshold``. O(N F) memory
    here, which the kernels do without.

    Args:
        x: shape [..., D]; its rows are counted in order, N in all.
        weight: shape [F, D]; row f is what feature f listens to.
        bias: shape [F], or ``None``.
        threshold: shape [F] or [], or a number.
        return_order: also return the ``LatentOrder`` of all entries.

    Returns:
        values [E] of the dtype of ``x``; indices [E] int64; offsets [N + 1] int64. Row n has the
        entries offsets[n] to offsets[n + 1] - 1, in ascending order of feature.

    Example:
        >>> x = torch.tensor([[1.0, 3.0, 2.0], [0.0, 1.0, -1.0]])
        >>> threshold_encode(x, torch.eye(3), None, 0.5)
        (tensor([1., 3., 2., 1.]), tensor([0, 1, 2, 1]), tensor([0, 3, 4]))
    """
    scores, broken = _scores(x, weight, bias)
    selected = torch.where(broken, _is_first(scores), scores.detach() > threshold)
    values, indices, offsets = _as_ragged(scores, broken, selected, x.dtype)
    if not return_order:
        return values, indices, offsets
    return values, indices, offsets, latent_order(indices, len(weight), offsets=offsets)


def batch_topk_encode(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: float,
    *,
    activation: str = "relu",
    return_order: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor] | tuple[Tensor, Tensor, Tensor, Tensor, LatentOrder]:
    """The N k largest of ``activation(x @ weight.T + bias)`` in the whole batch, as a ragged code.

    Ranked in float64; ties go to the lowest row, then to the lowest feature. A row with a NaN among its
    pre-activations gives one entry, of value NaN and index 0, which ranks above all numbers; where
    everything else is used up, it gives more of them. Gradients as for ``topk_encode``.

    Args:
        x, weight, bias: as in ``threshold_encode``.
        k: entries for each row on average; round(N k) in all, at most N F.
        activation: "relu" or "identity".
        return_order: also return the ``LatentOrder`` of the code, with "relu" without the entries that are 0.

    Returns:
        values, indices, offsets: as in ``threshold_encode``. threshold []: the smallest value that was
        selected, infinity if none was; before rounding to a half type; detached.

    Raises:
        ValueError: ``k`` out of range, or an unknown ``activation``.

    Example:
        >>> x = torch.tensor([[1.0, 3.0, 2.0], [0.0, 1.0, -1.0]])
        >>> batch_topk_encode(x, torch.eye(3), None, 1)
        (tensor([3., 2.]), tensor([1, 2]), tensor([0, 2, 2]), tensor(2.))
    """
    scores, broken = _scores(x, weight, bias)
    entries = round(len(scores) * k)
    if not 0 <= entries <= scores.numel():
        raise ValueError(f"k is {k}; expected 0 to {len(weight)}, the number of features")
    if activation == "relu":
        scores = scores.relu()
    elif activation != "identity":
        raise ValueError(f"activation is {activation!r}; expected 'relu' or 'identity'")
    # Entries of broken rows stand above all numbers or below them; stable sorts, least important key first.
    standing = torch.where(broken, 2 * _is_first(scores).int(), 1).flatten()
    order = torch.where(broken, 0, scores.detach()).flatten().sort(descending=True, stable=True).indices
    order = order[standing[order].sort(descending=True, stable=True).indices]
    selected = torch.zeros_like(standing, dtype=torch.bool)
    selected[order[:entries]] = True
    selected = selected.view_as(scores)
    numbers = scores.detach()[selected & ~broken]
    threshold = numbers.min() if len(numbers) else numbers.new_tensor(torch.inf)
    threshold = threshold.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    values, indices, offsets = _as_ragged(scores, broken, selected, x.dtype)
    if not return_order:
        return values, indices, offsets, threshold
    active = values.detach() if activation == "relu" else None
    return values, indices, offsets, threshold, latent_order(indices, len(weight), values=active, offsets=offsets)


def _scores(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Pre-activations [N, F] in float64, and which rows [N, 1] have a NaN among them."""
    scores = torch.atleast_2d(x.double()).flatten(0, -2) @ weight.double().T
    if bias is not None:
        scores = scores + bias.double()
    return scores, scores.isnan().any(-1, keepdim=True)


def _is_first(scores: Tensor) -> Tensor:
    return torch.arange(scores.shape[1], device=scores.device).expand_as(scores) == 0


def _as_ragged(scores: Tensor, broken: Tensor, selected: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    values = torch.where(broken, torch.nan, scores)[selected].to(dtype)
    rows, features = selected.nonzero(as_tuple=True)
    counts = selected.sum(1)
    return values, features.where(~broken[rows, 0], 0), torch.cat([counts.new_zeros(1), counts.cumsum(0)])
