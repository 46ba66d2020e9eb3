"""Residual vector quantization: all stages of a codec's quantizer, forward and training step."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from harness import shapes
from torch import Tensor
from torch.nn import Buffer
from vector_quantize_pytorch import ResidualVQ

from isthmus import nn, ops

SMALL = {"N": 1024, "Q": 4, "K": 128, "D": 64}
CODEC = {"N": 8192, "Q": 8, "K": 1024, "D": 128}


def data(shape: dict[str, int]) -> tuple[Tensor, Tensor]:
    """Codebooks that shrink from stage to stage, as trained ones do."""
    rows, stages, codes, dims = shape.values()
    scales = 0.8 ** torch.arange(stages).view(-1, 1, 1)
    return torch.randn(rows, dims), scales * torch.randn(stages, codes, dims)


def nearest(x: Tensor, codebook: Tensor) -> Tensor:
    return torch.addmm(codebook.square().sum(1), x, codebook.t(), alpha=-2).argmin(1)


def quantize(x: Tensor, codebooks: Tensor) -> tuple[Tensor, Tensor]:
    """Stage after stage, as it is usually written."""
    residual, indices = x, []
    for codebook in codebooks.unbind():
        indices.append(nearest(residual, codebook))
        residual = residual - F.embedding(indices[-1], codebook)
    return x - residual, torch.stack(indices, -1)


def peer_of(codebooks: Tensor, **options: float) -> ResidualVQ:
    """The peer with the same codebooks."""
    stages, codes, dims = codebooks.shape
    peer = ResidualVQ(dim=dims, num_quantizers=stages, codebook_size=codes, rotation_trick=False, **options)
    for layer, codebook in zip(peer.layers, codebooks, strict=True):
        layer.codebook = codebook
    return peer


def mean_error(x: Tensor, quantized: Tensor) -> Tensor:
    """Where two codes are equally near in float32, implementations part, and so do all later stages of that vector."""
    return (x - quantized).square().sum(-1).mean().detach()


def flops(shape: dict[str, int]) -> int:
    return 2 * shape["N"] * shape["Q"] * shape["K"] * shape["D"]


@shapes(SMALL, large=(CODEC,))
def bench_residual_vq_quantize(contest, shape):
    x, codebooks = data(shape)
    peer = peer_of(codebooks).eval()

    def compare(quantized: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        return (mean_error(x, quantized),)

    contest(
        x,
        codebooks,
        plain=quantize,
        peer=("vector-quantize-pytorch", lambda x, _: peer(x)[:2]),
        isthmus=ops.residual_vq_quantize,
        compare=compare,
        flops=flops(shape),
    )


class MovingAverageQuantizer(torch.nn.Module):
    """A training step as it is usually written: moving averages of one-hot counts and sums, stage after stage."""

    def __init__(self, codebooks: Tensor, decay: float, commitment_weight: float) -> None:
        super().__init__()
        self.decay = decay
        self.commitment_weight = commitment_weight
        self.codebooks = Buffer(codebooks.clone())
        self.counts = Buffer(torch.ones(codebooks.shape[:2]))
        self.sums = Buffer(codebooks.clone())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        residual, indices, loss = x, [], torch.zeros(())
        for codebook, counts, sums in zip(self.codebooks, self.counts, self.sums, strict=True):
            with torch.no_grad():
                index = nearest(residual, codebook)
                code = F.embedding(index, codebook)
                members = F.one_hot(index, len(codebook)).to(x.dtype)
                counts.lerp_(members.sum(0), 1 - self.decay)
                sums.lerp_(members.t() @ residual, 1 - self.decay)
                codebook.copy_(sums / counts.unsqueeze(1))
            indices.append(index)
            residual = residual - code
            loss = loss + self.commitment_weight * residual.square().sum(-1).mean()
        return x - residual.detach(), torch.stack(indices, -1), loss


@pytest.mark.parametrize("mode", ["fwd+bwd"])
@shapes(SMALL, large=(CODEC,))
def bench_residual_vq_training_step(contest, shape, mode):
    """Quantize, pass the gradient back, and move the codebooks of all stages by moving averages.

    Gradients are not compared: the peer passes that of the quantized vector back once for each stage.
    """
    _, stages, codes, dims = shape.values()
    x, codebooks = data(shape)
    weight, decay = 0.25, 0.99
    ours = nn.ResidualVQ(codes, dims, stages, commitment_weight=weight, decay=decay, revive_below=0)
    ours.codebook.copy_(codebooks.flatten(0, 1))
    ours.sums.copy_(codebooks.flatten(0, 1))
    # The peer averages the squared error over elements where the others sum over a vector's.
    peer = peer_of(codebooks, decay=decay, commitment_weight=weight * dims)

    def compare(quantized: Tensor, _: Tensor, loss: Tensor, __: Tensor) -> tuple[Tensor, ...]:
        return mean_error(x, quantized), loss.sum()

    contest(
        x,
        plain=MovingAverageQuantizer(codebooks, decay, weight),
        peer=("vector-quantize-pytorch", peer),
        isthmus=ours,
        compare=compare,
        flops=flops(shape),
    )
