"""Negative log-likelihoods: what a decoder's prediction says about the data, in one pass each way."""

from typing import Any

import torch
from torch import Tensor

from isthmus import reference
from isthmus.ops._arguments import broadcast, check_choice
from isthmus.ops._register import (
    gradient_of,
    none_if_absent,
    register_autocast,
    register_second_order,
    register_vmap_by_loop,
)

_ops = torch.ops.isthmus

SCALE_TYPES = ("logvar", "std", "softplus", "square")
REDUCTIONS = ("none", "row", "sum", "mean")


def gaussian_nll(
    x: Tensor,
    mean: Tensor,
    scale: Tensor | float,
    weight: Tensor | None = None,
    *,
    scale_type: str = "logvar",
    beta: float = 0.0,
    reduction: str = "row",
) -> Tensor:
    """Negative log-density of a diagonal Gaussian, -log N(x; mean, s²), in nats.

    An element is weight · s^(2 beta) · (((x - mean) / s)² / 2 + log s + log(2π) / 2). The factor in front carries no
    gradient: with ``beta`` between 0 and 1 it takes from the gradient of the mean the division by s² that starves
    badly predicted points (beta-NLL; Seitzer et al., On the Pitfalls of Heteroscedastic Uncertainty Estimation, 2022).

    Reads every argument once, in either direction, and stores nothing between them. A mean, scale or weight of one
    element, fixed or learned, is never expanded.

    Args:
        x: [*, D]; float32, float64, bfloat16 or float16.
        mean: same dtype, broadcastable with ``x``.
        scale: a number, or a tensor like ``mean``; what it means is set by ``scale_type``.
        weight: tensor like ``mean``; gets no gradient. Default: 1.
        scale_type: "logvar" (s = exp(scale/2)), "std" (s = scale), "softplus" (s = softplus(scale)) or
            "square" (s = scale²).
        beta: 0 is the likelihood; 1 gives the mean the gradient of the squared error.
        reduction: "row" sums over the last dimension, "sum" over everything, "mean" averages the row sums,
            "none" keeps every element.

    Returns:
        [*, D] for "none", [*] for "row", [] for "sum" and "mean". float64 for float64 inputs, else float32, also
        for bfloat16 and float16 inputs. The mean over zero rows is NaN.

    Gradients:
        To x, mean and scale; twice differentiable. Nothing is clamped: an element overflows where
        ((x - mean) / s)² does, in float32 at 1.8e19 standard deviations. A log-variance of -80 is well within.

    Raises:
        ValueError: an option is none of its choices, or shapes do not broadcast.
        RuntimeError: dtypes or devices do not fit.

    Example:
        >>> gaussian_nll(torch.zeros(2, 3), torch.zeros(2, 3), 1.0, scale_type="std")
        tensor([2.7568, 2.7568])
    """
    check_choice("scale_type", scale_type, SCALE_TYPES)
    check_choice("reduction", reduction, REDUCTIONS)
    x, mean, scale, weight = _arguments(x=x, mean=mean, scale=_as_tensor(scale, x), weight=weight)
    return _ops.gaussian_nll(x, mean, scale, weight, scale_type, beta, reduction)


def _accumulate_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _as_tensor(value: Tensor | float, x: Tensor) -> Tensor:
    """A number becomes a tensor of one element, unrounded by a half type of x."""
    return value if isinstance(value, Tensor) else x.new_full((), value, dtype=_accumulate_dtype(x))


def _arguments(**tensors: Tensor | None) -> tuple[Any, ...]:
    """x and the others at their common shape; but others of one element stay so, in the type of sums."""
    expanded = broadcast(**tensors)
    dtype = _accumulate_dtype(expanded[0])

    def chosen(given: Tensor | None, full: Tensor | None) -> Tensor | None:
        if given is None or given is tensors["x"] or given.numel() != 1:
            return full
        return given.to(dtype)

    return tuple(chosen(given, full) for given, full in zip(tensors.values(), expanded, strict=True))


# ---- shapes without data ---------------------------------------------------------------------------------------------


def _nll_shape(x: Tensor, reduction: str) -> Any:
    return {"none": x.shape, "row": x.shape[:-1]}.get(reduction, ())


def _gradients_like(*wanted: tuple[Tensor, bool]) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape if needed else (0,)) for t, needed in wanted)


@torch.library.register_fake("isthmus::gaussian_nll")
def _(x, mean, scale, weight, scale_type, beta, reduction):
    return x.new_empty(_nll_shape(x, reduction), dtype=_accumulate_dtype(x))


@torch.library.register_fake("isthmus::gaussian_nll_backward")
def _(grad, x, mean, scale, weight, scale_type, beta, reduction, need_x, need_mean, need_scale):
    return _gradients_like((x, need_x), (mean, need_mean), (scale, need_scale))


# ---- gradients -------------------------------------------------------------------------------------------------------


def _gaussian_setup(ctx, inputs, output):
    *tensors, scale_type, beta, reduction = inputs
    ctx.options = scale_type, beta, reduction
    ctx.save_for_backward(*tensors)


def _gaussian_backward(ctx, grad):
    needed = ctx.needs_input_grad[:3]
    grads = _ops.gaussian_nll_backward(grad, *ctx.saved_tensors, *ctx.options, *needed)
    return *map(none_if_absent, grads, needed), None, None, None, None


def _gaussian_gradients(grad, x, mean, scale, weight, scale_type, beta, reduction, *needed):
    def nll(x, mean, scale):
        return reference.gaussian_nll(x, mean, scale, weight, scale_type=scale_type, beta=beta, reduction=reduction)

    return tuple(g if n else None for g, n in zip(gradient_of(nll, (x, mean, scale), grad), needed, strict=True))


torch.library.register_autograd("isthmus::gaussian_nll", _gaussian_backward, setup_context=_gaussian_setup)
register_second_order("gaussian_nll_backward", _gaussian_gradients)

for _name in ("gaussian_nll",):
    register_autocast(_name)
    register_vmap_by_loop(_name)
    register_vmap_by_loop(f"{_name}_backward")
