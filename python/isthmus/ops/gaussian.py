"""Reparameterised Gaussian sampling: z = mean + temperature · s · noise, with noise that is never stored."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from isthmus import reference
from isthmus.ops._arguments import broadcast, check_choice, key_for
from isthmus.ops._register import (
    gradient_of,
    none_if_absent,
    register_autocast,
    register_second_order,
    register_vmap_by_loop,
)
from isthmus.ops.divergence import gaussian_kl

_ops = torch.ops.isthmus


def gaussian_noise(key: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normals: element i of the result is a function of (key, i) alone.

    The stream every sampling op draws from (docs/numerics.md). Uniform bits are the same on every device,
    instruction set and thread count; normals agree to a few units in the last place.

    Args:
        key: int64 [2], from ``isthmus.key``; the result lives on its device.
        shape: shape of the result.
        dtype: float32, float64 (a stream of its own), bfloat16 or float16 (the float32 stream, rounded).

    Returns:
        Tensor of ``shape``. Not differentiable.

    Raises:
        RuntimeError: ``key`` is not an int64 pair, or ``dtype`` is not one of the four.

    Example:
        >>> noise = gaussian_noise(isthmus.key(0), (2, 3))
        >>> torch.equal(noise, gaussian_noise(isthmus.key(0), (2, 3)))
        True
    """
    return _ops.gaussian_noise(key, shape, dtype)


def gaussian_sample(
    mean: Tensor,
    scale: Tensor,
    *,
    scale_type: str = "logvar",
    num_samples: int | None = None,
    temperature: float = 1.0,
    key: Tensor | None = None,
    generator: Generator | None = None,
) -> Tensor:
    """Sample z = mean + temperature · s · noise, differentiably (Kingma & Welling 2014, arXiv 1312.6114).

    One pass forward (reads mean and scale, writes z), one pass backward that draws the same noise again from
    16 bytes: neither s nor the noise is ever stored.

    Args:
        mean: [*]; float32, float64, bfloat16 or float16.
        scale: same dtype, broadcastable with ``mean``; what it means is set by ``scale_type``.
        scale_type: "logvar" (s = exp(scale/2)), "std" (s = scale), "softplus" (s = softplus(scale)) or
            "square" (s = scale²).
        num_samples: None for one sample without a sample axis, else the size of a new leading axis.
        temperature: factor on the noise.
        key: int64 [2]; the noise of element i of the result is ``gaussian_noise(key, …)[i]``. Default: a fresh
            key drawn from ``generator``, or from torch's generator of the device.
        generator: where a fresh key is drawn from.

    Returns:
        z, [*] or [num_samples, *], dtype of ``mean``.

    Gradients:
        To ``mean`` and ``scale``; twice differentiable. float32 overflows where exp(scale/2) does, at a
        log-variance of 177; nothing is clamped.

    Raises:
        ValueError: an option is none of its choices, or key and generator are both given.
        RuntimeError: dtypes, devices or shapes do not fit.

    Example:
        >>> mean, logvar = torch.zeros(4, 2), torch.zeros(4, 2)
        >>> gaussian_sample(mean, logvar, num_samples=3, key=isthmus.key(0)).shape
        torch.Size([3, 4, 2])
    """
    mean, scale = broadcast(mean=mean, scale=scale)
    key = key_for(mean, key, generator)
    return _ops.gaussian_sample(mean, scale, key, scale_type, _axis(num_samples), temperature)


def gaussian_sample_kl(
    mean: Tensor,
    scale: Tensor,
    prior_mean: Tensor | None = None,
    prior_scale: Tensor | None = None,
    *,
    scale_type: str = "logvar",
    num_samples: int | None = None,
    temperature: float = 1.0,
    reduction: str = "row",
    key: Tensor | None = None,
    generator: Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Sample z and its posterior's divergence from the prior, in one pass each way.

    Equals ``gaussian_sample`` and ``gaussian_kl`` with the same arguments, for the memory traffic of the first.

    Args:
        mean, scale, scale_type, num_samples, temperature, key, generator: as in ``gaussian_sample``.
        prior_mean, prior_scale: mean and scale (of the same ``scale_type``) of the prior, broadcastable with
            ``mean``. Default: the standard normal.
        reduction: "row" sums over the last dimension, "sum" over everything, "mean" averages the row sums,
            "none" keeps every element.

    Returns:
        (z, kl): z as in ``gaussian_sample``; kl in nats, [*] without the last dimension for "row". For bfloat16
        and float16 inputs kl is float32.

    Gradients:
        To all four tensors; twice differentiable.

    Raises:
        ValueError: an option is none of its choices, or key and generator are both given.
        RuntimeError: dtypes, devices or shapes do not fit, or only one of the prior's two tensors is given.

    Example:
        >>> z, kl = gaussian_sample_kl(torch.zeros(4, 2), torch.zeros(4, 2))
        >>> kl
        tensor([0., 0., 0., 0.])
    """
    check_choice("reduction", reduction, ("none", "row", "sum", "mean"))
    mean, scale, prior_mean, prior_scale = broadcast(
        mean=mean, scale=scale, prior_mean=prior_mean, prior_scale=prior_scale
    )
    key = key_for(mean, key, generator)
    samples = _axis(num_samples)
    if reduction == "none":
        z = _ops.gaussian_sample(mean, scale, key, scale_type, samples, temperature)
        prior = {"prior_mean": prior_mean, "prior_scale": prior_scale}
        return z, gaussian_kl(mean, scale, **prior, scale_type=scale_type, reduction="none")
    z, kl = _ops.gaussian_sample_kl(mean, scale, prior_mean, prior_scale, key, scale_type, samples, temperature)
    return z, {"row": lambda: kl, "sum": kl.sum, "mean": kl.mean}[reduction]()


def _axis(num_samples: int | None) -> int:
    """0 in the op's schema means: no sample axis."""
    if num_samples is None:
        return 0
    if num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}; expected None or at least 1")
    return num_samples


# ---- shapes without data ---------------------------------------------------------------------------------------------


def _sample_shape(mean: Tensor, num_samples: int) -> list[Any]:
    return [num_samples, *mean.shape] if num_samples else list(mean.shape)


def _accumulate_dtype(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


@torch.library.register_fake("isthmus::gaussian_noise")
def _(key, shape, dtype):
    return key.new_empty(shape, dtype=dtype)


@torch.library.register_fake("isthmus::gaussian_sample")
def _(mean, scale, key, scale_type, num_samples, temperature):
    return mean.new_empty(_sample_shape(mean, num_samples))


@torch.library.register_fake("isthmus::gaussian_sample_backward")
def _(grad, scale, key, scale_type, num_samples, temperature):
    return scale.new_empty(scale.shape), scale.new_empty(scale.shape)


@torch.library.register_fake("isthmus::gaussian_sample_kl")
def _(mean, scale, prior_mean, prior_scale, key, scale_type, num_samples, temperature):
    kl = mean.new_empty(mean.shape[:-1], dtype=_accumulate_dtype(mean))
    return mean.new_empty(_sample_shape(mean, num_samples)), kl


@torch.library.register_fake("isthmus::gaussian_sample_kl_backward")
def _(grad_z, grad_kl, mean, scale, prior_mean, prior_scale, key, scale_type, num_samples, temperature):
    prior_shape = (0,) if prior_mean is None else mean.shape
    shapes = (mean.shape, mean.shape, prior_shape, prior_shape)
    return tuple(mean.new_empty(shape) for shape in shapes)


# ---- gradients -------------------------------------------------------------------------------------------------------


def _sample_setup(ctx, inputs, output):
    _, scale, key, *ctx.options = inputs
    ctx.save_for_backward(scale, key)


def _sample_backward(ctx, grad):
    grad_mean, grad_scale = _ops.gaussian_sample_backward(grad, *ctx.saved_tensors, *ctx.options)
    return grad_mean, grad_scale, None, None, None, None


def _sample_kl_setup(ctx, inputs, output):
    *tensors, scale_type, num_samples, temperature = inputs
    ctx.options = scale_type, num_samples, temperature
    ctx.save_for_backward(*tensors)


def _sample_kl_backward(ctx, grad_z, grad_kl):
    mean, scale, prior_mean, prior_scale, key = ctx.saved_tensors
    grads = _ops.gaussian_sample_kl_backward(grad_z, grad_kl, mean, scale, prior_mean, prior_scale, key, *ctx.options)
    present = (True, True, prior_mean is not None, prior_scale is not None)
    to_inputs = (none_if_absent(g, there) for g, there in zip(grads, present, strict=True))
    return *to_inputs, None, None, None, None


torch.library.register_autograd("isthmus::gaussian_sample", _sample_backward, setup_context=_sample_setup)
torch.library.register_autograd("isthmus::gaussian_sample_kl", _sample_kl_backward, setup_context=_sample_kl_setup)


def _noise_of(mean: Tensor, key: Tensor, num_samples: int) -> Tensor:
    return _ops.gaussian_noise(key, _sample_shape(mean, num_samples), _accumulate_dtype(mean))


def _sample_gradients(grad, scale, key, scale_type, num_samples, temperature):
    noise = _noise_of(scale, key, num_samples)

    def sample(mean, scale):
        return reference.gaussian_sample(
            mean,
            scale,
            scale_type=scale_type,
            num_samples=num_samples or None,
            temperature=temperature,
            noise=noise,
        )

    # The gradient does not depend on the mean; any will do.
    return gradient_of(sample, (torch.zeros_like(scale, requires_grad=True), scale), grad)


def _sample_kl_gradients(
    grad_z, grad_kl, mean, scale, prior_mean, prior_scale, key, scale_type, num_samples, temperature
):
    noise = _noise_of(mean, key, num_samples)

    def sample_kl(*tensors):
        return reference.gaussian_sample_kl(
            *tensors,
            scale_type=scale_type,
            num_samples=num_samples or None,
            temperature=temperature,
            noise=noise,
        )

    return gradient_of(sample_kl, (mean, scale, prior_mean, prior_scale), (grad_z, grad_kl))


register_second_order("gaussian_sample_backward", _sample_gradients)
register_second_order("gaussian_sample_kl_backward", _sample_kl_gradients)

for _name in ("gaussian_sample", "gaussian_sample_kl"):
    register_autocast(_name)
    register_vmap_by_loop(_name)
    register_vmap_by_loop(f"{_name}_backward")
register_vmap_by_loop("gaussian_noise")
