"""Divergences between Gaussians: one pass over the parameters each way, accurate next to the prior."""

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


def gaussian_kl(
    mean: Tensor,
    scale: Tensor,
    prior_mean: Tensor | None = None,
    prior_scale: Tensor | None = None,
    *,
    scale_type: str = "logvar",
    reduction: str = "row",
) -> Tensor:
    """KL(N(mean, s²) ‖ N(prior_mean, s_prior²)) of diagonal Gaussians, in nats.

    With d = log s - log s_prior an element is ((mean - prior_mean) / s_prior)² / 2 + (expm1(2d) - 2d) / 2. Near
    the prior, where the textbook form subtracts nearly equal numbers, this form keeps its relative accuracy.

    Reads every parameter once, in either direction, and stores nothing between them. A prior expanded from one
    element, such as ``torch.tensor(0.1).expand_as(mean)``, is read as one element, never copied.

    Args:
        mean: [*, D]; float32, float64, bfloat16 or float16.
        scale: same dtype, broadcastable with ``mean``; what it means is set by ``scale_type``.
        prior_mean, prior_scale: mean and scale (of the same ``scale_type``) of the prior, broadcastable with
            ``mean``. Default: the standard normal.
        scale_type: "logvar" (s = exp(scale/2)), "std" (s = scale), "softplus" (s = softplus(scale)) or
            "square" (s = scale²).
        reduction: "row" sums over the last dimension, "sum" over everything, "mean" averages the row sums,
            "none" keeps every element.

    Returns:
        [*, D] for "none", [*] for "row", [] for "sum" and "mean". float64 for float64 inputs, else float32, also
        for bfloat16 and float16 inputs. The mean over zero rows is NaN.

    Gradients:
        To all four tensors; twice differentiable. Nothing is clamped: float32 overflows where (s / s_prior)²
        does, at a log-variance of 88 over the prior's, and a posterior without width has an infinite divergence.

    Raises:
        ValueError: an option is none of its choices.
        RuntimeError: dtypes, devices or shapes do not fit, or only one of the prior's two tensors is given.

    Example:
        >>> gaussian_kl(torch.ones(2, 3), torch.zeros(2, 3))
        tensor([1.5000, 1.5000])
    """
    check_choice("scale_type", scale_type, ("logvar", "std", "softplus", "square"))
    check_choice("reduction", reduction, ("none", "row", "sum", "mean"))
    tensors = broadcast(mean=mean, scale=scale, prior_mean=prior_mean, prior_scale=prior_scale)
    return _ops.gaussian_kl(*tensors, scale_type, reduction)


# ---- shapes without data ---------------------------------------------------------------------------------------------


@torch.library.register_fake("isthmus::gaussian_kl")
def _(mean, scale, prior_mean, prior_scale, scale_type, reduction):
    shape = {"none": mean.shape, "row": mean.shape[:-1]}.get(reduction, ())
    dtype = torch.float64 if mean.dtype == torch.float64 else torch.float32
    return mean.new_empty(shape, dtype=dtype)


@torch.library.register_fake("isthmus::gaussian_kl_backward")
def _(grad, mean, scale, prior_mean, prior_scale, scale_type, reduction):
    prior_shape = (0,) if prior_mean is None else mean.shape
    shapes = (mean.shape, mean.shape, prior_shape, prior_shape)
    return tuple(mean.new_empty(shape) for shape in shapes)


# ---- gradients -------------------------------------------------------------------------------------------------------


def _setup(ctx, inputs, output):
    *tensors, scale_type, reduction = inputs
    ctx.options = scale_type, reduction
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    tensors = ctx.saved_tensors
    grads = _ops.gaussian_kl_backward(grad, *tensors, *ctx.options)
    to_inputs = (none_if_absent(g, t is not None) for g, t in zip(grads, tensors, strict=True))
    return *to_inputs, None, None


torch.library.register_autograd("isthmus::gaussian_kl", _backward, setup_context=_setup)


def _gradients(grad, mean, scale, prior_mean, prior_scale, scale_type, reduction):
    def kl(*tensors):
        return reference.gaussian_kl(*tensors, scale_type=scale_type, reduction=reduction)

    return gradient_of(kl, (mean, scale, prior_mean, prior_scale), grad)


register_second_order("gaussian_kl_backward", _gradients)
register_autocast("gaussian_kl")
register_vmap_by_loop("gaussian_kl")
register_vmap_by_loop("gaussian_kl_backward")
