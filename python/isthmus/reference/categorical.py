"""Gumbel-softmax sampling (Jang et al., 2017; Maddison et al., 2017) and categorical divergences."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from isthmus.random import philox4x32
from isthmus.reference._numeric import exp_tail, widen
from isthmus.reference.gaussian import _uniform32, _uniform64

__all__ = ["categorical_kl", "gumbel_noise", "gumbel_softmax", "gumbel_softmax_kl"]


def gumbel_noise(key: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard Gumbel noise of a key: the definition that every kernel reproduces.

    Block ``b`` of the stream is ``w0, w1, w2, w3 = philox4x32(seed, offset + b)``, the counter
    modulo 2^64. Elements are numbered in contiguous (row-major) order of ``shape``. Below, ``fl``
    rounds to nearest even, once. ::

        float32    element i is of word i % 4 of block i // 4
                   v(w) = min(fl(fl(w) * 2^-32 + 2^-33), 1 - 2^-24)            in [2^-33, 1)
        float64    element i is of words w0, w1 (i even) or w2, w3 (i odd) of block i // 2
                   v(a, b) = min(fl((a * 2^32 + b + 1/2) * 2^-64), 1 - 2^-53)  in [2^-65, 1)

        noise = -log(-log(u)),   u = 1 - v in (0, 1), evaluated as -log(-log1p(-v))

    v is never 0 and never 1, so noise is finite: in [-2.82, 22.88] in float32. Because it is u that
    comes near 1 in steps of 2^-33, the upper tail, which decides maxima, is resolved to that
    probability. Logarithms are evaluated in float64 here and the result rounded once; float32
    kernels differ by a few ulp of max(1, |noise|). bfloat16 and float16 round the float32 value.

    Args:
        key: int64, shape [2].
        shape: shape of the result.
        dtype: float32, float64, bfloat16 or float16.

    Returns:
        Tensor of ``shape`` and ``dtype`` on the device of ``key``.

    Example:
        >>> gumbel_noise(torch.tensor([0, 0]), [2, 2])
        tensor([[ 0.6748, -0.7536],
                [-0.2857,  0.0725]])
    """
    numel = math.prod(shape)
    blocks = torch.arange(-(-numel // (2 if dtype == torch.float64 else 4)), device=key.device)
    w0, w1, w2, w3 = philox4x32(key[0], key[1] + blocks)
    if dtype == torch.float64:
        uniforms = torch.stack([_uniform64(w0, w1), _uniform64(w2, w3)], dim=-1)
    else:
        uniforms = torch.stack([_uniform32(w) for w in (w0, w1, w2, w3)], dim=-1)
    below_one = 1 - torch.finfo(uniforms.dtype).eps / 2
    noise = -torch.log(-torch.log1p(-uniforms.clamp(max=below_one).double()))
    return noise.to(uniforms.dtype).flatten()[:numel].reshape(tuple(shape)).to(dtype)


def gumbel_softmax(logits: Tensor, *, temperature: float = 1.0, hard: bool = False, noise: Tensor) -> Tensor:
    """Relaxed samples ``y = softmax((logits + noise) / temperature)`` over the last dimension.

    ``hard`` returns the one-hot of the largest entry, the first of equals, with the gradient of y
    (straight-through). A row that holds NaN or +inf, or nothing finite, is NaN either way.

    Gradients flow to ``logits``. Half inputs are computed in float32 and rounded once.

    Raises:
        ValueError: ``temperature`` is not positive, or ``noise`` is of another shape than ``logits``.

    Example:
        >>> gumbel_softmax(torch.zeros(3), hard=True, noise=torch.tensor([0.1, 0.7, 0.7]))
        tensor([0., 1., 0.])
    """
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; expected a positive number")
    if noise.shape != logits.shape:
        raise ValueError(f"noise has shape {list(noise.shape)}; expected {list(logits.shape)}")
    perturbed = (widen(logits) + widen(noise)) / temperature
    y = perturbed.softmax(-1)
    if hard:
        one_hot = torch.zeros_like(y).scatter_(-1, perturbed.detach().argmax(-1, keepdim=True), 1.0)
        y = one_hot + (y - y.detach())
    return y.to(logits.dtype)


def categorical_kl(logits: Tensor, prior_logits: Tensor | None = None, *, reduction: str = "row") -> Tensor:
    """KL(q || p) of q = softmax(logits) from p = softmax(prior_logits), or uniform, in nats.

    With d = log q - log p a row is ``sum q (exp(-d) - 1 + d)``: equal to ``sum q d`` because q and
    p sum to one, but of terms that are never negative and keep their relative accuracy as q
    approaches p. A probability of zero (a logit of -inf) in q adds nothing; one in p alone makes
    the divergence infinite.

    Gradients flow to both tensors. Half inputs give a float32 result.

    Args:
        logits: shape [..., K].
        prior_logits: shape of ``logits``; ``None`` for the uniform prior.
        reduction: "row" [...], "sum" [], or "mean" [] (mean over rows).

    Raises:
        ValueError: unknown ``reduction``.

    Example:
        >>> categorical_kl(torch.tensor([0.0, 0.0, -math.inf, -math.inf]))
        tensor(0.6931)
    """
    log_q = widen(logits).log_softmax(-1)
    classes = logits.shape[-1]
    log_p = torch.full_like(log_q, -math.log(classes)) if prior_logits is None else widen(prior_logits).log_softmax(-1)
    q, p = log_q.exp(), log_p.exp()
    impossible = log_q == -math.inf
    d = torch.where(impossible, 0.0, log_q - log_p)
    near = q * exp_tail(-d.clamp(min=-1))
    terms = torch.where(d < -1, p - q + q * d, near)
    rows = torch.where(impossible, p, terms).sum(-1)
    if reduction == "row":
        return rows
    if reduction == "sum":
        return rows.sum()
    if reduction == "mean":
        return rows.mean()
    raise ValueError(f"reduction is {reduction!r}; expected 'row', 'sum' or 'mean'")


def gumbel_softmax_kl(
    logits: Tensor,
    prior_logits: Tensor | None = None,
    *,
    temperature: float = 1.0,
    hard: bool = False,
    reduction: str = "row",
    noise: Tensor,
) -> tuple[Tensor, Tensor]:
    """``gumbel_softmax`` and ``categorical_kl`` of the same logits: (y, kl).

    Example:
        >>> y, kl = gumbel_softmax_kl(torch.zeros(2, 4), noise=torch.zeros(2, 4))
        >>> y[0], kl
        (tensor([0.2500, 0.2500, 0.2500, 0.2500]), tensor([0., 0.]))
    """
    y = gumbel_softmax(logits, temperature=temperature, hard=hard, noise=noise)
    return y, categorical_kl(logits, prior_logits, reduction=reduction)
