"""Normal and LogNormal with one-kernel samples, densities and divergences."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor, distributions
from torch.distributions import constraints
from torch.distributions.kl import register_kl
from torch.distributions.utils import broadcast_all, lazy_property

from isthmus import ops
from isthmus.distributions._sampling import ReparameterizedFromKey
from isthmus.ops._arguments import check_choice

__all__ = ["LogNormal", "Normal"]

_STANDARD_DEVIATION = {
    "logvar": lambda scale: (0.5 * scale).exp(),
    "std": lambda scale: scale,
    "softplus": lambda scale: torch.logaddexp(scale, torch.zeros_like(scale)),
    "square": lambda scale: scale.square(),
}


class Normal(ReparameterizedFromKey, distributions.Normal):
    """``torch.distributions.Normal`` on fused kernels: change the import and nothing else.

    ``rsample`` is one pass each way, whose noise is drawn again in backward instead of stored; ``log_prob`` and
    ``kl_divergence`` are one pass each way and keep every digit near the prior. Everything of torch's class works:
    ``Independent``, ``expand``, transforms, ``validate_args``, ``cdf``, the other registered divergences.

    Made by ``from_logvar`` (or ``from_parameters``), the standard deviation is never formed unless somebody asks for
    ``scale``.

    Args:
        loc: mean; number or tensor.
        scale: standard deviation; number or tensor, broadcastable with ``loc``.
        validate_args: as in torch.

    Raises:
        ValueError: an argument is not valid, where validation is on.

    Example:
        >>> from isthmus.distributions import Normal
        >>> q, p = Normal.from_logvar(torch.zeros(2, 3), torch.zeros(2, 3)), Normal(0.0, 1.0)
        >>> torch.distributions.kl_divergence(q, p).sum()
        tensor(0.)
        >>> q.rsample((5,), key=isthmus.key(0)).shape
        torch.Size([5, 2, 3])
    """

    _scale_type = "std"
    _parameter: Tensor  # the scale as it was given, where it is not the standard deviation

    @classmethod
    def from_logvar(cls, mean: Tensor, logvar: Tensor, validate_args: bool | None = None) -> "Normal":
        """N(mean, exp(logvar)): what most encoders return.

        Example:
            >>> Normal.from_logvar(torch.zeros(2), torch.zeros(2)).scale
            tensor([1., 1.])
        """
        return cls.from_parameters(mean, logvar, "logvar", validate_args)

    @classmethod
    def from_parameters(
        cls, mean: Tensor, scale: Tensor, scale_type: str, validate_args: bool | None = None
    ) -> "Normal":
        """N(mean, s²) with s given as in the ops: "logvar" (s = exp(scale/2)), "std", "softplus" or "square".

        Example:
            >>> Normal.from_parameters(torch.zeros(2), torch.full((2,), 3.0), "square").scale
            tensor([9., 9.])
        """
        check_choice("scale_type", scale_type, tuple(_STANDARD_DEVIATION))
        if scale_type == "std":
            return cls(mean, scale, validate_args)
        made = cls.__new__(cls)
        made.loc, made._parameter = broadcast_all(mean, scale)
        made._scale_type = scale_type
        distributions.Distribution.__init__(made, made.loc.shape, validate_args=validate_args)
        if made._validate_args and not constraints.real.check(made._parameter).all():
            raise ValueError(f"scale of type {scale_type!r} holds NaN; expected real numbers")
        return made

    @lazy_property
    def scale(self) -> Tensor:  # type: ignore[override]
        return _STANDARD_DEVIATION[self._scale_type](self._parameter)

    @property
    def parameters(self) -> tuple[Tensor, Tensor, str]:
        """(mean, scale, scale_type), as the ops take them."""
        return self.loc, self.scale if self._scale_type == "std" else self._parameter, self._scale_type

    def expand(self, batch_shape: Any, _instance: Any = None) -> "Normal":
        new = self._get_checked_instance(Normal, _instance)
        loc, scale, new._scale_type = self.parameters
        new.loc = loc.expand(batch_shape)
        setattr(new, "scale" if new._scale_type == "std" else "_parameter", scale.expand(batch_shape))
        distributions.Distribution.__init__(new, torch.Size(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new

    def rsample(
        self, sample_shape: Sequence[int] = (), *, generator: Generator | None = None, key: Tensor | None = None
    ) -> Tensor:
        """A differentiable sample: ``gaussian_sample`` of the parameters.

        Args:
            sample_shape: as in torch.
            generator: where a fresh key is drawn from. Default: torch's generator of the device.
            key: int64 [2]; the noise of element i of the result is ``gaussian_noise(key, …)[i]``.

        Returns:
            [*sample_shape, *batch_shape].
        """
        shape = self._extended_shape(torch.Size(sample_shape))
        samples = math.prod(sample_shape)
        if samples == 0:
            return self.loc.new_empty(shape)
        mean, scale, scale_type = self.parameters
        z = ops.gaussian_sample(mean, scale, scale_type=scale_type, num_samples=samples, key=key, generator=generator)
        return z.view(shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """log N(value; loc, scale²), elementwise. float32 for half types."""
        return self.reduced_log_prob(value, "none")

    def reduced_log_prob(self, value: Tensor, reduction: str) -> Tensor:
        """``log_prob`` summed in the same pass: "none", "row" (over the last dimension), "sum" or "mean" (of rows)."""
        if self._validate_args:
            self._validate_sample(value)
        mean, scale, scale_type = self.parameters
        value, mean, scale = _of_one_dtype(value, mean, scale)
        return -ops.gaussian_nll(value, mean, scale, scale_type=scale_type, reduction=reduction)

    def entropy(self) -> Tensor:
        """0.5 (1 + log 2π) + log scale, elementwise."""
        _, scale, scale_type = self.parameters
        log_std = 0.5 * scale if scale_type == "logvar" else self.scale.log()
        return 0.5 * (1 + math.log(2 * math.pi)) + log_std


class LogNormal(ReparameterizedFromKey, distributions.LogNormal):
    """``torch.distributions.LogNormal`` on this package's ``Normal``.

    Example:
        >>> x = LogNormal(torch.zeros(3), torch.ones(3)).rsample((2,), key=isthmus.key(0))
        >>> (x > 0).all()
        tensor(True)
    """

    base_dist: Normal

    def __init__(self, loc: Tensor | float, scale: Tensor | float, validate_args: bool | None = None) -> None:
        base = Normal(loc, scale, validate_args=validate_args)
        distributions.TransformedDistribution.__init__(
            self, base, distributions.transforms.ExpTransform(), validate_args=validate_args
        )

    def rsample(
        self, sample_shape: Sequence[int] = (), *, generator: Generator | None = None, key: Tensor | None = None
    ) -> Tensor:
        """A differentiable sample: the exponential of the base's."""
        return self.base_dist.rsample(sample_shape, generator=generator, key=key).exp()


def _of_one_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The ops take one dtype; torch's distributions promote."""
    dtype = tensors[0].dtype
    for t in tensors[1:]:
        dtype = torch.promote_types(dtype, t.dtype)
    return tuple(t.to(dtype) for t in tensors)


def _parameters(d: distributions.Normal) -> tuple[Tensor, Tensor, str]:
    return d.parameters if isinstance(d, Normal) else (d.loc, d.scale, "std")


def normal_kl(q: distributions.Normal, p: distributions.Normal, reduction: str) -> Tensor:
    """KL(q ‖ p) by ``gaussian_kl``, whatever the two are made from; ``reduction`` as there."""
    mean, scale, scale_type = _parameters(q)
    prior_mean, prior_scale, prior_type = _parameters(p)
    if scale_type != prior_type:
        scale, prior_scale, scale_type = _log_variance(q), _log_variance(p), "logvar"
    tensors = _of_one_dtype(mean, scale, prior_mean, prior_scale)
    return ops.gaussian_kl(*tensors, scale_type=scale_type, reduction=reduction)


@register_kl(Normal, Normal)
@register_kl(Normal, distributions.Normal)
@register_kl(distributions.Normal, Normal)
def _normal_normal(q: distributions.Normal, p: distributions.Normal) -> Tensor:
    return normal_kl(q, p, "none")


def _log_variance(d: distributions.Normal) -> Tensor:
    _, scale, scale_type = _parameters(d)
    return scale if scale_type == "logvar" else 2 * d.scale.log()
