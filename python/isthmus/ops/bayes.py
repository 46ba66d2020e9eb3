"""Linear layers whose weights are Gaussian: the weight is generated inside the product, never stored."""

import torch
from torch import Generator, Tensor

from isthmus import reference
from isthmus.ops._arguments import check_choice, key_for
from isthmus.ops._register import (
    eager,
    gradient_of,
    none_if_absent,
    register_gradient,
    register_second_order,
    register_vmap_by_loop,
)
from isthmus.random import fold_in

_ops = torch.ops.isthmus


def bayes_linear(
    x: Tensor,
    weight_mean: Tensor,
    weight_scale: Tensor,
    bias_mean: Tensor | None = None,
    bias_scale: Tensor | None = None,
    *,
    scale_type: str = "softplus",
    estimator: str = "weight",
    key: Tensor | None = None,
    generator: Generator | None = None,
) -> Tensor:
    """A linear layer with independent Gaussian weights N(weight_mean, s²), and a bias of the same kind.

    Two unbiased estimators of the same layer:

    - "weight" draws one weight for the whole batch (Blundell et al., Weight Uncertainty in Neural Networks, ICML
      2015): out = x Wᵀ + b with W = weight_mean + s · noise, b = bias_mean + s_b · noise. The rows are outputs of one
      network; the noise is ``gaussian_noise(key, [F, D])`` and ``gaussian_noise(fold_in(key, 1), [F])``.
    - "local" draws every output from its own distribution (Kingma et al., Variational Dropout and the Local
      Reparameterization Trick, NeurIPS 2015): out = x weight_meanᵀ + bias_mean + √(x² (s²)ᵀ + s_b²) · noise, with
      ``gaussian_noise(key, [N, F])``. Gradients have less variance, at two products instead of one.

    Neither W nor s nor the noise is stored, in either direction: backward draws the same noise again from 16 bytes.
    2·N·D·F operations forward ("local": twice that), twice as many backward.

    Args:
        x: [..., D]; float32, float64, bfloat16 or float16. N is the number of its rows.
        weight_mean, weight_scale: [F, D], dtype of ``x``; ``scale_type`` says what a scale means.
        bias_mean, bias_scale: [F]. A ``bias_mean`` without ``bias_scale`` is an ordinary bias.
        scale_type: "logvar" (s = exp(scale/2)), "std" (s = scale), "softplus" (s = softplus(scale)) or
            "square" (s = scale²).
        estimator: "weight" or "local".
        key: int64 [2]. Default: a fresh key drawn from ``generator``, or from torch's generator of the device.
        generator: where a fresh key is drawn from.

    Returns:
        out, [..., F], dtype of ``x``. Half types accumulate in float32. Under autocast the op runs in the lower
        precision, like ``torch.nn.functional.linear``.

    Gradients:
        To ``x``, both weights and both biases; twice differentiable. Backward of "local" uses a temporary of the size
        of the output. Where an output of "local" has no variance (a zero row of ``x``, no ``bias_scale``) the root
        has no slope: no gradient flows through it, where autograd would make NaN.

    Raises:
        ValueError: an option is none of its choices, or key and generator are both given.
        RuntimeError: dtypes, devices or shapes do not fit, or ``bias_scale`` comes without ``bias_mean``.

    Example:
        >>> x, mean, scale = torch.ones(2, 3), torch.zeros(4, 3), torch.ones(4, 3)
        >>> out = bayes_linear(x, mean, scale, scale_type="std", key=isthmus.key(7))
        >>> weight = isthmus.ops.gaussian_noise(isthmus.key(7), (4, 3))
        >>> torch.allclose(out, torch.nn.functional.linear(x, weight))
        True
    """
    check_choice("scale_type", scale_type, ("logvar", "std", "softplus", "square"))
    check_choice("estimator", estimator, ("weight", "local"))
    key = key_for(x, key, generator)
    tensors = _autocast(x, weight_mean, weight_scale, bias_mean, bias_scale)
    return _bayes_linear(*tensors, key, scale_type, estimator)


def _autocast(x: Tensor, *parameters: Tensor | None) -> tuple[Tensor | None, ...]:
    """Under autocast, the tensors in the lower precision. torch.library can register a fixed dtype only."""
    tensors, device = (x, *parameters), x.device.type
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)


# ---- shapes without data ---------------------------------------------------------------------------------------------


@torch.library.register_fake("isthmus::bayes_linear")
def _(x, weight_mean, weight_scale, bias_mean, bias_scale, key, scale_type, estimator):
    return x.new_empty([*x.shape[:-1], weight_mean.shape[0]])


@torch.library.register_fake("isthmus::bayes_linear_backward")
def _(grad, x, weight_mean, weight_scale, bias_scale, key, scale_type, estimator):
    features = weight_mean.shape[:1]
    shapes = (
        x.shape,
        weight_mean.shape,
        weight_mean.shape,
        features,
        (0,) if bias_scale is None else features,
    )
    return tuple(x.new_empty(shape) for shape in shapes)


# ---- gradients -------------------------------------------------------------------------------------------------------

_bayes_linear_backward = eager("bayes_linear_backward")


def _setup(ctx, inputs, output):
    x, weight_mean, weight_scale, bias_mean, bias_scale, key, *ctx.options = inputs
    ctx.has_bias = bias_mean is not None
    ctx.save_for_backward(x, weight_mean, weight_scale, bias_scale, key)


def _backward(ctx, grad):
    *tensors, key = ctx.saved_tensors
    *grads, grad_bias_mean, grad_bias_scale = _bayes_linear_backward(grad, *tensors, key, *ctx.options)
    grad_bias_mean = none_if_absent(grad_bias_mean, ctx.has_bias)
    grad_bias_scale = none_if_absent(grad_bias_scale, tensors[-1] is not None)
    return *grads, grad_bias_mean, grad_bias_scale, None, None, None


_bayes_linear = register_gradient("bayes_linear", _backward, _setup)


def _gradients(grad, x, weight_mean, weight_scale, bias_scale, key, scale_type, estimator):
    stream = torch.float64 if x.dtype == torch.float64 else torch.float32
    noise_shape = grad.shape if estimator == "local" else weight_mean.shape
    noise = _ops.gaussian_noise(key, noise_shape, stream)
    bias_noise = _ops.gaussian_noise(fold_in(key, 1), weight_mean.shape[:1], stream)

    def linear(x, weight_mean, weight_scale, bias_mean, bias_scale):
        return reference.bayes_linear(
            x,
            weight_mean,
            weight_scale,
            bias_mean,
            bias_scale,
            scale_type=scale_type,
            estimator=estimator,
            noise=noise,
            bias_noise=bias_noise,
        )

    # The gradient does not depend on the mean of the bias; any will do.
    bias_mean = x.new_zeros(weight_mean.shape[:1], requires_grad=True)
    return gradient_of(linear, (x, weight_mean, weight_scale, bias_mean, bias_scale), grad)


register_second_order("bayes_linear_backward", _gradients)
register_vmap_by_loop("bayes_linear")
register_vmap_by_loop("bayes_linear_backward")
