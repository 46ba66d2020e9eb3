"""Products of Gaussian experts: how several views of one latent agree."""

import torch
from torch import Tensor

from isthmus.distributions.normal import _STANDARD_DEVIATION
from isthmus.ops._arguments import check_choice

__all__ = ["product_of_experts"]

_LOG_PRECISION = {
    "logvar": lambda scale: -scale,
    "std": lambda scale: -2 * scale.log(),
    "softplus": lambda scale: -2 * _STANDARD_DEVIATION["softplus"](scale).log(),
    "square": lambda scale: -4 * scale.abs().log(),
}
_FROM_LOG_PRECISION = {
    "logvar": lambda log_precision: -log_precision,
    "std": lambda log_precision: (-0.5 * log_precision).exp(),
    "softplus": lambda log_precision: _inverse_softplus((-0.5 * log_precision).exp()),
    "square": lambda log_precision: (-0.25 * log_precision).exp(),
}


def product_of_experts(
    means: Tensor,
    scales: Tensor,
    mask: Tensor | None = None,
    *,
    dim: int = 0,
    scale_type: str = "logvar",
    prior: bool | tuple[Tensor, Tensor] = True,
) -> tuple[Tensor, Tensor]:
    """The Gaussian proportional to a product of diagonal Gaussians, one of which may be the prior.

    Precisions add and means are weighted by them (Wu & Goodman, Multimodal Generative Models for Scalable
    Weakly-Supervised Learning, 2018; Hinton, 2002). Done on log-precisions, relative to the largest, so that no
    variance however extreme overflows on the way.

    Args:
        means, scales: experts along ``dim``; what a scale means is set by ``scale_type``.
        mask: broadcastable with ``means``; False where an expert is missing. What it says there, NaN even, has no
            influence and gets a gradient of zero.
        dim: the dimension of the experts.
        scale_type: "logvar" (s = exp(scale/2)), "std", "softplus" or "square", of experts, prior and result.
        prior: True adds the standard normal as one more expert, False nothing, (mean, scale) this Gaussian:
            broadcastable with the result, that is without ``dim``.

    Returns:
        (mean, scale) of the product, without ``dim``. With no expert at all, mean 0 and infinite variance.

    Raises:
        ValueError: ``scale_type`` is none of its choices.

    Example:
        >>> means, logvars = torch.tensor([[1.0, 1.0], [3.0, 3.0]]), torch.ones(2, 2)
        >>> seen = torch.tensor([[True, True], [True, False]])
        >>> product_of_experts(means, logvars, seen, prior=False)
        (tensor([2., 1.]), tensor([0.3069, 1.0000]))
    """
    check_choice("scale_type", scale_type, tuple(_LOG_PRECISION))
    means, scales = torch.broadcast_tensors(means, scales)
    if mask is None:
        log_precisions = _LOG_PRECISION[scale_type](scales)
    else:
        present = mask.bool()
        # A neutral value first: the logarithm of a missing expert's scale must not reach the gradient as NaN.
        neutral = 0.0 if scale_type in ("logvar", "softplus") else 1.0
        log_precisions = _LOG_PRECISION[scale_type](torch.where(present, scales, neutral))
        log_precisions = torch.where(present, log_precisions, -torch.inf)
        means = torch.where(present, means, 0.0)
    top = log_precisions.amax(dim).detach()
    if prior is not False:
        prior_mean, prior_log_precision = _prior_expert(prior, top, scale_type)
        top = torch.maximum(top, prior_log_precision.detach())
    top = torch.where(top == -torch.inf, 0.0, top)

    # Precisions relative to the largest: the result does not depend on it, so neither does the gradient.
    weights = (log_precisions - top.unsqueeze(dim)).exp()
    total, weighted = weights.sum(dim), (weights * means).sum(dim)
    if prior is not False:
        weight = (prior_log_precision - top).exp()
        total, weighted = total + weight, weighted + weight * prior_mean
    mean = weighted / torch.where(total == 0, 1.0, total)
    return mean, _FROM_LOG_PRECISION[scale_type](top + total.log())


def _prior_expert(prior: bool | tuple[Tensor, Tensor], like: Tensor, scale_type: str) -> tuple[Tensor, Tensor]:
    if isinstance(prior, bool):
        zero = like.new_zeros(())
        return zero, zero
    mean, scale = prior
    return mean, _LOG_PRECISION[scale_type](scale)


def _inverse_softplus(x: Tensor) -> Tensor:
    """log(exp(x) - 1), without overflow."""
    return x + torch.log(-torch.expm1(-x))
