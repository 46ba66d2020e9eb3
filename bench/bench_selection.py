"""Encoders with a ragged code: everything above a threshold, and the best of a whole batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from harness import MODES, shapes
from torch import Tensor

from isthmus import ops

SHAPES = shapes({"N": 256, "D": 128, "F": 2048, "k": 16}, large=({"N": 1024, "D": 768, "F": 24576, "k": 32},))


def make_encoder(rows: int, dims: int, features: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and bias."""
    return torch.randn(rows, dims), torch.randn(features, dims) / dims**0.5, 0.1 * torch.randn(features)


def work(rows: int, dims: int, features: int, k: int, mode: str) -> int:
    forward = 2 * rows * dims * features
    return forward if mode == "fwd" else forward + 4 * rows * dims * k


def summarize(values: Tensor, indices: Tensor, *gradients: Tensor) -> tuple[Tensor, ...]:
    """What an entry that only one of two roundings lets in changes little: sum and number of values, and gradients."""
    return values.sum(), torch.tensor(float(indices.numel())), *gradients


@MODES
@SHAPES
def bench_threshold_encode(contest, shape, mode):
    rows, dims, features, k = shape.values()
    x, weight, bias = make_encoder(rows, dims, features)
    # The threshold that k features of a row exceed on average.
    threshold = F.linear(x[:64], weight, bias).flatten().topk(64 * k).values[-1].item()

    def dense(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        scores = F.linear(x, weight, bias)
        found = (scores > threshold).nonzero(as_tuple=True)
        return scores[found], found[1]

    contest(
        x,
        weight,
        bias,
        plain=dense,
        isthmus=lambda x, weight, bias: ops.threshold_encode(x, weight, bias, threshold)[:2],
        compare=summarize,
        flops=work(rows, dims, features, k, mode),
    )


@MODES
@SHAPES
def bench_batch_topk_encode(contest, shape, mode):
    rows, dims, features, k = shape.values()

    def dense(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        values, positions = F.linear(x, weight, bias).relu().flatten().topk(rows * k, sorted=False)
        return values, positions % features

    contest(
        *make_encoder(rows, dims, features),
        plain=dense,
        isthmus=lambda x, weight, bias: ops.batch_topk_encode(x, weight, bias, k)[:2],
        compare=summarize,
        flops=work(rows, dims, features, k, mode),
    )
