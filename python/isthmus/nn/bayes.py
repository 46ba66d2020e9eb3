"""Linear layers whose weights are Gaussian distributions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Generator, Tensor, nn

from isthmus import ops

from .gaussian import require_unconstrained

# A trained weight of exactly 0 would become a point mass, whose KL is infinite.
_SMALLEST_STD = 1e-4


class BayesLinear(nn.Module):
    """Linear layer with independent Gaussian weights N(mean, s²), s given by a scale parameter.

    Every forward draws fresh weights, in ``train()`` and in ``eval()``: the predictive
    distribution is the point of the layer. Set ``deterministic = True``, or use
    :func:`mean_only` on a whole model, to compute with the means alone.

    ``estimator`` chooses what is drawn:

    - ``"weight"``: one weight matrix for the whole batch, generated inside the product.
    - ``"local"``: the Gaussian of each output, independently per row. Its gradient has less
      variance; its rows are not the outputs of one network.

    Noise is a function of its key, so several forwards before one backward are each
    differentiated with their own noise.

    Loss: :meth:`kl` is a sum over all weights, in nats. With a data term that is a mean over rows,
    add ``kl / (number of training rows)``.

    Args:
        in_features: size D of the last dimension of the input.
        out_features: size F of the output.
        bias: whether to add a (Gaussian) bias.
        scale_type: how a scale parameter means a standard deviation s: ``"softplus"``
            s = softplus(scale), ``"logvar"`` s = exp(scale/2), ``"square"`` s = scale².
        estimator: ``"weight"`` or ``"local"``.
        prior_std: standard deviation of the prior N(0, prior_std²) of every weight and bias.
        init_std: initial standard deviation of every weight and bias.

    Raises:
        ValueError: an argument is outside its range.

    Shapes:
        x ``[..., D]``; out ``[..., F]``; weight_mean, weight_scale ``[F, D]``; bias_mean,
        bias_scale ``[F]``; kl ``[]``.

    Source: Blundell et al., Weight Uncertainty in Neural Networks, ICML 2015; ``"local"``: Kingma
    et al., Variational Dropout and the Local Reparameterization Trick, NeurIPS 2015.

    Example:
        >>> import torch, isthmus
        >>> layer = isthmus.nn.BayesLinear(16, 3)
        >>> x, target = torch.randn(8, 16), torch.randint(3, (8,))
        >>> loss = torch.nn.functional.cross_entropy(layer(x), target) + layer.kl() / 1000
        >>> loss.backward()
        >>> with isthmus.nn.mean_only(layer):
        ...     torch.equal(layer(x), layer(x))
        True
    """

    prior_mean: Tensor
    prior_scale: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        scale_type: str = "softplus",
        estimator: str = "weight",
        prior_std: float = 1.0,
        init_std: float = 0.05,
    ) -> None:
        require_unconstrained(scale_type)
        if estimator not in ("weight", "local"):
            raise ValueError(f"estimator must be 'weight' or 'local', got {estimator!r}")
        for name, std in (("prior_std", prior_std), ("init_std", init_std)):
            if not 0.0 < std < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {std}")
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.scale_type = scale_type
        self.estimator = estimator
        self.deterministic = False
        bound = 1.0 / math.sqrt(in_features) if in_features > 0 else 0.0
        scale = scale_parameter(torch.tensor(init_std), scale_type)
        weight = torch.empty(out_features, in_features).uniform_(-bound, bound)
        self.weight_mean = nn.Parameter(weight)
        self.weight_scale = nn.Parameter(scale.expand_as(weight).clone())
        if bias:
            self.bias_mean = nn.Parameter(torch.empty(out_features).uniform_(-bound, bound))
            self.bias_scale = nn.Parameter(scale.expand(out_features).clone())
        else:
            self.register_parameter("bias_mean", None)
            self.register_parameter("bias_scale", None)
        self.register_buffer("prior_mean", torch.zeros(()))
        self.register_buffer("prior_scale", scale_parameter(torch.tensor(prior_std), scale_type))

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, relative_std: float = 0.1, **options: Any) -> BayesLinear:
        """Start from a trained layer: means are its weights, s = relative_std · |weight|.

        ``options`` are keyword arguments of the constructor except ``init_std``. The prior stays
        centred at 0. Follows Krishnan et al., Specifying weight priors in Bayesian deep neural
        networks with empirical Bayes, AAAI 2020, in the initialisation only.

        Example:
            >>> import torch, isthmus
            >>> linear = torch.nn.Linear(4, 2)
            >>> layer = isthmus.nn.BayesLinear.from_linear(linear, estimator="local")
            >>> torch.equal(layer.weight_mean, linear.weight)
            True
        """
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, **options)
        layer.to(linear.weight)
        with torch.no_grad():
            for name, trained in linear.named_parameters():
                std = (relative_std * trained.abs()).clamp_min(_SMALLEST_STD)
                getattr(layer, f"{name}_mean").copy_(trained)
                getattr(layer, f"{name}_scale").copy_(scale_parameter(std, layer.scale_type))
        return layer

    def forward(self, x: Tensor, *, key: Tensor | None = None, generator: Generator | None = None) -> Tensor:
        """``[..., D]`` to ``[..., F]`` with fresh noise, or that of ``key`` where one is given."""
        if self.deterministic:
            return nn.functional.linear(x, self.weight_mean, self.bias_mean)
        return ops.bayes_linear(
            x,
            self.weight_mean,
            self.weight_scale,
            self.bias_mean,
            self.bias_scale,
            scale_type=self.scale_type,
            estimator=self.estimator,
            key=key,
            generator=generator,
        )

    def kl(self) -> Tensor:
        """KL(posterior ‖ prior) in nats, summed over all weights and biases: a scalar."""
        total = self._kl(self.weight_mean, self.weight_scale)
        if self.bias_mean is not None:
            total = total + self._kl(self.bias_mean, self.bias_scale)
        return total

    def _kl(self, mean: Tensor, scale: Tensor) -> Tensor:
        return ops.gaussian_kl(
            mean,
            scale,
            self.prior_mean,
            self.prior_scale,
            scale_type=self.scale_type,
            reduction="sum",
        )

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, bias={self.bias_mean is not None}, "
            f"scale_type={self.scale_type!r}, estimator={self.estimator!r}"
        )


@contextmanager
def mean_only(model: nn.Module) -> Iterator[None]:
    """Make every Bayesian layer of ``model`` use its mean weights inside the ``with`` block.

    Example:
        >>> import torch, isthmus
        >>> model = torch.nn.Sequential(isthmus.nn.BayesLinear(4, 2), torch.nn.ReLU())
        >>> with isthmus.nn.mean_only(model):
        ...     out = model(torch.randn(3, 4))
        >>> model[0].deterministic
        False
    """
    layers = [layer for layer in model.modules() if isinstance(layer, BayesLinear) and not layer.deterministic]
    for layer in layers:
        layer.deterministic = True
    try:
        yield
    finally:
        for layer in layers:
            layer.deterministic = False


def scale_parameter(std: Tensor, scale_type: str) -> Tensor:
    """The scale parameter that means the standard deviation ``std``."""
    if scale_type == "logvar":
        return 2.0 * std.log()
    if scale_type == "square":
        return std.sqrt()
    # Inverse softplus, log(exp(s) - 1), in a form that neither overflows nor cancels.
    return std + torch.log(-torch.expm1(-std))
