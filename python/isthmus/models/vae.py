"""The variational autoencoder."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from isthmus.nn import GaussianBottleneck


class VAEOutput(NamedTuple):
    """What :class:`VAE` returns."""

    logits: Tensor
    kl: Tensor


class VAE(nn.Module):
    """Encode a vector as a Gaussian, sample it, decode the sample.

    Trained on the negative evidence lower bound of a data vector x,

        −log p(x) ≤ E[−log p(x | z)] + KL(q(z | x) ‖ N(0, 1)),    z ~ q(z | x) = N(mean(x), s(x)²).

    ``logits`` parametrise p(x | z); which likelihood they mean is the caller's choice, so the
    loss is too: ``(nll(logits, x) + kl).mean()``.

    Args:
        features: size D of a data vector.
        hidden: width H of the one hidden layer of encoder and decoder.
        latent: size L of z.

    Shapes:
        x ``[..., D]``; logits ``[..., D]``; kl ``[...]``, in nats; z ``[..., L]``.

    Source: Kingma and Welling, Auto-Encoding Variational Bayes, ICLR 2014.

    Example:
        >>> import torch
        >>> from isthmus.models import VAE
        >>> model, x = VAE(64, 32, 8), torch.rand(5, 64)
        >>> logits, kl = model(x)
        >>> nll = torch.nn.functional.binary_cross_entropy_with_logits(
        ...     logits, x, reduction="none"
        ... ).sum(-1)
        >>> (nll + kl).mean().backward()
        >>> model.decode(torch.randn(3, 8)).shape
        torch.Size([3, 64])
    """

    def __init__(self, features: int, hidden: int, latent: int) -> None:
        super().__init__()
        self.latent = latent
        self.encoder = nn.Sequential(nn.Linear(features, hidden), nn.SiLU())
        self.bottleneck = GaussianBottleneck(hidden, latent)
        self.decoder = nn.Sequential(nn.Linear(latent, hidden), nn.SiLU(), nn.Linear(hidden, features))

    def forward(self, x: Tensor) -> VAEOutput:
        """One sample of z for every row of ``x``, and its KL divergence."""
        z, kl, _, _ = self.bottleneck(self.encoder(x))
        return VAEOutput(self.decode(z), kl)

    def decode(self, z: Tensor) -> Tensor:
        """Logits of p(x | z); z ~ N(0, 1) makes them a sample from the model."""
        return self.decoder(z)

    def reconstruct(self, x: Tensor) -> Tensor:
        """Logits at the mean of q(z | x), without sampling."""
        return self.decode(self.bottleneck(self.encoder(x)).mean)
