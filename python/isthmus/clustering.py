"""k-means on the kernels of vector quantization: no distance matrix, no wait for the device, repeatable from a key."""

from __future__ import annotations

import torch
from torch import Tensor

from isthmus import ops
from isthmus.ops._arguments import check_choice, key_for
from isthmus.random import split
from isthmus.reference._numeric import unit, widen

__all__ = ["kmeans"]


@torch.no_grad()
def kmeans(
    x: Tensor,
    num_codes: int,
    *,
    iterations: int = 10,
    init: str = "random",
    metric: str = "euclidean",
    weights: Tensor | None = None,
    key: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Codes that lie close to the vectors of ``x``: Lloyd's iterations from a random start.

    Each iteration is one search and one sum by code, O(N·K·D) time and O(N·D + K·D) memory. A code that no vector is
    nearest to moves onto the vector that is farthest from its own code; several such codes take the farthest vectors in
    turn. The sum of squared errors never rises. Vectors that hold a NaN or an infinity are left out.

    Args:
        x: [N, D], N ≥ num_codes; float32, float64, bfloat16 or float16 (computed in float32).
        num_codes: K.
        iterations: how many, at least 1.
        init: "random": K vectors, no two the same one. "kmeans++": one after the other, each with a probability
            proportional to its squared distance from those chosen before (Arthur & Vassilvitskii 2007): K passes over
            ``x``, O(N·K·D) like one iteration, but bound by memory; torch.compile unrolls them. Often a better optimum
            where K is small, seldom where K is large.
        metric: "euclidean"; or "cosine", for which vectors and codes are scaled to length 1 (spherical k-means, Dhillon
            & Modha 2001).
        weights: [N], not negative: how many times each vector counts.
        key: int64 [2], of which all draws are made. Default: a fresh key from torch's generator of the device.

    Returns:
        (codebook, counts): codebook [K, D] and counts [K], float64 for float64 and float32 for others. Codes are the
        means of the vectors that were nearest to them at the start of the last iteration, counts how many these were
        (the sum of their weights); a code that has just moved counts 0.

    Raises:
        ValueError: an argument is out of range, or there are fewer vectors than codes.

    Example:
        >>> x = torch.tensor([[0.0], [0.2], [5.0], [5.2], [5.4]])
        >>> codebook, counts = kmeans(x, 2, key=torch.tensor([3, 0]))
        >>> codebook.flatten().sort().values, counts.sort().values
        (tensor([0.1000, 5.2000]), tensor([2., 3.]))
    """
    check_choice("init", init, ("random", "kmeans++"))
    check_choice("metric", metric, ("euclidean", "cosine"))
    if x.dim() != 2 or not 1 <= num_codes <= x.shape[0]:
        raise ValueError(f"x has shape {list(x.shape)}; expected [N, D] with N >= num_codes = {num_codes} >= 1")
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}; expected at least 1")
    if weights is not None and weights.shape != x.shape[:1]:
        raise ValueError(f"weights has shape {list(weights.shape)}; expected [{x.shape[0]}], a weight for each vector")

    rows = widen(x)
    finite = rows.isfinite().all(-1)
    rows = torch.where(finite.unsqueeze(-1), rows, 0.0)
    if metric == "cosine":
        rows = unit(rows)
    importance = finite.to(rows.dtype) if weights is None else torch.where(finite, weights.to(rows.dtype), 0.0)
    mask = importance > 0
    weighted = rows if weights is None else torch.cat([rows * importance.unsqueeze(-1), importance.unsqueeze(-1)], -1)

    choose = _random_rows if init == "random" else _scattered_rows
    codebook = rows[choose(rows, importance, num_codes, key_for(x, key, None))]
    for _ in range(iterations):
        _, indices, error = ops.vq_quantize(rows, codebook, metric=metric, mask=mask)
        counts, sums = ops.code_statistics(weighted, indices, num_codes)
        if weights is not None:
            sums, counts = sums[:, :-1], sums[:, -1]
        codebook = _refill(sums, counts, rows, error * importance)
        if metric == "cosine":
            codebook = unit(codebook)
    return codebook, counts


def _refill(sums: Tensor, counts: Tensor, rows: Tensor, error: Tensor) -> Tensor:
    """The mean of each code; those without a vector become the vectors of the largest errors, in turn."""
    empty = counts == 0
    farthest = error.sort(descending=True, stable=True).indices[
        : len(counts)
    ]  # stable: equal errors do not depend on luck
    turn = (empty.cumsum(0) - 1).clamp(min=0)
    means = sums / torch.where(empty, 1.0, counts).unsqueeze(-1)
    return torch.where(empty.unsqueeze(-1), rows[farthest[turn]], means)


def _random_rows(rows: Tensor, importance: Tensor, num_codes: int, key: Tensor) -> Tensor:
    """Indices of distinct rows, the largest of log weight + Gumbel noise: drawn in proportion to their weights."""
    noise = ops.gumbel_noise(key, rows.shape[:1], torch.float64)
    return (importance.double().log() + noise).sort(descending=True, stable=True).indices[:num_codes]


def _scattered_rows(rows: Tensor, importance: Tensor, num_codes: int, key: Tensor) -> Tensor:
    """Indices of rows, each drawn in proportion to its weight times its squared distance from the rows before it."""
    distance = torch.ones_like(importance)
    chosen: list[Tensor] = []
    nothing = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
    for step in split(key, num_codes).unbind():
        potential = importance * distance
        # The largest of log p + Gumbel noise is a draw from p: no sum over rows, whose order devices disagree on.
        chosen.append((potential.log() + ops.gumbel_noise(step, rows.shape[:1], rows.dtype)).argmax(0, keepdim=True))
        reach = ops.vq_quantize(rows, rows[chosen[-1]], indices=nothing)[2]
        distance = reach if len(chosen) == 1 else torch.minimum(distance, reach)
    return torch.cat(chosen)
