"""What the references of Gaussian ops share: the posterior behind its tensors, clamps, reductions."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from isthmus.reference._numeric import log_standard_deviation, standard_deviation, widen


class Posterior(NamedTuple):
    """A posterior N(mean, std^2), and how it lies to its prior."""

    mean: Tensor
    std: Tensor
    log_std: Tensor
    shift: Tensor  # (mean - prior mean) / prior std
    log_ratio: Tensor  # log (std / prior std)
    prior_mean: Tensor | float
    log_prior_std: Tensor | float


def unpack(mean: Tensor, scale: Tensor | None, packed_dim: int) -> tuple[Tensor, ...]:
    return tuple(mean.chunk(2, packed_dim)) if scale is None else (mean, scale)


def without_masked_rows(mask: Tensor | None, *tensors: Any) -> tuple[Any, ...]:
    """The tensors with ones, valid as means and scales, where the mask is False.

    What is left out may be NaN or infinite; a gradient of 0 that flows back to it would be NaN.
    """
    if mask is None:
        return tensors
    rows = mask.unsqueeze(-1)
    return tuple(torch.where(rows, t, 1) if isinstance(t, Tensor) else t for t in tensors)


def posterior(
    mean: Tensor,
    scale: Tensor | None,
    prior_mean: Tensor | float | None = None,
    prior_scale: Tensor | float | None = None,
    *,
    scale_type: str = "logvar",
    packed_dim: int = -1,
    residual: bool = False,
    clamp: tuple[float, float] | None = None,
    clamp_mode: str = "hard",
) -> Posterior:
    """Unpack, clamp, and resolve a residual posterior N(prior_mean + mean, (s_prior s)^2)."""
    mean, scale = unpack(mean, scale, packed_dim)
    mean, scale = widen(mean), clamp_scale(widen(scale), clamp, clamp_mode)
    std, log_std = standard_deviation(scale, scale_type), log_standard_deviation(scale, scale_type)
    if prior_mean is None and prior_scale is None:
        return Posterior(mean, std, log_std, mean, log_std, 0.0, 0.0)
    if prior_mean is None or prior_scale is None:
        missing = "prior_mean" if prior_mean is None else "prior_scale"
        raise ValueError(f"{missing} is None; expected both prior_mean and prior_scale, or neither")
    prior_mean, prior_scale = (widen(torch.as_tensor(t, dtype=mean.dtype)) for t in (prior_mean, prior_scale))
    prior_std = standard_deviation(prior_scale, scale_type)
    log_prior_std = log_standard_deviation(prior_scale, scale_type)
    inverse = torch.exp(-log_prior_std)
    if residual:
        full = (prior_mean + mean, prior_std * std, log_prior_std + log_std)
        return Posterior(*full, mean * inverse, log_std, prior_mean, log_prior_std)
    shift = (mean - prior_mean) * inverse
    return Posterior(mean, std, log_std, shift, log_std - log_prior_std, prior_mean, log_prior_std)


class _ClampTowardRange(torch.autograd.Function):
    """Clamp whose gradient passes inside, and outside if a step against it leads back inside."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.range = low, high
        return x.clamp(low, high)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        low, high = ctx.range
        blocked = ((x < low) & (grad >= 0)) | ((x > high) & (grad <= 0))
        return grad.masked_fill(blocked, 0), None, None


def clamp_scale(scale: Tensor, clamp: tuple[float, float] | None, mode: str) -> Tensor:
    """The scale as the op uses it, in the type it accumulates in.

    ============ ===================================== ==========================================================
    hard         min(max(x, low), high)                gradient 0 outside
    pass_through the same                              gradient 1 outside where it leads back inside, else 0
    tanh         c + h tanh((x - c) / h)               its derivative; c and h are center and half-width of range
    ============ ===================================== ==========================================================
    """
    if clamp is None:
        return scale
    scale = widen(scale)
    low, high = clamp
    if mode == "hard":
        return scale.clamp(low, high)
    if mode == "pass_through":
        return _ClampTowardRange.apply(scale, low, high)
    if mode == "tanh":
        center, half = (low + high) / 2, (high - low) / 2
        return center + half * torch.tanh((scale - center) / half)
    raise ValueError(f"clamp_mode is {mode!r}; expected 'hard', 'pass_through' or 'tanh'")


def reduce(kl: Tensor, reduction: str, groups: int = 1, mask: Tensor | None = None) -> Tensor:
    """Sum elements as ``reduction`` says; where ``mask`` is False a row counts nothing."""
    kept: Tensor | int = math.prod(kl.shape[:-1])
    if mask is not None:
        mask = mask.expand(kl.shape[:-1])
        kl, kept = torch.where(mask.unsqueeze(-1), kl, 0), mask.sum()
    if reduction == "none":
        return kl
    if reduction == "row":
        return kl.sum(-1)
    if reduction == "group":
        return kl.unflatten(-1, (groups, -1)).sum(-1)
    if reduction == "batch":
        return kl.sum(tuple(range(1, kl.dim()))) if kl.dim() > 1 else kl
    if reduction == "dim":
        return kl.sum(tuple(range(kl.dim() - 1))) / kept if kl.dim() > 1 else kl / kept
    if reduction == "sum":
        return kl.sum()
    if reduction == "mean":
        return kl.sum() / kept
    raise ValueError(f"reduction is {reduction!r}; expected none, row, group, batch, dim, sum or mean")
