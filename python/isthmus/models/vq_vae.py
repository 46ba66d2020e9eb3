"""The vector-quantized autoencoder of pictures."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from isthmus.nn import VectorQuantizer


class VQVAEOutput(NamedTuple):
    """What :class:`VQVAE` returns."""

    logits: Tensor
    indices: Tensor
    loss: Tensor


class VQVAE(nn.Module):
    """Write a square picture as a few words of a learned vocabulary, and read it back.

    Every patch becomes a vector e, every vector its nearest code c(e), and all codes of a picture
    together are decoded. The loss is

        −log p(x | c(e)) + loss,    loss = commitment_weight · |e − sg(c(e))|²

    with the gradient of the first term passed straight through to e, sg the stop-gradient and
    moving averages for the codes. ``loss`` is the mean over patches; ``logits`` parametrise
    p(x | c(e)), whose likelihood is the caller's choice.

    Patches overlap by half and pad the border by a quarter of a patch.

    Args:
        side: pixels along a side of the picture, so D = side².
        patch: pixels along a side of a patch, a multiple of 4. T = (2 · side / patch)² of them.
        hidden: width of the hidden layer that every patch passes through.
        num_codes: size of the vocabulary.
        code_dim: size of a code.
        decoder_hidden: width of the decoder's hidden layer.

    Raises:
        ValueError: ``patch`` is no multiple of 4, or half of it does not divide ``side``.

    Shapes:
        x ``[N, D]``; logits ``[N, D]``; indices int64 ``[N, T]``; loss ``[]``.

    Source: van den Oord et al., Neural Discrete Representation Learning, NeurIPS 2017.

    Example:
        >>> import torch
        >>> from isthmus.models import VQVAE
        >>> model = VQVAE(side=8, patch=4, hidden=32, num_codes=16, code_dim=4, decoder_hidden=32)
        >>> logits, indices, loss = model(torch.rand(5, 64))
        >>> logits.shape, indices.shape
        (torch.Size([5, 64]), torch.Size([5, 16]))
        >>> model.decode(indices).shape
        torch.Size([5, 64])
    """

    def __init__(
        self,
        *,
        side: int,
        patch: int,
        hidden: int,
        num_codes: int,
        code_dim: int,
        decoder_hidden: int,
    ) -> None:
        if patch % 4 or side % (patch // 2):
            raise ValueError(f"patch must be a multiple of 4 with patch/2 dividing side={side}, got {patch}")
        super().__init__()
        self.side = side
        self.unfold = nn.Unfold(patch, stride=patch // 2, padding=patch // 4)
        tokens = (2 * side // patch) ** 2
        self.encoder = nn.Sequential(nn.Linear(patch**2, hidden), nn.SiLU(), nn.Linear(hidden, code_dim))
        self.bottleneck = VectorQuantizer(num_codes, code_dim)
        self.decoder = nn.Sequential(
            nn.Flatten(),
            nn.Linear(tokens * code_dim, decoder_hidden),
            nn.SiLU(),
            nn.Linear(decoder_hidden, side**2),
        )

    def forward(self, x: Tensor) -> VQVAEOutput:
        """Quantize and decode; in training mode the codebook moves too."""
        quantized, indices, loss = self.bottleneck(self.embed(x))
        return VQVAEOutput(self.decoder(quantized), indices, loss)

    def patches(self, x: Tensor) -> Tensor:
        """Cut pictures into overlapping patches: ``[N, D]`` to ``[N, T, patch²]``."""
        return self.unfold(x.view(-1, 1, self.side, self.side)).transpose(1, 2)

    def embed(self, x: Tensor) -> Tensor:
        """Vectors before quantization: ``[N, D]`` to ``[N, T, code_dim]``."""
        return self.encoder(self.patches(x))

    def encode(self, x: Tensor) -> Tensor:
        """Pictures as words: ``[N, D]`` to int64 ``[N, T]``."""
        return self.bottleneck.encode(self.embed(x))

    def decode(self, indices: Tensor) -> Tensor:
        """Logits of the picture that the words spell: int64 ``[N, T]`` to ``[N, D]``."""
        return self.decoder(self.bottleneck.decode(indices))
