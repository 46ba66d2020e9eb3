"""Reparameterised Gaussian sampling: z = mean + temperature · s · noise, with noise that is never stored."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from isthmus import reference
from isthmus.ops._arguments import accumulate_dtype, check_choice, key_for
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
    scale: Tensor | None = None,
    *,
    scale_type: str = "logvar",
    packed_dim: int = -1,
    clamp: tuple[float, float] | None = None,
    clamp_mode: str = "hard",
    num_samples: int | None = None,
    antithetic: bool = False,
    temperature: float = 1.0,
    key: Tensor | None = None,
    generator: Generator | None = None,
) -> Tensor:
    """Sample z = mean + temperature · s · noise, differentiably (Kingma & Welling 2014, arXiv 1312.6114).

    One pass forward (reads mean and scale, writes z), one pass backward that draws the same noise again from
    16 bytes: neither s nor the noise is ever stored.

    Args:
        mean, scale, scale_type, packed_dim, clamp, clamp_mode: the Gaussian, as in ``gaussian_kl``.
        num_samples: None for one sample without a sample axis, else the size of a new leading axis.
        antithetic: samples come in pairs, the second with the noise of the first negated; needs an even
            ``num_samples``.
        temperature: factor on the noise.
        key: int64 [2]; the noise of element i of the result is ``gaussian_noise(key, …)[i]`` (for antithetic
            samples, of the first samples of all pairs). Default: a fresh key drawn from ``generator``, or from torch's
            generator of the device.
        generator: where a fresh key is drawn from.

    Returns:
        z, [*] or [num_samples, *], dtype of ``mean``.

    Gradients:
        To ``mean`` and ``scale``; twice differentiable. Unless clamped, float32 overflows where exp(scale/2) does,
        at a log-variance of 177.

    Raises:
        ValueError: an option is none of its choices, or key and generator are both given.
        RuntimeError: dtypes, devices or shapes do not fit.

    Example:
        >>> mean, logvar = torch.zeros(4, 2), torch.zeros(4, 2)
        >>> gaussian_sample(mean, logvar, num_samples=3, key=isthmus.key(0)).shape
        torch.Size([3, 4, 2])
    """
    options = clamp_options(clamp, clamp_mode)
    mean, scale, _, _ = gaussian_tensors(mean, scale, None, None, packed_dim)
    key = key_for(mean, key, generator)
    samples = _axis(num_samples, antithetic)
    return _gaussian_sample(mean, scale, key, scale_type, packed_dim, *options, samples, antithetic, temperature)


def gaussian_sample_kl(
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
    num_samples: int | None = None,
    antithetic: bool = False,
    temperature: float = 1.0,
    reduction: str = "row",
    groups: int = 1,
    unit: str = "nats",
    beta: float = 1.0,
    free_bits: float = 0.0,
    capacity: float | None = None,
    balance: float | None = None,
    key: Tensor | None = None,
    generator: Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Sample z and measure its posterior's divergence from the prior, in one pass each way.

    Equals ``gaussian_sample`` and ``gaussian_kl`` with the same arguments, for the memory traffic of the first.

    Args:
        mean, scale, prior_mean, prior_scale, scale_type, packed_dim, residual, clamp, clamp_mode, mask: posterior and
            prior, as in ``gaussian_kl``. Samples of rows that the mask leaves out are 0 and have no gradient.
        num_samples, antithetic, temperature, key, generator: as in ``gaussian_sample``. The divergence has no sample
            axis and does not know the temperature.
        reduction, groups, unit, beta, free_bits, capacity, balance: the divergence, as in ``gaussian_kl``.

    Returns:
        (z, kl): z as in ``gaussian_sample``, kl as in ``gaussian_kl``.

    Gradients:
        To all four tensors; twice differentiable. Those of a prior that needs none are not computed.

    Raises:
        ValueError: an option is none of its choices, or key and generator are both given.
        RuntimeError: dtypes, devices or shapes do not fit, or only one of the prior's two tensors is given.

    Example:
        >>> z, kl = gaussian_sample_kl(torch.zeros(4, 2), torch.zeros(4, 2))
        >>> kl
        tensor([0., 0., 0., 0.])
        >>> z, kl = gaussian_sample_kl(torch.randn(4, 6), reduction="mean", beta=0.1)  # packed: mean and log-variance
        >>> z.shape
        torch.Size([4, 3])
    """
    clamp_args = clamp_options(clamp, clamp_mode)
    options = divergence_options(reduction, groups, unit, balance, residual)
    tensors = gaussian_tensors(mean, scale, prior_mean, prior_scale, packed_dim)
    if mask is not None:
        mask = expand_mask(mask, tensors[0], tensors[1], packed_dim)
    key = key_for(mean, key, generator)
    draw = _axis(num_samples, antithetic), antithetic, temperature
    z, kl = _gaussian_sample_kl(*tensors, mask, key, scale_type, packed_dim, residual, *clamp_args, *draw, *options)
    return z, finish_divergence(kl, mask, reduction, beta, free_bits, capacity)


def gaussian_sample_log_prob(
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
    num_samples: int | None = None,
    antithetic: bool = False,
    temperature: float = 1.0,
    gradient: str = "total",
    groups: int = 1,
    key: Tensor | None = None,
    generator: Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sample z with its divergence and its log-densities under posterior and prior, in one pass each way.

    What an importance-weighted bound needs: with log_weights = log p(x | z) + log_p - log_q, ``log_mean_exp`` of it
    over samples is the bound, and ``gradient`` chooses the estimator of its gradient in the posterior:

    - "total": as autograd would have it. The part of log_q's own parameters has mean zero, but variance.
    - "path": without that part (Roeder et al. 2017, arXiv 1703.09194). Unbiased for one sample, biased for a bound.
    - "doubly_reparameterized": unbiased for bounds too, and its signal-to-noise ratio grows with the number of samples
      (Tucker et al. 2019, arXiv 1810.04152): what flows through sample k is multiplied by its normalised weight once
      more. The weight is read from the gradient that reaches ``log_p``.
    - "partial": PIWAE (Rainforth et al. 2018, arXiv 1802.04537): the loss is the bound of all samples, and the
      posterior gets the gradient of the mean of ``groups`` bounds.

    Args:
        mean, scale, prior_mean, prior_scale, scale_type, packed_dim, residual, clamp, clamp_mode: posterior and prior,
            as in ``gaussian_kl``.
        num_samples, antithetic, temperature, key, generator: as in ``gaussian_sample``.
        gradient: see above. All but "total" and "path" need ``num_samples``.
        groups: the M bounds of ``num_samples`` / M samples each, as in ``log_mean_exp``.

    Returns:
        (z, kl, log_q, log_p): z [S, *, D]; kl [*] in nats; log_q and log_p [S, *], sums over the last dimension of the
        log-densities of z; no S if ``num_samples`` is None. The last three are float64 for float64 inputs, else
        float32.

    Gradients:
        To all four tensors; those of the prior are always in full. Twice differentiable in "total" and "path"; in the
        others the weights are held constant.

    Raises:
        ValueError: an option is none of its choices, or ``groups`` does not divide ``num_samples``.
        RuntimeError: dtypes, devices or shapes do not fit, or only one of the prior's two tensors is given.

    Example:
        >>> z, kl, log_q, log_p = gaussian_sample_log_prob(torch.zeros(4, 2), torch.zeros(4, 2), num_samples=5)
        >>> isthmus.ops.log_mean_exp(log_p - log_q).shape
        torch.Size([1, 4])
    """
    check_choice("gradient", gradient, ("total", "path", "doubly_reparameterized", "partial"))
    samples = _axis(num_samples, antithetic)
    if gradient in ("doubly_reparameterized", "partial") and (groups < 1 or samples < 1 or samples % groups != 0):
        raise ValueError(f"groups is {groups}, num_samples {num_samples}; expected a divisor of the number of samples")
    clamp_args = clamp_options(clamp, clamp_mode)
    tensors = gaussian_tensors(mean, scale, prior_mean, prior_scale, packed_dim)
    key = key_for(mean, key, generator)
    return _gaussian_sample_log_prob(
        *tensors, key, scale_type, packed_dim, residual, *clamp_args, samples, antithetic, temperature, gradient, groups
    )


def _axis(num_samples: int | None, antithetic: bool) -> int:
    """0 in the op's schema means: no sample axis."""
    if antithetic and (num_samples is None or num_samples % 2 != 0):
        raise ValueError(f"num_samples is {num_samples}; expected an even number of antithetic samples")
    if num_samples is None:
        return 0
    if num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}; expected None or at least 1")
    return num_samples


# ---- shapes without data ---------------------------------------------------------------------------------------------


def _with_samples(shape: Any, num_samples: int) -> list[Any]:
    return [num_samples, *shape] if num_samples else list(shape)


@torch.library.register_fake("isthmus::gaussian_noise")
def _(key, shape, dtype):
    return key.new_empty(shape, dtype=dtype)


@torch.library.register_fake("isthmus::gaussian_sample")
def _(mean, scale, key, scale_type, packed_dim, mode, low, high, num_samples, antithetic, temperature):
    return mean.new_empty(_with_samples(posterior_shape(mean, scale, packed_dim), num_samples))


@torch.library.register_fake("isthmus::gaussian_sample_backward")
def _(grad, mean, scale, *others):
    return tuple(mean.new_empty(shape) for shape in gradient_shapes(mean, scale, None, False)[:2])


@torch.library.register_fake("isthmus::gaussian_sample_kl")
def _(mean, scale, prior_mean, prior_scale, mask, key, scale_type, packed_dim, residual, mode, low, high, num_samples,
      antithetic, temperature, reduction, groups, *weights):  # fmt: skip
    shape = posterior_shape(mean, scale, packed_dim)
    kl = mean.new_empty(divergence_shape(shape, reduction, groups), dtype=accumulate_dtype(mean))
    return mean.new_empty(_with_samples(shape, num_samples)), kl


@torch.library.register_fake("isthmus::gaussian_sample_kl_backward")
def _(grad_z, grad_kl, mean, scale, prior_mean, prior_scale, *others):
    return tuple(mean.new_empty(shape) for shape in gradient_shapes(mean, scale, prior_mean, others[-1]))


@torch.library.register_fake("isthmus::gaussian_sample_log_prob")
def _(mean, scale, prior_mean, prior_scale, key, scale_type, packed_dim, residual, mode, low, high, num_samples,
      *others):  # fmt: skip
    shape, dtype = posterior_shape(mean, scale, packed_dim), accumulate_dtype(mean)
    log_prob = _with_samples(shape[:-1], num_samples)
    sums = (mean.new_empty(s, dtype=dtype) for s in (shape[:-1], log_prob, log_prob))
    return mean.new_empty(_with_samples(shape, num_samples)), *sums


@torch.library.register_fake("isthmus::gaussian_sample_log_prob_backward")
def _(grad_z, grad_kl, grad_log_q, grad_log_p, gate, mean, scale, prior_mean, prior_scale, *others):
    return tuple(mean.new_empty(shape) for shape in gradient_shapes(mean, scale, prior_mean, others[-1]))


# ---- gradients -------------------------------------------------------------------------------------------------------

_gaussian_sample_backward = eager("gaussian_sample_backward")
_gaussian_sample_kl_backward = eager("gaussian_sample_kl_backward")
_gaussian_sample_log_prob_backward = eager("gaussian_sample_log_prob_backward")


def _sample_setup(ctx, inputs, output):
    mean, scale, key, *ctx.options = inputs
    ctx.packed = scale is None
    # Backward asks the mean for its layout only: the scale has the same, and need not keep the mean alive.
    ctx.save_for_backward(mean if ctx.packed else scale, key)


def _sample_backward(ctx, grad):
    layout, key = ctx.saved_tensors
    scale = None if ctx.packed else layout
    grads = _gaussian_sample_backward(grad, layout, scale, key, *ctx.options)
    return grads[0], none_if_absent(grads[1], not ctx.packed), None, *(None for _ in ctx.options)


def _sample_kl_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:6])
    ctx.options = inputs[6:]


def _present(ctx: Any, scale: Tensor | None) -> tuple[bool, ...]:
    """Which of the four gradients there are."""
    prior = any(ctx.needs_input_grad[2:4])
    return True, scale is not None, prior, prior


def _sample_kl_backward(ctx, grad_z, grad_kl):
    saved = ctx.saved_tensors
    present = _present(ctx, saved[1])
    grads = _gaussian_sample_kl_backward(grad_z, grad_kl, *saved, *ctx.options, present[-1])
    return *map(none_if_absent, grads, present), None, None, *(None for _ in ctx.options)


def _log_prob_setup(ctx, inputs, output):
    *tensors, ctx.gradient, ctx.groups = inputs
    ctx.save_for_backward(*tensors[:5])
    ctx.options = tensors[5:]


def _gate(gradient: str, groups: int, grad_log_p: Tensor) -> Tensor | None:
    """Factor on what flows to the posterior through each sample; grad_log_p [S, …] is proportional to its weight."""
    if gradient in ("total", "path"):
        return None
    grads = grad_log_p.unflatten(0, (groups, -1))
    of_group = grads.sum(1, keepdim=True)
    if gradient == "doubly_reparameterized":
        gate = grads / of_group
    else:
        gate = (of_group.sum(0, keepdim=True) / (groups * of_group)).expand_as(grads)
    return torch.where(of_group == 0, 0, gate).flatten(0, 1)


def _log_prob_backward(ctx, grad_z, grad_kl, grad_log_q, grad_log_p):
    saved = ctx.saved_tensors
    present = _present(ctx, saved[1])
    gate = _gate(ctx.gradient, ctx.groups, grad_log_p)
    path_only = ctx.gradient in ("path", "doubly_reparameterized")
    grads = _gaussian_sample_log_prob_backward(
        grad_z, grad_kl, grad_log_q, grad_log_p, gate, *saved, *ctx.options, path_only, present[-1]
    )
    return *map(none_if_absent, grads, present), None, *(None for _ in ctx.options), None, None


_gaussian_sample = register_gradient("gaussian_sample", _sample_backward, _sample_setup)
_gaussian_sample_kl = register_gradient("gaussian_sample_kl", _sample_kl_backward, _sample_kl_setup)
_gaussian_sample_log_prob = register_gradient("gaussian_sample_log_prob", _log_prob_backward, _log_prob_setup)


# ---- gradients of gradients ------------------------------------------------------------------------------------------


def _draw_options(
    mean: Tensor, scale: Tensor | None, key: Tensor, packed_dim: int, num_samples: int, antithetic: bool,
    temperature: float,
) -> dict[str, Any]:  # fmt: skip
    """How the op drew its samples, as the reference takes it."""
    noise_samples = num_samples // 2 if antithetic else num_samples
    shape = _with_samples(posterior_shape(mean, scale, packed_dim), noise_samples)
    return {
        "num_samples": num_samples or None,
        "antithetic": antithetic,
        "temperature": temperature,
        "noise": _ops.gaussian_noise(key, shape, accumulate_dtype(mean)),
    }


def _sample_gradients(grad, mean, scale, key, scale_type, packed_dim, mode, low, high, *draw):
    options = reference_options(scale_type, packed_dim, False, mode, low, high)
    options |= _draw_options(mean, scale, key, packed_dim, *draw)
    return gradient_of(lambda *tensors: reference.gaussian_sample(*tensors, **options), (mean, scale), grad)


def _sample_kl_gradients(grad_z, grad_kl, mean, scale, prior_mean, prior_scale, mask, key, *options):
    chosen, draw, reduction, prior_gradient = reference_options(*options[:6]), options[6:9], options[9:-1], options[-1]
    drawn = _draw_options(mean, scale, key, options[1], *draw)

    def sample_kl(*tensors: Any) -> Any:
        mean, scale, prior_mean, prior_scale = tensors
        z, _ = reference.gaussian_sample_kl(mean, scale, prior_mean, prior_scale, mask=mask, **chosen, **drawn)
        return z, reference_kl(tensors, mask, chosen, *reduction)

    grads = gradient_of(sample_kl, (mean, scale, prior_mean, prior_scale), (grad_z, grad_kl))
    return grads if prior_gradient else [*grads[:2], None, None]


def _log_prob_gradients(
    grad_z, grad_kl, grad_log_q, grad_log_p, gate, mean, scale, prior_mean, prior_scale, key, *options
):
    chosen, draw, (path_only, prior_gradient) = reference_options(*options[:6]), options[6:9], options[9:]
    drawn = _draw_options(mean, scale, key, options[1], *draw)
    drawn |= {"path_only": path_only, "gate": gate}

    def sample_log_prob(mean: Any, scale: Any, prior_mean: Any, prior_scale: Any) -> Any:
        return reference.gaussian_sample_log_prob(mean, scale, prior_mean, prior_scale, **chosen, **drawn)

    tensors, grads = (mean, scale, prior_mean, prior_scale), (grad_z, grad_kl, grad_log_q, grad_log_p)
    found = gradient_of(sample_log_prob, tensors, grads)
    return found if prior_gradient else [*found[:2], None, None]


register_second_order("gaussian_sample_backward", _sample_gradients)
register_second_order("gaussian_sample_kl_backward", _sample_kl_gradients)
register_second_order("gaussian_sample_log_prob_backward", _log_prob_gradients)

for _name in ("gaussian_sample", "gaussian_sample_kl", "gaussian_sample_log_prob"):
    register_autocast(_name)
    register_vmap_by_loop(_name)
    register_vmap_by_loop(f"{_name}_backward")
register_vmap_by_loop("gaussian_noise")
