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


def discretized_logistic_mixture_nll(
    x: Tensor,
    parameters: Tensor,
    *,
    num_mixtures: int = 10,
    bins: int = 256,
    min_log_scale: float = -7.0,
    reduction: str = "image",
) -> Tensor:
    """Negative log-likelihood of images under the mixture of discretized logistics of PixelCNN++, in nats.

    A value is the probability of its bin of width 2 / (bins - 1), the first and the last bin open; a pixel's
    channels share the mixture's component, and green's mean is moved by the true red, blue's by red and green
    (Salimans et al., PixelCNN++: Improving the PixelCNN with Discretized Logistic Mixture Likelihood, 2017).

    The log of a bin's probability is taken as log σ(b) + log σ(-a) + log(1 - exp(a - b)), a and b its edges in
    units of the scale: exact for bins of any width and values any number of scales away, where implementations
    that subtract two sigmoids fall back to a density or a floor.

    Args:
        x: [B, C, H, W] with C = 1 or 3, scaled to [-1, 1]; float32, float64, bfloat16 or float16. A value within
            half a bin of -1 or 1 belongs to the open bin there.
        parameters: [B, num_mixtures · (1 + 2C + C(C - 1)/2), H, W], same dtype, in the order of NVAE and of Very
            Deep VAE: ``num_mixtures`` logits; then for each channel as many means, log-scales and, for C = 3, raw
            coefficients. tanh of the coefficients in red's block moves green by red, in green's blue by red, in
            blue's blue by green.
        num_mixtures: number of components.
        bins: number of values a channel can take.
        min_log_scale: floor of the log-scales. A log-scale below it gets no gradient, as with ``torch.clamp``.
        reduction: "image" sums over the pixels of an image, "sum" over everything, "mean" averages the images,
            "none" keeps every pixel.

    Returns:
        [B, H, W] for "none", [B] for "image", [] for "sum" and "mean". float64 for float64 inputs, else float32.
        Divide an image's value by C · H · W · log(2) for bits per dimension.

    Gradients:
        To x and parameters; twice differentiable.

    Raises:
        ValueError: reduction is none of its choices.
        RuntimeError: dtypes, devices or shapes do not fit, or C is neither 1 nor 3.

    Example:
        >>> discretized_logistic_mixture_nll(torch.zeros(1, 1, 1, 1), torch.zeros(1, 3, 1, 1), num_mixtures=1)
        tensor([6.2344])
    """
    check_choice("reduction", reduction, ("none", "image", "sum", "mean"))
    return _ops.discretized_logistic_mixture_nll(x, parameters, num_mixtures, bins, min_log_scale, reduction)


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


@torch.library.register_fake("isthmus::discretized_logistic_mixture_nll")
def _(x, parameters, num_mixtures, bins, min_log_scale, reduction):
    shape = {"none": (x.shape[0], *x.shape[2:]), "image": x.shape[:1]}.get(reduction, ())
    return x.new_empty(shape, dtype=_accumulate_dtype(x))


@torch.library.register_fake("isthmus::discretized_logistic_mixture_nll_backward")
def _(grad, x, parameters, num_mixtures, bins, min_log_scale, reduction, need_x, need_parameters):
    return _gradients_like((x, need_x), (parameters, need_parameters))


# ---- gradients -------------------------------------------------------------------------------------------------------


def _only(needed, grads):
    return tuple(g if need else None for g, need in zip(grads, needed, strict=True))


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

    return _only(needed, gradient_of(nll, (x, mean, scale), grad))


torch.library.register_autograd("isthmus::gaussian_nll", _gaussian_backward, setup_context=_gaussian_setup)
register_second_order("gaussian_nll_backward", _gaussian_gradients)


def _mixture_setup(ctx, inputs, output):
    x, parameters, *ctx.options = inputs
    ctx.save_for_backward(x, parameters)


def _mixture_backward(ctx, grad):
    needed = ctx.needs_input_grad[:2]
    grads = _ops.discretized_logistic_mixture_nll_backward(grad, *ctx.saved_tensors, *ctx.options, *needed)
    return *map(none_if_absent, grads, needed), None, None, None, None


def _mixture_gradients(grad, x, parameters, num_mixtures, bins, min_log_scale, reduction, *needed):
    def nll(x, parameters):
        return reference.discretized_logistic_mixture_nll(
            x,
            parameters,
            num_mixtures=num_mixtures,
            bins=bins,
            min_log_scale=min_log_scale,
            reduction=reduction,
        )

    return _only(needed, gradient_of(nll, (x, parameters), grad))


torch.library.register_autograd(
    "isthmus::discretized_logistic_mixture_nll", _mixture_backward, setup_context=_mixture_setup
)
register_second_order("discretized_logistic_mixture_nll_backward", _mixture_gradients)

for _name in ("gaussian_nll", "discretized_logistic_mixture_nll"):
    register_autocast(_name)
    register_vmap_by_loop(_name)
    register_vmap_by_loop(f"{_name}_backward")
