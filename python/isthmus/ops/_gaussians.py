"""What the public functions on Gaussians share: layouts, options of posterior and divergence."""

import math
from typing import Any

from torch import Tensor

from isthmus import reference
from isthmus.ops._arguments import broadcast, check_choice

REDUCTIONS = ("none", "row", "group", "batch", "dim", "sum", "mean")
CLAMP_MODES = ("hard", "pass_through", "tanh")


def posterior_shape(mean: Tensor, scale: Tensor | None, packed_dim: int) -> list[Any]:
    """Shape of the posterior mean; without a scale, ``mean`` holds both along ``packed_dim``."""
    shape = list(mean.shape)
    if scale is None:
        shape[packed_dim] = shape[packed_dim] // 2
    return shape


def gaussian_tensors(
    mean: Tensor,
    scale: Tensor | None,
    prior_mean: Tensor | float | None,
    prior_scale: Tensor | float | None,
    packed_dim: int,
) -> tuple[Any, ...]:
    """Posterior and prior in one shape. Numbers become tensors of one element; nothing is copied."""
    prior_mean, prior_scale = _as_tensor(prior_mean, mean), _as_tensor(prior_scale, mean)
    if scale is not None:
        return broadcast(mean=mean, scale=scale, prior_mean=prior_mean, prior_scale=prior_scale)
    if not -mean.dim() <= packed_dim < mean.dim() or mean.shape[packed_dim] % 2 != 0:
        raise ValueError(
            f"mean has shape {list(mean.shape)} and there is no scale; expected an even size along packed_dim "
            f"{packed_dim}, to hold both"
        )
    shape = posterior_shape(mean, scale, packed_dim)
    prior = (_expand("prior_mean", prior_mean, shape), _expand("prior_scale", prior_scale, shape))
    return (mean, None, *prior)


def _as_tensor(value: Tensor | float | None, like: Tensor) -> Tensor | None:
    return value if value is None or isinstance(value, Tensor) else like.new_full((), value)


def _expand(name: str, t: Tensor | None, shape: list[Any]) -> Tensor | None:
    if t is None:
        return None
    try:
        return t.expand(shape)
    except RuntimeError as error:
        raise ValueError(f"{name} has shape {list(t.shape)}, which does not expand to {shape}") from error


def expand_mask(mask: Tensor | None, mean: Tensor, scale: Tensor | None, packed_dim: int) -> Tensor | None:
    return _expand("mask", mask, posterior_shape(mean, scale, packed_dim)[:-1])


def clamp_options(clamp: tuple[float, float] | None, clamp_mode: str) -> tuple[str, float, float]:
    check_choice("clamp_mode", clamp_mode, CLAMP_MODES)
    if clamp is None:
        return "none", 0.0, 0.0
    if not isinstance(clamp, tuple) or len(clamp) != 2 or not clamp[0] < clamp[1]:
        raise ValueError(f"clamp is {clamp}; expected (low, high) with low < high")
    return clamp_mode, float(clamp[0]), float(clamp[1])


def divergence_options(
    reduction: str, groups: int, unit: str, balance: float | None, residual: bool
) -> tuple[str, int, float, float, float]:
    """reduction, groups, weight, and the shares of posterior and prior in the gradient."""
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("unit", unit, ("nats", "bits"))
    weight = 1.0 if unit == "nats" else 1 / math.log(2)
    if balance is None:
        return reduction, groups, weight, 1.0, 1.0
    if not 0 <= balance <= 1:
        raise ValueError(f"balance is {balance}; expected a share between 0 and 1")
    if residual:
        raise ValueError("balance and residual were both given; a residual posterior moves with its prior")
    return reduction, groups, weight, 1 - balance, balance


def finish_divergence(
    kl: Tensor, mask: Tensor | None, reduction: str, beta: float, free_bits: float, capacity: float | None
) -> Tensor:
    """What is left to do on the reduced divergence, which is small."""
    if mask is not None and reduction in ("mean", "dim"):
        kl = kl * (mask.numel() / mask.sum())  # the op averages over all rows, the mask keeps some
    if free_bits < 0:
        raise ValueError(f"free_bits is {free_bits}; expected a floor of at least 0")
    if free_bits > 0:
        kl = kl.clamp(min=free_bits)
    if capacity is not None:
        kl = (kl - capacity).abs()
    return kl if beta == 1 else beta * kl


def divergence_shape(shape: Any, reduction: str, groups: int) -> list[Any]:
    shape = list(shape)
    return {
        "none": shape,
        "row": shape[:-1],
        "group": [*shape[:-1], groups],
        "batch": shape[:1],
        "dim": shape[-1:],
    }.get(reduction, [])


def gradient_shapes(mean: Tensor, scale: Tensor | None, prior_mean: Tensor | None, prior_gradient: bool) -> Any:
    """Shapes of the four gradients; (0,) where there is none."""
    prior = prior_mean.shape if prior_gradient and prior_mean is not None else (0,)
    return mean.shape, (0,) if scale is None else scale.shape, prior, prior


def reference_options(
    scale_type: str, packed_dim: int, residual: bool, mode: str, low: float, high: float
) -> dict[str, Any]:
    """The op's options as the reference takes them."""
    clamp = {} if mode == "none" else {"clamp": (low, high), "clamp_mode": mode}
    return {"scale_type": scale_type, "packed_dim": packed_dim, "residual": residual, **clamp}


def reference_kl(
    tensors: Any, mask: Tensor | None, options: dict[str, Any], reduction: str, groups: int, weight: float,
    posterior_weight: float, prior_weight: float,
) -> Tensor:  # fmt: skip
    """The reference with the op's weights, which are nobody's mean over kept rows."""
    balance = None if posterior_weight == prior_weight else prior_weight
    kl = reference.gaussian_kl(*tensors, mask=mask, reduction=reduction, groups=groups, balance=balance, **options)
    if mask is not None and reduction in ("mean", "dim"):
        kl = kl * (mask.sum() / mask.numel())
    return weight * kl
