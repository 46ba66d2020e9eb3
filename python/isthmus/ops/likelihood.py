"""Negative log-likelihoods: what a decoder's prediction says about the data, in one pass each way."""

import math
from typing import Any

import torch
from torch import Tensor

from isthmus import reference
from isthmus.ops._arguments import accumulate_dtype, broadcast, check_choice, gradients_like
from isthmus.ops._register import (
    eager,
    gradient_of,
    none_if_absent,
    register_autocast,
    register_gradient,
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
    return _gaussian_nll(x, mean, scale, weight, scale_type, beta, reduction)


def discretized_gaussian_nll(
    x: Tensor,
    mean: Tensor,
    scale: Tensor | float,
    *,
    bin_width: float,
    low: float | None = None,
    high: float | None = None,
    scale_type: str = "logvar",
    reduction: str = "row",
) -> Tensor:
    """Negative log-probability that N(mean, s²) gives to the bin of width ``bin_width`` around x, in nats.

    -log(Φ((x + w/2 - mean) / s) - Φ((x - w/2 - mean) / s)), where x at or below ``low`` takes all that is below it
    and x at or above ``high`` all that is above. It is the likelihood of quantised data, and the number of bits
    (times log 2) of a quantised latent under a learned Gaussian prior (Ballé et al., Variational Image Compression
    with a Scale Hyperprior, 2018).

    There is no floor: the value and its gradient are exact 50 standard deviations away, and for bins much narrower
    than s, where the two Φ cancel.

    Args:
        x, mean, scale, scale_type, reduction: as in ``gaussian_nll``.
        bin_width: w, positive.
        low, high: values whose bins are open. Default: none is.

    Returns:
        [*, D] for "none", [*] for "row", [] for "sum" and "mean". float64 for float64 inputs, else float32.

    Gradients:
        To x, mean and scale; twice differentiable. s must be a normal number, in float32 between 1e-38 and 1e38; the
        value overflows where ((x - mean) / s)² does.

    Raises:
        ValueError: an option is none of its choices, or shapes do not broadcast.
        RuntimeError: dtypes or devices do not fit, bin_width is not positive, or low is not below high.

    Example:
        >>> discretized_gaussian_nll(torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1, 2), bin_width=2.0)
        tensor([0.7634])
    """
    check_choice("scale_type", scale_type, SCALE_TYPES)
    check_choice("reduction", reduction, REDUCTIONS)
    x, mean, scale = _arguments(x=x, mean=mean, scale=_as_tensor(scale, x))
    low, high = -math.inf if low is None else low, math.inf if high is None else high
    return _discretized_gaussian_nll(x, mean, scale, bin_width, low, high, scale_type, reduction)


def generalized_gaussian_nll(
    x: Tensor, mean: Tensor, scale: Tensor | float, shape: Tensor | float, *, reduction: str = "row"
) -> Tensor:
    """Negative log-density of the generalised Gaussian, (|x - mean| / α)^β + log(2 α / β) + log Γ(1 / β), in nats.

    With predicted scale α and shape β it models residuals with light or heavy tails, element by element (Upadhyay et
    al., BayesCap, 2022). β = 2 is a Gaussian of variance α² / 2, β = 1 a Laplace distribution.

    Args:
        x, mean, reduction: as in ``gaussian_nll``.
        scale: α > 0, a number, one element, or broadcastable with ``x``.
        shape: β > 0, likewise.

    Returns:
        [*, D] for "none", [*] for "row", [] for "sum" and "mean". float64 for float64 inputs, else float32.

    Gradients:
        To x, mean, scale and shape; twice differentiable. At x = mean those of the power are 0.

    Raises:
        ValueError: an unknown reduction, or shapes do not broadcast.
        RuntimeError: dtypes or devices do not fit.

    Example:
        >>> x = torch.zeros(1, 2)
        >>> generalized_gaussian_nll(x, x, 2**0.5, 2.0)  # the standard normal
        tensor([1.8379])
    """
    check_choice("reduction", reduction, REDUCTIONS)
    x, mean, scale, shape = _arguments(x=x, mean=mean, scale=_as_tensor(scale, x), shape=_as_tensor(shape, x))
    return _generalized_gaussian_nll(x, mean, scale, shape, reduction)


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
    return _discretized_logistic_mixture_nll(x, parameters, num_mixtures, bins, min_log_scale, reduction)


def _as_tensor(value: Tensor | float, x: Tensor) -> Tensor:
    """A number becomes a tensor of one element, unrounded by a half type of x."""
    return value if isinstance(value, Tensor) else x.new_full((), value, dtype=accumulate_dtype(x))


def _arguments(**tensors: Tensor | None) -> tuple[Any, ...]:
    """x and the others at their common shape; but others of one element stay so, in the type of sums."""
    expanded = broadcast(**tensors)
    dtype = accumulate_dtype(expanded[0])

    def chosen(given: Tensor | None, full: Tensor | None) -> Tensor | None:
        if given is None or given is tensors["x"] or given.numel() != 1:
            return full
        return given.to(dtype)

    return tuple(chosen(given, full) for given, full in zip(tensors.values(), expanded, strict=True))


# ---- shapes without data ---------------------------------------------------------------------------------------------


def _nll_shape(x: Tensor, reduction: str) -> Any:
    return {"none": x.shape, "row": x.shape[:-1]}.get(reduction, ())


@torch.library.register_fake("isthmus::gaussian_nll")
def _(x, mean, scale, weight, scale_type, beta, reduction):
    return x.new_empty(_nll_shape(x, reduction), dtype=accumulate_dtype(x))


@torch.library.register_fake("isthmus::gaussian_nll_backward")
def _(grad, x, mean, scale, weight, scale_type, beta, reduction, need_x, need_mean, need_scale):
    return gradients_like((x, need_x), (mean, need_mean), (scale, need_scale))


@torch.library.register_fake("isthmus::discretized_gaussian_nll")
def _(x, mean, scale, bin_width, low, high, scale_type, reduction):
    return x.new_empty(_nll_shape(x, reduction), dtype=accumulate_dtype(x))


@torch.library.register_fake("isthmus::discretized_gaussian_nll_backward")
def _(grad, x, mean, scale, bin_width, low, high, scale_type, reduction, need_x, need_mean, need_scale):
    return gradients_like((x, need_x), (mean, need_mean), (scale, need_scale))


@torch.library.register_fake("isthmus::generalized_gaussian_nll")
def _(x, mean, scale, shape, reduction):
    return x.new_empty(_nll_shape(x, reduction), dtype=accumulate_dtype(x))


@torch.library.register_fake("isthmus::generalized_gaussian_nll_backward")
def _(grad, x, mean, scale, shape, reduction, *needed):
    return gradients_like(*zip((x, mean, scale, shape), needed, strict=True))


@torch.library.register_fake("isthmus::discretized_logistic_mixture_nll")
def _(x, parameters, num_mixtures, bins, min_log_scale, reduction):
    shape = {"none": (x.shape[0], *x.shape[2:]), "image": x.shape[:1]}.get(reduction, ())
    return x.new_empty(shape, dtype=accumulate_dtype(x))


@torch.library.register_fake("isthmus::discretized_logistic_mixture_nll_backward")
def _(grad, x, parameters, num_mixtures, bins, min_log_scale, reduction, need_x, need_parameters):
    return gradients_like((x, need_x), (parameters, need_parameters))


# ---- gradients -------------------------------------------------------------------------------------------------------

_discretized_gaussian_nll_backward = eager("discretized_gaussian_nll_backward")
_discretized_logistic_mixture_nll_backward = eager("discretized_logistic_mixture_nll_backward")
_gaussian_nll_backward = eager("gaussian_nll_backward")
_generalized_gaussian_nll_backward = eager("generalized_gaussian_nll_backward")


def _only(needed, grads):
    return tuple(g if need else None for g, need in zip(grads, needed, strict=True))


def _gaussian_setup(ctx, inputs, output):
    *tensors, scale_type, beta, reduction = inputs
    ctx.options = scale_type, beta, reduction
    ctx.save_for_backward(*tensors)


def _gaussian_backward(ctx, grad):
    needed = ctx.needs_input_grad[:3]
    grads = _gaussian_nll_backward(grad, *ctx.saved_tensors, *ctx.options, *needed)
    return *map(none_if_absent, grads, needed), None, None, None, None


def _gaussian_gradients(grad, x, mean, scale, weight, scale_type, beta, reduction, *needed):
    def nll(x, mean, scale):
        return reference.gaussian_nll(x, mean, scale, weight, scale_type=scale_type, beta=beta, reduction=reduction)

    return _only(needed, gradient_of(nll, (x, mean, scale), grad))


_gaussian_nll = register_gradient("gaussian_nll", _gaussian_backward, _gaussian_setup)
register_second_order("gaussian_nll_backward", _gaussian_gradients)


def _discretized_setup(ctx, inputs, output):
    x, mean, scale, *ctx.options = inputs
    ctx.save_for_backward(x, mean, scale)


def _discretized_backward(ctx, grad):
    needed = ctx.needs_input_grad[:3]
    grads = _discretized_gaussian_nll_backward(grad, *ctx.saved_tensors, *ctx.options, *needed)
    return *map(none_if_absent, grads, needed), *(None for _ in ctx.options)


def _discretized_gradients(grad, x, mean, scale, bin_width, low, high, scale_type, reduction, *needed):
    bins = {"bin_width": bin_width, "low": low, "high": high}

    def nll(x, mean, scale):
        return reference.discretized_gaussian_nll(x, mean, scale, **bins, scale_type=scale_type, reduction=reduction)

    return _only(needed, gradient_of(nll, (x, mean, scale), grad))


_discretized_gaussian_nll = register_gradient("discretized_gaussian_nll", _discretized_backward, _discretized_setup)
register_second_order("discretized_gaussian_nll_backward", _discretized_gradients)


def _generalized_setup(ctx, inputs, output):
    *tensors, ctx.reduction = inputs
    ctx.save_for_backward(*tensors)


def _generalized_backward(ctx, grad):
    needed = ctx.needs_input_grad[:4]
    grads = _generalized_gaussian_nll_backward(grad, *ctx.saved_tensors, ctx.reduction, *needed)
    return *map(none_if_absent, grads, needed), None


def _generalized_gradients(grad, x, mean, scale, shape, reduction, *needed):
    def nll(*tensors):
        return reference.generalized_gaussian_nll(*tensors, reduction=reduction)

    return _only(needed, gradient_of(nll, (x, mean, scale, shape), grad))


_generalized_gaussian_nll = register_gradient("generalized_gaussian_nll", _generalized_backward, _generalized_setup)
register_second_order("generalized_gaussian_nll_backward", _generalized_gradients)


def _mixture_setup(ctx, inputs, output):
    x, parameters, *ctx.options = inputs
    ctx.save_for_backward(x, parameters)


def _mixture_backward(ctx, grad):
    needed = ctx.needs_input_grad[:2]
    grads = _discretized_logistic_mixture_nll_backward(grad, *ctx.saved_tensors, *ctx.options, *needed)
    return *map(none_if_absent, grads, needed), *(None for _ in ctx.options)


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


_discretized_logistic_mixture_nll = register_gradient(
    "discretized_logistic_mixture_nll", _mixture_backward, _mixture_setup
)
register_second_order("discretized_logistic_mixture_nll_backward", _mixture_gradients)

for _name in (
    "gaussian_nll",
    "discretized_gaussian_nll",
    "generalized_gaussian_nll",
    "discretized_logistic_mixture_nll",
):
    register_autocast(_name)
    register_vmap_by_loop(_name)
    register_vmap_by_loop(f"{_name}_backward")
