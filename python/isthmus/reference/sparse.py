"""Sparse codes: their decoder, and their order by latent."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding

from isthmus.reference._numeric import widen

__all__ = ["LatentOrder", "latent_order", "sparse_decode", "sparse_reconstruct"]


class LatentOrder(NamedTuple):
    """The entries of a sparse code sorted by latent, stably.

    Latent f has the positions ``starts[f]`` to ``starts[f + 1] - 1``.

    Attributes:
        entries: int64 [E]; where each entry stands in the code, of all its E places flattened. Entries that the order
            leaves out are missing: from ``starts[F]`` on, this is -1.
        rows: int64 [E]; the row of the code that each of them belongs to.
        starts: int64 [F + 1].

    Example:
        >>> LatentOrder(torch.tensor([1, 2, 0]), torch.tensor([0, 1, 0]), torch.tensor([0, 2, 2, 3])).counts
        tensor([2, 0, 1])
    """

    entries: Tensor
    rows: Tensor
    starts: Tensor

    @property
    def counts(self) -> Tensor:
        """How often each latent fired, int64 [F]."""
        return self.starts.diff()


def latent_order(
    indices: Tensor, num_features: int, *, values: Tensor | None = None, offsets: Tensor | None = None
) -> LatentOrder:
    """The entries of a sparse code sorted by latent.

    Left out are empty places, of index -1, and, if ``values`` are given, entries whose value is exactly 0.

    Args:
        indices: int64, padded [..., k] or, with ``offsets``, ragged [E]; in [0, F), or -1.
        num_features: F.
        values: shape of ``indices``, or ``None``.
        offsets: int64 [N + 1]; row n has the entries ``offsets[n]`` to ``offsets[n + 1] - 1``.

    Returns:
        ``LatentOrder``.

    Example:
        >>> latent_order(torch.tensor([[2, 0], [0, -1]]), 3)
        LatentOrder(entries=tensor([ 1,  2,  0, -1]), rows=tensor([ 0,  1,  0, -1]), starts=tensor([0, 2, 2, 3]))
    """
    flat = indices.flatten()
    used = flat >= 0
    if values is not None:
        used = used & (values.flatten() != 0)
    keys = torch.where(used, flat, num_features)  # those left out come last
    entries = keys.argsort(stable=True)
    counts = torch.bincount(keys, minlength=num_features + 1)[:num_features]
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    rows = _row_of_entries(indices, offsets)[entries]
    left_out = keys[entries] == num_features
    return LatentOrder(entries.masked_fill(left_out, -1), rows.masked_fill(left_out, -1), starts)


def sparse_decode(
    values: Tensor,
    indices: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    offsets: Tensor | None = None,
    order: LatentOrder | None = None,
) -> Tensor:
    """Sum of ``values[..., j] * weight[indices[..., j]]`` over j, plus ``bias``.

    An index that occurs twice counts twice; one of -1 marks an empty place. Gradients flow to ``values``,
    ``weight`` and ``bias``. O(N k D) time; O(N k D) memory here, which the kernels do without.

    Args:
        values: padded, shape [..., k]; or ragged, shape [E].
        indices: int64, shape of ``values``, in [0, F), or -1.
        weight: shape [F, D]; row f is the direction of feature f.
        bias: shape [D], or ``None``.
        offsets: int64 [N + 1], of a ragged code; row n has the entries ``offsets[n]`` to ``offsets[n + 1] - 1``.
        order: what ``latent_order`` gives; only its entries reach the gradient of ``weight``.

    Returns:
        Shape [..., D], or [N, D] with ``offsets``; dtype of ``values``.

    Raises:
        IndexError: an index outside [-1, F).

    Example:
        >>> sparse_decode(torch.tensor([3.0, 2.0]), torch.tensor([1, 2]), torch.eye(3))
        tensor([0., 3., 2.])
    """
    return _decode(values, indices, weight, bias, offsets, order).to(values.dtype)


def sparse_reconstruct(
    values: Tensor,
    indices: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *,
    offsets: Tensor | None = None,
    order: LatentOrder | None = None,
) -> tuple[Tensor, Tensor]:
    """``sparse_decode``, and the squared distance of each row from its target.

    Args:
        values, indices, weight, bias, offsets, order: as in ``sparse_decode``.
        target: shape of the reconstruction.

    Returns:
        The reconstruction, and the squared length of target - reconstruction of each row, in the accumulate dtype.

    Example:
        >>> target = torch.tensor([0.0, 1.0, 2.0])
        >>> sparse_reconstruct(torch.tensor([3.0, 2.0]), torch.tensor([1, 2]), torch.eye(3), None, target)
        (tensor([0., 3., 2.]), tensor(4.))
    """
    out = _decode(values, indices, weight, bias, offsets, order)
    error = (widen(target) - out).square().sum(-1)
    return out.to(values.dtype), error


def selected_scores(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    indices: Tensor,
    offsets: Tensor | None = None,
    order: LatentOrder | None = None,
) -> Tensor:
    """``x[n] @ weight[f] + bias[f]`` for each entry of a code, of row n and latent f; 0 at empty places.

    What sparse encoders select. Only the entries of ``order``, if given, reach the gradients of ``weight`` and
    ``bias``.
    """
    used, in_order = indices != -1, _in_order(indices, order)
    latents = indices.where(used, 0)
    directions, shifts = embedding(latents, widen(weight)), widen(bias)[latents]
    directions = directions.where(in_order.unsqueeze(-1), directions.detach())
    shifts = shifts.where(in_order, shifts.detach())
    rows = widen(x)[_row_of_entries(indices, offsets)].view(directions.shape)
    return ((rows * directions).sum(-1) + shifts).where(used, 0)


def _decode(
    values: Tensor,
    indices: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    offsets: Tensor | None,
    order: LatentOrder | None,
) -> Tensor:
    used = indices != -1
    directions = embedding(indices.where(used, 0), widen(weight))
    directions = directions.where(_in_order(indices, order).unsqueeze(-1), directions.detach())
    terms = widen(values).where(used, 0).unsqueeze(-1) * directions
    if offsets is None:
        out = terms.sum(-2)
    else:
        out = terms.new_zeros(len(offsets) - 1, weight.shape[1])
        out = out.index_add(0, _row_of_entries(indices, offsets), terms)
    return out if bias is None else out + widen(bias)


def _in_order(indices: Tensor, order: LatentOrder | None) -> Tensor:
    """Whether each entry takes part in sums over a latent."""
    if order is None:
        return indices != -1
    found = torch.zeros(indices.numel() + 1, dtype=torch.bool, device=indices.device)
    found[order.entries] = True  # -1 is the place behind the last entry
    return found[:-1].view(indices.shape)


def _row_of_entries(indices: Tensor, offsets: Tensor | None) -> Tensor:
    entries = torch.arange(indices.numel(), device=indices.device)
    if offsets is None:
        return entries // max(indices.shape[-1], 1)
    return torch.searchsorted(offsets, entries, right=True) - 1
