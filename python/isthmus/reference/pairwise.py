"""Terms over all pairs of two sets of vectors, by broadcasting: memory of the size of the pairs."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from isthmus.reference._numeric import log_standard_deviation, widen

__all__ = ["aggregate_log_prob", "component_log_prob", "mixture_log_prob", "mmd"]


def mixture_log_prob(
    z: Tensor, mean: Tensor, scale: Tensor, log_weight: Tensor | None = None, *, scale_type: str = "logvar"
) -> Tensor:
    """log sum_k exp(log_weight_k) N(z; mean_k, s_k^2).

    Args:
        z: shape [..., D].
        mean, scale: shape [K, D]; ``scale_type`` says what ``scale`` stands for.
        log_weight: shape [K], used as given; ``None`` for -log K.

    Returns:
        Shape [...]; float32 for half inputs.

    Example:
        >>> mixture_log_prob(torch.zeros(2), torch.zeros(3, 2), torch.zeros(3, 2))
        tensor(-1.8379)
    """
    scores = _log_density(z, mean, scale, scale_type).sum(-1)
    log_weight = scores.new_full((len(mean),), -math.log(len(mean))) if log_weight is None else widen(log_weight)
    return torch.logsumexp(scores + log_weight, -1)


def component_log_prob(
    z: Tensor, mean: Tensor, scale: Tensor, log_weight: Tensor | None = None, *, scale_type: str = "logvar"
) -> Tensor:
    """log sum_i exp(log_weight_i) N(z_i; mean_k, s_k^2) for each component k: the sum runs over the rows of ``z``.

    Args:
        z: shape [B, D].
        mean, scale: shape [K, D]; ``scale_type`` says what ``scale`` stands for.
        log_weight: shape [B], used as given; ``None`` for -log B.

    Returns:
        Shape [K]; float32 for half inputs.

    Example:
        >>> component_log_prob(torch.zeros(3, 2), torch.zeros(1, 2), torch.zeros(1, 2))
        tensor([-1.8379])
    """
    scores = _log_density(z, mean, scale, scale_type).sum(-1)
    if log_weight is None:
        log_weight = scores.new_full((len(z),), -math.log(max(len(z), 1)))
    return torch.logsumexp(scores + widen(log_weight).unsqueeze(1), 0)


def aggregate_log_prob(
    z: Tensor,
    mean: Tensor,
    scale: Tensor,
    dataset_size: int,
    *,
    estimator: str = "weighted",
    scale_type: str = "logvar",
) -> tuple[Tensor, Tensor]:
    """log q(z_i) and sum_d log q(z_id) of the aggregate posterior, estimated from a batch.

    Args:
        z: shape [B, D]; row i is a sample of N(mean_i, s_i^2).
        mean, scale: shape [B, D]; ``scale_type`` says what ``scale`` stands for.
        dataset_size: N, the number of posteriors that q averages.
        estimator: "weighted" or "stratified", as in Chen et al. (2018).

    Returns:
        (log_joint, log_marginals), each of shape [B]; float32 for half inputs.

    Example:
        >>> aggregate_log_prob(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 3), 2, estimator="stratified")
        (tensor([-2.7568, -2.7568]), tensor([-2.7568, -2.7568]))
    """
    log_joint, log_marginal = aggregate_terms(z, mean, scale, dataset_size, estimator=estimator, scale_type=scale_type)
    return log_joint, log_marginal.sum(-1)


def aggregate_terms(
    z: Tensor, mean: Tensor, scale: Tensor, dataset_size: int, *, estimator: str, scale_type: str
) -> tuple[Tensor, Tensor]:
    """log q(z_i), shape [B], and log q(z_id), shape [B, D]."""
    log_density = _log_density(z, mean, scale, scale_type)
    log_weight = aggregate_log_weights(len(z), dataset_size, estimator).to(log_density)
    log_joint = torch.logsumexp(log_weight + log_density.sum(-1), 1)
    return log_joint, torch.logsumexp(log_weight.unsqueeze(-1) + log_density, 1)


def aggregate_log_weights(batch: int, dataset_size: int, estimator: str) -> Tensor:
    """log w_ij, float64 [B, B]: the weight of posterior j in the estimate of q(z_i)."""
    if estimator == "weighted":
        return torch.full((batch, batch), -math.log(dataset_size * max(batch, 1)), dtype=torch.float64)
    if estimator != "stratified":
        raise ValueError(f"estimator is {estimator!r}; expected 'weighted' or 'stratified'")
    n, m = dataset_size, batch - 1
    weights = torch.full((batch, batch), 1 / m, dtype=torch.float64)
    rows = torch.arange(batch)
    weights[rows, rows] = 1 / n
    weights[rows, (rows + 1) % max(batch, 1)] = (n - m) / (n * m)
    return weights.log()


def mmd(
    x: Tensor,
    y: Tensor,
    *,
    kernel: str = "rbf",
    bandwidths: Sequence[float] | None = None,
    estimator: str = "unbiased",
) -> Tensor:
    """Squared maximum mean discrepancy of two samples, for a sum of kernels of the distance.

    With u = |x - y|^2 / (2 h^2) a kernel is exp(-u) ("rbf") or 1 / (1 + u) ("imq").

    Args:
        x: shape [N, D].
        y: shape [M, D].
        kernel: "rbf" or "imq".
        bandwidths: every h; ``None`` for ``default_bandwidths(D)``.
        estimator: "unbiased" leaves the pairs of a point with itself out, "biased" does not.

    Returns:
        A scalar; float32 for half inputs.

    Example:
        >>> mmd(torch.zeros(2, 1), torch.ones(2, 1), bandwidths=[0.1])
        tensor(2.)
    """
    bandwidths = default_bandwidths(x.shape[1]) if bandwidths is None else bandwidths
    x, y = widen(x), widen(y)

    def kernels(a: Tensor, b: Tensor) -> Tensor:
        squares = (a.unsqueeze(1) - b).square().sum(-1)
        scaled = [squares / (2 * h * h) for h in bandwidths]
        if kernel == "rbf":
            return sum((torch.exp(-u) for u in scaled), torch.zeros_like(squares))
        if kernel == "imq":
            return sum((1 / (1 + u) for u in scaled), torch.zeros_like(squares))
        raise ValueError(f"kernel is {kernel!r}; expected 'rbf' or 'imq'")

    def within(a: Tensor) -> Tensor:
        if estimator == "biased":
            return kernels(a, a).mean()
        if estimator == "unbiased":
            return (kernels(a, a).sum() - len(a) * len(bandwidths)) / (len(a) * (len(a) - 1))
        raise ValueError(f"estimator is {estimator!r}; expected 'unbiased' or 'biased'")

    return within(x) + within(y) - 2 * kernels(x, y).mean()


def default_bandwidths(dim: int) -> list[float]:
    """h^2 = D times 0.1, 0.2, 0.5, 1, 2, 5 and 10: multiples of the scale of a standard normal in D dimensions."""
    return [math.sqrt(dim * multiple) for multiple in (0.1, 0.2, 0.5, 1, 2, 5, 10)]


def _log_density(z: Tensor, mean: Tensor, scale: Tensor, scale_type: str) -> Tensor:
    """log N(z_d; mean_kd, s_kd^2), shape [..., K, D]."""
    log_std = log_standard_deviation(widen(scale), scale_type)
    residual = (widen(z).unsqueeze(-2) - widen(mean)) * torch.exp(-log_std)
    return -0.5 * residual.square() - log_std - 0.5 * math.log(2 * math.pi)
