"""Linear layers whose weights are independent Gaussians."""

import torch
from torch import Tensor
from torch.nn.functional import linear

from isthmus.reference._numeric import standard_deviation, widen

__all__ = ["bayes_linear"]


def bayes_linear(
    x: Tensor,
    weight_mean: Tensor,
    weight_scale: Tensor,
    bias_mean: Tensor | None = None,
    bias_scale: Tensor | None = None,
    *,
    scale_type: str = "softplus",
    estimator: str = "weight",
    noise: Tensor,
    bias_noise: Tensor | None = None,
) -> Tensor:
    """A linear layer with W ~ N(weight_mean, s(weight_scale)^2), and a bias of the same kind.

    Two unbiased estimators of the same layer:

    - "weight" draws one W for the whole batch (Blundell et al., "Weight uncertainty in neural
      networks", 2015): ``x @ (mean + s * noise).T + (bias_mean + s_bias * bias_noise)``.
    - "local" draws each output from its own distribution (Kingma et al., "Variational dropout
      and the local reparameterization trick", 2015), which has less variance:
      ``x @ mean.T + bias_mean + sqrt(x^2 @ (s^2).T + s_bias^2) * noise``. Where the variance is 0
      its root gets the gradient 0, where autograd would make NaN.

    A bias without ``bias_scale`` is an ordinary one. Gradients flow to every tensor but the noise.

    Args:
        x: shape [..., D].
        weight_mean, weight_scale: shape [F, D]; ``scale_type`` says what a scale stands for.
        bias_mean, bias_scale: shape [F], or ``None``.
        noise: [F, D] for "weight"; the shape of the result for "local".
        bias_noise: [F], for "weight" with a ``bias_scale``.

    Returns:
        Shape [..., F], dtype of ``x``.

    Raises:
        ValueError: unknown ``scale_type`` or ``estimator``, noise that is missing or of another
            shape, or ``bias_scale`` without ``bias_mean``.

    Example:
        >>> x, mean, std = torch.ones(2, 3), torch.ones(4, 3), torch.ones(4, 3)
        >>> bayes_linear(x, mean, std, scale_type="std", noise=torch.ones(4, 3))
        tensor([[6., 6., 6., 6.],
                [6., 6., 6., 6.]])
    """
    if bias_scale is not None and bias_mean is None:
        raise ValueError("bias_mean is None; expected a tensor, as bias_scale is given")
    wide, mean = widen(x), widen(weight_mean)
    std = standard_deviation(widen(weight_scale), scale_type)
    bias = None if bias_mean is None else widen(bias_mean)
    bias_std = None if bias_scale is None else standard_deviation(widen(bias_scale), scale_type)

    if estimator == "weight":
        weight = mean + std * _wide_noise("noise", noise, mean.shape)
        if bias is not None and bias_std is not None:
            bias = bias + bias_std * _wide_noise("bias_noise", bias_noise, bias.shape)
        out = linear(wide, weight, bias)
    elif estimator == "local":
        bias_variance = None if bias_std is None else bias_std.square()
        variance = linear(wide.square(), std.square(), bias_variance)
        out = linear(wide, mean, bias)
        out = out + _root(variance) * _wide_noise("noise", noise, out.shape)
    else:
        raise ValueError(f"estimator is {estimator!r}; expected 'weight' or 'local'")
    return out.to(x.dtype)


def _root(variance: Tensor) -> Tensor:
    zero = variance == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, variance).sqrt())


def _wide_noise(name: str, noise: Tensor | None, shape: torch.Size) -> Tensor:
    if noise is None or noise.shape != shape:
        came = "None" if noise is None else f"of shape {list(noise.shape)}"
        raise ValueError(f"{name} is {came}; expected shape {list(shape)}")
    return widen(noise)
