"""Soft and stochastic assignment to codes: samples, mean codes, entropy and usage, cross-entropy to given codes."""

from __future__ import annotations

import torch
from harness import MODES, shapes
from torch import Tensor
from torch.nn import functional

from isthmus import ops

SMALL = {"N": 1024, "K": 256, "D": 64}
LARGE = ({"N": 4096, "K": 1024, "D": 64}, {"N": 4096, "K": 8192, "D": 64}, {"N": 4096, "K": 8192, "D": 8})
TEMPERATURE = 20.0


def vectors(shape: dict[str, int]) -> tuple[Tensor, Tensor]:
    rows, codes, dims = shape.values()
    return torch.randn(rows, dims), torch.randn(codes, dims)


def work(shape: dict[str, int], mode: str, forward: int, backward: int) -> int:
    """Operations of so many products of rows, codes and dimensions."""
    rows, codes, dims = shape.values()
    return 2 * rows * codes * dims * (forward if mode == "fwd" else forward + backward)


def distance_logits(x: Tensor, codebook: Tensor) -> Tensor:
    return -torch.cdist(x, codebook).square() / TEMPERATURE


def expanded_logits(x: Tensor, codebook: Tensor) -> Tensor:
    """The square expanded, without the part that all codes share: one product, and wrong far from the origin."""
    offset = codebook.square().sum(1) / -TEMPERATURE
    return torch.addmm(offset, x, codebook.t(), alpha=2 / TEMPERATURE)


def gumbel_max(logits: Tensor) -> Tensor:
    return (logits - torch.empty_like(logits).exponential_().log()).argmax(-1)


def no_comparison(*_: Tensor) -> tuple[Tensor, ...]:
    """Samples cannot be compared by element; tests/ops/test_assignment.py has their frequencies."""
    return ()


@shapes(SMALL, large=LARGE)
def bench_vq_sample(contest, shape):
    contest(
        *vectors(shape),
        plain=lambda x, codebook: gumbel_max(distance_logits(x, codebook)),
        peer=("one product", lambda x, codebook: gumbel_max(expanded_logits(x, codebook))),
        isthmus=lambda x, codebook: ops.vq_sample(x, codebook, temperature=TEMPERATURE),
        compare=no_comparison,
        flops=work(shape, "fwd", 1, 0),
    )


def attention(x: Tensor, codebook: Tensor) -> Tensor:
    """torch's fused kernel, the offsets of the codes as a mask."""
    offset = (codebook.square().sum(1) / -TEMPERATURE).expand(len(x), -1)
    query, keys = x[None, None], codebook[None, None]
    return functional.scaled_dot_product_attention(query, keys, keys, offset, scale=2 / TEMPERATURE)[0, 0]


@MODES
@shapes(SMALL, large=LARGE)
def bench_vq_soft_quantize(contest, shape, mode):
    contest(
        *vectors(shape),
        plain=lambda x, codebook: distance_logits(x, codebook).softmax(-1) @ codebook,
        peer=("attention", attention),
        isthmus=lambda x, codebook: ops.vq_soft_quantize(x, codebook, temperature=TEMPERATURE)[0],
        compare=lambda *results: results,
        flops=work(shape, mode, 2, 5),
    )


@MODES
@shapes(SMALL, large=LARGE)
def bench_vq_gumbel_quantize(contest, shape, mode):
    """A one-hot sample forward, the gradient of the relaxed one backward."""

    def quantize(logits: Tensor, codebook: Tensor) -> Tensor:
        return functional.gumbel_softmax(logits, hard=True) @ codebook

    contest(
        *vectors(shape),
        plain=lambda x, codebook: quantize(distance_logits(x, codebook), codebook),
        peer=("one product", lambda x, codebook: quantize(expanded_logits(x, codebook), codebook)),
        isthmus=lambda x, codebook: ops.vq_soft_quantize(x, codebook, temperature=TEMPERATURE, gumbel=True, hard=True)[
            0
        ],
        compare=no_comparison,
        flops=work(shape, mode, 2, 5),
    )


def statistics(logits: Tensor) -> tuple[Tensor, Tensor]:
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    return -(p * log_p).sum(-1), p.mean(0)


def weighted(results: tuple[Tensor, Tensor], weights: Tensor) -> tuple[Tensor, Tensor]:
    """Usage times something: the gradient of its plain sum is zero."""
    entropy, usage = results
    return entropy, usage * weights


@MODES
@shapes(SMALL, large=LARGE)
def bench_vq_soft_statistics(contest, shape, mode):
    weights = torch.randn(shape["K"])
    contest(
        *vectors(shape),
        plain=lambda x, codebook: weighted(statistics(distance_logits(x, codebook)), weights),
        peer=("one product", lambda x, codebook: weighted(statistics(expanded_logits(x, codebook)), weights)),
        isthmus=lambda x, codebook: weighted(ops.vq_soft_statistics(x, codebook, temperature=TEMPERATURE), weights),
        compare=lambda *results: results,
        flops=work(shape, mode, 2, 4),
    )


@MODES
@shapes(SMALL, large=LARGE)
def bench_vq_cross_entropy(contest, shape, mode):
    indices = torch.randint(shape["K"], (shape["N"],))
    contest(
        *vectors(shape),
        plain=lambda x, c: functional.cross_entropy(distance_logits(x, c), indices, reduction="none"),
        peer=(
            "one product",
            lambda x, c: functional.cross_entropy(expanded_logits(x, c), indices, reduction="none"),
        ),
        isthmus=lambda x, c: ops.vq_cross_entropy(x, c, indices, temperature=TEMPERATURE),
        compare=lambda *results: results,
        flops=work(shape, mode, 1, 3),
    )
