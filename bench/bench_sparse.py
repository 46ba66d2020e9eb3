"""The two halves of a top-k sparse autoencoder: encode to k features, decode from them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from harness import MODES, shapes
from torch import Tensor

from isthmus import ops

SHAPES = shapes({"N": 256, "D": 128, "F": 2048, "k": 16}, large=({"N": 2048, "D": 768, "F": 24576, "k": 32},))


def random_supports(rows: int, features: int, k: int) -> Tensor:
    """k different features for each row: one from each of k equal ranges."""
    width = features // k
    return torch.arange(k) * width + torch.randint(width, (rows, k))


@MODES
@SHAPES
def bench_topk_encode(contest, shape, mode):
    rows, dims, features, k = shape.values()
    x = torch.randn(rows, dims)
    weight = torch.randn(features, dims) / dims**0.5
    bias = 0.1 * torch.randn(features)

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


def dense_decode(values: Tensor, indices: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    dense = values.new_zeros(len(values), len(weight)).scatter(1, indices, values)
    return torch.addmm(bias, dense, weight)


def bag_decode(values: Tensor, indices: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.embedding_bag(indices, weight, per_sample_weights=values, mode="sum") + bias


@MODES
@SHAPES
def bench_sparse_decode(contest, shape, mode):
    rows, dims, features, k = shape.values()
    contest(
        torch.rand(rows, k),
        random_supports(rows, features, k),
        torch.randn(features, dims),
        torch.randn(dims),
        plain=dense_decode,
        peer=("embedding_bag", bag_decode),
        isthmus=ops.sparse_decode,
        compare=lambda *results: results,
    )
