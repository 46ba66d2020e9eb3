"""Soft and stochastic assignment of vectors to codes: softmax over what a metric scores."""

import torch
from torch import Tensor
from torch.nn.functional import embedding

from isthmus.reference._numeric import unit, widen

__all__ = ["vq_cross_entropy", "vq_sample", "vq_soft_quantize", "vq_soft_statistics"]


def vq_sample(
    x: Tensor,
    codebook: Tensor,
    *,
    metric: str = "euclidean",
    temperature: float = 1.0,
    mask: Tensor | None = None,
    noise: Tensor,
) -> Tensor:
    """A code for each vector, drawn from ``p(k | x) = softmax(score_k / temperature)``.

    The largest ``score / temperature + noise``: with standard Gumbel noise an exact sample. The
    score is ``-|x - c|^2`` ("euclidean"), ``x.c / (|x||c|)``, 0 if either is zero ("cosine"), or
    ``x.c`` ("inner_product"). The first of equals; a row with NaN gets 0. Not differentiable.

    Args:
        x: shape [..., D], or [H, ..., D] for a codebook with heads.
        codebook: shape [K, D], or [H, K, D]: one for each head.
        temperature: at least 0; 0 takes the largest score, without noise.
        mask: bool, shape [...]; rows that are False get -1.
        noise: shape [..., K].

    Returns:
        int64, shape [...].

    Example:
        >>> vq_sample(torch.zeros(2, 1), torch.tensor([[0.0], [1.0]]), noise=torch.tensor([[0.0, 0.5], [0.0, 2.0]]))
        tensor([0, 1])
    """
    if not temperature >= 0:
        raise ValueError(f"temperature is {temperature}; expected 0 or more")
    scores = _scores(x.detach(), codebook.detach(), metric)
    perturbed = scores / temperature + widen(noise) if temperature > 0 else scores
    return _hide_indices(torch.where(perturbed.isnan(), -torch.inf, perturbed).argmax(-1), mask)


def vq_soft_quantize(
    x: Tensor,
    codebook: Tensor,
    *,
    metric: str = "euclidean",
    temperature: float = 1.0,
    gumbel: bool = False,
    relaxation: float = 1.0,
    hard: bool = False,
    mask: Tensor | None = None,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The mean code ``sum_k p_k c_k`` and its most probable code.

    ``p = softmax(score / temperature)``, or with ``gumbel`` the relaxed sample
    ``softmax((score / temperature + noise) / relaxation)``. ``hard`` returns the most probable
    code itself, with the gradients of the mean to both tensors (straight-through).

    Args:
        x, codebook, mask: as in ``vq_sample``; masked rows give 0 and -1, and no gradient.
        noise: shape [..., K]; used with ``gumbel``.

    Returns:
        quantized [..., D] of the dtype of ``x``, indices [...] int64.

    Example:
        >>> vq_soft_quantize(torch.tensor([[1.0]]), torch.tensor([[0.0], [2.0]]))
        (tensor([[1.]]), tensor([0]))
    """
    _check_temperature(temperature)
    if not relaxation > 0:
        raise ValueError(f"relaxation is {relaxation}; expected a positive number")
    logits = _scores(x, codebook, metric, mask) / temperature
    if gumbel:
        if noise is None:
            raise ValueError("noise is None; expected a tensor with gumbel=True")
        logits = (logits + widen(noise)) / relaxation
    indices = _hide_indices(torch.where(logits.isnan(), -torch.inf, logits).detach().argmax(-1), mask)
    soft = _combine(logits.softmax(-1), widen(codebook))
    if hard:
        code = _codes(widen(codebook), indices.clamp(min=0)).detach()
        soft = code + (soft - soft.detach()).nan_to_num()
    return _hide(soft, mask).to(x.dtype), indices


def vq_soft_statistics(
    x: Tensor,
    codebook: Tensor,
    *,
    metric: str = "euclidean",
    temperature: float = 1.0,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """How undecided each vector is, and how the vectors together use the codes.

    With ``p = softmax(score / temperature)``: the entropy ``-sum_k p_k log p_k`` of each row in
    nats, and the mean of p over the rows. Masked rows have entropy 0 and no part in the mean.

    Args:
        x, codebook, mask: as in ``vq_sample``.

    Returns:
        entropy [...] and mean probabilities [K] or [H, K]; float32 for half inputs. The mean of
        no rows is 0.

    Example:
        >>> vq_soft_statistics(torch.zeros(1, 1), torch.tensor([[-1.0], [1.0]]))
        (tensor([0.6931]), tensor([0.5000, 0.5000]))
    """
    entropy, usage = soft_statistics_sums(x, codebook, metric=metric, temperature=temperature, mask=mask)
    rows = x.new_ones(x.shape[:-1], dtype=torch.bool) if mask is None else mask
    return entropy, usage / rows.flatten(codebook.dim() - 2).sum(-1, keepdim=True).clamp(min=1)


def soft_statistics_sums(
    x: Tensor, codebook: Tensor, *, metric: str, temperature: float, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``vq_soft_statistics`` with the sum over the rows in place of the mean."""
    _check_temperature(temperature)
    log_p = (_scores(x, codebook, metric, mask) / temperature).log_softmax(-1)
    p = log_p.exp()
    entropy = -torch.where(p == 0, 0.0, p * log_p).sum(-1)
    usage = _hide(p, mask).flatten(codebook.dim() - 2, -2).sum(-2)
    return _hide(entropy, mask), usage


def vq_cross_entropy(
    x: Tensor,
    codebook: Tensor,
    indices: Tensor,
    *,
    metric: str = "euclidean",
    temperature: float = 1.0,
) -> Tensor:
    """``-log p(index | x)`` under ``p = softmax(score / temperature)``, in nats.

    Args:
        x, codebook: as in ``vq_sample``.
        indices: int64, shape [...]; -1 leaves a row out: loss 0, no gradient.

    Returns:
        shape [...]; float32 for half inputs.

    Example:
        >>> vq_cross_entropy(torch.zeros(1, 1), torch.tensor([[-1.0], [1.0]]), torch.tensor([0]))
        tensor([0.6931])
    """
    _check_temperature(temperature)
    shown = indices >= 0
    log_p = (_scores(x, codebook, metric, shown) / temperature).log_softmax(-1)
    return _hide(-log_p.gather(-1, indices.clamp(min=0).unsqueeze(-1)).squeeze(-1), shown)


def _scores(x: Tensor, codebook: Tensor, metric: str, mask: Tensor | None = None) -> Tensor:
    """What the metric has most of, [..., K]; masked rows are taken for zeros."""
    x, codebook = _hide(widen(x), mask), widen(codebook)
    if metric == "euclidean":
        # |x - c|^2 without the square of x - m, which all codes share.
        mean = codebook.mean(-2, keepdim=True)
        mean = torch.where(mean.isfinite(), mean, 0.0).detach()
        shift = mean.reshape(mean.shape[0], *[1] * (x.dim() - 2), -1) if codebook.dim() == 3 else mean.squeeze(0)
        x, codebook = x - shift, codebook - mean
        return 2 * _products(x, codebook) - _for_rows(codebook.square().sum(-1), x)
    if metric == "cosine":
        return _products(unit(x), unit(codebook))
    if metric == "inner_product":
        return _products(x, codebook)
    raise ValueError(f"metric is {metric!r}; expected 'euclidean', 'cosine' or 'inner_product'")


def _products(x: Tensor, codebook: Tensor) -> Tensor:
    return torch.einsum("h...d,hkd->h...k" if codebook.dim() == 3 else "...d,kd->...k", x, codebook)


def _combine(p: Tensor, codebook: Tensor) -> Tensor:
    return torch.einsum("h...k,hkd->h...d" if codebook.dim() == 3 else "...k,kd->...d", p, codebook)


def _for_rows(values: Tensor, x: Tensor) -> Tensor:
    """[K] or [H, K] so that it broadcasts with [..., K] or [H, ..., K]."""
    return values if values.dim() == 1 else values.reshape(len(values), *[1] * (x.dim() - 2), -1)


def _codes(codebook: Tensor, indices: Tensor) -> Tensor:
    if codebook.dim() == 2:
        return embedding(indices, codebook)
    return torch.stack([embedding(i, c) for i, c in zip(indices, codebook, strict=True)])


def _hide(values: Tensor, mask: Tensor | None) -> Tensor:
    """Zeros, without gradient, where ``mask`` is False."""
    if mask is None:
        return values
    return torch.where(mask if mask.dim() == values.dim() else mask.unsqueeze(-1), values, 0.0)


def _hide_indices(indices: Tensor, mask: Tensor | None) -> Tensor:
    return indices if mask is None else indices.masked_fill(~mask, -1)


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; expected a positive number")
