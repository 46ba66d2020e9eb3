"""Vector quantization (van den Oord et al., "Neural discrete representation learning", 2017)."""

import torch
from torch import Tensor
from torch.nn.functional import embedding

from isthmus.reference._numeric import unit, widen

__all__ = [
    "code_statistics",
    "code_totals",
    "update_codebook_",
    "vq_assign",
    "vq_match",
    "vq_quantize",
]

_METRICS = ("euclidean", "cosine", "inner_product")
_GRADIENTS = ("straight_through", "rotation", "codebook")
_FORGOTTEN = 1e-12


def vq_assign(
    x: Tensor, codebook: Tensor, *, metric: str = "euclidean", topk: int = 1, mask: Tensor | None = None
) -> Tensor:
    """Index of the code with the best score for each row of ``x``.

    ============= ===========================================
    euclidean     ``-|x - c|^2``
    cosine        ``x.c / |c|``, 0 for a code of zeros
    inner_product ``x.c``
    ============= ===========================================

    Ties go to the lowest index. A score that is NaN counts as minus infinity: a row with NaN gets the
    indices 0, 1, ..., a code with NaN comes last. Not differentiable. O(N K D) time and memory here.

    Args:
        x: shape [..., D]; with heads [H, ..., D].
        codebook: shape [K, D]; with heads [H, K, D].
        metric: "euclidean", "cosine" or "inner_product".
        topk: how many codes, 1 to K.
        mask: bool, the leading shape of ``x``; rows that are False get -1.

    Returns:
        int64 [...], or [..., topk] if ``topk`` is above 1, best first.

    Raises:
        ValueError: another ``metric``, or ``topk`` out of range.

    Example:
        >>> vq_assign(torch.tensor([[0.9], [0.5]]), torch.tensor([[0.0], [1.0]]))
        tensor([1, 0])
    """
    _check_choice("metric", metric, _METRICS)
    num_codes = codebook.shape[-2]
    if not 1 <= topk <= num_codes:
        raise ValueError(f"topk is {topk}; expected 1 to {num_codes}, the number of codes")
    scores = _scores(x.detach().double(), _per_row(codebook.detach().double(), x), metric)
    order = scores.nan_to_num(-torch.inf, torch.inf, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
    indices = order[..., :topk] if topk > 1 else order[..., 0]
    if mask is not None:
        indices = torch.where(mask.unsqueeze(-1) if topk > 1 else mask, indices, -1)
    return indices


def vq_quantize(
    x: Tensor,
    codebook: Tensor,
    *,
    metric: str = "euclidean",
    gradient: str = "straight_through",
    commitment_weight: float = 1.0,
    mask: Tensor | None = None,
    indices: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Replace each row of ``x`` by its best code.

    ``quantized`` passes its gradient on as ``gradient`` says:

    - "straight_through": to ``x`` unchanged (Bengio et al., 2013).
    - "rotation": to ``x`` through :func:`rotate` (Fifty et al., 2024).
    - "codebook": to the code, and none to ``x``.

    ``squared_error`` gives its gradient to ``codebook`` in full and to ``x`` times
    ``commitment_weight``: its mean trains like ``|sg(x) - c|^2 + commitment_weight * |x - sg(c)|^2``,
    in second derivatives too.

    A row that is masked has index -1, quantizes to zeros, has no error and passes no gradient. A row
    with NaN gets index 0, the value of code 0, and the error NaN. Half inputs give a float32
    ``squared_error``.

    Args:
        x, codebook, metric, mask: as in :func:`vq_assign`.
        gradient: "straight_through", "rotation" or "codebook".
        commitment_weight: of the gradient of ``squared_error`` to ``x``.
        indices: hold this assignment fixed instead of searching; -1 masks a row.

    Returns:
        quantized [..., D] of the dtype of ``x``; indices [...] int64; squared_error
        ``|x - c|^2`` [...].

    Raises:
        ValueError: another ``metric`` or ``gradient``, or both ``mask`` and ``indices``.
        IndexError: a given index is out of range.

    Example:
        >>> quantized, indices, error = vq_quantize(torch.tensor([[0.75]]), torch.tensor([[1.0]]))
        >>> quantized, indices, error
        (tensor([[1.]]), tensor([0]), tensor([0.0625]))
    """
    _check_choice("metric", metric, _METRICS)
    _check_choice("gradient", gradient, _GRADIENTS)
    if mask is not None and indices is not None:
        raise ValueError("mask and indices were both given; expected -1 in indices where a row is masked")
    if indices is None:
        indices = vq_assign(x, codebook, metric=metric, mask=mask)
    kept = (indices >= 0).unsqueeze(-1)
    wide, code = (torch.where(kept, t, 0.0) for t in (widen(x), _gather(widen(codebook), indices)))

    if gradient == "codebook":
        quantized = code
    else:
        quantized = code.detach() + _carrier(rotate(wide, code.detach()) if gradient == "rotation" else wide)
    quantized = quantized.to(x.dtype)

    commitment = (wide - code.detach()).square().sum(-1)
    squared_error = (wide.detach() - code).square().sum(-1)
    squared_error = squared_error + commitment_weight * (commitment - commitment.detach())
    return quantized, indices, squared_error


def rotate(x: Tensor, code: Tensor) -> Tensor:
    """``lambda R x``: the rotation and scaling that takes each row of ``x`` to its code, held constant.

    ``lambda = |c| / |x|`` and ``R = I - 2 r r^T + 2 c^ x^^T`` with ``x^ = x / |x|``, ``c^ = c / |c|``,
    ``r = (x^ + c^) / |x^ + c^|``. The value is the code; the gradient g reaches ``x`` as
    ``lambda R^T g``, linear in g, and second derivatives with respect to ``x`` and the code are 0.

    Where x and c are opposed but for rounding (``|x^ + c^| <= 4 eps``) r has no direction and counts as
    0, which leaves a reflection. Where x is 0 the gradient passes unchanged. Where the code is 0, lambda
    is 0.

    Args:
        x: shape [..., D].
        code: shape [..., D]; receives no gradient.

    Returns:
        [..., D].
    """
    with torch.no_grad():
        x_length, code_length = (torch.linalg.vector_norm(t, dim=-1, keepdim=True) for t in (x, code))
        x_hat = x / torch.where(x_length == 0, 1.0, x_length)
        c_hat = code / torch.where(code_length == 0, 1.0, code_length)
        r = x_hat + c_hat
        length = torch.linalg.vector_norm(r, dim=-1, keepdim=True)
        r = torch.where(length <= 4 * torch.finfo(x.dtype).eps, 0.0, r / length)
        scale = code_length / torch.where(x_length == 0, 1.0, x_length)
    rotated = x - 2 * r * (r * x).sum(-1, keepdim=True) + 2 * c_hat * (x_hat * x).sum(-1, keepdim=True)
    return torch.where(x_length == 0, x, scale * rotated)


def vq_match(x: Tensor, codebook: Tensor, *, metric: str = "euclidean") -> tuple[Tensor, Tensor]:
    """The best code of each row, and the best row of each code.

    The rows of a code are ranked by the same score with the roles exchanged: for "cosine" by ``x.c / |x|``.

    Args:
        x: shape [N, D], N >= 1; with heads [H, N, D].
        codebook: shape [K, D]; with heads [H, K, D].
        metric: as in :func:`vq_assign`.

    Returns:
        nearest_code int64 [N] and nearest_row int64 [K]; with heads [H, N] and [H, K].
    """
    return vq_assign(x, codebook, metric=metric), vq_assign(codebook, x, metric=metric)


def code_totals(x: Tensor, indices: Tensor, num_codes: int) -> Tensor:
    """How many rows each code received, and their sum, in one buffer: K counts, then K D sums.

    Not differentiable. Rows of index -1 are left out. Half inputs accumulate in float32, and the
    results stay float32.

    Args:
        x: shape [..., D].
        indices: int64, shape [...], values in [-1, K).
        num_codes: K.

    Returns:
        [K (1 + D)].

    Raises:
        IndexError: an index is out of range.
    """
    rows = widen(x.detach()).reshape(indices.numel(), x.shape[-1])
    place = 1 + indices.flatten()  # the first place is for what has no code
    counts = rows.new_zeros(1 + num_codes).index_add(0, place, rows.new_ones(len(place)))
    sums = rows.new_zeros(1 + num_codes, x.shape[-1]).index_add(0, place, rows)
    return torch.cat([counts[1:], sums[1:].flatten()])


def code_statistics(x: Tensor, indices: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """The two parts of :func:`code_totals`: what a moving-average codebook or k-means needs.

    Returns:
        counts [K] and sums [K, D], of the same dtype.

    Example:
        >>> code_statistics(torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([2, 0, 2]), 3)
        (tensor([1., 0., 2.]), tensor([[2.],
                [0.],
                [5.]]))
    """
    totals = code_totals(x, indices, num_codes)
    return totals[:num_codes], totals[num_codes:].view(num_codes, x.shape[-1])


@torch.no_grad()
def update_codebook_(
    codebook: Tensor,
    usage: Tensor,
    sums: Tensor | None,
    counts: Tensor,
    batch_sums: Tensor | None,
    *,
    decay: float,
    eps: float = 0.0,
    code_weight: Tensor | None = None,
    candidates: Tensor | None = None,
    revive_below: float = 0.0,
    normalize: bool = False,
) -> None:
    """One step of a codebook that learns by moving averages, in place.

    ``usage`` counts hits in units of the mean hits of a code, N / K with ``N = sum(counts)``; with
    ``r = (1 - decay) code_weight``

        usage <- usage + r (counts K / N - usage)
        sums  <- sums  + r (batch_sums K / N - sums)
        code  <- sums / smoothed,   smoothed = (usage + eps) U / (U + K eps),   U = sum(usage)

    A code with ``usage`` of 1e-12 or less stays. Then a code with ``usage < revive_below`` whose candidate
    holds no NaN becomes its candidate, with a usage of 1. Without hits nothing changes.

    Args:
        codebook: [K, D] or [H, K, D], heads being updated each on its own.
        usage, counts, code_weight: [K] or [H, K].
        sums, batch_sums: like ``codebook``; None: the codebook learns otherwise.
        candidates: like ``codebook``; None: nothing is revived.
        normalize: scale codes and what is revived to length 1.
    """
    total = counts.sum(-1, keepdim=True)
    learning = total > 0
    per_hit = counts.shape[-1] / torch.where(learning, total, 1.0)
    rate = (1 - decay) * (torch.ones_like(usage) if code_weight is None else code_weight) * learning
    usage.add_(rate * (counts * per_hit - usage))
    if sums is not None and batch_sums is not None:
        sums.add_(rate.unsqueeze(-1) * (batch_sums * per_hit.unsqueeze(-1) - sums))
        used = usage.sum(-1, keepdim=True)
        smoothed = (usage + eps) * used / (used + usage.shape[-1] * eps)
        codes = unit(sums) if normalize else sums / smoothed.unsqueeze(-1)
        learned = (learning & (usage > _FORGOTTEN)).unsqueeze(-1)
        codebook.copy_(torch.where(learned, codes.to(codebook.dtype), codebook))
    if candidates is not None:
        dead = learning & (usage < revive_below) & ~candidates.isnan().any(-1)
        fresh = widen(candidates)
        fresh = unit(fresh) if normalize else fresh
        usage.masked_fill_(dead, 1.0)
        codebook.copy_(torch.where(dead.unsqueeze(-1), fresh.to(codebook.dtype), codebook))
        if sums is not None:
            sums.copy_(torch.where(dead.unsqueeze(-1), fresh, sums))


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(repr, choices))}")


def _per_row(codebook: Tensor, x: Tensor) -> Tensor:
    """The codebook of each row, [..., K, D], broadcast against the leading dimensions of x."""
    if codebook.dim() == 2:
        return codebook
    return codebook.reshape(codebook.shape[0], *[1] * (x.dim() - 2), *codebook.shape[1:])


def _scores(x: Tensor, codebook: Tensor, metric: str) -> Tensor:
    x = x.unsqueeze(-2)
    if metric == "euclidean":
        return -(x - codebook).square().sum(-1)
    products = (x * codebook).sum(-1)
    if metric == "inner_product":
        return products
    lengths = torch.linalg.vector_norm(codebook, dim=-1)
    return torch.where(lengths == 0, 0.0, products / torch.where(lengths == 0, 1.0, lengths))


def _gather(codebook: Tensor, indices: Tensor) -> Tensor:
    """The code of each index; that of index -1 is any."""
    indices = indices.masked_fill(indices == -1, 0)
    if codebook.dim() == 2:
        return embedding(indices, codebook)
    head = torch.arange(len(codebook), device=codebook.device).reshape(-1, *[1] * (indices.dim() - 1))
    return codebook[head, indices]


def _carrier(x: Tensor) -> Tensor:
    """Zero with the gradient of x, also where x is NaN or infinite: what it is added to keeps its value."""
    return (x - x.detach()).nan_to_num()
