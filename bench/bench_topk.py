"""The encoder of a top-k sparse autoencoder."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from harness import MODES, shapes
from torch import Tensor

from isthmus import ops

SHAPES = shapes(
    {"N": 256, "D": 128, "F": 2048, "k": 16},
    large=({"N": 2048, "D": 768, "F": 24576, "k": 32}, {"N": 512, "D": 768, "F": 131072, "k": 128}),
)


def make_encoder(rows: int, dims: int, features: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and bias."""
    return torch.randn(rows, dims), torch.randn(features, dims) / dims**0.5, 0.1 * torch.randn(features)


@MODES
@SHAPES
def bench_topk_encode(contest, shape, mode):
    rows, dims, features, k = shape.values()
    x, weight, bias = make_encoder(rows, dims, features)

    def compare(values: Tensor, indices: Tensor, *gradients: Tensor) -> tuple[Tensor, ...]:
        """The values, the activations found at the indices, and the gradients."""
        activations = F.linear(x.detach(), weight.detach(), bias.detach()).relu()
        return values, activations.gather(1, indices), *gradients

    forward = 2 * rows * dims * features
    backward = 4 * rows * dims * k
    contest(
        x,
        weight,
        bias,
        plain=lambda x, weight, bias: tuple(F.linear(x, weight, bias).relu().topk(k)),
        isthmus=lambda x, weight, bias: ops.topk_encode(x, weight, bias, k),
        compare=compare,
        flops=forward if mode == "fwd" else forward + backward,
    )


@MODES
@shapes({"N": 256, "D": 128, "F": 2048, "k": 16}, large=({"N": 2048, "D": 768, "F": 24576, "k": 256},))
def bench_topk_encode_among(contest, shape, mode):
    """One feature in twenty takes part, as where dead latents are to explain what the others left over."""
    rows, dims, features, k = shape.values()
    x, weight, bias = make_encoder(rows, dims, features)
    among = torch.arange(features) % 20 == 7

    def gathered(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        alive = among.nonzero().squeeze(1)
        values, found = F.linear(x, weight[alive], bias[alive]).topk(k)
        return values, alive[found]

    def compare(values: Tensor, indices: Tensor, *gradients: Tensor) -> tuple[Tensor, ...]:
        activations = F.linear(x.detach(), weight.detach(), bias.detach())
        return values, activations.gather(1, indices), *gradients

    contest(
        x,
        weight,
        bias,
        plain=lambda x, weight, bias: tuple(F.linear(x, weight, bias).masked_fill(~among, -torch.inf).topk(k)),
        peer=("gathered weights", gathered),
        isthmus=lambda x, weight, bias: ops.topk_encode(x, weight, bias, k, activation="identity", among=among),
        compare=compare,
    )
