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


def widest_gap(scores: Tensor, wanted: int) -> tuple[float, int]:
    """A threshold that about `wanted` scores exceed, and how many do. It is far from all of them: of float32 and
    float64 scores the same ones are above."""
    about = scores[:64].flatten().topk(wanted * 64 // len(scores)).values[-1]
    near = scores[(scores - about).abs() < 0.01].sort().values
    middle = near.diff().argmax()
    threshold = near[middle : middle + 2].mean().item()
    return threshold, int((scores > threshold).sum())


def summarize(values: Tensor, indices: Tensor, *gradients: Tensor) -> tuple[Tensor, ...]:
    """The order of entries is free: sum and number of values, and the gradients."""
    return values.sum(), torch.tensor(float(indices.numel())), *gradients


@MODES
@SHAPES
def bench_threshold_encode(contest, shape, mode):
    rows, dims, features, k = shape.values()
    x, weight, bias = make_encoder(rows, dims, features)
    threshold, _ = widest_gap(F.linear(x, weight, bias), rows * k)

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
    x, weight, bias = make_encoder(rows, dims, features)
    _, entries = widest_gap(F.linear(x, weight, bias), rows * k)

    def dense(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        values, positions = F.linear(x, weight, bias).relu().flatten().topk(entries, sorted=False)
        return values, positions % features

    contest(
        x,
        weight,
        bias,
        plain=dense,
        isthmus=lambda x, weight, bias: ops.batch_topk_encode(x, weight, bias, entries / rows)[:2],
        compare=summarize,
        flops=work(rows, dims, features, k, mode),
    )
