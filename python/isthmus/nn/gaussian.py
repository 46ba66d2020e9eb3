"""The bottleneck of a variational autoencoder: features in, a Gaussian sample and its KL out."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Generator, Tensor, nn

from isthmus import ops

_UNCONSTRAINED = ("logvar", "softplus", "square")


def require_unconstrained(scale_type: str) -> None:
    """Raise ``ValueError`` unless every real scale parameter means a standard deviation.

    ``"std"`` is refused: nothing keeps a learned or projected value positive, and the first
    negative one turns the KL into NaN.
    """
    if scale_type not in _UNCONSTRAINED:
        raise ValueError(f"scale_type must be one of {_UNCONSTRAINED}, got {scale_type!r}")


class GaussianBottleneckOutput(NamedTuple):
    """What :class:`GaussianBottleneck` returns."""

    z: Tensor
    kl: Tensor
    mean: Tensor
    scale: Tensor


class GaussianBottleneck(nn.Module):
    """Project features to a diagonal Gaussian, sample it and measure its KL divergence.

    One linear layer gives the mean and the scale of q(z|x) = N(mean, s²); one op draws
    z = mean + temperature · s · noise and computes KL(q ‖ p) in nats in the same pass. Backward
    regenerates the noise from its 16-byte key.

    Sampling stays on in ``eval()``: the module cannot know whether it evaluates a bound or
    encodes. For a deterministic code use ``mean`` of the output.

    Args:
        in_features: size D_in of the last dimension of the input.
        latent_features: size D of the latent.
        scale_type: how the projected scale means a standard deviation s: ``"logvar"``
            s = exp(scale/2), ``"softplus"`` s = softplus(scale), ``"square"`` s = scale².
        options: how posterior and divergence are shaped, as :func:`isthmus.ops.gaussian_sample_kl` takes
            it: ``reduction``, ``residual``, ``clamp``, ``free_bits``, ``balance``, ….

    Raises:
        ValueError: ``scale_type`` admits values that are no standard deviation (``"std"``).

    Shapes:
        x ``[..., D_in]``; mean, scale ``[..., D]``; z ``[..., D]`` or ``[num_samples, ..., D]``;
        kl ``[...]``, or what ``reduction`` makes of it.

    Source: Kingma and Welling, Auto-Encoding Variational Bayes, ICLR 2014.

    Example:
        >>> import torch, isthmus
        >>> bottleneck = isthmus.nn.GaussianBottleneck(32, 8)
        >>> z, kl, mean, scale = bottleneck(torch.randn(5, 32))
        >>> z.shape, kl.shape
        (torch.Size([5, 8]), torch.Size([5]))
    """

    def __init__(
        self,
        in_features: int,
        latent_features: int,
        *,
        scale_type: str = "logvar",
        **options: Any,
    ) -> None:
        require_unconstrained(scale_type)
        super().__init__()
        self.in_features = in_features
        self.latent_features = latent_features
        self.scale_type = scale_type
        self.options = options
        self.projection = nn.Linear(in_features, 2 * latent_features)

    def forward(
        self,
        x: Tensor,
        prior_mean: Tensor | None = None,
        prior_scale: Tensor | None = None,
        *,
        num_samples: int | None = None,
        temperature: float = 1.0,
        key: Tensor | None = None,
        generator: Generator | None = None,
    ) -> GaussianBottleneckOutput:
        """Encode ``x``; arguments after it are those of :func:`isthmus.ops.gaussian_sample_kl`.

        The prior is N(0, 1), or, where the two tensors are given, N(prior_mean, s_prior²) with
        ``prior_scale`` read by the same ``scale_type``; gradients reach both.
        """
        packed = self.projection(x)  # read and differentiated as one tensor: nothing is split or joined
        z, kl = ops.gaussian_sample_kl(
            packed,
            None,
            prior_mean,
            prior_scale,
            scale_type=self.scale_type,
            num_samples=num_samples,
            temperature=temperature,
            key=key,
            generator=generator,
            **self.options,
        )
        return GaussianBottleneckOutput(z, kl, *packed.chunk(2, dim=-1))

    def extra_repr(self) -> str:
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        return f"{self.in_features}, {self.latent_features}, scale_type={self.scale_type!r}{options}"
