"""A sparse dictionary for the hidden activations of a trained network."""

from __future__ import annotations

from torch import Tensor, nn

from isthmus.nn import SAEOutput, TopKSAE


class SparseAutoencoder(nn.Module):
    """Explain a layer of a frozen network by k active features out of many.

    The network is cut in two, a body that makes the activations a and a head that reads them:

        a = body(x),    a ≈ â = pre_bias + Σᵢ vᵢ · decoder[fᵢ],    (v, f) = topk(features(a)).

    Trained on the fraction of the variance of a that â leaves unexplained. :meth:`spliced` runs
    the head on â instead of a: what the network still can do through the dictionary is the part
    of its behaviour that the features explain.

    Args:
        body: inputs to activations ``[..., D]``; frozen here.
        head: activations to outputs; frozen here.
        dim: size D of the activations.
        num_features: size F of the dictionary.
        k: features active per row.
        aux_k: dead features per row in the auxiliary loss; ``None`` means D / 2, at most F.
        dead_after: rows without firing after which a feature counts as dead.

    Shapes:
        activations ``[..., D]``; values and indices of the output ``[..., k]``.

    Source: Gao et al., Scaling and evaluating sparse autoencoders, 2024.

    Example:
        >>> import torch
        >>> from isthmus.models import SparseAutoencoder
        >>> body, head = torch.nn.Linear(64, 32), torch.nn.Linear(32, 10)
        >>> model, x = SparseAutoencoder(body, head, dim=32, num_features=128, k=4), torch.rand(5, 64)
        >>> model(model.activations(x)).loss.backward()
        >>> model.spliced(x).shape
        torch.Size([5, 10])
    """

    def __init__(
        self,
        body: nn.Module,
        head: nn.Module,
        *,
        dim: int,
        num_features: int,
        k: int,
        aux_k: int | None = None,
        dead_after: int = 10_000_000,
    ) -> None:
        super().__init__()
        self.body = body.requires_grad_(False)
        self.head = head.requires_grad_(False)
        self.bottleneck = TopKSAE(dim, num_features, k, aux_k=aux_k, dead_after=dead_after)

    def forward(self, activations: Tensor) -> SAEOutput:
        """Reconstruct activations, which a training loop may have computed once for all."""
        return self.bottleneck(activations)

    def activations(self, x: Tensor) -> Tensor:
        """What the body makes of inputs ``x``."""
        return self.body(x)

    def spliced(self, x: Tensor) -> Tensor:
        """Outputs of the network with the reconstruction in place of the activations."""
        return self.head(self(self.activations(x)).reconstruction)
