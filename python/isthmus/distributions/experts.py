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
    Weakly-Supervised Learning, 2018; Hinton, 2002). Done on log-precisions, as a log-sum-exp and a softmax, so that no
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
    present = torch.ones((), dtype=torch.bool, device=means.device) if mask is None else mask.bool()
    # A neutral value first: the logarithm of a missing expert's scale must not reach the gradient as NaN.
    neutral = 0.0 if scale_type in ("logvar", "softplus") else 1.0
    log_precisions = _LOG_PRECISION[scale_type](torch.where(present, scales, neutral))
    log_precisions = torch.where(present, log_precisions, -torch.inf)
    means = torch.where(present, means, 0.0)
    if prior is not False:
        mean, log_precision = _prior_expert(prior, means.select(dim, 0), scale_type)
        means = torch.cat((means, mean.unsqueeze(dim)), dim)
        log_precisions = torch.cat((log_precisions, log_precision.unsqueeze(dim)), dim)

    # Not logsumexp and softmax of the whole: where every expert is missing their gradients would be NaN.
    nothing = (log_precisions == -torch.inf).all(dim, keepdim=True)
    log_precisions = torch.where(nothing, 0.0, log_precisions)
    mean = (log_precisions.softmax(dim) * means).sum(dim)
    total = torch.where(nothing.squeeze(dim), -torch.inf, log_precisions.logsumexp(dim))
    return mean, _FROM_LOG_PRECISION[scale_type](total)


def _prior_expert(prior: bool | tuple[Tensor, Tensor], like: Tensor, scale_type: str) -> tuple[Tensor, Tensor]:
    if prior is True:
        return torch.zeros_like(like), torch.zeros_like(like)
    mean, scale = prior  # type: ignore[misc]
    return mean.expand_as(like), _LOG_PRECISION[scale_type](scale).expand_as(like)


def _inverse_softplus(x: Tensor) -> Tensor:
    """log(exp(x) - 1), without overflow."""
    return x + torch.log(-torch.expm1(-x))
