"""Divergences between Gaussians, and the bound of importance weights: one pass over the parameters each way."""

from typing import Any

import torch
from torch import Tensor

from isthmus import reference
from isthmus.ops._arguments import accumulate_dtype
from isthmus.ops._gaussians import (
    clamp_options,
    divergence_options,
    divergence_shape,
    expand_mask,
    finish_divergence,
    gaussian_tensors,
    gradient_shapes,
    posterior_shape,
    reference_kl,
    reference_options,
)
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


def gaussian_kl(
    mean: Tensor,
    scale: Tensor | None = None,
    prior_mean: Tensor | float | None = None,
    prior_scale: Tensor | float | None = None,
    *,
    scale_type: str = "logvar",
    packed_dim: int = -1,
    residual: bool = False,
    clamp: tuple[float, float] | None = None,
    clamp_mode: str = "hard",
    mask: Tensor | None = None,
    reduction: str = "row",
    groups: int = 1,
    unit: str = "nats",
    beta: float = 1.0,
    free_bits: float = 0.0,
    capacity: float | None = None,
    balance: float | None = None,
) -> Tensor:
    """KL(N(mean, s²) ‖ N(prior_mean, s_prior²)) of diagonal Gaussians.

    With d = log s - log s_prior an element is ((mean - prior_mean) / s_prior)² / 2 + (expm1(2d) - 2d) / 2. Near
    the prior, where the textbook form subtracts nearly equal numbers, this form keeps its relative accuracy.

    Reads every parameter once, in either direction, and stores nothing between them. Halves of a packed tensor,
    expanded rows and expanded numbers are read where they lie, never copied.

    Args:
        mean: [*, D]; float32, float64, bfloat16 or float16. Without a scale it holds both, the mean first, as halves
            along ``packed_dim``: [B, 2C, H, W] with ``packed_dim=1`` is what a KL autoencoder's encoder gives.
        scale: same dtype, broadcastable with ``mean``; what it means is set by ``scale_type``.
        prior_mean, prior_scale: mean and scale (of the same ``scale_type``) of the prior, numbers or tensors
            broadcastable with ``mean``. Default: the standard normal.
        scale_type: "logvar" (s = exp(scale/2)), "std" (s = scale), "softplus" (s = softplus(scale)) or
            "square" (s = scale²).
        packed_dim: see ``mean``.
        residual: the posterior is N(prior_mean + mean, (s_prior · s)²), as in NVAE (Vahdat & Kautz 2020).
        clamp: range (low, high) of ``scale``. Default: none.
        clamp_mode: "hard" (no gradient outside), "pass_through" (outside, a gradient passes if a step against it
            leads back inside) or "tanh" (center + half-width · tanh, and its derivative).
        mask: bool, broadcastable to [*]. A row where it is False counts nothing, whatever it holds.
        reduction: "none" [*, D], "row" [*] (sum over the last dimension), "group" [*, groups] (sums over equal parts
            of the last dimension), "batch" [B] (sum over all but the first), "dim" [D] (batch mean of each latent
            dimension), "sum" [] or "mean" [] (mean of the row sums).
        groups: see "group".
        unit: "nats" or "bits".
        beta: factor on the result (Higgins et al. 2017).
        free_bits: floor of every entry of the result, in its unit (Kingma et al. 2016 use "dim" or "group").
        capacity: C of |KL - C| (Burgess et al. 2018), in the unit of the result.
        balance: share a of the gradient that goes to the prior, 1 - a going to the posterior (Hafner et al. 2021).
            The value stays. Default: both in full.

    Returns:
        beta · |max(KL, free_bits) - capacity| in the shape of ``reduction``; without a capacity, beta · max(…).
        float64 for float64 inputs, else float32, also for bfloat16 and float16 inputs. The mean over zero rows is
        NaN.

    Gradients:
        To all four tensors; twice differentiable. Unless clamped, float32 overflows where (s / s_prior)² does, at a
        log-variance of 88 over the prior's, and a posterior without width has an infinite divergence.

    Raises:
        ValueError: an option is none of its choices, or shapes do not fit.
        RuntimeError: dtypes or devices do not fit, or only one of the prior's two tensors is given.

    Example:
        >>> gaussian_kl(torch.ones(2, 3), torch.zeros(2, 3))
        tensor([1.5000, 1.5000])
        >>> gaussian_kl(torch.zeros(2, 8, 4, 4), packed_dim=1, reduction="batch")
        tensor([0., 0.])
    """
    clamp_args = clamp_options(clamp, clamp_mode)
    options = divergence_options(reduction, groups, unit, balance, residual)
    tensors = gaussian_tensors(mean, scale, prior_mean, prior_scale, packed_dim)
    if mask is not None:
        mask = expand_mask(mask, tensors[0], tensors[1], packed_dim)
    kl = _gaussian_kl(*tensors, mask, scale_type, packed_dim, residual, *clamp_args, *options)
    return finish_divergence(kl, mask, reduction, beta, free_bits, capacity)


def log_mean_exp(log_weights: Tensor, *, groups: int = 1) -> Tensor:
    """log mean exp over samples: the importance-weighted bound (Burda et al. 2016, arXiv 1509.00519).

    With log_weights[k] = log p(x, z_k) - log q(z_k | x), the result is the bound L_K of IWAE; the mean over M
    ``groups`` of K samples is that of MIWAE (Rainforth et al. 2018). Two readings, one writing; the backward
    recomputes the normalised weights from the bound.

    Args:
        log_weights: [groups · K, *]; float32, float64, bfloat16 or float16.
        groups: number of groups, neighbours along the first dimension.

    Returns:
        [groups, *]; float64 for float64 inputs, else float32. A column of -inf gives -inf and no gradient.

    Gradients:
        The normalised weights; twice differentiable.

    Raises:
        RuntimeError: no samples, or ``groups`` does not divide their number.

    Example:
        >>> log_mean_exp(torch.zeros(6, 2), groups=3).shape
        torch.Size([3, 2])
    """
    return _log_mean_exp(log_weights, groups)


# ---- shapes without data ---------------------------------------------------------------------------------------------


@torch.library.register_fake("isthmus::gaussian_kl")
def _(mean, scale, prior_mean, prior_scale, mask, scale_type, packed_dim, residual, mode, low, high, reduction, groups,
      *weights):  # fmt: skip
    shape = divergence_shape(posterior_shape(mean, scale, packed_dim), reduction, groups)
    return mean.new_empty(shape, dtype=accumulate_dtype(mean))


@torch.library.register_fake("isthmus::gaussian_kl_backward")
def _(grad, mean, scale, prior_mean, prior_scale, mask, *options):
    return tuple(mean.new_empty(shape) for shape in gradient_shapes(mean, scale, prior_mean, options[-1]))


@torch.library.register_fake("isthmus::log_mean_exp")
def _(log_weights, groups):
    return log_weights.new_empty([groups, *log_weights.shape[1:]], dtype=accumulate_dtype(log_weights))


@torch.library.register_fake("isthmus::log_mean_exp_backward")
def _(grad, log_weights, bound):
    return torch.empty_like(log_weights, memory_format=torch.contiguous_format)


# ---- gradients -------------------------------------------------------------------------------------------------------

_gaussian_kl_backward = eager("gaussian_kl_backward")
_log_mean_exp_backward = eager("log_mean_exp_backward")


def _kl_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5])
    ctx.options = inputs[5:]


def _kl_backward(ctx, grad):
    *tensors, mask = ctx.saved_tensors
    prior_gradient = any(ctx.needs_input_grad[2:4])
    grads = _gaussian_kl_backward(grad, *tensors, mask, *ctx.options, prior_gradient)
    present = (True, tensors[1] is not None, prior_gradient, prior_gradient)
    return *map(none_if_absent, grads, present), None, *(None for _ in ctx.options)


def _bound_setup(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], output)


def _bound_backward(ctx, grad):
    return _log_mean_exp_backward(grad, *ctx.saved_tensors), None


_gaussian_kl = register_gradient("gaussian_kl", _kl_backward, _kl_setup)
_log_mean_exp = register_gradient("log_mean_exp", _bound_backward, _bound_setup)


def _kl_gradients(grad, mean, scale, prior_mean, prior_scale, mask, *options):
    *choices, prior_gradient = options
    chosen, reduction = reference_options(*choices[:6]), choices[6:]

    def kl(*tensors: Any) -> Tensor:
        return reference_kl(tensors, mask, chosen, *reduction)

    prior = (prior_mean, prior_scale)
    grads = gradient_of(kl, (mean, scale, *prior), grad)
    return grads if prior_gradient else [*grads[:2], None, None]


def _log_mean_exp_gradients(grad, log_weights, bound):
    groups = bound.shape[0]
    return gradient_of(lambda w: reference.log_mean_exp(w, groups=groups), (log_weights,), grad)


register_second_order("gaussian_kl_backward", _kl_gradients)
register_second_order("log_mean_exp_backward", _log_mean_exp_gradients)
for _name in ("gaussian_kl", "log_mean_exp"):
    register_autocast(_name)
    register_vmap_by_loop(_name)
    register_vmap_by_loop(f"{_name}_backward")
